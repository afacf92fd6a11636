"""How far one list of class names is from another, seen by a model's text tower (SAN, table 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LabelSetSimilarity:
    """Distances are 1 - cosine.

    Attributes:
        hausdorff_distance: the larger of the two directed distances.
        to_second: the largest distance of a name of the first list to its nearest in the second: how foreign the most
            foreign name is.
        to_first: the other way round.
        mean_nearest: mean cosine of the first list's names to their nearest.
        nearest: `[A]` index of each name's nearest in the second list.
        cosines: `[A]` cosine to it.
    """

    hausdorff_distance: float
    to_second: float
    to_first: float
    mean_nearest: float
    nearest: torch.Tensor
    cosines: torch.Tensor

    def figures(self) -> dict[str, float]:
        """The scalars."""
        return {name: value for name, value in vars(self).items() if not isinstance(value, torch.Tensor)}


def one_vector_per_class(text_embeds: torch.Tensor) -> torch.Tensor:
    """`[K, D]`, L2-normalised, of `[K, D]` or of `[K, P, D]` (methods that keep their prompts)."""
    if text_embeds.ndim == 3:
        text_embeds = text_embeds.mean(1)
    return torch.nn.functional.normalize(text_embeds.float(), dim=-1).cpu()


def label_set_similarity(first: torch.Tensor, second: torch.Tensor) -> LabelSetSimilarity:
    """Compare two lists by their embeddings, `[A, D]` or `[A, P, D]`, and the same with B.

    The Hausdorff distance is max(max_a min_b d, max_b min_a d) with d = 1 - cosine.
    """
    cosines = one_vector_per_class(first) @ one_vector_per_class(second).t()
    best, nearest = cosines.max(1)
    to_second, to_first = float(1 - best.min()), float(1 - cosines.max(0).values.min())
    return LabelSetSimilarity(
        hausdorff_distance=max(to_second, to_first),
        to_second=to_second,
        to_first=to_first,
        mean_nearest=float(best.mean()),
        nearest=nearest,
        cosines=best,
    )
