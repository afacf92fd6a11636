"""Evaluate a model on synthetic scenes: `python examples/evaluate_scenes.py --model MODEL --data scenes`.

Prints mean IoU by tier (a: trained on; b: CLIP has met the names; c: nobody has), things and stuff apart, and the same
with the names shuffled, the floor of a model that does not read them. `--ledger FILE` also writes a line there.
`--floors` adds made-up names, and a line for the class with the most pixels. A plain CLIP as `--model` is the floor
without training: its patches are classified one by one.
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

from ov_segmentation import ledger
from ov_segmentation.cli_options import at_least_one
from ov_segmentation.data.datasets import load_segmentation_data
from ov_segmentation.data.scene_folders import EVALUATION_FOLDER, world_suffix
from ov_segmentation.data.scene_vocabulary import SceneVocabulary
from ov_segmentation.evaluation.runner import weights_digest
from ov_segmentation.loading import load_model_and_processor
from ov_segmentation.training.scene_evaluation import FLOORS, absent_names, evaluate_scenes, majority_floor

MAJORITY = "majority class"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, evaluate, print and record; an error ends it with a message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a checkpoint")
    parser.add_argument("--data", required=True, type=Path, help="folder that examples/make_scenes.py wrote")
    parser.add_argument("--vocabulary", choices=("small", "full"), default="small")
    parser.add_argument("--max-samples", type=at_least_one, help="only the first so many scenes")
    parser.add_argument("--seed", type=int, default=0, help="of the training run; also of the shuffled names")
    parser.add_argument("--ledger", type=Path, help="JSON-lines file to append the figures to")
    parser.add_argument("--floors", action="store_true", help="also made-up names, and the majority class")
    parser.add_argument("--distractors", type=int, default=0, help="ask for so many names more, which no scene shows")
    parser.add_argument("--synonyms", action="store_true", help="ask for every class in a second wording too")
    parser.add_argument("--name", help="what the ledger calls the run (default: the model's path)")
    options = parser.parse_args(arguments)
    try:
        run(options, sys.argv[1:] if arguments is None else arguments)
    except (ValueError, TypeError, OSError) as error:
        # the message says what to do; a traceback would bury it
        sys.exit(f"{type(error).__name__}: {error}")


def run(options: argparse.Namespace, given: Sequence[str]) -> None:
    """Evaluate as the command line says."""
    if not (options.data / EVALUATION_FOLDER).is_dir():
        raise ValueError(
            f"There is no folder {options.data / EVALUATION_FOLDER}: "
            f"python examples/make_scenes.py --output {options.data} makes it."
        )
    model, processor = load_model_and_processor(options.model, dtype=torch.float32)
    pictures = load_segmentation_data(options.data / EVALUATION_FOLDER).split("validation", options.max_samples)
    vocabulary = SceneVocabulary.by_name(options.vocabulary)
    distractors = absent_names(vocabulary, options.distractors, options.seed)
    protocol = f"scenes-{options.vocabulary}-{len(pictures)}{world_suffix(options.data)}"
    if distractors:
        protocol += f"-and-{len(distractors)}-absent-names"
    if options.synonyms:
        protocol += "-synonyms"

    def report(name: str, method: str | None, start: float, figures: dict[str, float]) -> None:
        seconds = time.perf_counter() - start
        print(name)
        for key, value in figures.items():
            print(f"{key:>24} {100 * value:6.1f}")
        if options.ledger is not None:
            ledger.append(
                options.ledger,
                command=shlex.join(["python", "examples/evaluate_scenes.py", *given]),
                seed=options.seed,
                seconds=seconds,
                figures=figures,
                protocol=protocol,
                method=method,
                name=name,
                weights=None if method is None else weights_digest(model),
            )

    if options.floors and not recorded(options.ledger, name=MAJORITY, protocol=protocol):
        report(MAJORITY, None, time.perf_counter(), majority_floor(pictures, vocabulary))
    start = time.perf_counter()
    figures = evaluate_scenes(
        model,
        processor,
        pictures,
        vocabulary,
        options.seed,
        floors=FLOORS if options.floors else FLOORS[:1],
        distractors=distractors,
        synonyms=options.synonyms,
        progress=lambda loader: tqdm(loader, desc="scenes", unit="picture"),
    )
    report(options.name or options.model, model.config.model_type, start, figures)


def recorded(path: Path | None, **match: str) -> bool:
    """Whether the ledger has such a line; the majority class is the same for every model."""
    if path is None or not path.exists():
        return False
    return any(all(entry.get(key) == value for key, value in match.items()) for entry in ledger.read(path))


if __name__ == "__main__":
    main()
