"""The data set of a benchmark: found, loaded and recognised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.benchmarks import EvaluationProtocol, evaluation_protocol, own_protocol
from ..data.class_names import class_names
from ..data.datasets import load_segmentation_data
from ..data.labelled_pictures import SegmentationData
from ..data.preparation.card import read_card
from ..vocabulary import BENCHMARKS
from .state import EvaluationError


def locate(benchmark: str, data: Sequence[str]) -> str:
    """Where a benchmark's data set is: `NAME=PATH-OR-HUB-ID` entries count before folders that hold one per name.

    Raises:
        EvaluationError: nowhere.
    """
    for entry in data:
        name, equals, place = entry.partition("=")
        if equals and name == benchmark:
            return place
    folders = [Path(entry) / benchmark for entry in data if "=" not in entry]
    for folder in folders:
        if folder.is_dir():
            return str(folder)
    looked = f"looked for {', '.join(map(str, folders))}; " if folders else ""
    raise EvaluationError(
        f"There is no data set for {benchmark}: {looked}give --data FOLDER (with one folder per benchmark, as "
        f"examples/prepare_dataset.py makes them) or --data {benchmark}=PATH-OR-HUB-ID."
    )


def load_benchmark(
    benchmark: str,
    method: str,
    place: str,
    *,
    split: str | None = None,
    streaming: bool = False,
    ignore_index: Sequence[int] = (),
    columns: Mapping[str, Any] | None = None,
) -> tuple[EvaluationProtocol, SegmentationData]:
    """The protocol and the data set; a name that is no benchmark is a data set of the user's, with names of its own.

    Args:
        split, streaming, ignore_index: see [`ov_segmentation.data.datasets.load_segmentation_data`].
        columns: its arguments `image_column`, `annotation_column` and `reduce_labels`, for a data set of the user's.

    Raises:
        EvaluationError: the folder holds another data set.
        ValueError: no protocol, no class names, no such split.
        FileNotFoundError: no data set there.
    """
    if benchmark not in BENCHMARKS:
        data = load_segmentation_data(place, ignore_index=ignore_index, streaming=streaming, **(columns or {}))
        vocabulary = data.vocabulary
        protocol = own_protocol(benchmark, method, vocabulary.synonyms, ignore_index, split or "validation")
        data.require(protocol.split)
        return protocol, data
    if columns:
        raise EvaluationError(f"{benchmark} is a benchmark, whose columns are known: leave out {', '.join(columns)}.")
    protocol = evaluation_protocol(benchmark, method)
    card = read_card(Path(place)) if Path(place).is_dir() else None
    if card is not None and card.get("data_set") != benchmark:
        raise EvaluationError(f"{place} holds {card.get('data_set')}, not {benchmark}: wrong folder.")
    data = load_segmentation_data(
        place, class_names=list(protocol.class_names), ignore_index=list(protocol.ignore_index), streaming=streaming
    )
    _check_names(place, data.splits, protocol)
    protocol = protocol.with_changes(split=split)
    data.require(protocol.split)
    return protocol, data


def _check_names(place: str, splits: Any, protocol: EvaluationProtocol) -> None:
    try:
        found = class_names(splits)
    except ValueError:  # a folder without names: its ids are checked picture by picture
        return
    if tuple(found) != protocol.class_names:
        differs = next(
            (k for k, (a, b) in enumerate(zip(found, protocol.class_names)) if a != b),
            min(len(found), len(protocol.class_names)),
        )
        raise EvaluationError(
            f"{place} has {len(found)} classes, {protocol.benchmark} has {len(protocol.class_names)}; they differ from "
            f"class {differs} on. Is it the right folder? examples/prepare_dataset.py makes it from the download."
        )
