"""COCO-Stuff-164k: COCO's 2017 pictures with `stuffthingmaps_trainval2017`, and the captions of the same pictures."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path

from ..label_sets import LabelSet
from .sources import Item, PreparationError, Source, find_folder, named, pair_files

_FOLDERS = {"train": "train2017", "validation": "val2017"}
_MAPS = ("stuffthingmaps", "stuffthingmaps_trainval2017", "annotations")


def coco_stuff(source: Path, labels: LabelSet) -> Source:
    """Label maps hold COCO-Stuff's ids minus one: 0 to 181, of which 171 are used, and 255."""
    return Source(lambda split: _pairs(source, split), labels.transform)


def coco_captions(source: Path, labels: LabelSet) -> Source:
    """The same, with the captions of each picture."""
    return Source(lambda split: _with_captions(source, split), labels.transform)


def _pairs(source: Path, split: str) -> list[Item]:
    name = _FOLDERS[split]
    pictures = find_folder(source, (name, f"images/{name}"), f"the {split} pictures")
    maps = find_folder(source, [f"{folder}/{name}" for folder in _MAPS], f"COCO-Stuff's {split} label maps")
    return pair_files(pictures, maps, ".jpg", ".png")


def _with_captions(source: Path, split: str) -> list[Item]:
    folder = find_folder(source, ("annotations", "annotations_trainval2017/annotations"), "the captions")
    file = folder / f"captions_{_FOLDERS[split]}.json"
    if not file.is_file():
        raise PreparationError(f"There is no {file}: it is in COCO's annotations_trainval2017.zip.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        captions = defaultdict(list)
        for annotation in sorted(content["annotations"], key=lambda one: one["id"]):
            captions[names[annotation["image_id"]]].append(annotation["caption"].strip())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PreparationError(f"{file} is not a file of COCO captions ({type(error).__name__}: {error}).") from error
    items = _pairs(source, split)
    found = {item.file_name for item in items}
    problems = [
        f"{len(missing)} {what}: {named(missing)}"
        for missing, what in (
            (sorted(set(names.values()) - found), f"pictures of {file.name} are not there"),
            (sorted(found - set(captions)), "pictures have no caption"),
        )
        if missing
    ]
    if problems:
        raise PreparationError(f"{'; '.join(problems)}.")
    return [dataclasses.replace(item, captions=tuple(captions[item.file_name])) for item in items]
