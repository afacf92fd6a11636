"""Fine-tune a checkpoint of any method on pictures of your own.

`python examples/finetune.py --model CHECKPOINT --data FOLDER --ignore-index 255 --output runs/mine`

FOLDER holds `images/` and `masks/` (same file names; a mask is a PNG whose pixel values are class indices) and
`class_names.json`, a list of the names in index order; any data set that `load_dataset` reads works too. A fifth of
the pictures is held out, to keep the best weights and to stop when they get no better. What comes out,
`runs/mine/model`, is a checkpoint like any other. Start the same command again after a kill: it continues.
Several CPU processes: `ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/finetune.py ...`.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoConfig

from ov_segmentation import ledger
from ov_segmentation.cli_options import add_column_options, columns_of
from ov_segmentation.metrics import SegmentationScores
from ov_segmentation.strict_mapping import RecipeError
from ov_segmentation.training.checkpointing import CheckpointError
from ov_segmentation.training.fine_tuning import fine_tuning_recipe, score_before_and_after
from ov_segmentation.training.loop import train
from ov_segmentation.training.recipe import Recipe
from ov_segmentation.training.run_folder import RunFolderError


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, train, say what it gained."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        recipe = recipe_of(options)
        result = train(recipe, options.output, command=command_of(given))
        if not PartialState().is_main_process:
            return
        print(
            f"held-out pictures: mIoU {result['initial_miou']:.1%} before, {result['miou']:.1%} after "
            f"(step {result['exported_step']} of {result['steps']})"
        )
        if options.test_split is not None:
            report(recipe, options, result, command_of(given))
    except (RecipeError, RunFolderError, CheckpointError, FileNotFoundError, ImportError, ValueError) as error:
        # the message says what to do; a traceback would bury it
        sys.exit(f"{type(error).__name__}: {error}")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint to start from: folder or Hub id")
    parser.add_argument("--data", required=True, help="folder or Hub id")
    parser.add_argument("--output", required=True, type=Path, help="the run's folder")
    parser.add_argument("--names", help="JSON file of class names or a packaged benchmark (default: beside the data)")
    parser.add_argument("--ignore-index", type=int, nargs="+", help="pixel values that are no class")
    add_column_options(parser)
    parser.add_argument(
        "--trainable",
        nargs="+",
        default=["adapter"],
        metavar="PART",
        help="method, adapter, prompts, attention, lora, all; several add up (default: adapter)",
    )
    parser.add_argument("--pictures", type=int, help="use so many pictures of the training split only")
    parser.add_argument("--short-side", type=int, help="of the pictures, in pixels (default: as the checkpoint)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--test-split", help="score a split that has no part in the run, before and after")
    parser.add_argument("--ledger", type=Path, help="write these scores into a ledger (results/NAME.jsonl)")
    return parser


def recipe_of(options: argparse.Namespace) -> Recipe:
    """What the command line asks for."""
    if options.ledger is not None and options.test_split is None:
        raise RecipeError("--ledger records the scores of --test-split: give that too.")
    ignored = options.ignore_index
    return fine_tuning_recipe(
        options.model,
        options.data,
        class_names=options.names,
        ignore_index=ignored[0] if ignored and len(ignored) == 1 else ignored,
        **columns_of(options),
        trainable=options.trainable[0] if len(options.trainable) == 1 else options.trainable,
        pictures=options.pictures,
        short_side=options.short_side,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        precision=options.precision,
        seed=options.seed,
        threads=options.threads,
    )


def report(recipe: Recipe, options: argparse.Namespace, result: dict[str, Any], command: str) -> None:
    """Score the test split before and after, print it class by class, and record it if asked to."""
    started = time.monotonic()
    before, after, names = score_before_and_after(recipe, options.output / "model", options.test_split)
    for name, *shares in zip(names, before.iou_per_class.tolist(), after.iou_per_class.tolist(), strict=True):
        print(f"{name:>20}  {percent(shares[0]):>6}  {percent(shares[1]):>6}")
    print(f"{'mIoU':>20}  {before.miou:6.1%}  {after.miou:6.1%}   ({options.test_split}, {after.num_pixels:,} pixels)")
    if options.ledger is not None:
        ledger.append(
            options.ledger,
            command=command,
            seed=recipe.seed,
            seconds=result["seconds"],
            figures=figures(result, before, after, time.monotonic() - started),
            protocol=f"{options.test_split} split, IoU averaged over {after.averaging} classes",
            method=AutoConfig.from_pretrained(options.output / "model").model_type,
            model=options.model,
            dataset=Path(options.data).name,
            trainable=" + ".join(options.trainable),
            pictures=options.pictures,
        )


def percent(share: float) -> str:
    """A class's share for the table; a dash for one that neither labels nor predictions have."""
    return "-" if math.isnan(share) else f"{share:.1%}"


def figures(
    result: dict[str, Any], before: SegmentationScores, after: SegmentationScores, seconds: float
) -> dict[str, Any]:
    """What goes into the ledger."""
    kept = ("steps", "exported_step", "cpu_seconds", "trainable_parameters")
    return {
        **{name: result[name] for name in kept},
        "held_out_miou_before": result["initial_miou"],
        "held_out_miou": result["miou"],
        "test_miou_before": before.miou,
        "test_miou": after.miou,
        "test_pixel_accuracy_before": before.pixel_accuracy,
        "test_pixel_accuracy": after.pixel_accuracy,
        "test_seconds": round(seconds, 1),
    }


def command_of(arguments: Sequence[str]) -> str:
    """The command for records, without where its run lies, which changes nothing about it."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.split("=")[0] in ("--output", "--ledger"):
            skip = not skip and "=" not in argument
            continue
        kept.append(argument)
    return shlex.join(["python", "examples/finetune.py", *kept])


if __name__ == "__main__":
    main()
