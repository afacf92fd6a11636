"""Proposals that are not MaskFormer's: Segment Anything's, or the caller's own masks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ...layers.sam_masks import FAR_OUTSIDE, SamOptions, sam_masks
from ...layers.sliding_window import split_pictures
from .configuration_deop import DeOPConfig

if TYPE_CHECKING:
    from transformers import SamModel


def load_sam(source: Any) -> SamModel:
    """A `SamModel` from a folder or Hub id; a model is returned as it is."""
    from transformers import SamModel

    return SamModel.from_pretrained(source) if isinstance(source, (str, os.PathLike)) else source


def given_proposals(masks: torch.Tensor, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The caller's masks `[B, N, h, w]` as logits (bool ones become -20 and 20), and which of them are there: all
    (None), or without any mask none of a single empty one.

    Raises:
        ValueError: another shape, or values that are no logits.
    """
    if masks.ndim != 4 or len(masks) != len(pixel_values) or not all(masks.shape[-2:]):
        raise ValueError(
            f"proposals must be masks [B, N, h, w] over pixel_values {list(pixel_values.shape)}, h and w of any size; "
            f"got {list(masks.shape)}."
        )
    masks = masks.to(pixel_values.device)
    if not masks.shape[1]:
        empty = pixel_values.new_full((len(masks), 1, *masks.shape[-2:]), FAR_OUTSIDE)
        return empty, torch.zeros(len(masks), 1, dtype=torch.bool, device=masks.device)
    if masks.dtype == torch.bool:
        return torch.where(masks, -FAR_OUTSIDE, FAR_OUTSIDE).to(pixel_values.dtype), None
    if not masks.is_floating_point():
        raise ValueError(f"proposals must be bool masks or floating-point logits, got {masks.dtype}.")
    if not masks.isfinite().all():
        raise ValueError("proposals hold NaN or infinite logits.")
    return masks.to(pixel_values.dtype), None


def sam_proposals(
    sam: SamModel, config: DeOPConfig, pixel_values: torch.Tensor, sizes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """SAM's masks of the pictures inside their padding, see `layers.sam_masks.sam_masks`, in the model's precision."""
    values = (config.image_mean, config.image_std, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    mean, std, sam_mean, sam_std = pixel_values.new_tensor(values)[..., None, None]
    pictures = (pixel_values * std + mean - sam_mean) / sam_std
    options = SamOptions(
        points_per_side=config.sam_points_per_side,
        points_per_batch=config.sam_points_per_batch,
        score_threshold=config.sam_score_threshold,
        stability_threshold=config.sam_stability_threshold,
        stability_offset=config.sam_stability_offset,
        box_overlap=config.sam_box_overlap,
        mask_overlap=config.sam_mask_overlap,
        max_masks=config.sam_max_masks,
        exclusive=config.sam_exclusive,
    )
    # frozen in training, as it is unless the caller changes that, it runs as in inference
    trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in sam.parameters())
    with torch.set_grad_enabled(trained):
        masks, valid = sam_masks(sam, split_pictures(pictures, sizes), tuple(pixel_values.shape[-2:]), options)
    return masks.to(pixel_values.dtype), valid
