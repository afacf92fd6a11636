"""Masked crops of one picture for CLIP: tight boxes, masked-out pixels filled, stretched to a square; all at once.

Bicubic resizing is linear and separable, so the crop and the resize of every box are two small matrix products with
weights that stop at the box's edges: the numbers of cropping first and resizing then, without a loop over crops.
Source: Liang et al., "Open-Vocabulary Semantic Segmentation with Mask-adapted CLIP" (2023), section 3.1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..precision import widest_float
from .bicubic import bicubic_matrices, bicubic_taps


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
    corners = boxes.to(widest_float(boxes.device))
    centre = (corners[:, :2] + corners[:, 2:]) / 2
    half = (corners[:, 2:] - corners[:, :2]) * expand_ratio / 2
    boxes = torch.cat([centre - half, centre + half], dim=-1).trunc().long()
    for axis, length in enumerate((width, height)):
        boxes[:, axis::2].clamp_(0, length)
    return boxes


def _extent(occupied: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    length = occupied.shape[-1]
    marks = occupied.int()
    return marks.argmax(dim=-1), length - marks.flip(-1).argmax(dim=-1)


class CropGrid(NamedTuple):
    """Where the pixels of `n` crops of `size` x `size` lie in their picture; every field begins with `n`.

    `row_index`, `row_taps`, `column_index`, `column_taps` `[n, size, 4]`: see `bicubic_taps`; `nearest_rows`,
    `nearest_columns` `[n, size]`.
    """

    row_index: torch.Tensor
    row_taps: torch.Tensor
    column_index: torch.Tensor
    column_taps: torch.Tensor
    nearest_rows: torch.Tensor
    nearest_columns: torch.Tensor

    @classmethod
    def of(cls, boxes: torch.Tensor, size: int) -> CropGrid:
        """The grid of `boxes` `[n, 4]` (x0, y0, x1, y1) stretched to squares of `size`."""
        x0, y0, x1, y1 = boxes.unbind(1)
        rows, columns = bicubic_taps(y0, y1, size), bicubic_taps(x0, x1, size)
        return cls(*rows, *columns, _nearest_pixels(y0, y1, size), _nearest_pixels(x0, x1, size))

    def split(self) -> list[CropGrid]:
        """One grid for each crop, where they are not of one picture."""
        return [CropGrid(*fields) for fields in zip(*(field.split(1) for field in self))]


def _nearest_pixels(start: torch.Tensor, stop: torch.Tensor, size: int) -> torch.Tensor:
    steps = torch.arange(size, device=start.device)
    scale = (stop - start).float() / size
    index = (steps * scale[:, None]).floor().long()
    return index.minimum((stop - start - 1)[:, None]) + start[:, None]


def masked_crops(
    picture: torch.Tensor, masks: torch.Tensor, grid: CropGrid, fill: torch.Tensor | None = None
) -> torch.Tensor:
    """Crops `[n, 3, size, size]` of a normalised `picture` `[3, H, W]`, stretched bicubically without antialiasing.

    Args:
        masks: bool `[n, H, W]`; pixels outside take the value `fill`. None of the picture is hidden where True.
        grid: of the boxes from `mask_boxes`.
        fill: `[3]` in normalised units; None: 0, which is CLIP's mean colour.
    """
    height, width = picture.shape[-2:]
    visible = masks[:, None].to(picture.dtype)
    pixels = picture * visible if fill is None else picture * visible + fill[:, None, None] * (1 - visible)
    rows = bicubic_matrices(grid.row_index, grid.row_taps, height).to(picture.dtype)
    columns = bicubic_matrices(grid.column_index, grid.column_taps, width).to(picture.dtype)
    return rows[:, None] @ pixels @ columns[:, None].transpose(-1, -2)


def crop_for_clip(
    picture: torch.Tensor, masks: torch.Tensor, grid: CropGrid, mask_fill: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops `[n, 3, size, size]` of a `picture` `[3, H, W]` in CLIP's normalisation, and their masks.

    Args:
        masks, grid: see [`masked_crops`].
        mask_fill: "mean", "zero" or "none", see `OVSegConfig`.
    """
    fill = None
    if mask_fill == "zero":
        fill = -picture.new_tensor(OPENAI_CLIP_MEAN) / picture.new_tensor(OPENAI_CLIP_STD)
    visible = torch.ones_like(masks) if mask_fill == "none" else masks
    return masked_crops(picture, visible, grid, fill), cropped_masks(masks, grid)


def cropped_masks(masks: torch.Tensor, grid: CropGrid) -> torch.Tensor:
    """The `masks` `[n, H, W]` inside the boxes of `grid`, nearest neighbour, `[n, size, size]` bool."""
    picked = torch.arange(len(masks), device=masks.device)[:, None, None]
    return masks[picked, grid.nearest_rows[:, :, None], grid.nearest_columns[:, None, :]]
