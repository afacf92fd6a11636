"""The data sets that can be prepared: class names, the meaning of the ids in the official files, known counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from ..vocabulary import Vocabulary, unseen_classes
from .label_transforms import LabelTransform, keep_classes

# of the ids 0 to 181 of COCO-Stuff's label files these are in no picture (of its ids 1 to 182: 12, 26, 29, ...)
_COCO_REMOVED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
_COCO_CLASSES = tuple(value for value in range(182) if value not in _COCO_REMOVED)
_COCO = LabelTransform(_COCO_CLASSES, frozenset({*_COCO_REMOVED, 255}))
_VOC = LabelTransform(tuple(range(1, 21)), frozenset({0, 255}))
_VOC_WITH_BACKGROUND = LabelTransform((*range(1, 21), 0), frozenset({255}))


@dataclass(frozen=True)
class LabelSet:
    """A data set in its prepared form.

    Args:
        name: what commands call it.
        title: its name in papers.
        class_names: class k of the prepared label maps.
        transform: from the official files' ids; None: it depends on the download (ADE20K-847, whose index names them).
        ignore_index: the id of pixels that are not scored.
        pictures: known number of pictures by split; a split without one is not checked.
        classes_in_pictures: known number of classes with at least one pixel, by split.
        drops_unlabelled: pictures without any labelled pixel are left out.
        source: what the folder given by `--source` has to hold.
    """

    name: str
    title: str
    class_names: tuple[str, ...]
    transform: LabelTransform | None
    ignore_index: int
    splits: tuple[str, ...] = ("train", "validation")
    pictures: Mapping[str, int] = field(default_factory=dict)
    classes_in_pictures: Mapping[str, int] = field(default_factory=dict)
    drops_unlabelled: bool = False
    source: str = ""


def _names(benchmark: str, protocol: str) -> tuple[str, ...]:
    return tuple(label.strip() for label in Vocabulary.from_benchmark(benchmark, protocol).labels)


def context_59_ids() -> tuple[int, ...]:
    """The ids of PASCAL Context's 59 classes among its 459 (1 to 459); "diningtable" is "table" there."""
    all_names = _names("pascal_context_459", "sed")
    names = ("table" if name == "diningtable" else name for name in _names("pascal_context_59", "san"))
    return tuple(all_names.index(name) + 1 for name in names)


_COCO_SOURCE = "train2017/ and val2017/ (pictures) and stuffthingmaps/{train2017,val2017}/ (COCO-Stuff's label maps)"
_CONTEXT_SOURCE = (
    "VOC2010's JPEGImages/ (also inside VOCdevkit/VOC2010/), PASCAL Context's trainval/*.mat, and its split as "
    "train.txt and val.txt, pascalcontext_{train,val}.txt or trainval_merged.json"
)
_VOC_SOURCE = (
    "VOC2012's JPEGImages/, ImageSets/Segmentation/ and SegmentationClass/ (also inside VOCdevkit/VOC2012/); for the "
    "training split also SBD's dataset/ (also inside benchmark_RELEASE/)"
)


@cache
def label_sets() -> dict[str, LabelSet]:
    """Every data set that can be prepared, by name."""
    coco, voc = _names("coco_stuff_171", "san"), _names("pascal_voc_20", "sed")
    coco_seen = [k for k in range(171) if k not in unseen_classes("coco_stuff_171")]
    voc_seen = [k for k in range(20) if k not in unseen_classes("pascal_voc_20")]
    ids_59 = context_59_ids()
    coco_pictures = {"train": 118_287, "validation": 5_000}
    voc_pictures = {"train": 10_582, "validation": 1_449}
    sets = (
        LabelSet("coco_stuff_171", "COCO-Stuff-164k", coco, _COCO, 255, pictures=coco_pictures, source=_COCO_SOURCE),
        LabelSet(
            "coco_stuff_156",
            "COCO-Stuff-164k, the 156 seen classes",
            tuple(coco[k] for k in coco_seen),
            keep_classes(_COCO, coco_seen),
            255,
            pictures=coco_pictures,
            drops_unlabelled=True,
            source=_COCO_SOURCE,
        ),
        LabelSet(
            "coco_captions",
            "COCO Captions with COCO-Stuff's label maps",
            coco,
            _COCO,
            255,
            pictures=coco_pictures,
            source=f"{_COCO_SOURCE} and annotations/captions_{{train2017,val2017}}.json",
        ),
        LabelSet(
            "ade20k_150",
            "ADE20K-150",
            _names("ade20k_150", "sed"),
            LabelTransform(tuple(range(1, 151)), frozenset({0})),
            255,
            pictures={"train": 20_210, "validation": 2_000},
            source="images/ and annotations/ with training/ and validation/ (also inside ADEChallengeData2016/)",
        ),
        LabelSet(
            "ade20k_847",
            "ADE20K-847 (full, 2021_17_01)",
            _names("ade20k_847", "san"),
            None,
            65535,
            pictures={"train": 25_574, "validation": 2_000},
            classes_in_pictures={"validation": 847},
            source="ADE20K_2021_17_01/ with index_ade20k.pkl and images/ADE/{training,validation}/",
        ),
        LabelSet(
            "pascal_context_59",
            "PASCAL Context 59",
            _names("pascal_context_59", "san"),
            LabelTransform(ids_59, frozenset(range(460)) - frozenset(ids_59)),
            255,
            pictures={"validation": 5_104},
            source=_CONTEXT_SOURCE,
        ),
        # SED's and CAT-Seg's own files have 459 where ours have 65535: the same pixels
        LabelSet(
            "pascal_context_459",
            "PASCAL Context 459",
            _names("pascal_context_459", "san"),
            LabelTransform(tuple(range(1, 460)), frozenset({0}), 65535),
            65535,
            pictures={"validation": 5_104},
            classes_in_pictures={"validation": 345},
            source=_CONTEXT_SOURCE,
        ),
        LabelSet(
            "pascal_voc_20",
            "PASCAL VOC 20",
            voc,
            _VOC,
            255,
            pictures=voc_pictures,
            drops_unlabelled=True,
            source=_VOC_SOURCE,
        ),
        LabelSet(
            "pascal_voc_20b",
            "PASCAL VOC 20b",
            (*voc, "background"),
            _VOC_WITH_BACKGROUND,
            255,
            pictures=voc_pictures,
            source=_VOC_SOURCE,
        ),
        LabelSet(
            "pascal_voc_15",
            "PASCAL VOC, the 15 seen classes",
            tuple(voc[k] for k in voc_seen),
            keep_classes(_VOC, voc_seen),
            255,
            pictures=voc_pictures,
            drops_unlabelled=True,
            source=_VOC_SOURCE,
        ),
        LabelSet(
            "camvid_11",
            "CamVid, 11 classes",
            _names("camvid_11", "san"),
            LabelTransform(tuple(range(11)), frozenset({11}), 11),
            11,
            pictures={"train": 367, "validation": 101},
            source="images/{train,val}/ and annotations/{train,val}/, or SegNet's train/, trainannot/, val/, valannot/",
        ),
    )
    return {one.name: one for one in sets}


def label_set(name: str) -> LabelSet:
    """One of `label_sets()`; ValueError with all names if there is none."""
    known = label_sets()
    if name not in known:
        raise ValueError(f"There is no data set {name!r}. There are: {', '.join(known)}.")
    return known[name]
