"""What the commands that segment pictures have in common: class names, background, threshold, inference switches."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from .download_errors import loading_explained
from .vocabulary import BENCHMARKS, Vocabulary, split_names


def add_label_options(parser: argparse.ArgumentParser) -> None:
    """Beside `--model`: `--labels` or `--vocabulary`, one of which has to be given, and what else a call takes."""
    names = parser.add_mutually_exclusive_group(required=True)
    names.add_argument("--labels", help="class names, separated by commas")
    names.add_argument(
        "--vocabulary",
        metavar="FILE-OR-NAME",
        help=f"JSON list of class names (a list inside: synonyms), or one of {', '.join(BENCHMARKS)}",
    )
    parser.add_argument(
        "--background", nargs="+", metavar="NAME", help="labels folded into one, and no_object: the method's own"
    )
    parser.add_argument("--threshold", type=float, help="confidence (0 to 1) below which a pixel is unlabelled")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="inference switches, JSON values")


def vocabulary_of(options: argparse.Namespace) -> Vocabulary:
    """The class names that the command line asks for.

    Raises:
        FileNotFoundError: no such file or packaged vocabulary.
        ValueError: names that cannot be used, a threshold out of range.
    """
    from .post_processing import check_threshold  # torch, which the command line alone does not need

    check_threshold(options.threshold)
    if options.labels is not None:
        return Vocabulary(split_names(options.labels))
    if options.vocabulary in BENCHMARKS:
        with loading_explained(options.model):
            method = AutoConfig.from_pretrained(options.model).model_type
        names = Vocabulary.from_benchmark(options.vocabulary, "deop" if method == "clip" else method)
        # the checkpoint's own texts: it may have been trained with others than the method's published ones
        return names.with_texts(None, None)
    file = Path(options.vocabulary)
    if not file.is_file():
        raise FileNotFoundError(
            f"--vocabulary {options.vocabulary!r} is neither a file nor a packaged one ({', '.join(BENCHMARKS)})."
        )
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(names, list):
        raise ValueError(f"{file} must hold a JSON list of class names in index order, got {type(names).__name__}.")
    return Vocabulary(names)


def add_column_options(parser: argparse.ArgumentParser) -> None:
    """How a data set of the user's is read, beside `--ignore-index`; `columns_of` takes the answers."""
    parser.add_argument("--image-column", help="of a data set of yours (default: by type and usual names)")
    parser.add_argument("--annotation-column", help="likewise, of the label maps")
    parser.add_argument(
        "--reduce-labels",
        action="store_true",
        help="id 0 is no class, every other id is lowered by one; --ignore-index means lowered ids",
    )


def columns_of(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `load_segmentation_data` that `add_column_options` asked for."""
    names = ("image_column", "annotation_column", "reduce_labels")
    return {name: getattr(options, name) for name in names if getattr(options, name)}


def at_least_one(text: str) -> int:
    """`type=` of an option that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text}.")
    return int(text)


def check_switches(model: Any, switches: Iterable[str]) -> None:
    """Find inference switches that a model does not have before it is run.

    Raises:
        ValueError: there are some; with those that it has.
    """
    known = model.switches | model.picture_switches
    if unknown := sorted(set(switches) - known):
        raise ValueError(
            f"{type(model).__name__} has no switch {', '.join(unknown)}. It has: {', '.join(sorted(known)) or 'none'}."
        )


def parse_switches(entries: Sequence[str]) -> dict[str, Any]:
    """Inference switches from `NAME=VALUE` entries; the values are JSON, or none.

    Raises:
        ValueError: no such form.
    """
    switches = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, got {entry!r}.")
        try:
            switches[name] = None if value.lower() == "none" else json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"The value of --set {entry!r} is no number, true, false or none.") from None
    return switches
