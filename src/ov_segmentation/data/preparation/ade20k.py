"""ADE20K-150: `ADEChallengeData2016`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..label_sets import LabelSet
from .sources import Item, Source, find_folder, pair_files

FOLDERS = {"train": "training", "validation": "validation"}
PREFIXES = {"train": "ADE_train_", "validation": "ADE_val_"}


def ade20k_150(source: Path, labels: LabelSet) -> Source:
    """Label maps hold 0 (other) and 1 to 150."""
    return Source(lambda split: _pairs(source, split), labels.transform, expected_names=_numbered)


def _pairs(source: Path, split: str) -> list[Item]:
    root = find_folder(source, ("ADEChallengeData2016", "."), "ADEChallengeData2016")
    pictures = find_folder(root, (f"images/{FOLDERS[split]}",), f"the {split} pictures")
    maps = find_folder(root, (f"annotations/{FOLDERS[split]}",), f"the {split} label maps")
    return pair_files(pictures, maps, ".jpg", ".png")


def _numbered(split: str, count: int) -> Iterable[str]:
    return (f"{PREFIXES[split]}{number:08d}" for number in range(1, count + 1))
