"""Training of a small Segment Anything on the regions of synthetic scenes, whatever their class.

Source: Kirillov et al., "Segment Anything" (2023), section 3 and appendix A: three masks for a prompt, of which only
the best is trained, focal (without class weights) and dice loss 20 : 1, and a head that learns the masks' IoU. In place
of its rounds of corrected prompts every step draws one kind of prompt: points, a box, or a point and a rough mask.

What minutes on a CPU need beside that is in `sam_initialization.py` and in averaged weights (EMA).
"""

from __future__ import annotations

import copy
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import SamConfig, SamModel

from ..data.scene_vocabulary import SceneVocabulary
from ..data.scenes import SceneGenerator
from ..strict_mapping import from_mapping
from .contrastive import learning_rate_factor, parameter_groups, write_log
from .one_file_checkpoint import OneFileFolder
from .run import TERMINATED, Terminated, termination_flag
from .sam_evaluation import evaluate_sam
from .sam_initialization import init_for_short_training
from .sam_prompts import ask, draw_prompts, mask_iou, scene_regions

# kinds of prompts in the steps of a training: masks are learnt first
ROUND = ("points", "box", "points", "box", "mask")
FOCAL_WEIGHT, DICE_WEIGHT, IOU_WEIGHT = 20.0, 1.0, 1.0
FOCAL_GAMMA = 2
NUM_POINTS = 3


@dataclass(frozen=True)
class SamRecipe:
    """What a recipe file holds.

    Args:
        model: sub-configurations of `SamConfig`.
        vocabulary: "small" or "full" scene vocabulary.
        tiers: tiers of the training scenes.
        geometry: "easy" or "hard" scenes.
        scene_size: side of a scene in pixels, also SAM's input.
        steps: optimiser steps.
        batch_size: scenes in a step.
        prompts_per_scene: prompts for each scene of a step.
        learning_rate, weight_decay, betas, max_grad_norm: AdamW; the decay applies to matrices only.
        warmup_steps: steps of linear warm-up.
        decay_fraction: last part of the training in which the rate falls linearly to 0.
        ema_decay: decay of the averaged weights, which are the ones that are evaluated and saved.
        attention: attention implementation while training; "eager" is twice as fast on a CPU.
        autocast: None or "bfloat16".
        log_every: steps between lines of the log.
        checkpoint_every: steps between checkpoints, from which a run continues; changes no result.
        eval_every: steps between evaluations on a quarter of the scenes.
        eval_scenes: scenes of the evaluation.
    """

    model: dict[str, Any]
    vocabulary: str = "small"
    tiers: tuple[str, ...] = ("a",)
    geometry: str = "easy"
    scene_size: int = 96
    steps: int = 1200
    batch_size: int = 16
    prompts_per_scene: int = 4
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    warmup_steps: int = 50
    decay_fraction: float = 0.5
    ema_decay: float = 0.99
    attention: str = "eager"
    autocast: str | None = None
    log_every: int = 50
    checkpoint_every: int = 50
    eval_every: int = 250
    eval_scenes: int = 256

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> SamRecipe:
        """Read a recipe; `overrides` that are not None win. `RecipeError` says what is wrong."""
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return from_mapping(cls, {**values, **{key: value for key, value in overrides.items() if value is not None}})


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


