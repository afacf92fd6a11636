"""Recipes: a YAML file that says everything about a training run, as strict dataclasses.

Lengths are counted in optimizer steps, and `batch_size` is the number of pictures of one optimizer step, over all
processes and accumulated micro-batches: a recipe means the same on one process and on eight.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..strict_mapping import RecipeError, from_mapping, override
from .lora import LoRARecipe

# Fields that came later: recipes that do not use them keep their values and their hash.
LEFT_OUT = {"left_out_when_none": True}


@dataclass(frozen=True)
class ModelRecipe:
    """What is trained.

    Args:
        from_pretrained: folder or Hub id of a checkpoint of this package.
        from_clip: folder or Hub id of a CLIP; with `model_type`: an untrained model around it.
        from_sam: folder or Hub id of a SAM, beside `from_clip`, for the methods that hold one.
        model_type: the method (`san`, `sed`, ...); with neither of the above: random weights.
        config: configuration fields that differ from the defaults; nested.
        attention: attention implementation; training small models on a CPU, "eager" is twice as fast as "sdpa".
        trainable: what is trained: "method", what the method's `freeze_pretrained` leaves trainable, as its paper does;
            "adapter", what the method adds to CLIP; "prompts", learned tokens; "attention", weights of query and value
            projections; "lora", low-rank updates, merged into the weights at the end; "all", everything that the loss
            reaches. Or a list of these and of regular expressions, which stand for the parameters whose names they find
            (`re.search`). Not every method has every one; a message names those that it has.
        lora: rank and place of the low-rank updates; None: rank 8 in the method's usual places.
        activation_checkpointing: recompute activations in the backward pass to save memory.
    """

    from_pretrained: str | None = None
    from_clip: str | None = None
    from_sam: str | None = None
    model_type: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    attention: Literal["eager", "sdpa"] | None = None
    trainable: Literal["method", "adapter", "prompts", "attention", "lora", "all"] | list[str] = "method"
    activation_checkpointing: bool = False
    lora: LoRARecipe | None = field(default=None, metadata=LEFT_OUT)

    def __post_init__(self) -> None:
        if self.from_pretrained is not None and (self.from_clip or self.model_type):
            raise RecipeError("model.from_pretrained stands alone: the checkpoint says its method and holds its CLIP.")
        if self.from_pretrained is None and self.model_type is None:
            raise RecipeError(
                "model needs from_pretrained (a checkpoint of ours), or model_type with from_clip (around a CLIP), or "
                "model_type alone (random weights)."
            )
        if self.from_sam is not None and self.from_clip is None:
            raise RecipeError("model.from_sam needs model.from_clip beside it.")


@dataclass(frozen=True)
class ProcessorRecipe:
    """Tokenizer, templates and image processor.

    Args:
        tokenizer: folder or Hub id; "words": a small tokenizer made from the class names and templates, for models with
            random weights; None: that of `from_pretrained` or `from_clip`.
        templates: key of the package's `prompt_templates.json`, or a list of templates with `{}`; None: the method's.
        image_processor: attributes that differ from the method's defaults (`size`, `pad_multiple`, ...).
    """

    tokenizer: str | None = None
    templates: str | list[str] | None = None
    image_processor: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataRecipe:
    """A data set of pictures and label maps; see `ov_segmentation.data.datasets.load_segmentation_data`.

    Args:
        name: Hub id, folder for `load_dataset`, folder of `save_to_disk`, or folder with `images/` and `annotations/`.
        config_name: configuration of a Hub dataset.
        revision: its git revision.
        train_split, eval_split: names of splits; `eval_split` None: no evaluation.
        image_column, annotation_column: found automatically when None.
        class_names: list (a list inside it: synonyms), key of a packaged benchmark ("camvid_11"), or a JSON file;
            None: from the dataset's features.
        ignore_index: ids in the label maps that are no class; with `reduce_labels` the lowered ids, so that a file's
            255 is 254.
        reduce_labels: id 0 is ignored and every other id is lowered by one (ADE20K's files).
        regions_per_class: train on so many regions of each class, cut out, in place of whole pictures; see
            `ov_segmentation.data.regions`.
        train_samples: train on so many pictures of the split only, evenly spaced; None: on all.
        holdout: for data sets with one split: so many of its pictures, drawn by the seed, are not trained on but are
            what `eval_split` would be; that has to be null then.
    """

    name: str
    config_name: str | None = None
    revision: str | None = None
    train_split: str = "train"
    eval_split: str | None = "validation"
    image_column: str | None = None
    annotation_column: str | None = None
    class_names: str | list[str | list[str]] | None = None
    ignore_index: int | list[int] | None = None
    reduce_labels: bool = False
    regions_per_class: int | None = None
    train_samples: int | None = field(default=None, metadata=LEFT_OUT)
    holdout: int | None = field(default=None, metadata=LEFT_OUT)

    def __post_init__(self) -> None:
        for name in ("train_samples", "holdout"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RecipeError(f"data.{name} must be at least 1 or null, got {value}.")
        if self.holdout is not None and self.eval_split is not None:
            raise RecipeError(
                f"data.holdout takes {self.holdout} pictures of the training split for evaluation, but data.eval_split "
                f"is {self.eval_split!r}: set it to null, or leave holdout out."
            )


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters whose names the regular expression `pattern` finds (`re.search`); the first group that fits counts."""

    pattern: str
    lr_multiplier: float = 1.0
    weight_decay: float | None = None


@dataclass(frozen=True)
class OptimizerRecipe:
    """The optimizer. `groups` is ordered; parameters in none of them get `lr` and `weight_decay` as they are.

    `betas` and `eps` are AdamW's, `momentum` is SGD's.
    """

    lr: float
    name: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    groups: list[ParameterGroup] = field(default_factory=list)


@dataclass(frozen=True)
class ScheduleRecipe:
    """Learning rate over optimizer steps t of T, times (t + 1) / (`warmup_steps` + 1) in a linear warm-up; with
    `warmup_factor`, that factor alone during the warm-up.

    "poly": (1 - t/T)^power. "cosine": half a cosine to 0. "constant": 1 until `decay_from` (a share of T), then linear
    to 0.
    """

    name: Literal["poly", "cosine", "constant"] = "poly"
    power: float = 0.9
    warmup_steps: int = 0
    warmup_factor: float | None = None
    decay_from: float = 1.0


@dataclass(frozen=True)
class EvaluationRecipe:
    """Evaluation during training.

    Args:
        interval: optimizer steps between evaluations; the last step is always evaluated.
        max_samples: only the first so many pictures; None: all.
        averaging: rule of the mean IoU, see `ov_segmentation.metrics.ConfusionMatrix.compute`.
        patience: stop after so many evaluations without a better mean IoU; None: never.
        data: another data set (and vocabulary) to evaluate on; None: that of training. Where training has some of its
            class names and not all, mean IoU of these seen classes, of the others, and hIoU are reported too.
        at_start: evaluate before the first step too, so that what training gains is known, and a training that gains
            nothing exports what it began with (`export.weights` "best").
    """

    interval: int = 5000
    max_samples: int | None = None
    averaging: Literal["ground_truth", "union"] = "ground_truth"
    patience: int | None = None
    data: DataRecipe | None = None
    at_start: bool | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class CheckpointRecipe:
    """Optimizer steps between checkpoints, and how many of the latest are kept (the best one is kept besides)."""

    interval: int = 1000
    total_limit: int = 2


@dataclass(frozen=True)
class ExportRecipe:
    """The folder `model/` written at the end: weights of the last step or of the best evaluation, and their type."""

    weights: Literal["last", "best"] = "last"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


@dataclass(frozen=True)
class Recipe:
    """A training run.

    Args:
        steps: optimizer steps.
        batch_size: pictures per optimizer step, over all processes and micro-batches.
        accumulation: micro-batches per optimizer step. Losses are normalised over all of them, so that the gradient is
            that of one batch; what is drawn for a batch as a whole (SED's training classes, dropout) is drawn for each.
        clip_grad_norm: largest L2 norm of the gradient of all parameters; None: not clipped.
        augmentation: list of `{name: ..., ...}`, see `ov_segmentation.data.augmentation`.
        seed: every random draw follows from it: initial weights, order, augmentation, points in the loss, dropout.
        threads: CPU threads of each process; None: torch's choice. Bit-exact repetition needs the same number.
        num_workers: data-loading processes per training process.
        log_interval: optimizer steps between lines of the log.
        trackers: beside the JSON-lines log, which is always written: "tensorboard", or another that accelerate knows.
    """

    model: ModelRecipe
    data: DataRecipe
    optimizer: OptimizerRecipe
    steps: int
    batch_size: int
    accumulation: int = 1
    clip_grad_norm: float | None = None
    precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0
    processor: ProcessorRecipe = field(default_factory=ProcessorRecipe)
    augmentation: list[dict[str, Any]] = field(default_factory=list)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    export: ExportRecipe = field(default_factory=ExportRecipe)
    threads: int | None = None
    num_workers: int = 0
    log_interval: int = 20
    trackers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_lengths(self)
        if self.data.holdout is not None and self.evaluation.data is not None:
            raise RecipeError("data.holdout and evaluation.data both say what to evaluate on: leave one out.")


def check_lengths(recipe: Any) -> None:
    """Check the numbers of steps and pictures of a training recipe.

    Raises:
        RecipeError: one is less than 1, or a batch cannot be split into its micro-batches.
    """
    positive = {
        "steps": recipe.steps,
        "batch_size": recipe.batch_size,
        "accumulation": recipe.accumulation,
        "log_interval": recipe.log_interval,
        "evaluation.interval": recipe.evaluation.interval,
        "checkpoint.interval": recipe.checkpoint.interval,
        "checkpoint.total_limit": recipe.checkpoint.total_limit,
    }
    for name, value in positive.items():
        if value < 1:
            raise RecipeError(f"{name} must be at least 1, got {value}.")
    if recipe.evaluation.patience is not None and recipe.evaluation.patience < 1:
        raise RecipeError(f"evaluation.patience must be at least 1 or null, got {recipe.evaluation.patience}.")
    if recipe.batch_size % recipe.accumulation:
        raise RecipeError(
            f"batch_size {recipe.batch_size} must be a multiple of accumulation {recipe.accumulation}: it counts the "
            f"pictures of a whole optimizer step."
        )


# What a run may change between a stop and its continuation without being another experiment.
RUNTIME_FIELDS = ("num_workers", "trackers", "threads")


def load_recipe(path: str | Path, assignments: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with `key=value` overrides applied (dotted keys, YAML values).

    Raises:
        RecipeError: anything wrong in it, with its place.
        FileNotFoundError: no such file.
    """
    return from_mapping(Recipe, read_recipe(path, assignments))


def read_recipe(path: str | Path, assignments: Sequence[str] = ()) -> Any:
    """The values in a recipe file, with overrides applied; errors: see [`load_recipe`]."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No recipe at {path}. The ones that come with the project are in examples/recipes/.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    for assignment in assignments:
        override(values, assignment)
    return values


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON values, defaults included."""
    return json.loads(json.dumps(_values(recipe)))


def _values(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return [_values(item) for item in value] if isinstance(value, (list, tuple)) else value
    return {
        field.name: _values(getattr(value, field.name))
        for field in dataclasses.fields(value)
        if not (field.metadata == LEFT_OUT and getattr(value, field.name) is None)
    }


def recipe_hash(recipe: Recipe) -> str:
    """12 hex digits that name the experiment: the recipe without `RUNTIME_FIELDS`."""
    values = {key: value for key, value in recipe_values(recipe).items() if key not in RUNTIME_FIELDS}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def differences(first: dict[str, Any], second: dict[str, Any], where: str = "") -> list[str]:
    """Dotted keys in which two recipes differ, `RUNTIME_FIELDS` aside."""
    found = []
    for key in sorted({*first, *second}):
        place = f"{where}.{key}" if where else key
        if place in RUNTIME_FIELDS or first.get(key) == second.get(key):
            continue
        if isinstance(first.get(key), dict) and isinstance(second.get(key), dict):
            found += differences(first[key], second[key], place)
        else:
            found.append(place)
    return found
