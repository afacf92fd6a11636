"""A recipe for a trained model and a few pictures of one's own: what `examples/finetune.py` and the notebook start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import clear_environment
from transformers import AutoConfig, AutoProcessor

from ..auto import AutoModelForOpenVocabularySegmentation
from ..data.datasets import load_segmentation_data
from ..data.labelled_pictures import SegmentationData
from ..download_errors import loading_explained
from ..evaluation.prediction import evaluate
from ..metrics import SegmentationScores
from ..strict_mapping import RecipeError, from_mapping
from .building import build_model_and_processor, check_trained_to_segment
from .recipe import Recipe

EVALUATION_SPLITS = ("validation", "val", "test")
HELD_OUT = 0.2
"""Share of the pictures that early stopping looks at, where the data set has no split for it."""
EVALUATIONS = 10
"""How often a run is scored; it stops after `PATIENCE` scores without a better one."""
PATIENCE = 4


def fine_tuning_recipe(
    model: str | Path,
    data: str | Path,
    *,
    class_names: str | Sequence[str | list[str]] | None = None,
    ignore_index: int | Sequence[int] | None = None,
    image_column: str | None = None,
    annotation_column: str | None = None,
    reduce_labels: bool = False,
    trainable: str | Sequence[str] = "adapter",
    pictures: int | None = None,
    short_side: int | None = None,
    steps: int = 300,
    batch_size: int = 4,
    learning_rate: float = 1e-4,
    seed: int = 0,
    threads: int | None = None,
    precision: str = "no",
) -> Recipe:
    """A recipe that fine-tunes a checkpoint, keeps its best weights and stops when they get no better.

    Where the data set has no split named in `EVALUATION_SPLITS`, or with `pictures`, a fifth of the training pictures
    is held out and not trained on.

    Args:
        model: folder or Hub id of a checkpoint of this package, of any method.
        data, class_names, ignore_index, image_column, annotation_column, reduce_labels: see
            [`ov_segmentation.data.datasets.load_segmentation_data`].
        trainable: see `ModelRecipe.trainable`.
        pictures: use so many pictures of the training split only, a fifth of them held out.
        short_side: of the pictures, in training and ever after; None: what the checkpoint's image processor does.
        steps, batch_size, learning_rate, seed, threads, precision: see `Recipe`.

    Raises:
        RecipeError: fewer than two pictures, or a checkpoint that needs no training.
        FileNotFoundError, ValueError: a data set that cannot be used.
    """
    columns = {"image_column": image_column, "annotation_column": annotation_column, "reduce_labels": reduce_labels}
    found = load_segmentation_data(data, class_names=class_names, ignore_index=ignore_index, **columns)
    train_split = "train" if "train" in found.splits else next(iter(found.splits))
    available = len(found.split(train_split))
    used = available if pictures is None else min(pictures, available)
    others = [split for split in EVALUATION_SPLITS if split in found.splits and split != train_split]
    eval_split = others[0] if others and pictures is None else None
    if used < 2:
        raise RecipeError(f"{data} has {used} labelled picture(s) in split {train_split!r}; fine-tuning takes two.")
    with loading_explained(model):
        check_trained_to_segment(str(model), AutoConfig.from_pretrained(model))
        size = AutoProcessor.from_pretrained(model).image_processor.size
    side = short_side or size.get("shortest_edge") or min(size["height"], size["width"])
    window = {"height": side, "width": side * 4 // 3}
    longest = {} if size.get("longest_edge") is None else {"longest_edge": max(size["longest_edge"], 4 * side)}
    processor = {"image_processor": {"size": {"shortest_edge": side, **longest}}} if short_side else {}
    values: dict[str, Any] = {
        "model": {
            "from_pretrained": str(model),
            "trainable": trainable if isinstance(trainable, str) else list(trainable),
        },
        "processor": processor,
        "data": {
            "name": str(data),
            "train_split": train_split,
            "eval_split": eval_split,
            "class_names": class_names if class_names is None or isinstance(class_names, str) else list(class_names),
            "ignore_index": list(ignore_index) if isinstance(ignore_index, Sequence) else ignore_index,
            **columns,
            "train_samples": pictures,
            "holdout": max(1, round(HELD_OUT * used)) if eval_split is None else None,
        },
        "augmentation": [
            {"name": "resize_short_side", "size_range": [side, side * 3 // 2]},
            {"name": "random_crop", **window},
            {"name": "colour_jitter"},
            {"name": "horizontal_flip"},
            {"name": "pad_to_size", **window},
        ],
        "optimizer": {"lr": learning_rate},
        "schedule": {"name": "poly", "warmup_steps": steps // 20},
        "steps": steps,
        "batch_size": batch_size,
        "clip_grad_norm": 1.0,
        "precision": precision,
        "seed": seed,
        "threads": threads,
        "evaluation": {"interval": max(1, steps // EVALUATIONS), "patience": PATIENCE, "at_start": True},
        "checkpoint": {"interval": max(1, steps // EVALUATIONS)},
        "export": {"weights": "best"},
    }
    return from_mapping(Recipe, values)


def score_before_and_after(
    recipe: Recipe, exported: str | Path, split: str, max_samples: int | None = None
) -> tuple[SegmentationScores, SegmentationScores, list[str]]:
    """Scores on a split that the run had no part in: of the checkpoint it began with, and of what it exported. Whatever
    trained, one process scores, by itself.

    Args:
        recipe: of [`fine_tuning_recipe`].
        exported: the run's folder `model/`.
        split: of the recipe's data set.
        max_samples: only the first so many pictures.

    Returns:
        before, after, and the class names.

    Raises:
        ValueError: no such split.
    """
    data: SegmentationData = load_segmentation_data(
        recipe.data.name,
        class_names=recipe.data.class_names,
        ignore_index=recipe.data.ignore_index,
        image_column=recipe.data.image_column,
        annotation_column=recipe.data.annotation_column,
        reduce_labels=recipe.data.reduce_labels,
    )
    pictures = data.split(split, max_samples)
    on_cpu = PartialState().device.type == "cpu"
    # the group of processes that trained is over and cannot be had again
    AcceleratorState._reset_state(reset_partial_state=True)
    with clear_environment():
        accelerator = Accelerator(cpu=on_cpu)
    scores = []
    for source in (None, exported):
        if source is None:
            model, processor = build_model_and_processor(recipe, [])
        else:
            model = AutoModelForOpenVocabularySegmentation.from_pretrained(source)
            processor = AutoProcessor.from_pretrained(source)
        scores.append(evaluate(model.to(accelerator.device), processor, pictures, accelerator))
    return scores[0], scores[1], data.vocabulary.labels


__all__ = ["fine_tuning_recipe", "score_before_and_after"]
