"""Train a model by a recipe: `accelerate launch examples/train.py --recipe examples/recipes/san_tiny_camvid.yaml`.

Start the same command again after a crash, a kill or a full disk: it continues from the last checkpoint.
Several CPU processes: `ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/train.py ...`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ov_segmentation.strict_mapping import RecipeError
from ov_segmentation.training.checkpointing import CheckpointError
from ov_segmentation.training.loop import train
from ov_segmentation.training.recipe import load_recipe
from ov_segmentation.training.run_folder import RunFolderError


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, type=Path, help="YAML file; see examples/recipes/")
    parser.add_argument("--output", type=Path, help="the run's folder (default: runs/NAME-OF-THE-RECIPE)")
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="change the recipe: optimizer.lr=1e-4",
    )
    parser.add_argument(
        "--trainable",
        nargs="+",
        metavar="PART",
        help="the same as --set model.trainable=[PART, ...]: method, adapter, prompts, attention, lora, all",
    )
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto: continue from the last checkpoint in the output folder, if any; never: the folder must be empty",
    )
    options = parser.parse_args(arguments)
    # without --output: where a run lies changes nothing about it
    if options.trainable:
        options.set.append(f"model.trainable={json.dumps(options.trainable)}")
    changes = ["--set", *options.set] if options.set else []
    command = shlex.join(["accelerate", "launch", "examples/train.py", "--recipe", str(options.recipe), *changes])
    try:
        recipe = load_recipe(options.recipe, options.set)
        train(recipe, options.output or Path("runs") / options.recipe.stem, options.resume, command)
    except (RecipeError, RunFolderError, CheckpointError, FileNotFoundError, ImportError, ValueError) as error:
        # the message says what to do; a traceback would bury it
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
