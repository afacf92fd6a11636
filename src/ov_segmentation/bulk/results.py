"""What a bulk run writes: PNG files beside each other, or a data set. Each file is there whole or not at all."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image
from datasets import Dataset

from ..atomic_files import TEMPORARY, full_disk_message, write_atomically
from ..data.class_names import segmentation_features
from ..visualization import color_palette, label_map_picture, overlay, unlabelled_value
from ..vocabulary import Vocabulary

CLASSES_FILE = "classes.json"


class BulkError(RuntimeError):
    """A bulk run that cannot be done as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Segmented:
    """A picture's result, or what is wrong with it.

    Args:
        index: its place among the pictures.
        name: its name.
        segmentation: `[H, W]` class indices, -1 = unlabelled; None where there is a problem.
        picture: upright, of the same size.
        encoded: the picture's own bytes.
        problem: why it could not be segmented.
    """

    index: int
    name: str
    segmentation: np.ndarray | None = None
    picture: PIL.Image.Image | None = None
    encoded: bytes | None = None
    problem: str | None = None


class Results(Protocol):
    """Where the results of a run go, in parts that are written at once."""

    parts: Sequence[range]
    """Indices of the pictures in each part."""

    def is_done(self, part: int) -> bool:
        """Whether a part is written."""

    def pack(self, one: Segmented) -> Any:
        """What `write` needs of a picture, so that a part that waits for its last picture is small."""

    def write(self, part: int, found: Sequence[Any]) -> None:
        """Write a part of packed pictures."""

    def problems(self, part: int) -> list[dict[str, str]]:
        """What was wrong in a part that is written: picture and reason."""


class LabelMapFolder:
    """`label_maps/<name>.png` of class indices, and on request `overlays/<name>.png` with a legend.

    Args:
        folder: the run's.
        names: relative paths of the pictures' files, see `output_names`.
        vocabulary: the classes.
        palette: write colours into the PNGs, which then show them in any viewer; up to 255 classes.
        overlays: also draw the maps over the pictures.

    Raises:
        BulkError: a palette for more classes than a PNG can have colours.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], vocabulary: Vocabulary, palette: bool = False, overlays: bool = False
    ) -> None:
        self.maps, self.overlays = folder / "label_maps", folder / "overlays" if overlays else None
        self.names, self.labels = names, vocabulary.labels
        self.unlabelled = unlabelled_value(len(vocabulary))
        if palette and self.unlabelled > 255:
            raise BulkError(
                f"A PNG has at most 256 colours, there are {len(vocabulary)} classes: leave the palette out; "
                f"overlays and {CLASSES_FILE} have colours for any number."
            )
        self.palette = None
        if palette:
            # all 256 colours, or PIL would write fewer bits than the unlabelled value needs; the rest is black
            self.palette = np.zeros((256, 3), dtype=np.uint8)
            self.palette[: len(vocabulary)] = color_palette(len(vocabulary))
        self.parts = [range(index, index + 1) for index in range(len(names))]

    def is_done(self, part: int) -> bool:
        """Whether the label map is there; it is written behind the overlay."""
        return (self.maps / self.names[part]).is_file()

    def pack(self, one: Segmented) -> Segmented:
        """The picture as it is: its files are written at once."""
        return one

    def write(self, part: int, found: Sequence[Segmented]) -> None:
        """Write the files of one picture; nothing where it has a problem, so that the next run tries it again."""
        (one,) = found
        if one.problem is not None:
            return
        if self.overlays is not None:
            _write(self.overlays / self.names[part], _png(overlay(one.picture, one.segmentation, self.labels)))
        label_map = label_map_picture(one.segmentation, len(self.labels))
        if self.palette is not None:
            label_map.putpalette(self.palette.tobytes())  # its mode becomes P, its pixels stay indices
        _write(self.maps / self.names[part], _png(label_map))

    def problems(self, part: int) -> list[dict[str, str]]:
        """None: what is written had none."""
        return []


class LabelMapDataset:
    """`data/<split>-*.parquet` with the columns image, annotation, file_name and classes, as training takes them.

    Args:
        folder: the run's.
        names: the pictures'.
        vocabulary: the classes.
        shard_size: pictures in a file.
    """

    def __init__(self, folder: Path, names: Sequence[str], vocabulary: Vocabulary, shard_size: int = 500) -> None:
        self.data, self.summaries = folder / "data", folder / "shards"
        self.features = segmentation_features(vocabulary.labels)
        self.num_classes = len(vocabulary)
        self.parts = [range(i, min(i + shard_size, len(names))) for i in range(0, len(names), shard_size)]

    def _file(self, part: int) -> Path:
        return self.data / f"train-{part:05d}-of-{len(self.parts):05d}.parquet"

    def _summary(self, part: int) -> Path:
        return self.summaries / f"{part:05d}.json"

    def is_done(self, part: int) -> bool:
        """Whether the shard is there; its summary is written before it."""
        return self._file(part).is_file()

    def pack(self, one: Segmented) -> dict[str, Any]:
        """A row of the data set, or the picture's problem."""
        if one.problem is not None:
            return {"picture": one.name, "problem": one.problem}
        present = np.unique(one.segmentation)
        return {
            "image": {"bytes": one.encoded, "path": one.name},
            "annotation": {
                "bytes": _png(label_map_picture(one.segmentation, self.num_classes)),
                "path": f"{one.name}.png",
            },
            "file_name": one.name,
            "classes": present[present >= 0].tolist(),
        }

    def write(self, part: int, found: Sequence[dict[str, Any]]) -> None:
        """Write a shard of the rows, and the problems of the other pictures."""
        rows = [entry for entry in found if "problem" not in entry]
        problems = [entry for entry in found if "problem" in entry]
        _write(self._summary(part), json.dumps({"rows": len(rows), "problems": problems}, ensure_ascii=False).encode())
        file = self._file(part)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + TEMPORARY)
        columns = {name: [row[name] for row in rows] for name in self.features}
        try:
            Dataset.from_dict(columns, features=self.features).to_parquet(partial)
            partial.replace(file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise BulkError(full_disk_message(file, error)) from error

    def problems(self, part: int) -> list[dict[str, str]]:
        """What the shard's summary holds."""
        return json.loads(self._summary(part).read_text(encoding="utf-8"))["problems"]


def write_classes(folder: Path, vocabulary: Vocabulary) -> None:
    """`classes.json`: id, name, synonyms and colour of every class, and the value of unlabelled pixels."""
    colors = color_palette(len(vocabulary)).tolist()
    classes = [
        {"id": k, "name": label, "synonyms": list(synonyms), "color": color}
        for k, (label, synonyms, color) in enumerate(zip(vocabulary.labels, vocabulary.synonyms, colors, strict=True))
    ]
    content = {"unlabelled": unlabelled_value(len(vocabulary)), "classes": classes}
    _write(folder / CLASSES_FILE, (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode())


def _png(picture: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise BulkError(full_disk_message(path, error)) from error
