"""Contrastive training of a small CLIP on captioned crops of synthetic scenes (Radford et al., 2021, section 2.3).

InfoNCE both ways, with one change: a caption that happens to be true of another picture of the batch is no negative, it
is left out of that picture's sum. On scenes about half the crops have such a twin.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, PreTrainedModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..data.scene_captions import build_scene_tokenizer
from ..layers.clip_stem import CLIPModelWithStem
from ..layers.convnext_clip import ConvNextCLIPConfig, ConvNextCLIPModel
from ..strict_mapping import RecipeError
from .scene_crops import SceneCrops
from .scene_training import SceneRecipe, SceneTraining
from .zero_shot import ZeroShotBank, zero_shot_accuracy


@dataclass(frozen=True, kw_only=True)
class ContrastiveRecipe(SceneRecipe):
    """What a recipe file holds, beside what [`SceneRecipe`] says; samples are pairs of picture and caption.

    Args:
        architecture: "vit" (`CLIPModelWithStem`) or "convnext" (`ConvNextCLIPModel`).
        model: as in [`SceneRecipe`]; vocabulary size and special tokens are filled in.
        tiers: tiers whose names may occur in captions.
        crop_size: side of the training pictures.
        crops: further arguments of [`SceneCrops`].
        refresh_every: steps between replacements of a block of the bank.
        init_from: folder of an earlier run of the same architecture whose weights to start from.
    """

    architecture: str
    tiers: tuple[str, ...] = ("a", "b")
    crop_size: int = 64
    crops: dict[str, Any] = field(default_factory=dict)
    refresh_every: int = 10
    batch_size: int = 128
    learning_rate: float = 1.5e-3
    warmup_steps: int = 100
    decay_fraction: float = 0.3
    eval_every: int = 200
    checkpoint_every: int = 100
    eval_scenes: int = 512
    init_from: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.architecture not in ("vit", "convnext"):
            raise RecipeError(f"architecture {self.architecture!r}: choose 'vit' or 'convnext'.")
        if "c" in self.tiers:
            raise RecipeError("tiers contain 'c', whose names no caption may contain: they measure what is open.")


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


class ClipTraining(SceneTraining):
    """Contrastive training of a CLIP on crops of scenes."""

    samples = "pictures"

    def build_model(self) -> PreTrainedModel:
        """The recipe's CLIP."""
        self.tokenizer = build_scene_tokenizer()
        model = build_clip(self.recipe, self.tokenizer)
        model.set_attn_implementation(self.recipe.attention)
        return model

    def prepare_data(self, step: int) -> None:
        """Fill the banks of crops."""
        recipe = self.recipe
        self.bank = ZeroShotBank.render(self.test_scenes, recipe.eval_scenes, recipe.crop_size)
        refreshed = step // recipe.refresh_every
        self.crops = SceneCrops(self.scenes, crop_size=recipe.crop_size, refreshed=refreshed, **recipe.crops)

    def loss(self, step: int) -> torch.Tensor:
        """The contrastive loss."""
        batch = self.crops.sample(self.recipe.batch_size, seed=self.step_seed(step))
        pixel_values = normalise_pictures(batch.images, self.device)
        tokens = tokenize(self.tokenizer, batch.captions, self.device)
        autocast = self.recipe.autocast is not None
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=autocast):
            images = self.model.get_image_features(pixel_values=pixel_values).pooler_output
            texts = self.model.get_text_features(**tokens).pooler_output
        return contrastive_loss(images.float(), texts.float(), self.model.logit_scale, batch.fits.to(self.device))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Bound the temperature, and put new scenes into the bank."""
        self.model.logit_scale.clamp_(max=math.log(100))
        if (step + 1) % self.recipe.refresh_every == 0:
            self.crops.refresh()

    def figures(self, step: int, is_last: bool) -> dict[str, Any]:
        """Temperature and zero-shot accuracy."""
        accuracy = zero_shot_accuracy(self.average, self.tokenizer, self.bank, self.device)
        return {"logit_scale": float(self.model.logit_scale.detach().exp()), **accuracy}

    def save(self, output: Path) -> None:
        """Write model, tokenizer and image processor."""
        save_clip(self.average, self.tokenizer, self.recipe.crop_size, output)


def train_clip(
    recipe: ContrastiveRecipe,
    output: str | Path,
    seed: int = 0,
    minutes: float | None = None,
    device: str = "cpu",
    progress_bar: bool = True,
) -> dict[str, Any]:
    """Train, evaluate and save a CLIP, with its tokenizer and image processor.

    Args:
        recipe: what to train.
        seed: seed of weights, scenes and crops.
        device: where to train.
        output, minutes, progress_bar: see [`SceneTraining.run`], which also says what is returned and raised.
    """
    return ClipTraining(recipe, seed, device).run(output, recipe.eval_every, minutes, progress_bar)


def save_clip(model: PreTrainedModel, tokenizer: Any, image_size: int, output: str | Path) -> None:
    """Write model, tokenizer and image processor as one folder; attention goes back to the default on loading."""
    model.save_pretrained(output, save_original_format=False)
    tokenizer.save_pretrained(output)
    size = {"height": image_size, "width": image_size}
    CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False).save_pretrained(output)


def tokenize(tokenizer: Any, texts: Sequence[str], device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Ids and mask, padded to the longest text."""
    return tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(device)
