"""Regions of synthetic scenes, prompts for them, and what a Segment Anything answers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import SamModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..data.scenes import MAX_OBJECTS, SceneBatch

PROMPTS = ("points", "box", "mask")
MASK_LOGIT = 10.0
SMALLEST_REGION = 24


class Prompts(NamedTuple):
    """Points inside regions of scenes.

    Args:
        points: `[B, P, n, 2]`, column and row of pixels, all of one region.
        targets: bool `[B, P, S, S]`, the regions.
    """

    points: torch.Tensor
    targets: torch.Tensor


def scene_regions(scenes: SceneBatch) -> torch.Tensor:
    """Region numbers `[B, S, S]` int64: objects 0 to 4, stuff 5 and, where there are two classes of it, 6."""
    second = scenes.label_maps == scenes.stuff_classes[:, 1, None, None]
    alike = scenes.stuff_classes[:, 0] == scenes.stuff_classes[:, 1]
    stuff = MAX_OBJECTS + (second & ~alike[:, None, None]).long()
    instances = scenes.instance_maps.long()
    return torch.where(instances >= 0, instances, stuff)


def draw_prompts(regions: torch.Tensor, count: int, points: int, generator: torch.Generator) -> Prompts:
    """`count` regions of each scene, equally likely whatever their size, and `points` pixels of each, all equally
    likely; regions of less than 24 pixels are not drawn."""
    size = regions.shape[-1]
    flat = regions.flatten(1)
    areas = torch.zeros(len(regions), MAX_OBJECTS + 2, dtype=torch.long).scatter_add_(1, flat, torch.ones_like(flat))
    weights = torch.where(areas >= SMALLEST_REGION, 1 / areas, 0.0).gather(1, flat)
    first = torch.multinomial(weights, count, replacement=True, generator=generator)
    targets = flat[:, None] == flat.gather(1, first)[:, :, None]
    pixels = torch.multinomial(targets.float().flatten(0, 1), points, replacement=True, generator=generator)
    pixels = pixels.unflatten(0, first.shape)
    # SAM itself adds the half pixel of their centres
    places = torch.stack([pixels % size, pixels // size], dim=-1).float()
    return Prompts(places, targets.unflatten(2, (size, size)))


def boxes_of(targets: torch.Tensor) -> torch.Tensor:
    """Bounding boxes `[..., 4]` (x, y of two corners, in pixels) of masks `[..., S, S]` that are not empty."""
    columns, rows = targets.any(-2).float(), targets.any(-1).float()

    def ends(line: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return line.argmax(-1), line.shape[-1] - line.flip(-1).argmax(-1)

    (left, right), (top, bottom) = ends(columns), ends(rows)
    return torch.stack([left, top, right, bottom], dim=-1).float()


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 pictures `[B, 3, S, S]` to SAM's `pixel_values`."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (images.float() / 255 - mean) / std


def ask(model: SamModel, images: torch.Tensor, prompts: Prompts, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Three masks for every prompt.

    Args:
        images: uint8 `[B, 3, S, S]`.
        kind: "points", "box", or "mask": one point and the region's mask, on a grid of an eighth of the picture.

    Returns:
        Mask logits `[B * P, 3, m, m]` and predicted IoU `[B * P, 3]`, float32.
    """
    count = prompts.targets.shape[1]
    embeddings = model.vision_encoder(normalise(images)).last_hidden_state.repeat_interleave(count, dim=0)
    points, targets = prompts.points.flatten(0, 1), prompts.targets.flatten(0, 1)
    given: dict[str, torch.Tensor] = {}
    if kind == "box":
        given["input_boxes"] = boxes_of(targets)[:, None]
    else:
        given["input_points"] = points[:, None] if kind == "points" else points[:, None, :1]
        given["input_labels"] = torch.ones(given["input_points"].shape[:-1], dtype=torch.long)
    if kind == "mask":
        side = 4 * model.config.prompt_encoder_config.image_embedding_size
        rough = F.adaptive_avg_pool2d(targets[:, None].float(), targets.shape[-1] // 8)
        given["input_masks"] = F.interpolate((2 * rough - 1) * MASK_LOGIT, (side, side), mode="bilinear")
    found = model(image_embeddings=embeddings, multimask_output=True, **given)
    return found.pred_masks[:, 0].float(), found.iou_scores[:, 0].float()


def mask_iou(masks: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """IoU `[...]` of bool masks `[..., h, w]`; 0 where both are empty."""
    shared, either = (masks & targets).sum((-2, -1)), (masks | targets).sum((-2, -1))
    return shared / either.clamp(min=1)
