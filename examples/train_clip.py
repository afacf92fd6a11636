"""Train a small CLIP on captions of synthetic scenes.

python examples/train_clip.py --recipe examples/recipes/clip_vit_scenes.yaml --output clip_vit_scenes --seed 0

Start the same command again to continue a run that was killed; on a CPU it ends with the same bits.
"""

from __future__ import annotations

import argparse
import json
import sys

from ov_segmentation.training.checkpointing import CheckpointError
from ov_segmentation.training.contrastive import ContrastiveRecipe, train_clip
from ov_segmentation.training.run_folder import RunFolderError


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, train, print the last line of the log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="YAML file, see examples/recipes")
    parser.add_argument("--output", required=True, help="folder for model, tokenizer, image processor and log")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--minutes", type=float, help="stop after this time; the schedule follows the clock, not the steps"
    )
    parser.add_argument("--steps", type=int, help="overrides the recipe's number of steps")
    parser.add_argument("--init-from", help="folder of an earlier run to continue from, with a new schedule")
    parser.add_argument("--device", default="cpu", help="e.g. cpu or cuda")
    options = parser.parse_args(arguments)
    try:
        recipe = ContrastiveRecipe.from_yaml(options.recipe, steps=options.steps, init_from=options.init_from)
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f"{options.recipe}: {error}")
    try:
        figures = train_clip(recipe, options.output, options.seed, options.minutes, options.device)
    except (CheckpointError, RunFolderError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
