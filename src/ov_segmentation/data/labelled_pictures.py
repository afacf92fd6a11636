"""Pictures with their label maps, read and checked one by one: with random access, or from a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict
from PIL import Image as PILImage

from ..image_reading import read_image
from ..label_maps import IGNORED, ignore_ids, read_label_map
from ..vocabulary import Vocabulary


@dataclass(frozen=True)
class SegmentationData:
    """Splits with the columns `image` and `annotation` (and whatever else they had), and what the ids mean.

    Args:
        splits: the dataset.
        vocabulary: class k of the label maps is its k-th name.
        ignore_index: ids that are no class.
        reduce_labels: id 0 is ignored and every other id is lowered by one, before `ignore_index` is looked at.
    """

    splits: DatasetDict | IterableDatasetDict
    vocabulary: Vocabulary
    ignore_index: tuple[int, ...] = ()
    reduce_labels: bool = False

    def require(self, split: str) -> None:
        """Look whether there is such a split.

        Raises:
            ValueError: there is not.
        """
        if split not in self.splits:
            raise ValueError(f"There is no split {split!r}. This data set has: {', '.join(self.splits)}.")

    def split(self, name: str, max_samples: int | None = None) -> LabelledPictures:
        """The decoded and checked samples of a split.

        Raises:
            ValueError: no such split, or an empty one.
        """
        self.require(name)
        rows = self.splits[name]
        if not len(rows):
            raise ValueError(f"The split {name!r} is empty.")
        return LabelledPictures(
            self, name, rows if max_samples is None else rows.select(range(min(max_samples, len(rows))))
        )

    def stream(self, name: str) -> LabelledStream:
        """The same of a data set that was loaded with `streaming=True`.

        Raises:
            ValueError: no such split.
        """
        self.require(name)
        return LabelledStream(self, name, self.splits[name])

    def check(self, row: Mapping[str, Any], name: str) -> LabelledPicture:
        """Picture and class ids of a row.

        Args:
            row: its `image` and `annotation` are PIL pictures, or what [`decoded`] takes.
            name: what messages call it.

        Raises:
            ValueError: no label map, one of another size than the picture, or with ids that are no class; a picture or
                label map that cannot be read.
            TypeError: something that is no picture or no label map.
        """
        if row["image"] is None:
            raise ValueError(f"{name}: it has no picture.")
        if row["annotation"] is None:
            raise ValueError(f"{name}: it has no label map. Leave unlabelled samples out, or take another split.")
        try:
            image = rgb_picture(row["image"])
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
        label_map = self._class_ids(row["annotation"], name)
        if label_map.shape != (image.height, image.width):
            raise ValueError(
                f"{name}: its label map is {label_map.shape[1]} x {label_map.shape[0]} pixels, its picture "
                f"{image.width} x {image.height} (width x height). They must have one size."
            )
        return LabelledPicture(image, label_map)

    def _class_ids(self, annotation: Any, name: str) -> np.ndarray:
        try:
            ids = read_label_map(decoded(annotation))
            if self.reduce_labels:
                ids = np.where(ids == 0, IGNORED, ids - 1)
            ids = ignore_ids(ids, self.ignore_index).astype(np.int32)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
        num_classes, highest = len(self.vocabulary), int(ids.max())
        if highest >= num_classes:
            known = f"but the classes are 0 to {num_classes - 1} and the ignored ids {list(self.ignore_index)}"
            if self.reduce_labels:
                raise ValueError(
                    f"{name}: its label map holds the id {highest + 1}, which reduce_labels lowers to {highest}, "
                    f"{known}. Is it an ignored id? Give ignore_index={highest}: it is compared with lowered ids."
                )
            raise ValueError(
                f"{name}: its label map holds the id {highest}, {known}. Is it an ignored id? Give ignore_index. Is 0 "
                f"the unlabelled id, and do the classes start at 1? Set reduce_labels."
            )
        return ids


def decoded(value: Any) -> Any:
    """What a column holds, as `read_image` and `read_label_map` take it: nested lists (of `Array2D`, `List`) become an
    array, encoded pictures (of `Image(decode=False)`) are decoded; pictures and paths stay."""
    if isinstance(value, dict):
        return Image().decode_example(value)
    return np.asarray(value) if isinstance(value, list) else value


def rgb_picture(value: Any) -> PILImage.Image:
    """The picture in a column, in RGB as the image processors see it: PIL's own way makes 16-bit pictures white."""
    return PILImage.fromarray(read_image(decoded(value))[0])


class LabelledPicture(NamedTuple):
    """RGB picture and int32 label map `[H, W]` of its size, class ids and -100 (ignored)."""

    image: PILImage.Image
    label_map: np.ndarray


class LabelledPictures:
    """A split as a sequence of `LabelledPicture`, each checked when it is read."""

    def __init__(self, data: SegmentationData, split: str, rows: Dataset) -> None:
        self.data, self.split, self.rows = data, split, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> LabelledPicture:
        try:
            row = self.rows[int(index)]
            return self.data.check(row, _place(index, self.split, row))
        except (OSError, SyntaxError) as error:  # PIL raises both for broken files
            name = f"sample {index} of split {self.split!r} ({self.file_name(int(index))})"
            raise ValueError(f"{name}: its picture or label map cannot be decoded ({error}).") from error

    def select(self, indices: Sequence[int]) -> LabelledPictures:
        """The pictures with these indices, in this order."""
        return LabelledPictures(self.data, self.split, self.rows.select(indices))

    def file_name(self, index: int) -> str:
        """The picture's file name, its index where the data set has none."""
        return str(index) if self._file_names is None else self._file_names[index]

    @cached_property
    def _file_names(self) -> list[str] | None:
        # alone, so that no picture is decoded for its name
        named = "file_name" in self.rows.column_names
        return list(self.rows.select_columns("file_name")["file_name"]) if named else None


class LabelledStream:
    """A streamed split, each sample checked when it is read; `rows` are not decoded."""

    def __init__(self, data: SegmentationData, split: str, rows: IterableDataset) -> None:
        self.data, self.split, self.rows = data, split, rows

    def samples(
        self, wanted: Callable[[int], bool], max_samples: int | None = None
    ) -> Iterator[tuple[int, str, LabelledPicture]]:
        """(index, file name, picture) of the samples whose index is wanted; only those are decoded.

        Args:
            max_samples: only the first so many of the stream; None: all.
        """
        for index, row in enumerate(self.rows if max_samples is None else self.rows.take(max_samples)):
            if wanted(index):
                place = _place(index, self.split, row)
                for column in ("image", "annotation"):
                    try:
                        row[column] = decoded(row[column])
                    except (OSError, SyntaxError) as error:
                        raise ValueError(f"{place}: its {column} cannot be decoded ({error}).") from error
                yield index, str(row.get("file_name", index)), self.data.check(row, place)


def _place(index: int, split: str, row: Mapping[str, Any]) -> str:
    name = f"sample {index} of split {split!r}"
    if file := row.get("file_name") or getattr(row["image"], "filename", None):
        name += f" ({Path(file).name})"
    return name
