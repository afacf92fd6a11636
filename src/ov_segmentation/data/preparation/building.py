"""From a download to a folder that `load_dataset` reads: parquet files written one by one, resumed, then published.

Everything is written beside the output, in `<output>.partial`; the output appears when it is complete. A run that was
killed leaves only whole parquet files there, and the same command goes on behind them.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value

from ...atomic_files import TEMPORARY, full_disk_message, publish, remove_leftovers, write_atomically
from ..class_names import segmentation_features
from ..label_sets import LabelSet
from .card import CARD, read_card, write_card
from .rows import Converted, convert
from .sources import Item, PreparationError, Source, named

PARTIAL = ".partial"
ROWS_PER_FILE = 1000
_PLAN = "plan.json"

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]


def _silent(items: Iterable[Any], total: int, title: str) -> Iterable[Any]:
    return items


def build(
    labels: LabelSet,
    source: Source,
    output: Path,
    *,
    splits: Sequence[str] | None = None,
    expect_counts: bool = True,
    rows_per_file: int = ROWS_PER_FILE,
    workers: int = 0,
    progress: Progress = _silent,
) -> Path:
    """Write the data set to `output`, or find that it is there.

    Args:
        splits: default: all that the data set has.
        expect_counts: compare with the known numbers of pictures and of classes that occur. Off for parts of a data
            set only.
        rows_per_file: pictures per parquet file.
        workers: processes that read and encode; 0: this one.
        progress: wraps an iterable, given its length and a title, for a bar.

    Raises:
        PreparationError: missing, corrupt or surplus files, other counts than known, unknown label ids, an output
            folder that holds something else. `output` is then not there.
    """
    splits = tuple(splits or labels.splits)
    if unknown := sorted(set(splits) - set(labels.splits)):
        raise PreparationError(f"{labels.name} has no split {', '.join(unknown)}; it has {', '.join(labels.splits)}.")
    if output.exists():
        return _found(output, labels, splits)
    folder = output.with_name(output.name + PARTIAL)
    if (folder / CARD).is_file() and not (folder / _PLAN).exists():  # killed at the very end: all is written
        _found(folder, labels, splits)
        return _publish(folder, output)
    items = {split: source.items(split) for split in splits}
    for split in splits:
        _check_count(labels, source, split, items[split], expect_counts)
    _claim(folder, labels, items, rows_per_file)
    make = partial(
        convert,
        read_ids=source.read_ids,
        transform=source.transform,
        drops_unlabelled=labels.drops_unlabelled,
        with_captions=labels.name == "coco_captions",
    )
    counts, pixels, problems = {}, {}, []
    with _mapper(workers) as run:
        for split in splits:
            counts[split], pixels[split], wrong = _write_split(
                folder, labels, split, items[split], rows_per_file, lambda part: run(make, part), progress
            )
            problems += [f"{split}: {problem}" for problem in wrong]
    if problems:
        lines = "\n  ".join(problems[:50])
        raise PreparationError(
            f"{len(problems)} files of {labels.title} cannot be used:\n  {lines}\nDownload or unpack them again and "
            f"start the same command: what was read is kept in {folder}."
        )
    if expect_counts:
        _check_classes(labels, pixels)
    write_card(folder, labels, counts, pixels)
    (folder / _PLAN).unlink()
    return _publish(folder, output)


def _publish(folder: Path, output: Path) -> Path:
    """The complete partial folder, without what only a resumed run needs, becomes the output."""
    for file in folder.glob("data/*.json"):
        file.unlink()
    publish(folder, output)
    return output


def _found(output: Path, labels: LabelSet, splits: Sequence[str]) -> Path:
    card = read_card(output) if output.is_dir() else None
    if card is None or card.get("data_set") != labels.name or set(splits) - set(card["pictures"]):
        holds = "something else" if card is None else f"{card.get('data_set')} with {', '.join(card['pictures'])}"
        raise PreparationError(f"{output} exists and holds {holds}. Give another --output, or remove it.")
    return output


def _check_count(labels: LabelSet, source: Source, split: str, items: list[Item], expect_counts: bool) -> None:
    known = labels.pictures.get(split)
    if not items:
        raise PreparationError(f"The {split} split of {labels.title} has no picture.")
    if not expect_counts or known is None or len(items) == known:
        return
    names = ""
    if source.expected_names is not None:
        expected, found = set(source.expected_names(split, known)), {Path(item.file_name).stem for item in items}
        for what, stems in (("Missing", expected - found), ("Surplus", found - expected)):
            names += f" {what}: {named(sorted(stems))}." if stems else ""
    raise PreparationError(
        f"The {split} split of {labels.title} has {known} pictures, but there are {len(items)}.{names} A partial or "
        f"other download? --expect-counts off takes it as it is; its scores are then not comparable."
    )


def _check_classes(labels: LabelSet, pixels: dict[str, np.ndarray]) -> None:
    for split, known in labels.classes_in_pictures.items():
        if split in pixels and (found := int((pixels[split] > 0).sum())) != known:
            raise PreparationError(
                f"{found} classes occur in the {split} split of {labels.title}, but it should be {known}: the label "
                f"maps are of another version, or their ids are read wrongly."
            )


def _claim(folder: Path, labels: LabelSet, items: dict[str, list[Item]], rows_per_file: int) -> None:
    """Make the partial folder this run's, or find that it is; remove what a killed run left half-written."""
    listing = [[split, item.file_name, item.picture.stat().st_size] for split in items for item in items[split]]
    plan = {
        "data_set": labels.name,
        "rows_per_file": rows_per_file,
        "files": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
    }
    file = folder / _PLAN
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != plan:
        # of other files: nothing of it can be used; the plan goes last, when it is replaced
        shutil.rmtree(folder / "data", ignore_errors=True)
        (folder / CARD).unlink(missing_ok=True)
    elif not file.is_file() and any(path.is_file() and path.suffix != TEMPORARY for path in folder.rglob("*")):
        raise PreparationError(f"{folder} exists and was not made by this command; move it away.")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    write_atomically(file, json.dumps(plan))


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Iterable[Converted]]]:
    if not workers:
        yield map
        return
    # not forked: this process has threads
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield partial(pool.map, chunksize=8)


