"""Train a small Segment Anything on the regions of synthetic scenes, and measure it on scenes that it never saw.

python examples/train_sam.py --recipe examples/recipes/sam_scenes.yaml --output sam_scenes --seed 0

A run that was killed continues when the same command is started again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ov_segmentation import ledger
from ov_segmentation.strict_mapping import RecipeError
from ov_segmentation.training.checkpointing import CheckpointError
from ov_segmentation.training.run_folder import RunFolderError
from ov_segmentation.training.sam_training import SamRecipe, train_sam


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, train, print the last line of the log and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="YAML file, see examples/recipes")
    parser.add_argument("--output", required=True, help="folder for model and log")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="overrides the recipe's number of steps")
    parser.add_argument("--ledger", type=Path, help="JSON-lines file to append the figures to")
    options = parser.parse_args(arguments)
    try:
        recipe = SamRecipe.from_yaml(options.recipe, steps=options.steps)
    except (OSError, RecipeError) as error:
        sys.exit(f"{options.recipe}: {error}")
    code = ledger.revision()
    try:
        figures = train_sam(recipe, options.output, options.seed)
    except (CheckpointError, RunFolderError) as error:
        # the message says what to do; a traceback would bury it
        sys.exit(f"{type(error).__name__}: {error}")
    print(json.dumps(figures, indent=1))
    if options.ledger is not None and not recorded(options.ledger, figures):
        given = sys.argv[1:] if arguments is None else arguments
        ledger.append(
            options.ledger,
            command=shlex.join(["python", "examples/train_sam.py", *given]),
            seed=options.seed,
            seconds=figures["seconds"],
            figures=figures,
            protocol=f"mask IoU from a point in a random region, {recipe.eval_scenes} scenes of another seed",
            code=code,
            method="sam",
            name=Path(options.output).name,
            recipe=options.recipe,
        )


def recorded(path: Path, figures: dict[str, Any]) -> bool:
    """Whether the ledger has this very run: a finished one that is started again gives the figures it had."""
    return path.exists() and any(entry["figures"] == figures for entry in ledger.read(path))


if __name__ == "__main__":
    main()
