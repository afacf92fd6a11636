"""Training of a small Segment Anything on the regions of synthetic scenes, whatever their class.

Source: Kirillov et al., "Segment Anything" (2023), section 3 and appendix A: three masks for a prompt, of which only
the best is trained, focal (without class weights) and dice loss 20 : 1, and a head that learns the masks' IoU. In place
of its rounds of corrected prompts every step draws one kind of prompt: points, a box, or a point and a rough mask.

What minutes on a CPU need beside that is in `sam_initialization.py` and in averaged weights (EMA).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import SamConfig, SamModel

from .sam_evaluation import evaluate_sam
from .sam_initialization import init_for_short_training
from .sam_prompts import ask, draw_prompts, mask_iou, scene_regions
from .scene_training import SceneRecipe, SceneTraining

# kinds of prompts in the steps of a training: masks are learnt first
ROUND = ("points", "box", "points", "box", "mask")
FOCAL_WEIGHT, DICE_WEIGHT, IOU_WEIGHT = 20.0, 1.0, 1.0
FOCAL_GAMMA = 2
NUM_POINTS = 3


@dataclass(frozen=True, kw_only=True)
class SamRecipe(SceneRecipe):
    """What a recipe file holds, beside what [`SceneRecipe`] says; samples are scenes, of the size of SAM's input.

    Args:
        model: sub-configurations of `SamConfig`.
        prompts_per_scene: prompts for each scene of a step.
        log_every: steps between lines of the log.
        eval_every: steps between evaluations on a quarter of the scenes.
    """

    tiers: tuple[str, ...] = ("a",)
    batch_size: int = 16
    prompts_per_scene: int = 4
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    decay_fraction: float = 0.5
    log_every: int = 50
    checkpoint_every: int = 50
    eval_every: int = 250
    eval_scenes: int = 256


def build_sam(recipe: SamRecipe) -> SamModel:
    """The untrained model of a recipe."""
    config = SamConfig(**recipe.model)
    config.vision_config.initializer_range = config.initializer_range
    model = SamModel(config)
    init_for_short_training(model)
    model.set_attn_implementation(recipe.attention)
    return model


def sam_loss(logits: torch.Tensor, predicted_iou: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Focal and dice loss of each prompt's best mask, and the squared error of all predicted IoU.

    Args:
        logits: `[n, 3, m, m]`.
        predicted_iou: `[n, 3]`.
        targets: bool `[n, S, S]`.
    """
    wanted = F.interpolate(targets[:, None].float(), logits.shape[-2:], mode="area").expand_as(logits)
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    hit = probability * wanted + (1 - probability) * (1 - wanted)
    focal = ((1 - hit) ** FOCAL_GAMMA * entropy).mean((-2, -1))
    shared = (probability * wanted).sum((-2, -1))
    dice = 1 - (2 * shared + 1) / (probability.sum((-2, -1)) + wanted.sum((-2, -1)) + 1)
    masks = (FOCAL_WEIGHT * focal + DICE_WEIGHT * dice).amin(1).mean()
    found = mask_iou(logits.detach() > 0, wanted > 0.5)
    return masks + IOU_WEIGHT * F.mse_loss(predicted_iou, found)


class SamTraining(SceneTraining):
    """Training of a SAM on all regions of scenes."""

    samples = "scenes"

    def build_model(self) -> SamModel:
        """The recipe's SAM."""
        return build_sam(self.recipe)

    def loss(self, step: int) -> torch.Tensor:
        """Loss of the masks of one kind of prompt."""
        recipe = self.recipe
        generator = torch.Generator().manual_seed(self.step_seed(step))
        batch = self.scenes.render(step * recipe.batch_size, recipe.batch_size)
        kind = ROUND[step % len(ROUND)]
        points = int(torch.randint(1, NUM_POINTS + 1, (), generator=generator))
        prompts = draw_prompts(scene_regions(batch), recipe.prompts_per_scene, points, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast is not None):
            logits, predicted_iou = ask(self.model, batch.images, prompts, kind)
        return sam_loss(logits, predicted_iou, prompts.targets.flatten(0, 1))

    def figures(self, step: int, is_last: bool) -> dict[str, Any]:
        """Those of [`evaluate_sam`], in some of the lines."""
        if not is_last and step % self.recipe.eval_every:
            return {}
        return evaluate_sam(self.average, self.test_scenes, self.recipe.eval_scenes // (1 if is_last else 4))

    def save(self, output: Path) -> None:
        """Write the model."""
        self.average.save_pretrained(output)


def train_sam(recipe: SamRecipe, output: str | Path, seed: int = 0, progress_bar: bool = True) -> dict[str, Any]:
    """Train, evaluate and save a SAM (`SamModel.from_pretrained`).

    Args:
        recipe: what to train.
        seed: of weights, scenes and prompts.
        output, progress_bar: see [`SceneTraining.run`], which also says what is returned and raised.
    """
    return SamTraining(recipe, seed).run(output, recipe.log_every, progress_bar=progress_bar)
