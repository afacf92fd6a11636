"""CamVid with 11 classes, 480 x 360."""

from __future__ import annotations

from pathlib import Path

from ..label_sets import LabelSet
from .sources import Item, Source, find_folder, pair_files

_SPLITS = {"train": "train", "validation": "val"}


def camvid(source: Path, labels: LabelSet) -> Source:
    """Label maps hold 0 to 10, and 11 (unlabelled)."""
    return Source(lambda split: _pairs(source, _SPLITS[split]), labels.transform)


def _pairs(source: Path, split: str) -> list[Item]:
    pictures = find_folder(source, (f"images/{split}", split), f"CamVid's pictures of {split}")
    maps = find_folder(source, (f"annotations/{split}", f"{split}annot"), f"CamVid's label maps of {split}")
    suffix = ".jpg" if any(pictures.glob("*.jpg")) else ".png"
    return pair_files(pictures, maps, suffix, ".png")
