"""Training of a small model on synthetic scenes in one process: AdamW, averaged weights, log, checkpoints, resume.

Its recipe and its loop, whatever the model: CLIP is in `contrastive.py`, Segment Anything in `sam_training.py`.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..atomic_files import write_atomically
from ..data.scene_vocabulary import SceneVocabulary
from ..data.scenes import SceneGenerator
from ..strict_mapping import RecipeError, from_mapping
from .one_file_checkpoint import OneFileFolder, OneFileState
from .recipe import read_recipe
from .termination import Terminated, stop_signals

LOG_FILE = "train_log.jsonl"
R = TypeVar("R", bound="SceneRecipe")


@dataclass(frozen=True, kw_only=True)
class SceneRecipe:
    """What the recipe files of such trainings have in common.

    Args:
        model: keyword arguments of the model's configuration.
        vocabulary: "small" or "full" scene vocabulary.
        tiers: tiers whose names the training scenes show.
        geometry: "easy" or "hard" scenes.
        scene_size: side of a scene in pixels.
        steps: optimiser steps.
        batch_size: samples in a step.
        learning_rate, weight_decay, betas, max_grad_norm: AdamW; the decay applies to matrices only.
        warmup_steps: steps of linear warm-up.
        decay_fraction: last part of the training in which the rate falls linearly to 0.
        ema_decay: decay of the averaged weights, which are the ones that are evaluated and saved.
        attention: attention implementation while training; "eager" is twice as fast on a CPU.
        autocast: None or "bfloat16".
        eval_every: steps between evaluations.
        checkpoint_every: steps between checkpoints, from which a run continues; changes no result.
        eval_scenes: scenes of the evaluation.
    """

    model: dict[str, Any]
    vocabulary: str = "small"
    tiers: tuple[str, ...]
    geometry: str = "easy"
    scene_size: int = 96
    steps: int = 1200
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    warmup_steps: int
    decay_fraction: float
    ema_decay: float = 0.99
    attention: str = "eager"
    autocast: str | None = None
    eval_every: int
    checkpoint_every: int
    eval_scenes: int

    def __post_init__(self) -> None:
        if self.autocast not in (None, "bfloat16"):
            raise RecipeError(f"autocast {self.autocast!r}: choose null or 'bfloat16'.")

    @classmethod
    def from_yaml(cls: type[R], path: str | Path, **overrides: Any) -> R:
        """Read a recipe; `overrides` that are not None win. `RecipeError` says what is wrong."""
        values = read_recipe(path)
        given = {key: value for key, value in overrides.items() if value is not None}
        return from_mapping(cls, values | given if isinstance(values, dict) else values)


class SceneTraining:
    """One training; what is trained, on what, and how it is scored is a subclass's.

    Args:
        recipe: what to train.
        seed: of weights, scenes and samples.
        device: where to train.

    Attributes:
        model: what is trained, and `average`, its averaged weights: what is scored and saved.
        scenes: training scenes, and `test_scenes`, of all tiers, of which none is among them.
    """

    samples: ClassVar[str]
    """What a batch holds, as the log names it."""

    model: Any
    average: Any

    def __init__(self, recipe: Any, seed: int, device: str = "cpu") -> None:
        self.recipe, self.seed, self.device = recipe, seed, device
        vocabulary = SceneVocabulary.by_name(recipe.vocabulary)
        options = {"size": recipe.scene_size, "geometry": recipe.geometry}
        # Odd seeds are for evaluation, even ones for training, so no scene is in both.
        self.scenes = SceneGenerator(vocabulary, seed=2 * seed, tiers=recipe.tiers, **options)
        self.test_scenes = SceneGenerator(vocabulary, seed=2 * seed + 1, **options)

    # ------------------------------------------------------------------ what a subclass fills in

    def build_model(self) -> PreTrainedModel:
        """The untrained model."""
        raise NotImplementedError

    def prepare_data(self, step: int) -> None:
        """Called before the first step that is left to do, the one after `step` others."""

    def loss(self, step: int) -> torch.Tensor:
        """Loss of `model` on the batch of a step."""
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Called after the update of the weights and of their average."""

    def figures(self, step: int, is_last: bool) -> dict[str, Any]:
        """What the log's line after `step` steps says beside the loss."""
        raise NotImplementedError

    def save(self, output: Path) -> None:
        """Write the averaged model and what belongs to it."""
        raise NotImplementedError

    # ------------------------------------------------------------------ the run

    def step_seed(self, step: int) -> int:
        """Seed of what is drawn in a step."""
        return (self.seed * 1_000_003 + step) % 2**62

    def run(
        self, output: str | Path, log_every: int, minutes: float | None = None, progress_bar: bool = True
    ) -> dict[str, Any]:
        """Train, evaluate and save; equal arguments give equal weights on one machine (unless `minutes` is given).

        A run that was killed, or stopped by SIGTERM or Ctrl-C, continues from its last checkpoint, to the same bits;
        one that is over is not done again.

        Args:
            output: folder for the model, recipe and log (`train_log.jsonl`).
            log_every: steps between lines of the log.
            minutes: stop after so many minutes of wall-clock time; the schedule follows the time and not the steps.
            progress_bar: show one.

        Returns:
            The last line of the log: step, seconds (wall clock, and of the processor), loss and figures.

        Raises:
            RunFolderError: `output` holds a run of another recipe.
            CheckpointError: a checkpoint could not be written or read.
            FloatingPointError: the loss is no number.
            Terminated: SIGTERM or Ctrl-C came; everything is saved.
        """
        output = Path(output)
        identity = {**asdict(self.recipe), "seed": self.seed} | ({} if minutes is None else {"minutes": minutes})
        del identity["checkpoint_every"]
        folder = OneFileFolder(output, identity)
        result = folder.claim()
        if result is not None:
            return result
        torch.manual_seed(self.seed)
        self.model = self.build_model().to(self.device).train()
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        state = self._train(folder, log_every, minutes, progress_bar)
        self.save(output)
        folder.finish(state.lines[-1])
        return state.lines[-1]

    def _train(self, folder: OneFileFolder, log_every: int, minutes: float | None, progress_bar: bool) -> OneFileState:
        recipe = self.recipe
        groups = parameter_groups(self.model, recipe.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas)
        parts = {"model": self.model, "average": self.average, "optimizer": optimizer}
        state = folder.load(**parts)
        self.prepare_data(state.step)
        start, cpu_start = time.monotonic() - state.seconds, time.process_time() - state.cpu_seconds
        write_log(folder.path, state.lines)
        with stop_signals() as arrived, tqdm(total=recipe.steps, initial=state.step, disable=not progress_bar) as bar:
            # a run that was killed between its last step and its end has only that end before it
            while not state.is_over:
                elapsed = time.monotonic() - start
                progress = state.step / recipe.steps if minutes is None else min(elapsed / (60 * minutes), 1.0)
                factor = learning_rate_factor(progress, state.step, recipe.warmup_steps, recipe.decay_fraction)
                for group in optimizer.param_groups:
                    group["lr"] = recipe.learning_rate * factor
                state.losses.append(self._step(optimizer, state.step))
                state.step += 1
                state.is_over = state.step == recipe.steps if minutes is None else progress == 1
                bar.update()
                bar.set_postfix(loss=f"{state.losses[-1]:.3f}", lr=f"{recipe.learning_rate * factor:.1e}")
                if state.is_over or state.step % log_every == 0:
                    line = {
                        "step": state.step,
                        self.samples: state.step * recipe.batch_size,
                        "seconds": round(time.monotonic() - start, 1),
                        "cpu_seconds": round(time.process_time() - cpu_start, 1),
                        "loss": sum(state.losses) / len(state.losses),
                    }
                    state.lines.append(line | self.figures(state.step, state.is_over))
                    state.losses.clear()
                    write_log(folder.path, state.lines)
                if state.is_over or arrived or state.step % recipe.checkpoint_every == 0:
                    state.seconds, state.cpu_seconds = time.monotonic() - start, time.process_time() - cpu_start
                    folder.save(state, **parts)
                if arrived and not state.is_over:
                    raise Terminated(arrived[0])
        return state

    def _step(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """One update of the weights and of their average."""
        loss = self.loss(step)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"The loss is {loss.item()} at step {step}: lower learning_rate or max_grad_norm.")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        optimizer.step()
        update_average(self.average, self.model, min(self.recipe.ema_decay, (step + 1) / (step + 10)))
        self.after_step(step)
        return loss.item()


def learning_rate_factor(progress: float, step: int, warmup_steps: int, decay_fraction: float) -> float:
    """Linear warm-up, flat, linear decay to 0; `progress` in [0, 1] is the part of the training that is done."""
    warm = min(1.0, (step + 1) / max(warmup_steps, 1))
    return warm * min(1.0, (1.0 - progress) / max(decay_fraction, 1e-9))


def parameter_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and convolutions decay; embeddings, norms, biases and the temperature do not."""
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters()
    }
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decays = [parameter.ndim >= 2 and id(parameter) not in embeddings for parameter in parameters]
    return [
        {"params": [p for p, decay in zip(parameters, decays, strict=True) if decay], "weight_decay": weight_decay},
        {"params": [p for p, decay in zip(parameters, decays, strict=True) if not decay], "weight_decay": 0.0},
    ]


@torch.no_grad()
def update_average(average: PreTrainedModel, model: PreTrainedModel, decay: float) -> None:
    """Move the averaged weights towards the model's by the share 1 - decay."""
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


def write_log(output: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Replace the log by these lines."""
    write_atomically(output / LOG_FILE, "".join(json.dumps(line) + "\n" for line in lines))
