"""Masked crops of one picture for CLIP: tight boxes, masked-out pixels filled, stretched to a square; all at once.

Bicubic resizing is linear and separable, so the crop and the resize of every box are two small matrix products with
weights that stop at the box's edges: the numbers of cropping first and resizing then, without a loop over crops.
Source: Liang et al., "Open-Vocabulary Semantic Segmentation with Mask-adapted CLIP" (2023), section 3.1.
"""

from __future__ import annotations

import torch
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .bicubic import bicubic_weights


def mask_boxes(masks: torch.Tensor, expand_ratio: float = 1.0) -> torch.Tensor:
    """Boxes `[n, 4]` int64 (x0, y0, x1, y1; x1 and y1 exclusive) of bool `masks` `[n, H, W]`, none of them empty.

    `expand_ratio` scales width and height about the centre; corners are truncated toward zero and clamped to the map.
    """
    height, width = masks.shape[-2:]
    x0, x1 = _extent(masks.any(dim=1))
    y0, y1 = _extent(masks.any(dim=2))
    boxes = torch.stack([x0, y0, x1, y1], dim=-1)
    if expand_ratio == 1.0:
        return boxes
    corners = boxes.double()
    centre = (corners[:, :2] + corners[:, 2:]) / 2
    half = (corners[:, 2:] - corners[:, :2]) * expand_ratio / 2
    boxes = torch.cat([centre - half, centre + half], dim=-1).trunc().long()
    limits = torch.tensor([width, height, width, height], device=boxes.device)
    return boxes.clamp(min=0).minimum(limits)


def _extent(occupied: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    length = occupied.shape[-1]
    marks = occupied.int()
    return marks.argmax(dim=-1), length - marks.flip(-1).argmax(dim=-1)


def masked_crops(
    picture: torch.Tensor, masks: torch.Tensor, boxes: torch.Tensor, size: int, fill: torch.Tensor | None = None
) -> torch.Tensor:
    """Crops `[n, 3, size, size]` of a normalised `picture` `[3, H, W]`, stretched bicubically without antialiasing.

    Args:
        masks: bool `[n, H, W]`; pixels outside take the value `fill`. None of the picture is hidden where True.
        boxes: `[n, 4]` from `mask_boxes`.
        size: side of the crops in pixels.
        fill: `[3]` in normalised units; None: 0, which is CLIP's mean colour.
    """
    height, width = picture.shape[-2:]
    visible = masks[:, None].to(picture.dtype)
    pixels = picture * visible if fill is None else picture * visible + fill[:, None, None] * (1 - visible)
    rows = bicubic_weights(boxes[:, 1], boxes[:, 3], height, size).to(picture.dtype)
    columns = bicubic_weights(boxes[:, 0], boxes[:, 2], width, size).to(picture.dtype)
    return rows[:, None] @ pixels @ columns[:, None].transpose(-1, -2)


def crop_for_clip(
    picture: torch.Tensor, masks: torch.Tensor, boxes: torch.Tensor, size: int, mask_fill: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops `[n, 3, size, size]` of a `picture` `[3, H, W]` in CLIP's normalisation, and their masks.

    Args:
        masks, boxes, size: see [`masked_crops`].
        mask_fill: "mean", "zero" or "none", see `OVSegConfig`.
    """
    fill = None
    if mask_fill == "zero":
        fill = -picture.new_tensor(OPENAI_CLIP_MEAN) / picture.new_tensor(OPENAI_CLIP_STD)
    visible = torch.ones_like(masks) if mask_fill == "none" else masks
    return masked_crops(picture, visible, boxes, size, fill), cropped_masks(masks, boxes, size)


def cropped_masks(masks: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """The `masks` `[n, H, W]` inside their `boxes`, nearest neighbour, `[n, size, size]` bool."""

    def nearest(start: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(size, device=start.device)
        scale = (stop - start).float() / size
        index = (steps * scale[:, None]).floor().long()
        return index.minimum((stop - start - 1)[:, None]) + start[:, None]

    rows, columns = nearest(boxes[:, 1], boxes[:, 3]), nearest(boxes[:, 0], boxes[:, 2])
    picked = torch.arange(len(masks), device=masks.device)[:, None, None]
    return masks[picked, rows[:, :, None], columns[:, None, :]]
