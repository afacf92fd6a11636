"""The pictures of a bulk run: the files of a folder, or a column of a data set, read one by one."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import PIL.Image
from datasets import Dataset, Image

from ..data.datasets import IMAGE_COLUMNS, PICTURE_SUFFIXES, load_splits
from ..image_reading import open_picture

NAME_COLUMN = "file_name"


@dataclass(frozen=True)
class FolderPictures:
    """The picture files under a folder, at any depth, hidden ones left out.

    Args:
        root: the folder.
        names: paths relative to it, sorted.
    """

    root: Path
    names: tuple[str, ...]

    def encoded(self, index: int) -> bytes:
        """The file's bytes."""
        return (self.root / self.names[index]).read_bytes()


@dataclass(frozen=True)
class DatasetPictures:
    """A column of pictures of a data set's split.

    Args:
        rows: the split, its pictures not decoded.
        column: the pictures' column.
        names: one per row, all different: from a column `file_name`, or the row's number.
    """

    rows: Dataset
    column: str
    names: tuple[str, ...]

    def encoded(self, index: int) -> bytes:
        """The picture's bytes."""
        value = self.rows[index][self.column]
        if value is None:
            raise ValueError("the row has no picture")
        return Path(value["path"]).read_bytes() if value.get("bytes") is None else value["bytes"]


Pictures = FolderPictures | DatasetPictures


def find_pictures(
    source: str | Path, split: str | None = None, column: str | None = None, max_samples: int | None = None
) -> Pictures:
    """The pictures of a folder with picture files, or of a data set (a folder that `load_dataset` reads, or a Hub id).

    Args:
        source: where they are.
        split: of a data set that has several.
        column: of pictures, of a data set that has several.
        max_samples: only the first so many.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no pictures, or a split or column that is not there or has to be chosen.
    """
    path = Path(source)
    if path.is_file():
        raise ValueError(f"{path} is a file: give a folder, or use ov-segment for one picture.")
    if path.is_dir() and not _is_data_set(path):
        for name, value in (("split", split), ("column", column)):
            if value is not None:
                raise ValueError(f"{path} is a folder of picture files, which has no {name} {value!r}.")
        names = sorted(_picture_files(path))
        if not names:
            raise ValueError(f"There are no pictures in {path} ({', '.join(PICTURE_SUFFIXES)}).")
        return FolderPictures(path, tuple(names[:max_samples]))
    if not path.is_dir() and str(source).startswith((".", "/", "~")):
        raise FileNotFoundError(f"There is no folder {path}.")
    splits = load_splits(source)
    if split is None and len(splits) > 1:
        raise ValueError(f"{source} has several splits: choose one of {', '.join(splits)}.")
    split = split or next(iter(splits))
    if split not in splits:
        raise ValueError(f"{source} has no split {split!r}. It has: {', '.join(splits)}.")
    rows = splits[split]
    if max_samples is not None:
        rows = rows.select(range(min(max_samples, len(rows))))
    column = _picture_column(source, rows, column)
    return DatasetPictures(rows.cast_column(column, Image(decode=False)), column, _row_names(rows))


def upright(encoded: bytes) -> PIL.Image.Image:
    """The decoded picture, turned as its EXIF data says.

    Raises:
        ValueError: it cannot be read, or is empty or far too large.
    """
    try:
        picture = PIL.Image.open(io.BytesIO(encoded))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"cannot read it: {error}") from error
    return open_picture(picture)


def output_names(names: Sequence[str]) -> list[str]:
    """Relative paths of the label maps: `.png` in place of a picture's suffix, behind it where two would be one."""
    short = [str(PurePosixPath(name).with_suffix(".png")) for name in names]
    # a file system may not tell upper and lower case apart
    count = Counter(name.casefold() for name in short)
    chosen = [name if count[name.casefold()] == 1 else f"{full}.png" for name, full in zip(short, names)]
    if repeated := [name for name, number in Counter(name.casefold() for name in chosen).items() if number > 1]:
        raise ValueError(f"Several pictures would be written to {repeated[0]}: rename one of them.")
    return chosen


def _is_data_set(path: Path) -> bool:
    if (path / "images").is_dir() and (path / "annotations").is_dir():
        return True
    marks = ("dataset_dict.json", "state.json", "metadata.jsonl", "metadata.csv")
    return any((path / mark).is_file() for mark in marks) or any(path.rglob("*.parquet"))


def _picture_files(root: Path) -> Iterator[str]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            if Path(name).suffix.lower() in PICTURE_SUFFIXES and not name.startswith("."):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _picture_column(source: Any, rows: Dataset, column: str | None) -> str:
    found = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    if column is not None:
        if column not in found:
            raise ValueError(f"{source} has no column of pictures {column!r}. It has: {', '.join(found) or 'none'}.")
        return column
    usual = [name for name in IMAGE_COLUMNS if name in found]
    if not usual and len(found) != 1:
        raise ValueError(f"{source} has {len(found)} columns of pictures ({', '.join(found)}): name one.")
    return (usual or found)[0]


def _row_names(rows: Dataset) -> tuple[str, ...]:
    if NAME_COLUMN in rows.column_names:
        names = tuple(rows[NAME_COLUMN])
        paths = [PurePosixPath(name) for name in names if isinstance(name, str) and name]
        inside = len(paths) == len(names) and not any(path.is_absolute() or ".." in path.parts for path in paths)
        if inside and len(set(names)) == len(names):
            return names
    return tuple(f"{index:08d}" for index in range(len(rows)))
