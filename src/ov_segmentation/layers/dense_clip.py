"""Dense CLIP features: the vision tower with a last block that keeps positions apart.

In the last block attention is replaced by its value path (Zhou et al., "Extract Free Dense Labels from CLIP", 2022), so
a position's feature stays its own and lies in the space of the text embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import CLIPModel

from ..configuration_base import check_positive
from .clip_vision import embed_patches, run_block, run_block_with_weights


class DenseCLIPFeatures(NamedTuple):
    """What `dense_clip_features` returns, for R pictures on a grid of h x w patches.

    Args:
        features: `[R, D, h, w]`, projected, not normalised.
        skips: `[R, C, h, w]` for each of the blocks asked for.
        attentions: weights `[R, heads, 1 + h * w, 1 + h * w]` of every block but the last, on request.
    """

    features: torch.Tensor
    skips: tuple[torch.Tensor, ...]
    attentions: tuple[torch.Tensor, ...]


def value_path(layer: nn.Module, hidden: torch.Tensor, residual: str) -> torch.Tensor:
    """The attention half of a CLIP encoder layer when each token passes its own value on: `[R, N, C]` -> `[R, N, C]`.

    Args:
        residual: "cls" adds the class token's input to every token (CAT-Seg's release), "token" each token's own.
    """
    attention = layer.self_attn
    values = attention.out_proj(attention.v_proj(layer.layer_norm1(hidden)))
    if torch.is_grad_enabled():
        # queries and keys play no role, but some are trained: a gradient of zero keeps them in step in every process
        unread = [p for part in (attention.q_proj, attention.k_proj) for p in part.parameters() if p.requires_grad]
        values = values + sum(parameter.sum() * 0 for parameter in unread)
    return values + (hidden[:, :1] if residual == "cls" else hidden)


def value_path_block(layer: nn.Module, hidden: torch.Tensor, residual: str) -> torch.Tensor:
    """A CLIP encoder layer with `value_path` in the place of attention: `[R, N, C]` -> `[R, N, C]`."""
    hidden = value_path(layer, hidden, residual)
    return hidden + layer.mlp(layer.layer_norm2(hidden))


def _to_map(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Tokens, class token first, `[R, 1 + h * w, C]` -> `[R, C, h, w]`, the class token dropped."""
    return tokens[:, 1:].transpose(1, 2).unflatten(2, grid)


def dense_clip_features(
    clip: CLIPModel,
    pixel_values: torch.Tensor,
    skip_layers: Sequence[int],
    residual: str = "cls",
    output_attentions: bool = False,
) -> DenseCLIPFeatures:
    """Projected features of every position, and the maps of some blocks. Nothing is detached.

    Args:
        clip: any `CLIPModel`.
        pixel_values: `[R, 3, H, W]`, normalised.
        skip_layers: blocks (from 0, without the last) whose output is returned too.
        residual: see `value_path`.
        output_attentions: return the attention weights (eager attention only).
    """
    vision = clip.vision_model
    hidden, grid = embed_patches(vision, pixel_values)
    skips, attentions = {}, []
    *blocks, last = vision.encoder.layers
    for index, block in enumerate(blocks):
        if output_attentions:
            hidden, weights = run_block_with_weights(block, hidden)
            attentions.append(weights)
        else:
            hidden = run_block(block, hidden)
        if index in skip_layers:
            skips[index] = _to_map(hidden, grid)
    hidden = value_path_block(last, hidden, residual)
    dense = clip.visual_projection(vision.post_layernorm(hidden))
    return DenseCLIPFeatures(_to_map(dense, grid), tuple(skips[index] for index in skip_layers), tuple(attentions))


def dense_clip_views(
    clip: CLIPModel,
    views: torch.Tensor,
    skip_layers: Sequence[int],
    residual: str,
    at_once: int | None,
    output_attentions: bool = False,
) -> DenseCLIPFeatures:
    """`dense_clip_features` of many views `[R, 3, H, W]`, `at_once` of them at a time; None: all."""
    check_positive(crop_batch_size=at_once)
    parts = [
        dense_clip_features(clip, chunk, skip_layers, residual, output_attentions)
        for chunk in views.split(at_once or len(views))
    ]
    skips = tuple(torch.cat(blocks) for blocks in zip(*(part.skips for part in parts), strict=True))
    attentions = tuple(torch.cat(weights) for weights in zip(*(part.attentions for part in parts), strict=True))
    return DenseCLIPFeatures(torch.cat([part.features for part in parts]), skips, attentions)
