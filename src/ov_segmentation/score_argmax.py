"""The winning class of every pixel without ever holding all scores.

The picture is cut into tiles. In a tile, a class whose highest possible score is below another's lowest possible score
cannot win, nor can one that is everywhere below a mean of others; the rest, usually a handful, are evaluated. That is
exact: bounds come from the maps themselves, and interpolation never leaves the range of its inputs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from .resampling import Bilinear, Span
from .score_fields import SLACK, Bounds, Field

# so many are evaluated before it is asked which of them are beaten
_FEW = 4
_TILES_PER_SIDE = 20
_MIN_TILE = 40
_RIVALS = 8
_ACCELERATOR_BYTES = 256 * 2**20


@dataclass
class LabelMap:
    """Result for one picture of H x W pixels and K classes.

    Args:
        index: `[H, W]` int64, the class of the highest score, the lowest index where several share it; any where all
            scores are 0.
        best: `[H, W]`, its score; where only one class can win and neither `total` nor `scores` is wanted, a lower
            bound of it.
        total: `[H, W]`, the sum of all classes' scores, or None.
        scores: `[K, H, W]`, or None.
    """

    index: torch.Tensor
    best: torch.Tensor
    total: torch.Tensor | None
    scores: torch.Tensor | None


def draw_label_map(field: Field, size: tuple[int, int], with_total: bool, with_scores: bool) -> LabelMap:
    """Interpolate a field to `size` (height, width) and find the best class of every pixel.

    Args:
        field: scores, see `score_fields`.
        size: height and width of the result.
        with_total: also the sum over the classes.
        with_scores: also all scores, `[K, H, W]`.
    """
    resize = Bilinear((field.size, size))
    device = field.device
    every_class = torch.arange(field.num_classes, device=device)
    result = LabelMap(
        index=torch.zeros(size, dtype=torch.long, device=device),
        best=torch.zeros(size, device=device),
        total=torch.zeros(size, device=device) if with_total else None,
        scores=torch.zeros(field.num_classes, *size, device=device) if with_scores else None,
    )
    grid = _grid(size, field.num_classes, device)
    tiles = list(itertools.product(*grid))
    if with_scores:
        candidates, least = [every_class] * len(tiles), [0.0] * len(tiles)
    else:
        candidates, least = _candidates(field.bounds(*resize.windows(*grid)))
    for (rows, columns), classes, lowest in zip(tiles, candidates, least, strict=True):
        tile = (slice(*rows), slice(*columns))
        if not (len(classes) or with_total):
            continue
        if len(classes) == 1 and not (with_total or with_scores) and lowest > 0:
            result.index[tile], result.best[tile] = classes, lowest
            continue
        scores = resize(field.scores(*resize.window(rows, columns), classes, with_total), rows, columns)
        if with_total:
            scores, result.total[tile] = scores[..., :-1], scores[..., -1]
            if not len(classes):
                continue
        best, winner = scores.max(-1)
        result.best[tile], result.index[tile] = best, classes[winner]
        if with_scores:
            result.scores[:, tile[0], tile[1]] = scores.permute(2, 0, 1)
    return result


def _candidates(bounds: Bounds) -> tuple[list[torch.Tensor], list[float]]:
    """Classes that can win in each tile, and the highest of their least scores."""
    low, high = bounds.low.flatten(0, 1), bounds.high.flatten(0, 1)
    # scores of 0 never win
    promising = (high * (1 + SLACK) >= low.amax(-1, keepdim=True)) & (high > 0)
    if bounds.beaten is not None:
        pairs = (promising & (promising.sum(-1, keepdim=True) > _FEW)).nonzero(as_tuple=True)
        promising[pairs] = ~bounds.beaten(*pairs)
    classes = promising.nonzero()[:, 1].split(promising.sum(-1).tolist())
    return list(classes), low.where(promising, 0).amax(-1).tolist()


def _grid(size: tuple[int, int], num_classes: int, device: torch.device) -> tuple[list[Span], list[Span]]:
    """Rows and columns of the tiles."""
    height, width = size
    if device.type == "cpu":
        tile_height, tile_width = (max(_MIN_TILE, -(-side // _TILES_PER_SIDE)) for side in size)
    else:  # launching small kernels costs more than scores that cannot win
        tile_height, tile_width = max(1, _ACCELERATOR_BYTES // (4 * width * max(num_classes, 256))), width
    rows = [(top, min(top + tile_height, height)) for top in range(0, height, tile_height)]
    return rows, [(left, min(left + tile_width, width)) for left in range(0, width, tile_width)]


def undominated_classes(weights: torch.Tensor) -> torch.Tensor:
    """Indices of the classes that can win the merge of masks somewhere, ascending.

    A class is left out if another one's weight is at least as high for every query. Where both reach the same score the
    lower index wins, so a higher index only dominates by a margin that rounding cannot undo. Exact for any masks >= 0.

    Args:
        weights: `[N, K]`, non-negative weights of the merge.
    """
    num_queries, num_classes = weights.shape
    columns = weights.t().contiguous()
    margin = 1 + (2 * num_queries + 4) * torch.finfo(weights.dtype).eps
    dominated = torch.zeros(num_classes, dtype=torch.bool, device=weights.device)
    # where queries agree with each other, most classes fall to one of the few with the highest sums
    for rival in weights.sum(0).topk(min(_RIVALS, num_classes)).indices.tolist():
        others = (~dominated).nonzero()[:, 0]
        others = others[others != rival]
        needed = columns[others] * torch.where(others > rival, 1.0, margin)[:, None].to(weights.dtype)
        dominated[others[(columns[rival] >= needed).all(1)]] = True
    for some in (~dominated).nonzero()[:, 0].split(max(1, 2**20 // num_classes)):
        # few pairs survive a look at the one query for which a class is strongest
        strongest = columns[some].argmax(1)
        pairs = weights[strongest] >= columns[some, strongest][:, None]
        pairs[torch.arange(len(some), device=some.device), some] = False
        for chunk in pairs.nonzero().split(2**14):
            weaker, stronger = some[chunk[:, 0]], chunk[:, 1]
            needed = columns[weaker] * torch.where(stronger < weaker, 1.0, margin)[:, None].to(weights.dtype)
            dominated[weaker[(columns[stronger] >= needed).all(1)]] = True
    dominated[0] &= not dominated.all()  # only if no class has any weight
    return (~dominated).nonzero()[:, 0]
