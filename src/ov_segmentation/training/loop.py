"""Training of the methods: recipe in, folder with log, checkpoints and an exported model out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.augmentation import build_augmentations
from ..data.datasets import load_segmentation_data
from ..data.labelled_pictures import LabelledPictures, SegmentationData
from ..data.regions import RegionPictures
from ..evaluation.prediction import evaluate
from ..strict_mapping import RecipeError
from .building import build_model_and_processor
from .data_loading import BatchMaker, TrainingSamples
from .lora import LoRARecipe, merge_lora
from .randomness import HOLDOUT, derive_generator
from .recipe import DataRecipe, Recipe
from .run import TrainingRun
from .termination import Terminated


def train(recipe: Recipe, output: str | Path, resume: str = "auto", command: str = "") -> dict[str, Any]:
    """Train, or continue training, and export the model.

    Args:
        recipe: what to do.
        output: the run's folder: `recipe.yaml`, `log.jsonl`, `checkpoints/`, and at the end `model/` (model and
            processor, loadable by `pipeline`) and `result.json`.
        resume: "auto" continues from the last checkpoint in `output`, if there is one; "never" wants an empty folder.
        command: shell command of the run, recorded in the exported weights.

    Returns:
        The run's figures, as in `result.json`.

    Raises:
        RunFolderError: `output` belongs to another recipe, or is not empty with resume="never".
        RecipeError, CheckpointError, ValueError: with the place and what to do.
        Terminated: SIGTERM or Ctrl-C came; everything is saved.
    """
    return SegmentationRun(recipe, Path(output), resume).execute(command)


class SegmentationRun(TrainingRun):
    """A run of [`train`]: a method on pictures and label maps, scored by its mean IoU."""

    score_name = "miou"

    def prepare(self) -> None:
        """Load the data; build model and processor."""
        recipe = self.recipe
        data = load_data(recipe.data, recipe.model.model_type)
        self.pictures, held_out = training_pictures(data, recipe.data, recipe.seed)
        self.evaluation_pictures = self._evaluation_pictures(data) if held_out is None else held_out
        self.evaluates = self.evaluation_pictures is not None
        vocabularies = [data.vocabulary, *([p.data.vocabulary] if (p := self.evaluation_pictures) else [])]
        self.model, self.processor = build_model_and_processor(recipe, vocabularies)
        self.trained = self.model
        if recipe.data.regions_per_class is not None:
            self.pictures = RegionPictures(self.pictures, recipe.data.regions_per_class, recipe.seed)
        self.samples = TrainingSamples(self.pictures, build_augmentations(recipe.augmentation), recipe.seed)
        self.make_batch = BatchMaker(self.processor.image_processor)

    def constant_inputs(self) -> dict[str, torch.Tensor]:
        """The training classes: their texts, or, where the text side is frozen, their embeddings, made once."""
        text = self.processor(text=self.pictures.data.vocabulary, return_tensors="pt").to(self.accelerator.device)
        return dict(text) if self.model.trains_text else {"text_embeds": self.model.encode_vocabulary(**text)}

    def exported_weights(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Low-rank updates are merged: what is exported needs no peft."""
        return merge_lora(weights, (self.recipe.model.lora or LoRARecipe()).scaling)

    def describe_data(self) -> str:
        """Numbers of pictures and classes."""
        return f"{len(self.pictures):,} pictures of {len(self.pictures.data.vocabulary)} classes"

    def class_names_shown(self) -> list[str]:
        """The training data's."""
        return list(self.pictures.data.vocabulary.labels)

    def evaluate(self) -> dict[str, Any]:
        """Mean IoU and its parts on the evaluation split; of seen and unseen classes where there are both."""
        scores = evaluate(
            self.model,
            self.processor,
            self.evaluation_pictures,
            self.accelerator,
            averaging=self.recipe.evaluation.averaging,
            seen=self._seen_classes(),
            num_workers=self.recipe.num_workers,
            progress=self._bar("evaluating"),
        )
        return scores.figures()

    def _seen_classes(self) -> list[int] | None:
        """Classes of the evaluation that training has by the same name; None: all or none, which is no split."""
        trained = set(self.class_names_shown())
        labels = self.evaluation_pictures.data.vocabulary.labels
        seen = [index for index, label in enumerate(labels) if label in trained]
        return seen if 0 < len(seen) < len(labels) else None

    def _evaluation_pictures(self, data: SegmentationData) -> LabelledPictures | None:
        recipe = self.recipe.evaluation
        if recipe.data is not None:
            data = load_data(recipe.data, self.recipe.model.model_type)
        split = (recipe.data or self.recipe.data).eval_split
        return None if split is None else data.split(split, recipe.max_samples)


def training_pictures(
    data: SegmentationData, recipe: DataRecipe, seed: int
) -> tuple[LabelledPictures, LabelledPictures | None]:
    """What is trained on, and what is held out of it for evaluation (None: nothing).

    Raises:
        RecipeError: nothing would be left to train on.
    """
    pictures = data.split(recipe.train_split)
    if recipe.train_samples is not None and recipe.train_samples < len(pictures):
        pictures = pictures.select(np.linspace(0, len(pictures) - 1, recipe.train_samples).round().astype(int))
    if recipe.holdout is None:
        return pictures, None
    if recipe.holdout >= len(pictures):
        raise RecipeError(f"data.holdout: {recipe.holdout} of {len(pictures)} pictures leave none to train on.")
    order = derive_generator(seed, HOLDOUT).permutation(len(pictures))
    return pictures.select(np.sort(order[recipe.holdout :])), pictures.select(np.sort(order[: recipe.holdout]))


def load_data(recipe: DataRecipe, protocol: str | None) -> SegmentationData:
    """The data set of a recipe."""
    return load_segmentation_data(
        recipe.name,
        config_name=recipe.config_name,
        revision=recipe.revision,
        image_column=recipe.image_column,
        annotation_column=recipe.annotation_column,
        class_names=recipe.class_names,
        protocol=protocol,
        ignore_index=recipe.ignore_index,
        reduce_labels=recipe.reduce_labels,
    )


__all__ = ["SegmentationRun", "Terminated", "load_data", "train"]
