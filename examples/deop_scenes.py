"""DeOP's three training stages on synthetic scenes, and Table 3 of the paper: what prompts, severance and anchors add.

    python examples/make_scenes.py --output scenes
    python examples/train_clip.py --recipe examples/recipes/clip_vit_scenes.yaml --output clip_vit_scenes
    python examples/deop_scenes.py --clip clip_vit_scenes --scenes scenes --output runs/deop_scenes

Prompt and proposals are trained once, the third stage once per row; each row is evaluated on all tiers of the scenes
and printed. Start the same command again after a kill: it continues. `--ledger FILE` also writes a line per row there.
`--rows` trains some rows alone, `--seed N` another seed: give each seed an `--output` of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor

from ov_segmentation import AutoModelForOpenVocabularySegmentation, ledger
from ov_segmentation.atomic_files import write_atomically
from ov_segmentation.cli_options import at_least_one
from ov_segmentation.data.datasets import load_segmentation_data
from ov_segmentation.data.labelled_pictures import LabelledPictures
from ov_segmentation.data.scene_folders import EVALUATION_FOLDER
from ov_segmentation.data.scene_vocabulary import SceneVocabulary
from ov_segmentation.training.loop import train
from ov_segmentation.training.recipe import load_recipe
from ov_segmentation.training.scene_evaluation import evaluate_scenes

RECIPES = Path(__file__).parent / "recipes"
TABLE_3: dict[str, dict[str, str]] = {
    "baseline": {"pooling": "mask", "severance": "none", "visual_prompts": "none"},
    "prompts": {"pooling": "mask", "severance": "none"},
    "prompts, severance": {"pooling": "mask"},
    "prompts, anchors": {"severance": "none"},
    "prompts, severance, anchors": {},
}
"""Row -> what differs from the released model."""
ROWS_HELP = f"these alone, among: {'; '.join(TABLE_3)}"
COLUMNS = ("things_a", "things_b", "things_c", "stuff_a", "miou", "hiou", "shuffled_hiou")
RESULT = "result.json"
STAGES = ("stage1", "stage2")
"""Folders of the stages that all rows share."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, train, evaluate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", required=True, help="folder that examples/train_clip.py wrote")
    parser.add_argument("--scenes", required=True, type=Path, help="folder that examples/make_scenes.py wrote")
    parser.add_argument("--output", required=True, type=Path, help="folder of all runs")
    parser.add_argument("--seed", type=int, default=0, help="of all recipes and of the shuffled names")
    parser.add_argument("--rows", nargs="+", choices=TABLE_3, default=list(TABLE_3), metavar="ROW", help=ROWS_HELP)
    parser.add_argument("--max-samples", type=at_least_one, help="evaluate on only the first so many scenes")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="for every recipe")
    parser.add_argument("--ledger", type=Path, help="JSON-lines file to append the figures to")
    options = parser.parse_args(arguments)
    command = shlex.join(["python", "examples/deop_scenes.py", *(sys.argv[1:] if arguments is None else arguments)])
    common = [f"data.name={options.scenes / 'train'}", f"seed={options.seed}", *options.set]
    source = f"model.from_clip={options.clip}"
    for stage in STAGES:
        model = run(f"deop_scenes_{stage}", options.output / stage, [source, *common], command)
        source = f"model.from_pretrained={model}"
    print(f"{'':>28}" + "".join(f"{name:>15}" for name in COLUMNS))
    for row in options.rows:
        own = [f"model.config.{key}={value}" for key, value in TABLE_3[row].items()]
        folder = options.output / row.replace(", ", "_")
        model = run("deop_scenes", folder, [source, *own, *common], command)
        file = folder / "figures.json"
        if file.is_file():  # measured before a kill
            report(row, json.loads(file.read_text()))
            continue
        pictures = load_segmentation_data(options.scenes / EVALUATION_FOLDER).split("validation", options.max_samples)
        figures, seconds = measure(model, pictures, options.seed)
        spent = [json.loads((path / RESULT).read_text()) for path in (*map(options.output.joinpath, STAGES), folder)]
        figures["cpu_seconds"] = sum(result["cpu_seconds"] for result in spent)
        report(row, figures)
        if options.ledger is not None:
            ledger.append(
                options.ledger,
                command=command,
                seed=options.seed,
                seconds=seconds,
                figures=figures,
                protocol=f"scenes-small-{len(pictures)}",
                method="deop",
                name=f"deop_scenes, {row}",
                table="DeOP, table 3",
            )
        write_atomically(file, json.dumps(figures, indent=1))


def report(row: str, figures: dict[str, float]) -> None:
    """Print a row."""
    print(f"{row:>28}" + "".join(f"{100 * figures.get(name, math.nan):15.1f}" for name in COLUMNS), flush=True)


def run(recipe: str, output: Path, assignments: list[str], command: str) -> Path:
    """Train, unless it is done; the exported model's folder."""
    if not (output / RESULT).exists():
        train(load_recipe(RECIPES / f"{recipe}.yaml", assignments), output, command=command)
    return output / "model"


def measure(folder: Path, pictures: LabelledPictures, seed: int) -> tuple[dict[str, Any], float]:
    """Scores by tier, and the seconds that they took."""
    model = AutoModelForOpenVocabularySegmentation.from_pretrained(folder, dtype=torch.float32)
    start = time.perf_counter()
    processor = AutoProcessor.from_pretrained(folder)
    figures = evaluate_scenes(model, processor, pictures, SceneVocabulary.small(), seed)
    # a tier that few scenes do not show has no figure
    figures = {name: value for name, value in figures.items() if math.isfinite(value)}
    return figures, time.perf_counter() - start


if __name__ == "__main__":
    main()
