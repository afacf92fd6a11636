"""Evaluate a model on synthetic scenes: `python examples/evaluate_scenes.py --model MODEL --data scenes`.

Prints mean IoU by tier (a: trained on; b: CLIP has met the names; c: nobody has), things and stuff apart, and the same
with the names shuffled, the floor of a model that does not read them. `--ledger FILE` also writes a line there.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoProcessor

from ov_segmentation import AutoModelForOpenVocabularySegmentation, ledger
from ov_segmentation.data.datasets import load_segmentation_data
from ov_segmentation.data.scene_folders import EVALUATION_FOLDER
from ov_segmentation.data.scene_vocabulary import SceneVocabulary
from ov_segmentation.training.scene_evaluation import evaluate_scenes


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, evaluate, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a checkpoint")
    parser.add_argument("--data", required=True, type=Path, help="folder that examples/make_scenes.py wrote")
    parser.add_argument("--vocabulary", choices=("small", "full"), default="small")
    parser.add_argument("--max-samples", type=int, help="only the first so many scenes")
    parser.add_argument("--seed", type=int, default=0, help="of the training run; also of the shuffled names")
    parser.add_argument("--ledger", type=Path, help="JSON-lines file to append the figures to")
    parser.add_argument("--name", help="what the ledger calls the run (default: the model's path)")
    options = parser.parse_args(arguments)
    model = AutoModelForOpenVocabularySegmentation.from_pretrained(options.model, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(options.model)
    pictures = load_segmentation_data(options.data / EVALUATION_FOLDER).split("validation", options.max_samples)
    start = time.perf_counter()
    figures = evaluate_scenes(
        model,
        processor,
        pictures,
        SceneVocabulary.by_name(options.vocabulary),
        options.seed,
        progress=lambda loader: tqdm(loader, desc="scenes", unit="picture"),
    )
    seconds = time.perf_counter() - start
    for name, value in figures.items():
        print(f"{name:>24} {100 * value:6.1f}")
    if options.ledger is not None:
        ledger.append(
            options.ledger,
            command=shlex.join(["python", "examples/evaluate_scenes.py", *(arguments or sys.argv[1:])]),
            seed=options.seed,
            seconds=seconds,
            figures=figures,
            protocol=f"scenes-{options.vocabulary}-{len(pictures)}",
            method=model.config.model_type,
            name=options.name or options.model,
        )


if __name__ == "__main__":
    main()
