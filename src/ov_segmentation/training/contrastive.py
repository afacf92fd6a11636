"""Contrastive training of a small CLIP on captioned crops of synthetic scenes (Radford et al., 2021, section 2.3).

InfoNCE both ways, with one change: a caption that happens to be true of another picture of the batch is no negative, it
is left out of that picture's sum. On scenes about half the crops have such a twin.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, PreTrainedModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..atomic_files import write_atomically
from ..data.scene_captions import build_scene_tokenizer
from ..data.scene_vocabulary import SceneVocabulary
from ..data.scenes import SceneGenerator
from ..layers.clip_stem import CLIPModelWithStem
from ..layers.convnext_clip import ConvNextCLIPConfig, ConvNextCLIPModel
from .one_file_checkpoint import OneFileFolder
from .run import TERMINATED, Terminated, termination_flag
from .scene_crops import SceneCrops
from .zero_shot import ZeroShotBank, zero_shot_accuracy

LOG_FILE = "train_log.jsonl"


@dataclass
class ContrastiveRecipe:
    """What a recipe file holds.

    Args:
        architecture: "vit" (`CLIPModelWithStem`) or "convnext" (`ConvNextCLIPModel`).
        model: keyword arguments of the architecture's configuration. Vocabulary size and special tokens are filled in.
        vocabulary: "small" or "full" scene vocabulary.
        tiers: tiers whose names may occur in captions.
        geometry: "easy" or "hard" scenes.
        scene_size: side of a scene in pixels.
        crop_size: side of the training pictures.
        crops: further arguments of [`SceneCrops`].
        refresh_every: steps between replacements of a block of the bank.
        steps: optimiser steps.
        batch_size: pairs in a step.
        learning_rate, weight_decay, betas, max_grad_norm: AdamW; the decay applies to matrices only.
        warmup_steps: steps of linear warm-up.
        decay_fraction: last part of the training in which the rate falls linearly to 0.
        ema_decay: decay of the averaged weights, which are the ones that are evaluated and saved.
        attention: attention implementation while training; "eager" is twice as fast on a CPU.
        autocast: None or "bfloat16".
        eval_every: steps between evaluations.
        checkpoint_every: steps between checkpoints, which a killed run continues from.
        eval_scenes: scenes of the evaluation bank.
        init_from: folder of an earlier run of the same architecture whose weights to start from.
    """

    architecture: str
    model: dict[str, Any]
    vocabulary: str = "small"
    tiers: tuple[str, ...] = ("a", "b")
    geometry: str = "easy"
    scene_size: int = 96
    crop_size: int = 64
    crops: dict[str, Any] = field(default_factory=dict)
    refresh_every: int = 10
    steps: int = 1200
    batch_size: int = 128
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    warmup_steps: int = 100
    decay_fraction: float = 0.3
    ema_decay: float = 0.99
    attention: str = "eager"
    autocast: str | None = None
    eval_every: int = 200
    checkpoint_every: int = 100
    eval_scenes: int = 512
    init_from: str | None = None

    def __post_init__(self) -> None:
        if self.architecture not in ("vit", "convnext"):
            raise ValueError(f"architecture {self.architecture!r}: choose 'vit' or 'convnext'.")
        if self.autocast not in (None, "bfloat16"):
            raise ValueError(f"autocast {self.autocast!r}: choose null or 'bfloat16'.")
        if "c" in self.tiers:
            raise ValueError("tiers contain 'c', whose names no caption may contain: they measure what is open.")
        self.tiers, self.betas = tuple(self.tiers), tuple(self.betas)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> ContrastiveRecipe:
        """Read a recipe; `overrides` that are not None win. Unknown keys are errors."""
        values = yaml.safe_load(Path(path).read_text())
        if not isinstance(values, dict):
            raise ValueError(f"{path} does not hold a mapping of recipe keys to values.")
        values.update({key: value for key, value in overrides.items() if value is not None})
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"{path} has unknown keys {unknown}; known are {sorted(known)}.")
        return cls(**values)


def build_clip(recipe: ContrastiveRecipe, tokenizer: Any) -> PreTrainedModel:
    """The recipe's model, untrained or from `init_from`, with the tokenizer's ids in its text configuration."""
    model = copy.deepcopy(recipe.model)
    model.setdefault("text_config", {}).update(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=tokenizer.model_max_length,
    )
    if recipe.architecture == "vit":
        clip = CLIPModelWithStem(CLIPConfig(**model))
    else:
        clip = ConvNextCLIPModel(ConvNextCLIPConfig(**model))
    if recipe.init_from is not None:
        earlier = type(clip).from_pretrained(recipe.init_from, dtype=torch.float32)
        clip.load_state_dict(earlier.state_dict())
    return clip


def contrastive_loss(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor, fits: torch.Tensor
) -> torch.Tensor:
    """Mean of the two cross-entropies over pictures and captions, without the pairs that fit by chance.

    Args:
        image_embeds, text_embeds: [B, D], any norm; row i of both is a pair.
        logit_scale: logarithm of the temperature factor.
        fits: bool [B, B], `fits[i, j]`: caption j is true of picture i.
    """
    logits = logit_scale.exp() * F.normalize(image_embeds, dim=-1) @ F.normalize(text_embeds, dim=-1).T
    target = torch.arange(len(logits), device=logits.device)
    by_chance = fits & ~torch.eye(len(fits), dtype=torch.bool, device=fits.device)
    logits = logits.masked_fill(by_chance, torch.finfo(logits.dtype).min)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def normalise_pictures(images: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 pictures to CLIP's `pixel_values`."""
    mean = torch.tensor(OPENAI_CLIP_MEAN, device=device).view(1, 3, 1, 1)
    std = torch.tensor(OPENAI_CLIP_STD, device=device).view(1, 3, 1, 1)
    return (images.to(device).float() / 255 - mean) / std


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


