"""(Row, class) pairs of ESC-Net: which of them are segmented, how they are cut into chunks, and back together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from ...configuration_base import check_positive
from ...layers.correlation import strongest_classes
from ...layers.pieces import joined


@dataclass
class ClassChunk:
    """Some (row, class) pairs on their way through the blocks, sorted by row; a row is a picture or a view of one.

    Args:
        rows: `[n]` int64, the row of each pair.
        used_rows: the rows that the pairs belong to.
        counts: of each of these rows, how many of the n are its classes.
        features: `[n, h * w, C]`, the residual stream E.
        keys: `[n, h * w, S]`, the map that SAM refines: of the picture, later of the class.
        prompt_map: `[n, h, w]`, what the first block's prompts are made from: the correlation.
        tokens: `[n, T, S]`, queries of the SAM blocks beside those of the prompts; None: none.
        refined: `[n, h * w, C]`, the refined map F' of the present block, projected.
        records: name -> `[n, ...]`, what was asked for on the way.
    """

    rows: torch.Tensor
    used_rows: slice
    counts: list[int]
    features: torch.Tensor
    keys: torch.Tensor
    prompt_map: torch.Tensor
    tokens: torch.Tensor | None = None
    refined: torch.Tensor | None = None
    records: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w)."""
        return tuple(self.prompt_map.shape[1:])


def chunk_bounds(counts: list[int], chunk_size: int | None) -> Iterator[tuple[slice, slice, list[int]]]:
    """Cut rows with `counts` pairs each into chunks of `chunk_size` pairs.

    Yields:
        the chunk's pairs and its rows as slices, and how many of its pairs belong to each of these rows.
    """
    if chunk_size is None:
        # an exported program keeps the number of classes open, so nothing may be asked about it
        yield slice(0, sum(counts)), slice(0, len(counts)), counts
        return
    ends = [sum(counts[: row + 1]) for row in range(len(counts))]
    total = ends[-1]
    for start in range(0, total, chunk_size):
        stop = min(start + chunk_size, total)
        shares = [min(end, stop) - max(end - count, start) for end, count in zip(ends, counts, strict=True)]
        used = [row for row, share in enumerate(shares) if share > 0]
        rows = slice(used[0], used[-1] + 1)
        yield slice(start, stop), rows, [max(0, share) for share in shares[rows]]


def kept_classes(
    cost: torch.Tensor, top_k: int | None, max_classes: int | None, order: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Classes `[R, K]` bool that are segmented, by their cosines `[R, K, h, w]`; None: all.

    Args:
        top_k: a class has to be among the k with the highest cosine at some position of its row.
        max_classes: it has to be among so many with the highest cosine anywhere.
        order: `[R, K]`, in the place of these highest cosines.
    """
    num_classes = cost.shape[1]
    kept = None
    if top_k is not None:
        best = cost.flatten(2).topk(min(top_k, num_classes), dim=1, sorted=False).indices
        kept = torch.zeros(cost.shape[:2], dtype=torch.bool, device=cost.device).scatter(1, best.flatten(1), True)
    if max_classes is not None and max_classes < num_classes:
        scores = cost[:, :, None] if order is None else order[:, :, None, None, None]
        strongest = torch.zeros(cost.shape[:2], dtype=torch.bool, device=cost.device)
        strongest = strongest.scatter(1, strongest_classes(scores, max_classes), True)
        kept = strongest if kept is None else kept & strongest
    return kept


def check_limits(training: bool, averages: bool, limits: dict[str, int | None]) -> None:
    """Raise a ValueError if switches are out of range, or do not go with training or with averages over classes."""
    check_positive(**limits)
    if training and limits["rejection_top_k"] is not None:
        raise ValueError("Early rejection is for inference: pass rejection_top_k=None in training.")
    if averages and (limits["rejection_top_k"] is not None or limits["max_classes"] is not None):
        raise ValueError(
            "This model averages its maps over all classes: rejecting some would change the others. Pass "
            "rejection_top_k=None and max_classes=None."
        )


def by_class(
    parts: Iterable[torch.Tensor], shape: tuple[int, int], kept: torch.Tensor | None, missing: float
) -> torch.Tensor:
    """Values `[n, ...]` of the pairs that are `kept` `[R, K]` (None: all) -> `[R, K, ...]`, `missing` elsewhere."""
    if kept is None:
        return joined(parts, math.prod(shape)).unflatten(0, tuple(shape))
    values = joined(parts, int(kept.sum()))
    return values.new_full((*shape, *values.shape[1:]), missing).index_put_((kept,), values)


def average_over_classes(chunks: list[ClassChunk], num_classes: int) -> None:
    """Replace each class's refined map by the mean over all `num_classes` of its row; the chunks hold them all."""
    first = chunks[0].refined
    num_rows = chunks[-1].used_rows.stop
    means = first.new_zeros(num_rows, *first.shape[1:])
    for chunk in chunks:
        means = means.index_add(0, chunk.rows, chunk.refined / num_classes)
    for chunk in chunks:
        chunk.refined = means[chunk.rows]
