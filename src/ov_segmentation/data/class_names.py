"""Class names of a Hugging Face dataset for segmentation: where they are written and where they are looked for.

An `Image` feature cannot hold names, and a dataset's description does not survive parquet: only features do (in the
schema's metadata). So the names sit in a column `classes` of type `List(ClassLabel(names=...))`, whose value in a row
is the list of the classes in that row's label map. `to_parquet`, `save_to_disk` and `load_dataset` keep it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import ClassLabel, Features, Image, List, Value

CLASSES_COLUMN = "classes"


def segmentation_features(names: Sequence[str], **extra: Any) -> Features:
    """Features of a segmentation dataset: `image`, `annotation`, `file_name`, `classes` (holds the names), and `extra`.

    `Image()` is without a mode: `mode="L"` would turn palette indices into grey values and clip ids above 255.
    """
    columns = {
        "image": Image(),
        "annotation": Image(),
        "file_name": Value("string"),
        CLASSES_COLUMN: List(ClassLabel(names=list(names))),
    }
    return Features({**columns, **extra})


def class_names(dataset: Any) -> list[str]:
    """Class names of a `Dataset`, an `IterableDataset` or a `DatasetDict` (whose splits have to agree), in index order.

    Raises:
        ValueError: if there are none, or the splits differ.
    """
    splits = list(dataset.values()) if isinstance(dataset, dict) else [dataset]
    found = [_names_of(split.features) for split in splits]
    if any(names is None for names in found) or not found:
        raise ValueError(
            f"This dataset has no column {CLASSES_COLUMN!r} of type List(ClassLabel), where class names are kept. "
            "Give the class names yourself, or add them with ov_segmentation.data.class_names.with_class_names."
        )
    if any(names != found[0] for names in found):
        raise ValueError("The splits of this dataset have different class names; load one split.")
    return found[0]


def with_class_names(dataset: Any, names: Sequence[str], annotation: str = "annotation") -> Any:
    """Add the names to a map-style `Dataset` whose column `annotation` holds label maps of class indices.

    The column `classes` gets, per row, the indices below `len(names)` that occur in the map; other ids are ignore ids.
    """
    import numpy as np

    features = dataset.features.copy()
    features[CLASSES_COLUMN] = List(ClassLabel(names=list(names)))

    def present(row: dict[str, Any]) -> dict[str, list[int]]:
        ids = np.unique(np.asarray(row[annotation]))
        return {CLASSES_COLUMN: [int(index) for index in ids if 0 <= index < len(names)]}

    return dataset.map(present, features=features)


def _names_of(features: Features | None) -> list[str] | None:
    column = (features or {}).get(CLASSES_COLUMN)
    inner = getattr(column, "feature", None)
    return list(inner.names) if isinstance(inner, ClassLabel) else None
