"""PASCAL VOC 2012 for 20 classes, for 20 and background, and for 15 seen classes; training with SBD's annotations.

Where both have a picture, VOC's own label map counts. `SegmentationClassAug`, a common copy of SBD in VOC's format, may
take SBD's place.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...label_maps import read_label_map
from ..label_sets import LabelSet
from .sources import Item, PreparationError, Source, find_file, find_folder, listed_items, read_list


def pascal_voc(source: Path, labels: LabelSet) -> Source:
    """Label maps hold 0 (background), 1 to 20, and 255 (border)."""
    root = find_folder(source, ("VOCdevkit/VOC2012", "VOC2012", "."), "VOC2012")
    find_folder(root, ("ImageSets/Segmentation",), "VOC2012's lists for segmentation")
    return Source(lambda split: _items(source, root, split), labels.transform, read_voc_map)


def read_voc_map(path: Path) -> np.ndarray:
    """The ids `[H, W]` of a palette picture of VOC or a MATLAB file of SBD."""
    if path.suffix != ".mat":
        return read_label_map(path)
    from scipy.io import loadmat

    return loadmat(path)["GTcls"][0, 0]["Segmentation"].astype(np.int32)


def _items(source: Path, root: Path, split: str) -> list[Item]:
    lists = root / "ImageSets/Segmentation"
    pictures, maps = [root / "JPEGImages"], [root / "SegmentationClass"]
    for folder in (*pictures, *maps):
        if not folder.is_dir():
            raise PreparationError(f"There is no {folder}. Is VOC2012 complete?")
    validation = _voc_list(lists, "val")
    if split == "validation":
        return listed_items(validation, pictures, maps)
    sbd = next(
        (source / name for name in ("benchmark_RELEASE/dataset", "dataset", "sbd") if (source / name).is_dir()), None
    )
    augmented = root / "SegmentationClassAug"
    if augmented.is_dir():
        maps.append(augmented)
    if sbd is not None:
        pictures.append(sbd / "img")
        maps.append(sbd / "cls")
    listed = find_file([lists, root, source], ["trainaug.txt", "train_aug.txt"])
    if listed is not None:
        stems = [Path(stem).stem for stem in read_list(listed)]
    elif sbd is not None:
        more = {stem for name in ("train", "val") for stem in read_list(sbd / f"{name}.txt")}
        stems = sorted((more | set(_voc_list(lists, "train"))) - set(validation))
    else:
        raise PreparationError(
            f"The training split takes SBD's annotations too: put benchmark_RELEASE/ into {source}, or "
            f"SegmentationClassAug/ and ImageSets/Segmentation/trainaug.txt into {root}; or --splits validation."
        )
    return listed_items(stems, pictures, maps)


def _voc_list(lists: Path, name: str) -> list[str]:
    file = lists / f"{name}.txt"
    if not file.is_file():
        raise PreparationError(f"There is no {file}. Is VOC2012 complete?")
    return read_list(file)
