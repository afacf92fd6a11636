"""Any data set of pictures and label maps in one form: columns `image` and `annotation`, names, ignored ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDatasetDict,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetNotFoundError

from ..download_errors import LoadingError
from ..vocabulary import BENCHMARKS, Vocabulary
from .class_names import class_names as names_from_features
from .labelled_pictures import SegmentationData

IMAGE_COLUMNS = ("image", "img", "picture", "pixel_values")
ANNOTATION_COLUMNS = (
    "annotation",
    "annotations",
    "label",
    "labels",
    "mask",
    "segmentation",
    "segmentation_mask",
    "seg_map",
)
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
LABEL_MAP_FOLDERS = ("annotations", "masks", "labels")
NAMES_FILE = "class_names.json"

Names = str | Sequence[str | Sequence[str]]


def load_segmentation_data(
    name: str | Path,
    *,
    config_name: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    annotation_column: str | None = None,
    class_names: Names | None = None,
    protocol: str | None = None,
    ignore_index: int | Sequence[int] | None = None,
    reduce_labels: bool = False,
    streaming: bool = False,
) -> SegmentationData:
    """Load a data set of pictures and label maps.

    Args:
        name: a folder with `images/<split>/` and `annotations/<split>/` (or `masks/`, or `labels/`) with the same file
            stems, where without split folders there is one split "train"; a folder written by `save_to_disk`; any
            folder that `load_dataset` understands (parquet, an imagefolder with `metadata.jsonl`); or a Hub id.
        config_name, revision: for Hub ids.
        image_column, annotation_column: default: by type (`Image`) and usual names.
        class_names: names in index order (a list inside: synonyms), the key of a packaged benchmark, or a JSON file of
            such a list. Default: `class_names.json` in the folder, or the dataset's features.
        protocol: whose spelling of a packaged benchmark's names, where the methods differ.
        ignore_index: ids in the label maps that are no class; with `reduce_labels` the lowered ids, so that a file's
            255 is 254.
        reduce_labels: see `SegmentationData`.
        streaming: read while going, for `SegmentationData.stream` (parquet folders and Hub ids).

    Raises:
        FileNotFoundError: a folder without what it needs.
        ValueError: columns or names that cannot be found, label maps without pictures, streaming of what cannot be.
    """
    path = Path(name)
    splits = load_splits(name, config_name, revision, streaming)
    first = next(iter(splits.values()))
    image_column, annotation_column = _find_columns(first.features, image_column, annotation_column)
    names = class_names if class_names is not None else _names_beside(path)
    if names is None and _label_maps_beside(path):  # features of pictures in folders hold no names
        raise FileNotFoundError(
            f"There is no {NAMES_FILE} in {path}: write it, a JSON list of the class names in the order of the label "
            f"maps' pixel values, or give class_names."
        )
    names = names_from_features(splits) if names is None else names
    ignored = (ignore_index,) if isinstance(ignore_index, int) else tuple(ignore_index or ())
    kind = IterableDatasetDict if streaming else DatasetDict
    return SegmentationData(
        splits=kind({key: _rename(split, image_column, annotation_column) for key, split in splits.items()}),
        vocabulary=build_vocabulary(names, protocol),
        ignore_index=ignored,
        reduce_labels=reduce_labels,
    )


def load_splits(
    name: str | Path, config_name: str | None = None, revision: str | None = None, streaming: bool = False
) -> DatasetDict | IterableDatasetDict:
    """The splits of a folder or Hub id as they are; arguments and errors: see [`load_segmentation_data`]."""
    path, name = Path(name), str(name)
    label_maps = _label_maps_beside(path)
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if streaming and (label_maps or saved):
        raise ValueError(f"{path} has random access and is not streamed: leave streaming out.")
    if label_maps:
        return _local_tree(path, label_maps)
    if saved:
        loaded = load_from_disk(str(path))
    else:
        if not path.is_dir() and name.startswith((".", "/", "~")):
            raise FileNotFoundError(f"There is no folder {path}.")
        loaded = _from_hub_or_folder(name, config_name, revision, streaming)
        # a stream that decodes would encode pictures again, with loss, when its columns are renamed
        if streaming:
            loaded = IterableDatasetDict({split: rows.decode(False) for split, rows in loaded.items()})
    if isinstance(loaded, Dataset):
        loaded = DatasetDict({"train": loaded})
    if not isinstance(loaded, IterableDatasetDict if streaming else DatasetDict):
        raise ValueError(f"{name} loads as {type(loaded).__name__}, not as a dictionary of splits.")
    return loaded


def _from_hub_or_folder(name: str, config_name: str | None, revision: str | None, streaming: bool) -> Any:
    try:
        return load_dataset(name, config_name, revision=revision, streaming=streaming)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"{error} Nor is there such a folder. A private one needs `hf auth login`, or HF_TOKEN with a token that "
            f"may read it."
        ) from error
    except ConnectionError as error:
        raise LoadingError(
            f"{error}. There is no folder {name} either, nor is it in the cache: offline (HF_HUB_OFFLINE=1), a data "
            f"set is there only if it was loaded before, while online and without streaming."
        ) from error


def _label_maps_beside(root: Path) -> Path | None:
    """The folder of label maps beside `images/`, if this is such a tree."""
    if not (root / "images").is_dir():
        return None
    return next((root / folder for folder in LABEL_MAP_FOLDERS if (root / folder).is_dir()), None)


def _local_tree(root: Path, label_maps: Path) -> DatasetDict:
    # what begins with a dot was put there by a notebook or a file manager
    folders = {folder.name: folder for folder in _visible(root / "images") if folder.is_dir()}
    splits = {}
    for split, images in (folders or {"train": root / "images"}).items():
        annotations = label_maps / (split if folders else "")
        pictures = {file.stem: file for file in _visible(images) if file.suffix.lower() in PICTURE_SUFFIXES}
        if not annotations.is_dir():
            raise FileNotFoundError(
                f"There are pictures in {images}, but no folder {annotations} with their label maps."
            )
        maps = {file.stem: file for file in _visible(annotations) if file.suffix.lower() in PICTURE_SUFFIXES}
        if unpaired := sorted(set(pictures) ^ set(maps)):
            kind = "label map" if unpaired[0] in pictures else "picture"
            raise FileNotFoundError(
                f"{len(unpaired)} files of split {split!r} in {root} have no partner of the same name; the first is "
                f"{unpaired[0]!r}, which has no {kind}."
            )
        columns = {
            "image": [str(file) for file in pictures.values()],
            "annotation": [str(maps[stem]) for stem in pictures],
            "file_name": [file.name for file in pictures.values()],
        }
        features = Features({"image": Image(), "annotation": Image(), "file_name": Value("string")})
        splits[split] = Dataset.from_dict(columns, features=features)
    return DatasetDict(splits)


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _find_columns(features: Features, image: str | None, annotation: str | None) -> tuple[str, str]:
    pictures = [name for name, feature in features.items() if isinstance(feature, Image)]
    for given in (image, annotation):
        if given is not None and given not in features:
            raise ValueError(f"There is no column {given!r}. The columns are: {', '.join(features)}.")
    # a lone column of pictures is the one that its name says
    others = [name for name in pictures if name != image and (image is not None or name not in IMAGE_COLUMNS)]
    annotation = annotation or _choose(others, ANNOTATION_COLUMNS)
    image = image or _choose([name for name in pictures if name != annotation], IMAGE_COLUMNS)
    if image is None or annotation is None:
        missing = " and ".join(kind for kind, found in (("image", image), ("annotation", annotation)) if found is None)
        raise ValueError(
            f"Cannot tell the {missing} column: the columns are {', '.join(features)}, and those that hold pictures "
            f"{', '.join(pictures) or 'none'}. Give image_column and annotation_column."
        )
    return image, annotation


def _choose(columns: list[str], usual: Sequence[str]) -> str | None:
    known = [name for name in usual if name in columns]
    return known[0] if known else columns[0] if len(columns) == 1 else None


def _rename(split: Any, image: str, annotation: str) -> Any:
    wanted = {image: "image", annotation: "annotation"}
    taken = [new for old, new in wanted.items() if new in split.column_names and new not in wanted]
    split = split.remove_columns(taken)
    # both at once, so that two columns may swap their names
    return split.rename_columns({old: new for old, new in wanted.items() if old != new})


def _names_beside(path: Path) -> Names | None:
    return str(path / NAMES_FILE) if (path / NAMES_FILE).is_file() else None


def build_vocabulary(names: Names, protocol: str | None = None) -> Vocabulary:
    """The vocabulary of a list of names, a packaged benchmark's key or a JSON file, see [`load_segmentation_data`]."""
    if not isinstance(names, str):
        return Vocabulary(names)
    if names in BENCHMARKS:
        # only the names: templates and comma rule are the processor's
        return Vocabulary(Vocabulary.from_benchmark(names, protocol).synonyms)
    file = Path(names)
    if not file.is_file():
        raise FileNotFoundError(
            f"class_names {names!r} is neither a file nor a packaged benchmark ({', '.join(sorted(BENCHMARKS))})."
        )
    values = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(values, list):
        raise ValueError(f"{file} must hold a JSON list of class names in index order, got {type(values).__name__}.")
    return Vocabulary(values)
