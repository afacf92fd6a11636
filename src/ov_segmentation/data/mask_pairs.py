"""Pairs of a masked crop and a noun: their columns, and one way to read them from all formats.

- what examples/mine_mask_pairs.py writes, or any dataset with the columns `image` (crop), `mask` and `noun`;
- the table that OVSeg's authors distribute: tab-separated, with a header that names `filepath` and `title`, pictures
  beside it whose masked-out pixels have one exact colour (the "equality trick");
- a folder with one sub-folder of such pictures per class, as their evaluation set.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset, Features, Image, Value, interleave_datasets
from datasets import Sequence as ListOf
from PIL import Image as PILImage

from .datasets import PICTURE_SUFFIXES, load_splits

# ImageNet's mean colour, rounded: pixels outside the mask in the authors' pictures
MASKED_OUT = (124, 116, 103)
TABLES = (".csv", ".tsv")


class MaskPair(NamedTuple):
    """`crop` uint8 `[h, w, 3]` RGB, `mask` bool `[h, w]`, and what it shows."""

    crop: np.ndarray
    mask: np.ndarray
    noun: str


def pair_features() -> Features:
    """Columns of mined pairs.

    `image`: the crop, all pixels visible; `mask`: 255 inside; `noun`, `caption` (empty where nouns are class names);
    `box`: x0, y0, x1, y1 in the resized picture, x1 and y1 exclusive; `score`: cosine of crop and noun (None where no
    choice was made); `picture`: row of the picture in its split.
    """
    return Features(
        {
            "image": Image(),
            "mask": Image(),
            "noun": Value("string"),
            "caption": Value("string"),
            "box": ListOf(Value("int32"), length=4),
            "score": Value("float32"),
            "picture": Value("int64"),
        }
    )


def equality_mask(picture: np.ndarray) -> np.ndarray:
    """Mask bool `[h, w]` of a uint8 picture `[h, w, 3]` whose masked-out pixels are exactly `MASKED_OUT`."""
    return (picture != np.array(MASKED_OUT, dtype=np.uint8)).any(axis=-1)


class MaskPairs:
    """Pairs as a sequence of [`MaskPair`], each checked when it is read.

    Args:
        rows: a dataset with the columns `image`, `mask` (None: by the equality trick) and `noun`.
        name: of the source, for messages.
    """

    def __init__(self, rows: Dataset, name: str) -> None:
        self.rows, self.name = rows, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> MaskPair:
        row = self.rows[int(index)]
        crop = np.asarray(row["image"].convert("RGB"))
        mask = equality_mask(crop) if row["mask"] is None else np.asarray(row["mask"].convert("L")) > 0
        if mask.shape != crop.shape[:2]:
            raise ValueError(
                f"Pair {index} of {self.name}: its mask is {mask.shape[1]} x {mask.shape[0]} pixels, its crop "
                f"{crop.shape[1]} x {crop.shape[0]} (width x height)."
            )
        if not mask.any():
            raise ValueError(f"Pair {index} of {self.name} ({row['noun']!r}) has an empty mask.")
        return MaskPair(crop, mask, row["noun"])

    @property
    def nouns(self) -> list[str]:
        """The distinct nouns, sorted."""
        return sorted(set(self.rows["noun"]))


def load_mask_pairs(
    sources: str | Path | Sequence[str | Path],
    split: str = "train",
    probabilities: Sequence[float] | None = None,
    seed: int = 0,
    max_samples: int | None = None,
) -> MaskPairs:
    """Read pairs from one source, or from several, mixed.

    Args:
        sources: a table (`.csv`, `.tsv`), a folder of class folders, a folder or Hub id of a dataset; or a list.
        split: of a dataset.
        probabilities: share of each of several sources in the mixture (paper, Table 8); None: all of each.
        seed: of the order in which a mixture is drawn.
        max_samples: only the first so many; None: all.

    Raises:
        FileNotFoundError: no such table or folder, or a picture that a table names is missing.
        ValueError: a source without pairs, or with other columns; shares that do not fit the sources.
    """
    sources = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if not sources:
        raise ValueError("There is no source of pairs: give at least one.")
    if probabilities is not None:
        if len(probabilities) != len(sources):
            raise ValueError(
                f"There are {len(sources)} sources of pairs, but {len(probabilities)} shares of a mixture."
            )
        if min(probabilities) <= 0 or not math.isclose(sum(probabilities), 1, abs_tol=1e-6):
            raise ValueError(f"The shares of a mixture are positive and add up to 1, got {list(probabilities)}.")
    parts = [_read(source, split) for source in sources]
    if len(parts) == 1:
        rows = parts[0]
    else:
        # every pair of every source is seen where no shares are given
        stop = "first_exhausted" if probabilities is not None else "all_exhausted_without_replacement"
        rows = interleave_datasets(parts, probabilities, seed, stopping_strategy=stop)
    if max_samples is not None:
        rows = rows.select(range(min(max_samples, len(rows))))
    return MaskPairs(rows, ", ".join(map(str, sources)))


def _read(source: str | Path, split: str) -> Dataset:
    path = Path(source)
    if path.suffix.lower() in TABLES:
        return _dataset(*_table(path))
    if path.is_dir() and (folders := _class_folders(path)):
        pictures = [file for folder in folders for file in _pictures(folder)]
        return _dataset(pictures, [file.parent.name for file in pictures])
    none = (
        f"{source} holds no pairs in the split {split!r}: mining.json and the counts beside it say what was left out."
    )
    try:
        splits = load_splits(source)
    except ValueError as error:
        if "no data" in str(error):  # what datasets says of parquet files without rows
            raise ValueError(none) from error
        raise
    if split not in splits:
        raise ValueError(f"{source} has no split {split!r}. It has: {', '.join(splits)}.")
    rows = splits[split]
    if lacking := [name for name in ("image", "mask", "noun") if name not in rows.column_names]:
        raise ValueError(
            f"{source} lacks the columns {', '.join(lacking)}; it has {', '.join(rows.column_names)}. "
            f"examples/mine_mask_pairs.py writes pairs."
        )
    if not len(rows):
        raise ValueError(none)
    return rows.select_columns(["image", "mask", "noun"])


def _table(path: Path) -> tuple[list[Path], list[str]]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no table {path}.")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    if not rows or not {"filepath", "title"} <= set(rows[0]):
        raise ValueError(f"{path} must be tab-separated with a header that names filepath and title, and have rows.")
    files = [path.parent / row["filepath"] for row in rows]
    if missing := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{len(missing)} pictures that {path} names are missing, the first is {missing[0]}.")
    return files, [row["title"] for row in rows]


def _class_folders(path: Path) -> list[Path]:
    """Sub-folders with pictures in them; datasets on disk have none."""
    return [folder for folder in sorted(path.iterdir()) if folder.is_dir() and _pictures(folder)]


def _pictures(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.suffix.lower() in PICTURE_SUFFIXES]


def _dataset(files: list[Path], nouns: list[str]) -> Dataset:
    columns = {"image": [str(file) for file in files], "mask": [None] * len(files), "noun": nouns}
    kept = ("image", "mask", "noun")
    return Dataset.from_dict(columns, features=Features({name: pair_features()[name] for name in kept}))


def mask_picture(mask: np.ndarray) -> PILImage.Image:
    """A bool mask `[h, w]` as the picture that the column `mask` holds."""
    return PILImage.fromarray(mask.astype(np.uint8) * 255)
