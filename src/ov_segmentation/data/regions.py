"""Regions of a segmentation data set, one class each, as samples of their own: what a text prompt is learned on.

DeOP and SimBaseline learn theirs on a fixed number of regions per class (Xu et al., 2022, section 3.3).
"""

from __future__ import annotations

import numpy as np

from ..label_maps import IGNORED
from .labelled_pictures import LabelledPicture, LabelledPictures


class RegionPictures:
    """A split as a sequence of regions: the tight box of one class in one picture, all else in it ignored.

    Args:
        pictures: the split.
        per_class: regions per class, or fewer where the split has fewer; picked from pictures in an order that `seed`
            draws.
        seed: of that order.
    """

    def __init__(self, pictures: LabelledPictures, per_class: int, seed: int = 0) -> None:
        if per_class < 1:
            raise ValueError(f"regions_per_class must be at least 1, got {per_class}.")
        self.pictures, self.data = pictures, pictures.data
        wanted = np.full(len(pictures.data.vocabulary), per_class)
        order = np.random.default_rng(seed).permutation(len(pictures))
        listed = _listed_classes(pictures)
        self.regions: list[tuple[int, int]] = []
        for index in order.tolist():
            if not wanted.any():
                break
            for label in _classes_in(pictures, index) if listed is None else listed[index]:
                if wanted[label]:
                    wanted[label] -= 1
                    self.regions.append((index, label))
        if not self.regions:
            raise ValueError(f"None of the {len(pictures)} pictures holds a class: there are no regions to learn on.")

    def __len__(self) -> int:
        return len(self.regions)

    def __getitem__(self, number: int) -> LabelledPicture:
        index, label = self.regions[int(number)]
        image, label_map = self.pictures[index]
        inside = label_map == label
        if not inside.any():
            raise ValueError(f"Column 'classes' of picture {index} lists class {label}, which its label map lacks.")
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        region = np.where(inside[top:bottom, left:right], np.int32(label), np.int32(IGNORED))
        return LabelledPicture(image.crop((int(left), int(top), int(right), int(bottom))), region)


def _classes_in(pictures: LabelledPictures, index: int) -> list[int]:
    """The classes in a picture, ascending."""
    label_map = pictures[index].label_map
    return np.unique(label_map[label_map >= 0]).tolist()


def _listed_classes(pictures: LabelledPictures) -> list[list[int]] | None:
    """The column that prepared data sets have, so that no picture need be decoded; None where there is none."""
    if "classes" not in pictures.rows.column_names:
        return None
    return list(pictures.rows.select_columns("classes")["classes"])


__all__ = ["RegionPictures"]
