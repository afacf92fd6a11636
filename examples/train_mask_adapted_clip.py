"""Adapt the CLIP of an OVSeg model to masked crops by a recipe: fine-tuning, mask prompt tuning, or both at once.

`accelerate launch examples/train_mask_adapted_clip.py --recipe examples/recipes/ovseg_clip_ft_vit_l.yaml --output ft`

Start the same command again after a crash: it continues from the last checkpoint. The result, `ft/model`, is an
OVSeg model; `model.from_pretrained` of the next recipe may name it (fine-tuning, then prompts, or the other way round).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ov_segmentation.training.adaptation_recipe import load_adaptation_recipe
from ov_segmentation.training.checkpointing import CheckpointError
from ov_segmentation.training.mask_adaptation import adapt
from ov_segmentation.training.run_folder import RunFolderError


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, type=Path, help="YAML file; see examples/recipes/ovseg_clip_*.yaml")
    parser.add_argument("--output", type=Path, help="the run's folder (default: runs/NAME-OF-THE-RECIPE)")
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="change the recipe: optimizer.lr=1e-6",
    )
    parser.add_argument("--resume", choices=("auto", "never"), default="auto", help="as in examples/train.py")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["accelerate", "launch", "examples/train_mask_adapted_clip.py", *given])
    try:
        recipe = load_adaptation_recipe(options.recipe, options.set)
        adapt(recipe, options.output or Path("runs") / options.recipe.stem, options.resume, command)
    except (RunFolderError, CheckpointError, FileNotFoundError, ImportError, ValueError) as error:
        # the message says what to do; a traceback would bury it
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
