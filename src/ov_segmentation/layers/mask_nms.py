"""Non-maximum suppression of boxes and of masks, without torchvision and without a loop over candidates.

Used on the masks of Segment Anything (Kirillov et al., 2023, appendix B), which keep the best of those whose boxes
overlap by more than 0.7.
"""

from __future__ import annotations

import torch


def box_overlaps(boxes: torch.Tensor) -> torch.Tensor:
    """Intersection over union `[n, n]` of `boxes` `[n, 4]` (x0, y0, x1, y1; x1 and y1 exclusive); 0 for empty ones."""
    boxes = boxes.float()
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    common = (high - low).clamp(min=0).prod(dim=-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=-1)
    return _ratio(common, areas)


def mask_overlaps(masks: torch.Tensor) -> torch.Tensor:
    """Intersection over union `[n, n]` of bool `masks` `[n, h, w]`; 0 for empty ones."""
    flat = masks.flatten(1).float()
    return _ratio(flat @ flat.T, flat.sum(dim=1))


def _ratio(common: torch.Tensor, areas: torch.Tensor) -> torch.Tensor:
    return common / (areas[:, None] + areas[None, :] - common).clamp(min=torch.finfo(common.dtype).tiny)


def suppress(overlaps: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Indices of the candidates that greedy suppression keeps, best first.

    A candidate goes if a kept one with a better score (equal scores: a smaller index) overlaps it by more than
    `threshold`. Greedy suppression is the one fixed point of that rule; iterating it settles the candidates in order of
    how many others their fate hangs on, so few rounds are needed.

    Args:
        overlaps: `[n, n]`, from `box_overlaps` or `mask_overlaps`.
        scores: `[n]`.
    """
    order = scores.argsort(descending=True, stable=True)
    kills = (overlaps[order][:, order] > threshold).triu(diagonal=1)
    kept = torch.ones_like(order, dtype=torch.bool)
    while True:
        survivors = ~(kills & kept[:, None]).any(dim=0)
        if torch.equal(survivors, kept):
            return order[kept]
        kept = survivors