def train_clip(
    recipe: ContrastiveRecipe,
    output: str | Path,
    seed: int = 0,
    minutes: float | None = None,
    device: str = "cpu",
    progress_bar: bool = True,
) -> dict[str, Any]:
    """Train, evaluate and save a CLIP; equal arguments give equal weights on one machine (unless `minutes` is given).

    A run that was killed, or stopped by SIGTERM, continues from its last checkpoint, to the same bits; one that is over
    is not done again.

    Args:
        recipe: what to train.
        output: folder for model, tokenizer, image processor, recipe and log (`train_log.jsonl`).
        seed: seed of weights, scenes and crops.
        minutes: stop after so many minutes of wall-clock time; the schedule then follows the time and not the steps.
        device: where to train.
        progress_bar: show one.

    Returns:
        The last line of the log: step, seconds (wall clock, and of the processor), loss and the zero-shot figures.

    Raises:
        RunFolderError: `output` holds a run of another recipe.
        CheckpointError: a checkpoint could not be written or read.
        Terminated: SIGTERM came; everything is saved.
    """
    output = Path(output)
    identity = {**asdict(recipe), "seed": seed} | ({} if minutes is None else {"minutes": minutes})
    del identity["checkpoint_every"]
    folder = OneFileFolder(output, identity)
    result = folder.claim()
    if result is not None:
        return result
    torch.manual_seed(seed)
    tokenizer = build_scene_tokenizer()
    model = build_clip(recipe, tokenizer).to(device)
    model.set_attn_implementation(recipe.attention)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    vocabulary = SceneVocabulary.by_name(recipe.vocabulary)
    scene_options = {"size": recipe.scene_size, "geometry": recipe.geometry}
    # Odd seeds are for evaluation, even ones for training, so no scene is in both.
    test_scenes = SceneGenerator(vocabulary, seed=2 * seed + 1, **scene_options)
    bank = ZeroShotBank.render(test_scenes, recipe.eval_scenes, recipe.crop_size)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, recipe.weight_decay), lr=recipe.learning_rate, betas=recipe.betas
    )
    parts = {"model": model, "average": average, "optimizer": optimizer}
    state = folder.load(**parts)
    scenes = SceneGenerator(vocabulary, seed=2 * seed, tiers=recipe.tiers, **scene_options)
    crops = SceneCrops(scenes, crop_size=recipe.crop_size, refreshed=state.step // recipe.refresh_every, **recipe.crops)
    start, cpu_start = time.monotonic() - state.seconds, time.process_time() - state.cpu_seconds
    write_log(output, state.lines)
    limit = math.inf if minutes is None else 60 * minutes
    last = recipe.steps if minutes is None else math.inf
    with termination_flag() as stop, tqdm(total=recipe.steps, initial=state.step, disable=not progress_bar) as bar:
        # a run that was killed between its last step and its end has only that end before it
        while not (state.lines and state.lines[-1].get("is_last")):
            elapsed = time.monotonic() - start
            part = state.step / recipe.steps if minutes is None else elapsed / limit
            factor = learning_rate_factor(min(part, 1.0), state.step, recipe.warmup_steps, recipe.decay_fraction)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * factor
            loss = _train_step(model, average, optimizer, crops, tokenizer, recipe, seed, state.step, device)
            state.losses.append(loss)
            state.step += 1
            if state.step % recipe.refresh_every == 0:
                crops.refresh()
            is_last = state.step >= last or elapsed >= limit
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", lr=f"{recipe.learning_rate * factor:.1e}")
            if is_last or state.step % recipe.eval_every == 0:
                figures = zero_shot_accuracy(average, tokenizer, bank, device)
                line = {
                    "step": state.step,
                    "pictures": state.step * recipe.batch_size,
                    "seconds": round(time.monotonic() - start, 1),
                    "cpu_seconds": round(time.process_time() - cpu_start, 1),
                    "loss": sum(state.losses) / len(state.losses),
                    "logit_scale": float(model.logit_scale.detach().exp()),
                    **figures,
                }
                state.lines.append(line | ({"is_last": True} if is_last else {}))
                state.losses.clear()
                write_log(output, state.lines)
            if is_last or stop[0] or state.step % recipe.checkpoint_every == 0:
                state.seconds, state.cpu_seconds = time.monotonic() - start, time.process_time() - cpu_start
                folder.save(state, **parts)
            if stop[0] and not is_last:
                raise Terminated(TERMINATED)
    save_clip(average, tokenizer, recipe.crop_size, output)
    result = _shown(state.lines[-1])
    folder.finish(result)
    return result


def write_log(output: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Replace the log by these lines."""
    write_atomically(output / LOG_FILE, "".join(json.dumps(_shown(line)) + "\n" for line in lines))


def _shown(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != "is_last"}


def save_clip(model: PreTrainedModel, tokenizer: Any, image_size: int, output: str | Path) -> None:
    """Write model, tokenizer and image processor as one folder; attention goes back to the default on loading."""
    model.save_pretrained(output, save_original_format=False)
    tokenizer.save_pretrained(output)
    size = {"height": image_size, "width": image_size}
    CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False).save_pretrained(output)


def tokenize(tokenizer: Any, texts: Sequence[str], device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Ids and mask, padded to the longest text."""
    return tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(device)


def _train_step(
    model: PreTrainedModel,
    average: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    crops: SceneCrops,
    tokenizer: Any,
    recipe: ContrastiveRecipe,
    seed: int,
    step: int,
    device: str,
) -> float:
    batch = crops.sample(recipe.batch_size, seed=(seed * 1_000_003 + step) % 2**62)
    pixel_values = normalise_pictures(batch.images, device)
    cast = torch.autocast(torch.device(device).type, torch.bfloat16) if recipe.autocast else nullcontext()
    with cast:
        images = model.get_image_features(pixel_values=pixel_values).pooler_output
        texts = model.get_text_features(**tokenize(tokenizer, batch.captions, device)).pooler_output
    loss = contrastive_loss(images.float(), texts.float(), model.logit_scale, batch.fits.to(device))
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"The loss is {loss.item()} at step {step}: lower learning_rate or max_grad_norm.")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
    optimizer.step()
    decay = min(recipe.ema_decay, (step + 1) / (step + 10))
    with torch.no_grad():
        for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
            slow.lerp_(fast, 1 - decay)
        model.logit_scale.clamp_(max=math.log(100))
    return loss.item()
