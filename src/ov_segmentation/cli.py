"""The command `ov-segment`: `ov-segment PICTURE --labels a,b,c --model ID`, and `ov-segment doctor CHECKPOINT`.

Exit codes: 0; 1, the message says what is wrong (for `doctor`: the checkpoint has problems, which it lists); 2, the
command line is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DOCTOR = "doctor"


def main(arguments: Sequence[str] | None = None) -> None:
    """The console command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == [DOCTOR]:
        sys.exit(doctor(arguments[1:]))
    segment(arguments)


def segment(arguments: Sequence[str]) -> None:
    """Segment one picture: print a table of the labels found, write what is asked for."""
    options = _parser().parse_args(arguments)
    # after the command line is known to be right: these take seconds
    import torch
    from transformers import pipeline

    import ov_segmentation  # noqa: F401  registers the task

    from .cli_options import parse_switches, vocabulary_of
    from .download_errors import loading_explained
    from .image_reading import read_image
    from .visualization import overlay, save_label_map

    try:
        for path in filter(None, (options.output, options.label_map, options.json)):
            if not path.parent.is_dir():
                raise FileNotFoundError(f"There is no folder {path.parent} to write {path.name} to.")
        check_device(options.device)
        vocabulary = vocabulary_of(options)
        switches = parse_switches(options.set)
        picture, _ = read_image(options.picture)
        with loading_explained(options.model):
            run = pipeline(
                "open-vocabulary-segmentation", model=options.model, dtype=torch.float32, device=options.device or "cpu"
            )
        given = {"background": options.background} if options.background else {}
        result = run(
            picture, candidate_labels=vocabulary, threshold=options.threshold, output_type="map", **given, **switches
        )
        print(table(result))
        output = options.output or (None if options.label_map or options.json else Path("segmented.png"))
        if output is not None:
            overlay(picture, result["segmentation"], result["labels"]).save(output)
            print(f"\nOverlay: {output}")
        if options.label_map is not None:
            save_label_map(result["segmentation"], options.label_map, len(vocabulary))
        if options.json is not None:
            rows = [dict(zip(("label", "share", "score"), row, strict=True)) for row in found(result)]
            options.json.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    # the message says what to do; a traceback would bury it
    except (OSError, ValueError, TypeError) as error:
        sys.exit(f"ov-segment: {type(error).__name__}: {error}")


def check_device(device: str | None) -> None:
    """Refuse a device that this machine lacks.

    Raises:
        ValueError: with torch's reason.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # a torch without CUDA asserts
        raise ValueError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error


def doctor(arguments: Sequence[str]) -> int:
    """Report on a checkpoint; the exit code."""
    parser = argparse.ArgumentParser(
        prog="ov-segment doctor",
        description="What a checkpoint is, and whether it is whole: a folder, a Hub id, or an original's file.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder, Hub id, or file of an original method")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    options = parser.parse_args(arguments)
    from .checkpoint_report import examine

    report = examine(options.checkpoint, options.revision)
    print(report.text())
    return 1 if report.problems else 0


def found(result: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(label, share of the picture, mean confidence) of the labels that own pixels in a map, largest first."""
    pixels, labels = result["segmentation"], result["labels"]
    areas = np.bincount(pixels[pixels >= 0].ravel(), minlength=len(labels)) / pixels.size
    rows = zip(labels, areas.tolist(), result["scores"], strict=True)
    return sorted((row for row in rows if row[1]), key=lambda row: -row[1])


def table(result: Mapping[str, Any]) -> str:
    """`found` as text, one label a line."""
    shown = found(result)
    width = max([len("label"), *(len(label) for label, _, _ in shown)])
    lines = [f"{'label':{width}}    area  confidence"]
    lines += [f"{label:{width}}  {area:6.1%}  {score:10.2f}" for label, area, score in shown]
    unlabelled = float((result["segmentation"] < 0).mean())
    return "\n".join(lines + ([f"{'(unlabelled)':{width}}  {unlabelled:6.1%}"] if unlabelled else []))


def _parser() -> argparse.ArgumentParser:
    from .cli_options import add_label_options

    parser = argparse.ArgumentParser(
        prog="ov-segment",
        description="Segment a picture with class names of your choice.",
        epilog="`ov-segment doctor CHECKPOINT` says what a checkpoint is and whether it is whole. Many pictures: "
        "examples/segment_dataset.py.",
    )
    parser.add_argument("picture", metavar="PICTURE", help="path or http(s) URL (a file called doctor: ./doctor)")
    parser.add_argument("--model", required=True, help="folder or Hub id of a checkpoint")
    add_label_options(parser)
    parser.add_argument("--output", type=Path, help="overlay with a legend (default: segmented.png)")
    parser.add_argument("--label-map", type=Path, metavar="FILE", help="PNG of class indices instead, or as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the table as JSON")
    parser.add_argument("--device", help="e.g. cuda (default: cpu)")
    return parser


if __name__ == "__main__":
    main()