def _write_split(
    folder: Path,
    labels: LabelSet,
    split: str,
    items: list[Item],
    rows_per_file: int,
    run: Callable[[list[Item]], Iterable[Converted]],
    progress: Progress,
) -> tuple[int, np.ndarray, list[str]]:
    """Rows, pixels per class, and problems of a split."""
    extra = {"captions": List(Value("string"))} if labels.name == "coco_captions" else {}
    features = segmentation_features(labels.class_names, **extra)
    parts = [items[start : start + rows_per_file] for start in range(0, len(items), rows_per_file)]
    results = _read(folder, split, parts, run)
    count, pixels, problems = 0, np.zeros(len(labels.class_names), dtype=np.int64), []
    rows: list[dict[str, Any]] = []
    part_pixels, wrong = np.zeros_like(pixels), 0
    for number, is_last, result in progress(results, len(items), f"{labels.name} {split}"):
        if isinstance(result, dict):  # the part was written by an earlier run
            count, pixels = count + result["rows"], pixels + np.array(result["pixels"])
            continue
        if result.problem is not None:
            problems.append(result.problem)
            wrong += 1
        elif result.row is not None:
            rows.append(result.row)
            part_pixels += result.pixels
        if is_last:
            if not wrong:
                _write_part(_part_file(folder, split, number, len(parts)), rows, part_pixels, features)
            count, pixels = count + len(rows), pixels + part_pixels
            rows, part_pixels, wrong = [], np.zeros_like(pixels), 0
    if not count and not problems:
        raise PreparationError(f"No picture of the {split} split of {labels.title} has a labelled pixel.")
    return count, pixels, problems


def _part_file(folder: Path, split: str, number: int, total: int) -> Path:
    return folder / "data" / f"{split}-{number:05d}-of-{total:05d}.parquet"


def _read(
    folder: Path, split: str, parts: list[list[Item]], run: Callable[[list[Item]], Iterable[Converted]]
) -> Iterator[tuple[int, bool, Converted | dict[str, Any]]]:
    """(number of the part, whether it is its last, result) of every item; written parts give one summary and then
    nothing but steps of the bar."""
    for number, part in enumerate(parts):
        file = _part_file(folder, split, number, len(parts))
        if file.is_file():
            yield number, True, json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
            empty = {"rows": 0, "pixels": 0}
            yield from ((number, False, empty) for _ in part[1:])
            continue
        for position, result in enumerate(run(part), start=1):
            yield number, position == len(part), result


def _write_part(file: Path, rows: list[dict[str, Any]], pixels: np.ndarray, features: Features) -> None:
    columns = {name: [row[name] for row in rows] for name in features}
    temporary = file.with_name(file.name + TEMPORARY)
    try:
        Dataset.from_dict(columns, features=features).to_parquet(temporary)
        # first the summary: a parquet file that is there is complete
        write_atomically(file.with_suffix(".json"), json.dumps({"rows": len(rows), "pixels": pixels.tolist()}))
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.rename(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise PreparationError(full_disk_message(file, error)) from error
