"""OVSeg's whole chain on synthetic scenes: `python examples/ovseg_on_scenes.py --output runs/ovseg_scenes`.

Scenes and a CLIP that was trained on their captions (made if they are not there), a MaskFormer around it, pairs of crop
and noun phrase mined with both, and CLIP adapted to them three ways: prompts, fine-tuning, and prompts on top of
fine-tuning. Before and after: accuracy on masked crops, and mean IoU of the whole model on scenes. `--ledger FILE`
records them. What is there already is not done again, so the same command continues after a stop. `--seed` reaches
whatever is made here: scenes, CLIP, weights, order and augmentation of each training. Each seed needs an `--output`.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from transformers import AutoProcessor

from ov_segmentation import AutoModelForOpenVocabularySegmentation, ledger
from ov_segmentation.atomic_files import write_atomically
from ov_segmentation.data.datasets import load_segmentation_data
from ov_segmentation.data.labelled_pictures import LabelledPictures
from ov_segmentation.data.mask_pairs import load_mask_pairs
from ov_segmentation.data.mining import MiningOptions, PairMiner
from ov_segmentation.data.mining_run import MiningError, MiningRun, SourcePictures, settings_of
from ov_segmentation.data.nouns import find_tagger
from ov_segmentation.data.scene_folders import EVALUATION_FOLDER, TRAIN_FOLDER, write_scenes
from ov_segmentation.data.scene_vocabulary import SceneVocabulary
from ov_segmentation.training.adaptation_recipe import load_adaptation_recipe
from ov_segmentation.training.checkpointing import CheckpointError
from ov_segmentation.training.contrastive import ContrastiveRecipe, train_clip
from ov_segmentation.training.loop import train
from ov_segmentation.training.mask_adaptation import adapt
from ov_segmentation.training.masked_crop_accuracy import masked_crop_accuracy
from ov_segmentation.training.recipe import load_recipe
from ov_segmentation.training.run_folder import RunFolder, RunFolderError
from ov_segmentation.training.scene_evaluation import evaluate_scenes
from ov_segmentation.vocabulary import Vocabulary

RECIPES = Path(__file__).parent / "recipes"


class Adaptation(NamedTuple):
    """A way of adapting CLIP: the model it starts from, and changes of the recipe."""

    start: str
    changes: list[str]


# One level of prompts for CLIP's 4 blocks, as the paper has three for 12 or 24. The temperature is trained beside them:
# with their learning rate it would be halved before they have learned anything.
PROMPTS = [
    "train_clip=false",
    "prompts={use: trained, depth: 1}",
    "optimizer.lr=0.01",
    "optimizer.weight_decay=0.0",
    "optimizer.groups=[{pattern: logit_scale, lr_multiplier: 0.01}]",
]
ADAPTATIONS = {
    "fine_tuned": Adaptation("maskformer", []),
    "prompts": Adaptation("maskformer", PROMPTS),
    "both": Adaptation("fine_tuned", PROMPTS),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run what is not done yet."""
    options = parse(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        run(options, shlex.join(["python", "examples/ovseg_on_scenes.py", *given]))
    except (RunFolderError, CheckpointError, MiningError, FileNotFoundError, ValueError) as error:
        # the message says what to do; a traceback would bury it
        sys.exit(f"{type(error).__name__}: {error}")


def run(options: argparse.Namespace, command: str) -> None:
    """All steps, in their order."""
    code = ledger.revision()  # now: the checkout may move on meanwhile
    output, scenes = options.output, options.scenes or options.output / "scenes"
    if not list((scenes / EVALUATION_FOLDER).rglob("*.parquet")):
        write_scenes(
            scenes, options.train, options.evaluation, options.seed, vocabulary=SceneVocabulary.small(), size=96
        )
    clip = options.clip
    if clip is None:
        clip = output / "clip"
        recipe = ContrastiveRecipe.from_yaml(RECIPES / "clip_vit_scenes.yaml", steps=options.clip_steps)
        # which does nothing where that is done, and refuses a folder of another recipe or seed
        train_clip(recipe, clip, options.seed)
    changes = [f"seed={options.seed}", f"threads={options.threads}"]
    steps = [] if options.steps is None else [f"steps={options.steps}"]
    places = [f"model.from_clip={clip}", f"data.name={scenes / TRAIN_FOLDER}"]
    recipe = load_recipe(RECIPES / "ovseg_scenes.yaml", [*changes, *places, *steps])
    models = {"maskformer": trained(train, recipe, output / "maskformer", command)}
    # this CLIP chooses a mask that is not the noun's for one noun in four, mostly where the cosine is low
    captions = MiningOptions(phrases=True, min_area=0.003, min_score=options.min_score)
    mine(models["maskformer"], scenes / TRAIN_FOLDER, "train", captions, output / "pairs", options.train_pictures)
    classes = MiningOptions(masks="annotation", nouns="classes", min_area=0.003)
    mine(models["maskformer"], scenes / EVALUATION_FOLDER, "validation", classes, output / "crops", None)
    steps = [] if options.adaptation_steps is None else [f"steps={options.adaptation_steps}"]
    pairs = [f"data.sources=[{output / 'pairs'}]", f"data.evaluation={output / 'crops'}"]
    for name, (start, own_changes) in ADAPTATIONS.items():
        changed = [*changes, f"model.from_pretrained={models[start]}", *pairs, *steps, *own_changes]
        recipe = load_adaptation_recipe(RECIPES / "ovseg_scenes_clip.yaml", changed)
        models[name] = trained(adapt, recipe, output / name, command)
    pictures = load_segmentation_data(scenes / EVALUATION_FOLDER).split("validation", options.max_evaluation)
    protocol = f"scenes-small-{len(pictures)}"
    for name, folder in models.items():
        start, file = time.perf_counter(), folder.parent / f"{protocol}.json"
        if file.is_file():  # measured before the stop
            report(name, json.loads(file.read_text()))
            continue
        figures = measure(folder, pictures, output / "crops", options.seed)
        report(name, figures)
        if options.ledger is not None:
            ledger.append(
                options.ledger,
                command=command,
                seed=options.seed,
                seconds=time.perf_counter() - start,
                figures=figures,
                protocol=protocol,
                code=code,
                method="ovseg",
                name=f"ovseg_scenes_{name}",
            )
        write_atomically(file, json.dumps(figures, indent=1))


def trained(training: Callable[..., Any], recipe: Any, folder: Path, command: str) -> Path:
    """Train by a recipe unless that is done; the folder of another recipe, or of another seed, is refused."""
    own = RunFolder(folder)
    own.claim(recipe, "auto")
    if not own.model.is_dir():
        training(recipe, folder, command=command)
    return own.model


def report(name: str, figures: dict[str, float]) -> None:
    """Print a row."""
    print(f"{name:>12}  " + "  ".join(f"{key} {value:.3f}" for key, value in figures.items()))


def mine(model: Path, data: Path, split: str, options: MiningOptions, output: Path, max_pictures: int | None) -> None:
    """Mine pairs with a model's CLIP as it was before any adaptation."""
    pictures = SourcePictures(data, split, options)
    tagger_name, tagger = find_tagger("textblob") if options.nouns == "caption" else (None, None)
    number = len(pictures) if max_pictures is None else min(max_pictures, len(pictures))
    run = MiningRun(output, settings_of(options, data=str(data), split=split, tagger=tagger_name), number)
    run.claim()
    if run.summary()["shards_missing"]:
        network, processor = load(model)
        run.work(pictures, PairMiner(network, processor, options, tagger, pictures.class_names))
    print(f"{output}: {run.summary()}")


def load(folder: Path) -> tuple[Any, Any]:
    """A model, in evaluation mode, and its processor."""
    model = AutoModelForOpenVocabularySegmentation.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def measure(folder: Path, pictures: LabelledPictures, crops: Path, seed: int) -> dict[str, float]:
    """Accuracy on masked crops among all names, and mean IoU by tier of things and stuff."""
    model, processor = load(folder)
    vocabulary = SceneVocabulary.small()
    pairs = load_mask_pairs(crops, max_samples=5 * len(pictures))
    accuracy = masked_crop_accuracy(model, processor, pairs, Vocabulary(vocabulary.names), Accelerator())
    figures = {f"crops_{name}": value for name, value in accuracy.items()}
    figures |= evaluate_scenes(model, processor, pictures, vocabulary, seed)
    # a tier that few scenes do not show has no figure
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/ovseg_scenes"), help="folder of all steps")
    parser.add_argument("--scenes", type=Path, help="folder that examples/make_scenes.py wrote")
    parser.add_argument("--clip", type=Path, help="folder that examples/train_clip.py wrote")
    parser.add_argument("--train", type=int, default=4000, help="training scenes, where they are made")
    parser.add_argument("--evaluation", type=int, default=400, help="evaluation scenes, where they are made")
    parser.add_argument("--train-pictures", type=int, default=2000, help="scenes that pairs are mined from")
    parser.add_argument("--min-score", type=float, default=0.3, help="smallest cosine of a mined crop and its noun")
    parser.add_argument("--max-evaluation", type=int, default=200, help="scenes of the last measurements")
    parser.add_argument("--clip-steps", type=int, help="in place of the recipe's")
    parser.add_argument("--steps", type=int, help="of MaskFormer, in place of the recipe's")
    parser.add_argument("--adaptation-steps", type=int, help="in place of the recipe's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ledger", type=Path, help="JSON-lines file to append the figures to")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
