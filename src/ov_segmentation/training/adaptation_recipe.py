"""Recipes for adapting OVSeg's CLIP to masked crops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..strict_mapping import RecipeError, from_mapping
from .recipe import (
    LEFT_OUT,
    CheckpointRecipe,
    ExportRecipe,
    ModelRecipe,
    OptimizerRecipe,
    ProcessorRecipe,
    ScheduleRecipe,
    check_lengths,
    read_recipe,
)


@dataclass(frozen=True)
class PairsRecipe:
    """Pairs of masked crop and noun; see `ov_segmentation.data.mask_pairs.load_mask_pairs`.

    Args:
        sources: what to train on: datasets, tables or class folders.
        split: of datasets.
        probabilities: shares of several sources; None: all of each.
        evaluation: a source of crops whose nouns are class names; None: no evaluation.
        evaluation_split: of a dataset.
        class_names: names that the evaluation chooses from: a packaged benchmark, a JSON file or a list; None: the
            nouns of the evaluation's crops.
        max_evaluation_samples: only the first so many; None: all.
    """

    sources: list[str]
    split: str = "train"
    probabilities: list[float] | None = None
    evaluation: str | None = None
    evaluation_split: str = "train"
    class_names: str | list[str | list[str]] | None = None
    max_evaluation_samples: int | None = None


@dataclass(frozen=True)
class PromptsRecipe:
    """The visual prompts.

    Args:
        use: "none": CLIP alone (fine-tuning; the result is a model without prompts); "frozen": they are used as they
            are; "trained".
        kind, depth, number: of new prompts, made where the model has none of this kind and size; see `OVSegConfig`.
            None keeps the model's depth and number.
        fresh: new ones in any case.
    """

    use: Literal["none", "frozen", "trained"] = "none"
    kind: Literal["mask", "deep"] = "mask"
    depth: int | None = None
    number: int | None = None
    fresh: bool = False


@dataclass(frozen=True)
class IntervalRecipe:
    """Optimizer steps between evaluations; stop after `patience` of them without a gain (None: never).

    `at_start`: evaluate before the first step too, see `ov_segmentation.training.recipe.EvaluationRecipe`.
    """

    interval: int = 1000
    patience: int | None = None
    at_start: bool | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class AdaptationRecipe:
    """A run of mask adaptation. What is not described here: see `ov_segmentation.training.recipe.Recipe`.

    Fine-tuning is `train_clip: true`; mask prompt tuning `train_clip: false` with `prompts: {use: trained}`; either can
    start from the other's result, and both can be trained at once (paper, Table 5).

    Args:
        model: an OVSeg model of ours, or a CLIP with `model_type: ovseg` (an untrained proposal network around it).
        train_clip: CLIP's image side is trained; its text side never is.
        template: the text of a noun; the original puts nouns into none.
        equal_nouns: "negatives": crops of one batch with equal nouns are each other's negatives, as in the original;
            "ignored": they are left out of each other's sums.
        gather_with_gradient: gradients of all processes' features, so that several processes equal one. False: of the
            own ones only, as the original has it: the gradient is then 1/processes as large.
        crop_scale, crop_ratio: share and aspect ratio of the part of a crop that is seen, drawn anew each time.
        steps, batch_size: as ever; the contrastive loss runs over the pairs of a micro-batch of all processes.
    """

    model: ModelRecipe
    data: PairsRecipe
    optimizer: OptimizerRecipe
    steps: int
    batch_size: int
    train_clip: bool
    prompts: PromptsRecipe = field(default_factory=PromptsRecipe)
    template: str = "{}"
    equal_nouns: Literal["negatives", "ignored"] = "negatives"
    gather_with_gradient: bool = True
    crop_scale: tuple[float, float] = (0.9, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    accumulation: int = 1
    clip_grad_norm: float | None = None
    precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0
    processor: ProcessorRecipe = field(default_factory=ProcessorRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    evaluation: IntervalRecipe = field(default_factory=IntervalRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    export: ExportRecipe = field(default_factory=ExportRecipe)
    threads: int | None = None
    num_workers: int = 0
    log_interval: int = 20
    trackers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.train_clip and self.prompts.use != "trained":
            raise RecipeError("Nothing to train: set train_clip, or prompts.use to 'trained', or both.")
        if self.template.count("{}") != 1:
            raise RecipeError(f"template needs one {{}} for the noun, got {self.template!r}.")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise RecipeError(f"crop_scale must rise within (0, 1], got {list(self.crop_scale)}.")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise RecipeError(f"crop_ratio must rise and be positive, got {list(self.crop_ratio)}.")
        check_lengths(self)


def load_adaptation_recipe(path: str | Path, assignments: Sequence[str] = ()) -> AdaptationRecipe:
    """Read a recipe, with `key=value` overrides applied; errors as `load_recipe`'s."""
    return from_mapping(AdaptationRecipe, read_recipe(path, assignments))
