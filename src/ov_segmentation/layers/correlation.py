"""The cost map of the per-class methods: cosines of dense CLIP features with class embeddings (CAT-Seg, Sec. 3.2)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from . import products


def correlation(dense_features: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """Cosine of every position with every prompt.

    In float32 whatever comes in: cosines of different names differ by little, of which bfloat16 would leave two digits.

    Args:
        dense_features: `[R, D, h, w]`, any length.
        text_embeds: `[K, P, D]`, any length.

    Returns:
        float32 `[R, K, P, h, w]` in [-1, 1].
    """
    rows, _, height, width = dense_features.shape
    classes, prompts, _ = text_embeds.shape
    image = F.normalize(dense_features.float().flatten(2), dim=1)
    text = F.normalize(text_embeds.float(), dim=-1).flatten(0, 1)
    # one product per picture: rows are the pictures of a batch or the views of one
    cosines = torch.stack([products.linear(text, one.t()) for one in image])
    return cosines.view(rows, classes, prompts, height, width)


def strongest_classes(cost: torch.Tensor, max_classes: int) -> torch.Tensor:
    """The classes whose cosine is highest anywhere, over prompts and positions.

    Args:
        cost: `[R, K, P, h, w]`.
        max_classes: how many to keep, at most K.

    Returns:
        class indices `[R, max_classes]`, ascending.
    """
    return cost.flatten(2).amax(dim=2).topk(max_classes, dim=1, sorted=False).indices.sort(dim=1).values
