"""Write synthetic scenes as data sets: `python examples/make_scenes.py --output scenes`.

`scenes/train` (tier a: what segmentation training may see) and `scenes/evaluation` (all tiers), for `load_dataset` and
the recipes in examples/recipes/*_scenes.yaml.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ov_segmentation.cli_options import at_least_one
from ov_segmentation.data.scene_difficulty import DIFFICULTIES
from ov_segmentation.data.scene_folders import write_scenes
from ov_segmentation.data.scene_vocabulary import SceneVocabulary
from ov_segmentation.data.scenes import GEOMETRIES


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and write the scenes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--train", type=at_least_one, default=4000, help="training scenes")
    parser.add_argument("--evaluation", type=at_least_one, default=400, help="evaluation scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", choices=("small", "full"), default="small")
    parser.add_argument("--size", type=at_least_one, default=96, help="side in pixels")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="easy", help="hard: smaller and rotated objects")
    parser.add_argument(
        "--difficulty", choices=DIFFICULTIES, default="standard", help="overlap; lighting, blur, noise and JPEG"
    )
    options = parser.parse_args(arguments)
    vocabulary = SceneVocabulary.by_name(options.vocabulary)
    try:
        write_scenes(
            options.output,
            options.train,
            options.evaluation,
            options.seed,
            vocabulary=vocabulary,
            size=options.size,
            geometry=options.geometry,
            difficulty=options.difficulty,
        )
    except OSError as error:
        # the message says what to do; a traceback would bury it
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"{options.train} training and {options.evaluation} evaluation scenes written to {options.output}")


if __name__ == "__main__":
    main()
