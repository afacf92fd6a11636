"""What a builder says about an official download: its files, how a label file is read, what the ids mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...label_maps import read_label_map
from ..label_transforms import LabelTransform

_NOT_DATA = ("Thumbs.db", "desktop.ini")
_NAMED = 20


class PreparationError(RuntimeError):
    """A download that cannot be prepared; the message names the files and says what to do."""


@dataclass(frozen=True)
class Item:
    """One picture of a split and its label file.

    Args:
        file_name: the picture's name in the data set.
        picture, annotation: the files.
        captions: texts about the picture.
    """

    file_name: str
    picture: Path
    annotation: Path
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """A download, found on the disk.

    Args:
        items: the items of a split ("train" or "validation"), in order; raises PreparationError where files lack.
        transform: from the ids of its label files to classes.
        read_ids: the ids `[H, W]` of a label file; a function of a module, so that other processes can call it.
        expected_names: the stems that a complete split of so many pictures has, where they are numbered.
    """

    items: Callable[[str], list[Item]]
    transform: LabelTransform
    read_ids: Callable[[Path], np.ndarray] = read_label_map
    expected_names: Callable[[str, int], Iterable[str]] | None = None


def named(names: Iterable[str]) -> str:
    """Some names for a message, and how many there are in all."""
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def find_folder(source: Path, candidates: Sequence[str], what: str) -> Path:
    """The first of these folders that `source` holds.

    Raises:
        PreparationError: none of them is there.
    """
    for candidate in candidates:
        if (source / candidate).is_dir():
            return source / candidate
    raise PreparationError(
        f"{source} holds no folder with {what}: looked for {', '.join(candidates)}. Is it the right download, unpacked?"
    )


def find_file(folders: Sequence[Path], names: Sequence[str]) -> Path | None:
    """The first of these files in the first folder that has one."""
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def read_list(file: Path) -> list[str]:
    """The first word of each line: file stems of a split.

    Raises:
        PreparationError: an empty list, or one that names something twice.
    """
    stems = [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1}) if len(set(stems)) < len(stems) else []
    if twice or not stems:
        raise PreparationError(f"{file} {f'names {named(twice)} more than once' if twice else 'is empty'}.")
    return stems


def pair_files(pictures: Path, annotations: Path, picture_suffix: str, annotation_suffix: str) -> list[Item]:
    """Pictures and label files of the same stem, in the order of their names.

    Raises:
        PreparationError: a picture without a label file, a label file without a picture, or files of another kind.
    """
    found = [_stems(pictures, picture_suffix), _stems(annotations, annotation_suffix)]
    problems = [
        f"{len(missing)} {kind} in {folder} have no {other}: {named(missing)}"
        for missing, kind, folder, other in (
            (sorted(set(found[0]) - set(found[1])), "pictures", pictures, f"label map in {annotations}"),
            (sorted(set(found[1]) - set(found[0])), "label maps", annotations, f"picture in {pictures}"),
        )
        if missing
    ]
    if problems:
        raise PreparationError(f"{'; '.join(problems)}. Is the download complete?")
    return [Item(found[0][stem].name, found[0][stem], found[1][stem]) for stem in sorted(found[0])]


def listed_items(stems: Sequence[str], pictures: Sequence[Path], annotations: Sequence[Path]) -> list[Item]:
    """Items of a list of stems; each folder of a sequence is looked into in turn.

    Raises:
        PreparationError: files that are in none of the folders.
    """
    items, missing = [], []
    for stem in stems:
        picture = find_file(pictures, [f"{stem}.jpg"])
        annotation = find_file(annotations, [f"{stem}.png", f"{stem}.mat"])
        if picture is None:
            missing.append(f"{stem}.jpg")
        if annotation is None:
            missing.append(f"{stem} (label map)")
        if picture is not None and annotation is not None:
            items.append(Item(picture.name, picture, annotation))
    if missing:
        folders = ", ".join(str(folder) for folder in (*pictures, *annotations))
        raise PreparationError(f"{len(missing)} files of the list are in none of {folders}: {named(missing)}.")
    return items


def _stems(folder: Path, suffix: str) -> dict[str, Path]:
    files = [file for file in folder.iterdir() if not file.name.startswith(".") and file.name not in _NOT_DATA]
    surplus = sorted(file.name for file in files if file.suffix.lower() != suffix)
    if surplus:
        raise PreparationError(f"{folder} should hold {suffix} files only, but also has {named(surplus)}.")
    return {file.stem: file for file in files}
