"""ADE20K-847: the full release `ADE20K_2021_17_01`, whose index names the objects behind the ids.

A pixel of `*_seg.png` holds its object's number in red and green: red // 10 * 256 + green, 1 being the first of the
index' `objectnames`, 0 no object. The 847 classes are found in the index by their names.
"""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from ...image_reading import open_picture
from ..label_sets import LabelSet
from ..label_transforms import LabelTransform
from .ade20k import FOLDERS, PREFIXES
from .sources import Item, PreparationError, Source, find_folder, named

INDEX = "index_ade20k.pkl"
_ARRAY_PARTS = {"_reconstruct", "scalar", "ndarray", "dtype", "_frombuffer"}


class _IndexUnpickler(pickle.Unpickler):
    """Reads lists, dicts, text and NumPy arrays; anything else in the pickle is refused, nothing is run."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] != "numpy" or name not in _ARRAY_PARTS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def ade20k_847(source: Path, labels: LabelSet) -> Source:
    """The whole release, at its full resolution; objects outside the 847 classes are ignored."""
    root = find_folder(source, ("ADE20K_2021_17_01", "."), "ADE20K_2021_17_01")
    index = _read_index(root / INDEX)
    transform = _transform(index["objectnames"], labels)
    return Source(lambda split: _items(root, index, split), transform, read_object_ids)


def read_object_ids(path: Path) -> np.ndarray:
    """The objects' numbers `[H, W]` of a `*_seg.png`."""
    picture = open_picture(path)
    if picture.mode != "RGB":
        raise ValueError(f"a segmentation of the full ADE20K is an RGB picture, got mode {picture.mode}")
    colours = np.asarray(picture).astype(np.int32)
    return colours[..., 0] // 10 * 256 + colours[..., 1]


def _read_index(file: Path) -> dict[str, list[str]]:
    if not file.is_file():
        raise PreparationError(f"There is no {file}. Is it the release ADE20K_2021_17_01, unpacked?")
    try:
        index = _IndexUnpickler(io.BytesIO(file.read_bytes())).load()
        return {key: [str(entry) for entry in index[key]] for key in ("filename", "folder", "objectnames")}
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError, ImportError, ValueError) as error:
        raise PreparationError(f"{file} is not the index of ADE20K_2021_17_01 ({error}).") from error


def _transform(object_names: list[str], labels: LabelSet) -> LabelTransform:
    numbers = defaultdict(list)
    for number, name in enumerate(object_names, start=1):
        numbers[_spelling(name)].append(number)
    found = [numbers.get(_spelling(name), []) for name in labels.class_names]
    unclear = [name for name, ids in zip(labels.class_names, found, strict=True) if len(ids) != 1]
    if unclear:
        raise PreparationError(
            f"{len(unclear)} of the {len(found)} classes are not exactly once in {INDEX}: {named(unclear)}. It must be "
            f"the index of the release 2021_17_01."
        )
    classes = tuple(ids[0] for ids in found)
    ignored = frozenset(range(len(object_names) + 1)) - frozenset(classes)
    return LabelTransform(classes, ignored, labels.ignore_index)


def _spelling(name: str) -> str:
    return ", ".join(part.strip() for part in name.casefold().split(","))


def _items(root: Path, index: dict[str, list[str]], split: str) -> list[Item]:
    folder = find_folder(root, (f"images/ADE/{FOLDERS[split]}",), f"the {split} pictures")
    # the index' folders begin with the release's name
    listed = [
        root / Path(*Path(place).parts[1:]) / name
        for place, name in zip(index["folder"], index["filename"], strict=True)
        if name.startswith(PREFIXES[split])
    ]
    items = [Item(file.name, file, file.with_name(f"{file.stem}_seg.png")) for file in sorted(listed)]
    missing = [file.name for item in items for file in (item.picture, item.annotation) if not file.is_file()]
    surplus = sorted(str(file.relative_to(root)) for file in set(folder.rglob("*.jpg")) - set(listed))
    if missing or surplus:
        raise PreparationError(
            "; ".join(
                f"{len(names)} files {what}: {named(names)}"
                for names, what in ((missing, f"of {INDEX} are not there"), (surplus, f"are not in {INDEX}"))
                if names
            )
            + f" (the {split} split)."
        )
    return items
