"""The classifier of proposals in OVSeg and DeOP: cosines with class embeddings and a learned "no object"."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from ..precision import full_precision


def cosine_logits(
    embeddings: torch.Tensor, text_embeds: torch.Tensor, no_object: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Temperature times cosine, float32: bfloat16 would leave steps of an eighth between a hundred times a cosine.

    Args:
        embeddings: of proposals, `[..., D]`, any length.
        text_embeds: `[K, D]`, any length.
        no_object: `[1, D]`.
        temperature: what cosines are multiplied with.

    Returns:
        `[..., K + 1]`; "no object" is the last column.
    """
    classifier = torch.cat([text_embeds.float(), no_object.float()])
    with full_precision(embeddings):
        return temperature * normalize(embeddings.float(), dim=-1) @ normalize(classifier, dim=-1).T
