"""Masks of everything in a picture by Segment Anything: a grid of points, filters, suppression of duplicates.

Source: Kirillov et al., "Segment Anything" (2023), appendix B ("automatic mask generation"), here in one crop and on
the mask decoder's own grid (a quarter of SAM's input), where boxes and stability are measured too. `SamModel` is
transformers'; its own mask generation needs torchvision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from .mask_crops import mask_boxes
from .mask_nms import box_overlaps, mask_overlaps, suppress
from .sam_decoder import PointDecoder

if TYPE_CHECKING:
    from transformers import SamModel

FAR_OUTSIDE = -20.0
"""Mask logit of a pixel that belongs to another mask: sigmoid gives 2e-9."""


@dataclass(frozen=True)
class SamOptions:
    """How masks are made and filtered.

    Args:
        points_per_side: points of the grid, per side of the picture.
        points_per_batch: points that go through the mask decoder at once; on CPUs they can be fewer.
        score_threshold: least IoU that SAM predicts for a mask.
        stability_threshold: least IoU of a mask with itself when its logits are cut `stability_offset` higher and
            lower.
        box_overlap: largest IoU of the boxes of two masks that are both kept.
        mask_overlap: the same of the masks themselves; 1: no limit.
        max_masks: the best so many are kept; None: all.
        exclusive: a pixel belongs to the smallest of its masks alone.
    """

    points_per_side: int = 32
    points_per_batch: int = 64
    score_threshold: float = 0.88
    stability_threshold: float = 0.95
    stability_offset: float = 1.0
    box_overlap: float = 0.7
    mask_overlap: float = 1.0
    max_masks: int | None = None
    exclusive: bool = True


def sam_masks(
    sam: SamModel, pictures: list[torch.Tensor], canvas: tuple[int, int], options: SamOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of several pictures.

    Args:
        sam: the model.
        pictures: `[1, 3, h, w]` each, in SAM's normalisation (ImageNet's mean and deviation), without padding.
        canvas: (height, width) of the frame in whose upper left corner each picture stands.

    Returns:
        Mask logits `[B, N, canvas height / 4, canvas width / 4]` over the frame, N that of the picture with the most
        masks but at least 1, and bool `[B, N]`: which of them are masks and no filling.
    """
    size = (max(1, canvas[0] // 4), max(1, canvas[1] // 4))
    found = [_masks_of_picture(sam, picture, canvas, size, options) for picture in pictures]
    count = max(1, *(len(masks) for masks in found))
    valid = torch.stack([torch.arange(count, device=masks.device) < len(masks) for masks in found])
    filled = [F.pad(masks, (0, 0, 0, 0, 0, count - len(masks)), value=FAR_OUTSIDE) for masks in found]
    return torch.stack(filled), valid


def point_grid(points_per_side: int, height: float, width: float) -> torch.Tensor:
    """Centres `[n * n, 2]` (x, y) of the cells of a grid over a picture of the given size."""
    centres = (torch.arange(points_per_side) + 0.5) / points_per_side
    rows, columns = torch.meshgrid(centres * height, centres * width, indexing="ij")
    return torch.stack([columns.flatten(), rows.flatten()], dim=-1)


def stability(logits: torch.Tensor, offset: float) -> torch.Tensor:
    """IoU `[n]` of the masks `logits > offset` and `logits > -offset`, `logits` `[n, h, w]`; 0 for empty ones."""
    strict, loose = ((logits > cut).flatten(1).sum(dim=1) for cut in (offset, -offset))
    return strict / loose.clamp(min=1)


def make_exclusive(logits: torch.Tensor) -> torch.Tensor:
    """`logits` `[N, h, w]` with every pixel taken from all masks that cover it but the smallest."""
    inside = logits > 0
    areas = inside.flatten(1).sum(dim=1)
    owner = torch.where(inside, areas[:, None, None], inside[0].numel() + 1).argmin(dim=0)
    owned = torch.arange(len(logits), device=logits.device)[:, None, None] == owner
    return torch.where(inside.any(dim=0) & ~owned, FAR_OUTSIDE, logits)


def _masks_of_picture(
    sam: SamModel, picture: torch.Tensor, canvas: tuple[int, int], size: tuple[int, int], options: SamOptions
) -> torch.Tensor:
    """Mask logits `[N, *size]` over the canvas."""
    side = sam.config.vision_config.image_size
    height, width = picture.shape[-2:]
    scale = side / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    resized = F.interpolate(picture.float(), (new_height, new_width), mode="bilinear", antialias=True)
    square = F.pad(resized, (0, side - new_width, 0, side - new_height)).to(picture.dtype)
    embeddings = sam.get_image_embeddings(square)
    decoder = PointDecoder(sam, embeddings)
    points = point_grid(options.points_per_side, new_height, new_width).to(picture)
    part = (new_height / side, new_width / side)
    chunks = points.split(decoder.points_at_once(options.points_per_batch))
    logits, scores = zip(*(_filtered(decoder, chunk, part, options) for chunk in chunks))
    kept = _deduplicated(torch.cat(logits), torch.cat(scores), options)
    return _on_canvas(kept, (canvas[0] * scale / side, canvas[1] * scale / side), size, options.exclusive)


def _filtered(
    decoder: PointDecoder, points: torch.Tensor, part: tuple[float, float], options: SamOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask logits `[n, m, m]` of `points` `[P, 2]`, padding set far outside, and scores, those that pass the filters.

    `part`: the share of SAM's square that the picture fills, (down, across).
    """
    logits, scores = decoder(points, options.score_threshold)
    rows, columns = (max(1, round(share * length)) for share, length in zip(part, logits.shape[-2:]))
    logits[:, rows:] = FAR_OUTSIDE
    logits[:, :, columns:] = FAR_OUTSIDE
    good = (stability(logits, options.stability_offset) >= options.stability_threshold) & (logits > 0).flatten(1).any(1)
    return logits[good], scores[good]


def _deduplicated(logits: torch.Tensor, scores: torch.Tensor, options: SamOptions) -> torch.Tensor:
    if not len(logits):
        return logits
    masks = logits > 0
    kept = suppress(box_overlaps(mask_boxes(masks)), scores, options.box_overlap)
    if options.mask_overlap < 1:
        kept = kept[suppress(mask_overlaps(masks[kept]), scores[kept], options.mask_overlap)]
    return logits[kept[: options.max_masks]]


def _on_canvas(
    logits: torch.Tensor, extent: tuple[float, float], size: tuple[int, int], exclusive: bool
) -> torch.Tensor:
    """Bilinear samples of `logits` `[n, m, m]` on a grid `size` over the upper left part `extent` (down, across) of the
    square, which may go beyond it."""
    if not len(logits):
        return logits.new_zeros(0, *size)
    rows, columns = (
        (torch.arange(length, device=logits.device) + 0.5) / length * share * 2 - 1
        for length, share in zip(size, extent)
    )
    grid = torch.stack([columns.expand(len(rows), -1), rows[:, None].expand(-1, len(columns))], dim=-1)
    grid = grid.expand(len(logits), -1, -1, -1)
    sampled = F.grid_sample(logits[:, None], grid, align_corners=False, padding_mode="border")[:, 0]
    return make_exclusive(sampled) if exclusive else sampled
