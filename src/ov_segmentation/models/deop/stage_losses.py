"""Losses of DeOP's first and third training stage; those of the second are MaskFormer's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy, interpolate, normalize
from transformers import CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN

from ...layers.clip_vision import embed_patches, run_blocks
from ...losses import mean_of_step
from ...precision import full_precision
from .configuration_deop import DeOPConfig

# the original clamps probabilities before the logarithm of its focal loss
FOCAL_ALPHA, FOCAL_EPSILON = 0.25, 1e-4


def fused_map_losses(
    config: DeOPConfig, class_logits: torch.Tensor, mask_logits: torch.Tensor, labels: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Focal and dice losses on the map that all proposals make together (the third stage).

    Args:
        class_logits: `[B, N, K+1]`, "no object" last.
        mask_logits: `[B, N, h, w]`.
        labels: `[B, H, W]` int64, negative = ignored.
    """
    masks = interpolate(mask_logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False).sigmoid()
    with full_precision(masks):
        fused = torch.einsum("bnk,bnhw->bkhw", class_logits.float().softmax(dim=-1), masks)
    scale = config.map_scale
    probability = (scale * fused - scale).sigmoid()
    known = labels >= 0
    wanted = torch.where(known, labels, class_logits.shape[-1] - 1)
    # every channel as if it were absent, then the one that is not put right: no one-hot target of the map's size
    present = probability.gather(1, wanted[:, None]).squeeze(1)
    absent = (1 - FOCAL_ALPHA) * (_focal(1 - probability).sum(dim=1) - _focal(1 - present))
    counted = known | config.ignore_as_no_object
    focal = ((absent + FOCAL_ALPHA * _focal(present)) * counted).sum()

    def count(labels: torch.Tensor) -> torch.Tensor:
        return ((labels >= 0) | config.ignore_as_no_object).sum() * class_logits.shape[-1]

    predicted = (probability[:, :-1].sum(dim=1) * counted).sum(dim=(1, 2))
    dice = 1 - (2 * (present * known).sum(dim=(1, 2)) + 1) / (predicted + known.sum(dim=(1, 2)) + 1)
    focal = focal / _normaliser(config, count, labels)
    return {"loss_ce": config.focal_weight * focal, "loss_decoder_dice": config.dice_weight * dice.mean()}


def _normaliser(
    config: DeOPConfig, count: Callable[[torch.Tensor], torch.Tensor], labels: torch.Tensor
) -> torch.Tensor:
    return count(labels).clamp(min=1) if config.normalise_per_process else mean_of_step(count, 1, labels=labels)


def _focal(hit: torch.Tensor) -> torch.Tensor:
    """Focal loss (gamma 2) of the probability that an element has what it should have."""
    missing = 1 - hit
    return -missing * missing * hit.clamp(FOCAL_EPSILON, 1 - FOCAL_EPSILON).log()


def fill_outside(pixel_values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Pixels without a class take CLIP's mean colour, put in after normalisation (so the original), not before it."""
    return torch.where(labels[:, None] >= 0, pixel_values, pixel_values.new_tensor(OPENAI_CLIP_MEAN)[:, None, None])


def region_features(clip: CLIPModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """CLIP's own feature of each picture, `[B, D]`, not normalised: class token, no severance, no visual prompt."""
    vision = clip.vision_model
    tokens, _ = embed_patches(vision, pixel_values)
    return clip.visual_projection(vision.post_layernorm(run_blocks(vision.encoder.layers, tokens)[-1][:, 0]))


def region_classes(labels: torch.Tensor) -> torch.Tensor:
    """The one class of each of `labels` `[B, H, W]`; -100 where there is none.

    Raises:
        ValueError: a picture with several classes.
    """
    classes = labels.flatten(1).amax(dim=1)
    mixed = ((labels >= 0) & (labels != classes[:, None, None])).flatten(1).any(dim=1)
    if mixed.any():
        raise ValueError(
            f'training_stage="prompt" classifies regions: each label map may hold one class, those of pictures '
            f"{mixed.nonzero().flatten().tolist()} hold several. data.regions_per_class in the recipe cuts regions out."
        )
    return torch.where(classes >= 0, classes, -100)


def region_losses(
    config: DeOPConfig, features: torch.Tensor, text_embeds: torch.Tensor, labels: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Cross entropy of regions over the class names, without "no object" (the first stage).

    Args:
        features: `[B, D]`.
        labels: `[B, H, W]` with at most one class each, see [`region_classes`].
    """
    classes = region_classes(labels)
    with full_precision(features):
        logits = config.temperature * normalize(features.float(), dim=-1) @ text_embeds.float().T
    total = cross_entropy(logits, classes, ignore_index=-100, reduction="sum")
    return {"loss_cls": total / _normaliser(config, lambda labels: (region_classes(labels) >= 0).sum(), labels)}
