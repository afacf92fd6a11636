"""(Row, class) pairs on their way through SED's decoder, and category early rejection (paper, section 3.4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch


class ClassChunk(NamedTuple):
    """Some (row, class) pairs, sorted by row, then class; a row is a picture or a view of one.

    Args:
        features: `[n, h, w, C]`.
        cost: `[n, h, w, G]`: cost guidance at this resolution, to begin with the cost map; None where none is used.
        pairs: `[n]` int64, row * K + class.
        counts: of each row, how many of the n are its classes.
    """

    features: torch.Tensor
    cost: torch.Tensor | None
    pairs: torch.Tensor
    counts: tuple[int, ...]

    def select(self, keep: torch.Tensor) -> ClassChunk:
        """The pairs where `keep` `[n]` is true."""
        counts = tuple(int(part.sum()) for part in keep.split(list(self.counts)))
        # once: every use of a mask makes a GPU wait
        picked = keep.nonzero().flatten()
        cost = None if self.cost is None else self.cost[picked]
        return ClassChunk(self.features[picked], cost, self.pairs[picked], counts)

    @staticmethod
    def join(first: ClassChunk, second: ClassChunk) -> ClassChunk:
        """Both in one chunk; the pairs of `second` come after those of `first`."""
        cost = None if first.cost is None else torch.cat([first.cost, second.cost])
        counts = tuple(a + b for a, b in zip(first.counts, second.counts, strict=True))
        return ClassChunk(
            torch.cat([first.features, second.features]), cost, torch.cat([first.pairs, second.pairs]), counts
        )


def best_classes(logits: torch.Tensor, counts: Sequence[int], top_k: int) -> torch.Tensor:
    """Which pairs are among the k best classes at any position of their row.

    Args:
        logits: `[N, h, w]` of (row, class) pairs, sorted by row.
        counts: of each row, how many of the N are its classes.
        top_k: k; a row with fewer classes keeps all.

    Returns:
        `[N]` bool.
    """
    kept = []
    for of_row in logits.flatten(1).split(list(counts)):
        best = of_row.topk(min(top_k, of_row.shape[0]), dim=0, sorted=False).indices
        kept.append(
            torch.zeros(of_row.shape[0], dtype=torch.bool, device=logits.device).index_fill(0, best.flatten(), True)
        )
    return torch.cat(kept)


def total_counts(chunks: Sequence[ClassChunk]) -> list[int]:
    """How many pairs of each row all chunks hold together."""
    return [sum(of_row) for of_row in zip(*(chunk.counts for chunk in chunks), strict=True)]


def join_small(chunks: Iterable[ClassChunk], size: int) -> list[ClassChunk]:
    """The chunks without empty ones, neighbours joined as long as they hold at most `size` pairs together."""
    joined: list[ClassChunk] = []
    for chunk in chunks:
        if joined and joined[-1].pairs.shape[0] + chunk.pairs.shape[0] <= size:
            joined[-1] = ClassChunk.join(joined[-1], chunk)
        elif chunk.pairs.shape[0]:
            joined.append(chunk)
    return joined


def reject(chunks: list[ClassChunk], logits: torch.Tensor, top_k: int, size: int) -> list[ClassChunk]:
    """What is left of all chunks when only the best classes of each row stay.

    Args:
        chunks: all pairs. The list is used up, so that memory is freed on the way.
        logits: `[N, h, w]` of all pairs.
        top_k: see `best_classes`.
        size: most pairs of a chunk.
    """
    kept = best_classes(logits, total_counts(chunks), top_k).split([chunk.pairs.shape[0] for chunk in chunks])

    def survivors() -> Iterable[ClassChunk]:
        for keep in kept:
            chunk = chunks.pop(0)
            yield chunk if keep.all() else chunk.select(keep)

    return join_small(survivors(), size)
