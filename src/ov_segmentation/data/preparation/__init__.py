"""Builders: one per official download. `prepare(name, source, output)` is what `examples/prepare_dataset.py` calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..label_sets import LabelSet, label_set
from .ade20k import ade20k_150
from .ade20k_full import ade20k_847
from .building import build
from .camvid import camvid
from .coco import coco_captions, coco_stuff
from .pascal_context import pascal_context
from .pascal_voc import pascal_voc
from .sources import PreparationError, Source

BUILDERS: dict[str, Callable[[Path, LabelSet], Source]] = {
    "coco_stuff_171": coco_stuff,
    "coco_stuff_156": coco_stuff,
    "coco_captions": coco_captions,
    "ade20k_150": ade20k_150,
    "ade20k_847": ade20k_847,
    "pascal_context_59": pascal_context,
    "pascal_context_459": pascal_context,
    "pascal_voc_20": pascal_voc,
    "pascal_voc_20b": pascal_voc,
    "pascal_voc_15": pascal_voc,
    "camvid_11": camvid,
}


def prepare(name: str, source: str | Path, output: str | Path, **options: Any) -> Path:
    """Turn the official download in `source` into a data set in `output`, a folder that `load_dataset` reads.

    Args:
        name: a key of BUILDERS.
        options: of `building.build`: `splits`, `expect_counts`, `rows_per_file`, `workers`, `progress`.

    Raises:
        PreparationError: what is wrong with the download; `output` is then not there.
        ValueError: an unknown name.
    """
    labels = label_set(name)
    source = Path(source)
    if not source.is_dir():
        raise PreparationError(f"There is no folder {source}. It has to hold {labels.source}.")
    try:
        found = BUILDERS[name](source, labels)
    except PreparationError as error:
        raise PreparationError(f"{error} {labels.title} is made from {labels.source}.") from error
    return build(labels, found, Path(output), **options)
