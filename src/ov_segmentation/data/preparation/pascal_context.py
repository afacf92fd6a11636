"""PASCAL Context, 59 and 459 classes: VOC2010's pictures and the label maps of `trainval.tar.gz` (MATLAB files)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ...vocabulary import Vocabulary
from ..label_sets import LabelSet
from .sources import PreparationError, Source, find_file, find_folder, listed_items, named, read_list

_SPLITS = {"train": "train", "validation": "val"}


def pascal_context(source: Path, labels: LabelSet) -> Source:
    """Label maps hold 1 to 459 (0: nothing); the 59 classes are some of them."""
    root = find_folder(source, ("VOCdevkit/VOC2010", "VOC2010", "."), "VOC2010")
    pictures = find_folder(root, ("JPEGImages",), "VOC2010's pictures")
    places = [source, source / "PASCAL-Context", root, root / "ImageSets/SegmentationContext"]
    maps = next((place / "trainval" for place in places if (place / "trainval").is_dir()), None)
    if maps is None:
        raise PreparationError(f"{source} holds no folder trainval with PASCAL Context's label maps (*.mat).")
    _check_names(find_file([maps.parent, maps], ["labels.txt"]))
    return Source(
        lambda split: listed_items(_stems(places, split), [pictures], [maps]), labels.transform, read_context_map
    )


def read_context_map(path: Path) -> np.ndarray:
    """The ids `[H, W]` of a file of PASCAL Context."""
    from scipy.io import loadmat

    return loadmat(path)["LabelMap"].astype(np.int32)


def _stems(places: list[Path], split: str) -> list[str]:
    name = _SPLITS[split]
    file = find_file(places, [f"pascalcontext_{name}.txt", f"{name}.txt"])
    if file is not None:
        return read_list(file)
    merged = find_file(places, ["trainval_merged.json"])
    if merged is None:
        raise PreparationError(
            f"There is no list of the {split} pictures: put pascalcontext_{name}.txt, {name}.txt (one stem a line) or "
            f"trainval_merged.json into {places[0]}."
        )
    try:
        images = json.loads(merged.read_text(encoding="utf-8"))["images"]
        return sorted(Path(image["file_name"]).stem for image in images if image["phase"] == name)
    except (ValueError, KeyError, TypeError) as error:
        raise PreparationError(f"{merged} has no list `images` with `file_name` and `phase` ({error!r}).") from error


def _check_names(file: Path | None) -> None:
    """The download's own list of names, where it is there, must be the one that the ids are read by."""
    if file is None:
        return
    lines = [line.partition(":") for line in file.read_text(encoding="utf-8").splitlines() if ":" in line]
    given = {int(number): name.strip() for number, _, name in lines if number.strip().isdigit()}
    known = Vocabulary.from_benchmark("pascal_context_459", "sed").labels
    wrong = [f"{k} is {given.get(k)!r}, not {name!r}" for k, name in enumerate(known, start=1) if given.get(k) != name]
    if wrong:
        raise PreparationError(f"{file} names other classes than PASCAL Context's 459: {named(wrong)}.")