def train_sam(recipe: SamRecipe, output: str | Path, seed: int = 0, progress_bar: bool = True) -> dict[str, Any]:
    """Train, evaluate and save a SAM; equal arguments give equal weights on one machine.

    A run that was killed, or stopped by SIGTERM, continues from its last checkpoint, to the same bits; one that is over
    is not done again.

    Args:
        recipe: what to train.
        output: folder for the model (`SamModel.from_pretrained`), recipe and log (`train_log.jsonl`).
        seed: of weights, scenes and prompts.
        progress_bar: show one.

    Returns:
        The last line of the log: step, seconds (wall clock, and of the processor), loss and figures of
        [`evaluate_sam`].

    Raises:
        RunFolderError: `output` holds a run of another recipe.
        CheckpointError: a checkpoint could not be written or read.
        Terminated: SIGTERM came; everything is saved.
    """
    output = Path(output)
    identity = {**asdict(recipe), "seed": seed}
    del identity["checkpoint_every"]
    folder = OneFileFolder(output, identity)
    result = folder.claim()
    if result is not None:
        return result
    torch.manual_seed(seed)
    model = build_sam(recipe).train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    options = {"size": recipe.scene_size, "geometry": recipe.geometry}
    vocabulary = SceneVocabulary.by_name(recipe.vocabulary)
    # as for CLIP: even seeds are for training, odd ones for evaluation
    scenes = SceneGenerator(vocabulary, seed=2 * seed, tiers=recipe.tiers, **options)
    groups = parameter_groups(model, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas)
    parts = {"model": model, "average": average, "optimizer": optimizer}
    state = folder.load(**parts)
    start, cpu_start = time.monotonic() - state.seconds, time.process_time() - state.cpu_seconds
    write_log(output, state.lines)
    with termination_flag() as stop, tqdm(total=recipe.steps, initial=state.step, disable=not progress_bar) as bar:
        # a run that was killed between its last step and its end has only that end before it
        while state.step < recipe.steps:
            step = state.step
            factor = learning_rate_factor(step / recipe.steps, step, recipe.warmup_steps, recipe.decay_fraction)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * factor
            state.losses.append(_train_step(model, optimizer, scenes, recipe, seed, step))
            update_average(average, model, min(recipe.ema_decay, (1 + step) / (10 + step)))
            state.step += 1
            is_last = state.step == recipe.steps
            bar.update()
            if is_last or state.step % recipe.log_every == 0:
                bar.set_postfix(loss=f"{state.losses[-1]:.3f}")
                line = {
                    "step": state.step,
                    "scenes": state.step * recipe.batch_size,
                    "seconds": round(time.monotonic() - start, 1),
                    "cpu_seconds": round(time.process_time() - cpu_start, 1),
                    "loss": sum(state.losses) / len(state.losses),
                }
                state.losses.clear()
                if is_last or state.step % recipe.eval_every == 0:
                    count = recipe.eval_scenes // (1 if is_last else 4)
                    line |= evaluate_sam(average, SceneGenerator(vocabulary, seed=2 * seed + 1, **options), count)
                state.lines.append(line)
                write_log(output, state.lines)
            if is_last or stop[0] or state.step % recipe.checkpoint_every == 0:
                state.seconds, state.cpu_seconds = time.monotonic() - start, time.process_time() - cpu_start
                folder.save(state, **parts)
            if stop[0] and not is_last:
                raise Terminated(TERMINATED)
    average.save_pretrained(output)
    folder.finish(state.lines[-1])
    return state.lines[-1]


@torch.no_grad()
def update_average(average: SamModel, model: SamModel, decay: float) -> None:
    """Move the averaged weights towards the model's by the share 1 - decay."""
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


def _train_step(
    model: SamModel,
    optimizer: torch.optim.Optimizer,
    scenes: SceneGenerator,
    recipe: SamRecipe,
    seed: int,
    step: int,
) -> float:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**62)
    batch = scenes.render(step * recipe.batch_size, recipe.batch_size)
    kind = ROUND[step % len(ROUND)]
    points = int(torch.randint(1, NUM_POINTS + 1, (), generator=generator))
    prompts = draw_prompts(scene_regions(batch), recipe.prompts_per_scene, points, generator)
    with torch.autocast("cpu", torch.bfloat16) if recipe.autocast else nullcontext():
        logits, predicted_iou = ask(model, batch.images, prompts, kind)
    loss = sam_loss(logits, predicted_iou, prompts.targets.flatten(0, 1))
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"The loss is {loss.item()} at step {step}: lower learning_rate or max_grad_norm.")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
    optimizer.step()
    return loss.item()
