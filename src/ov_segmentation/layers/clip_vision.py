"""CLIP's vision transformer, dense and step by step: any picture size, tokens between any two blocks, our own biases.

The functions take transformers' own modules, so nothing here has weights.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPVisionModel

from ..precision import full_precision
from .attention import attend, prefers_tiles, split_heads
from .bicubic import bicubic_resize


def resize_position_grid(positions: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Bicubic resize of position embeddings `[1, h*w, D]` of a grid `old` (h, w) to the grid `new`, in float32."""
    if old == new:
        return positions
    with full_precision(positions):
        return bicubic_resize(positions[0].float().unflatten(0, old), new).flatten(0, 1)[None].to(positions.dtype)


def clip_position_embedding(vision_model: CLIPVisionModel, grid: tuple[int, int]) -> torch.Tensor:
    """Position embeddings `[1, 1 + h*w, D]` for a patch grid (h, w): the class token's row, and the rest resized."""
    weight = vision_model.embeddings.position_embedding.weight[None]
    side = vision_model.config.image_size // vision_model.config.patch_size
    return torch.cat([weight[:, :1], resize_position_grid(weight[:, 1:], (side, side), grid)], dim=1)


def embed_patches(vision_model: CLIPVisionModel, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """Tokens before the first block (positions added, after the first LayerNorm) of pictures of any size.

    Args:
        pixel_values: `[B, 3, H, W]`; what is left of a side after dividing it by the patch size is dropped.

    Returns:
        `[B, 1 + h*w, D]`, the class token first, and the grid (h, w).
    """
    embeddings = vision_model.embeddings
    patches = embeddings.patch_embedding(pixel_values)
    grid = (patches.shape[-2], patches.shape[-1])
    class_token = embeddings.class_embedding.expand(len(patches), 1, -1)
    tokens = torch.cat([class_token, patches.flatten(2).transpose(1, 2)], dim=1)
    return vision_model.pre_layrnorm(tokens + clip_position_embedding(vision_model, grid)), grid


def run_block(layer: nn.Module, tokens: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """One of CLIP's blocks: `[B, T, D]` -> `[B, T, D]`; `bias`: see `attend`."""
    return run_block_with_weights(layer, tokens, bias)[0] if prefers_tiles(tokens) else layer(tokens, bias)


def run_block_with_weights(
    layer: nn.Module, tokens: torch.Tensor, bias: torch.Tensor | None = None, num_queries: int | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same through `attend`, with the attention weights it gives; of the first `num_queries` tokens, None: all."""
    normed = layer.layer_norm1(tokens)
    attended, weights = attend_to(layer.self_attn, normed[:, :num_queries], normed, bias)
    tokens = tokens[:, :num_queries] + attended
    return tokens + layer.mlp(layer.layer_norm2(tokens)), weights


def run_blocks(layers: nn.ModuleList, tokens: torch.Tensor, bias: torch.Tensor | None = None) -> list[torch.Tensor]:
    """`tokens` `[B, T, D]` and the output of each of CLIP's `layers` after it; `bias`: see `attend`."""
    outputs = [tokens]
    for layer in layers:
        outputs.append(run_block(layer, outputs[-1], bias))
    return outputs


def attend_to(
    attention: nn.Module, queries: torch.Tensor, context: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cross-attention with the projections of one of CLIP's self-attention modules.

    Args:
        attention: `CLIPEncoderLayer.self_attn`.
        queries: `[B, Q, D]`, normalised.
        context: `[B, T, D]`, normalised: keys and values.
        bias: see `attend`.

    Returns:
        `[B, Q, D]` after the output projection, and the weights as `attend` gives them.
    """
    heads = attention.num_heads
    query = split_heads(attention.q_proj(queries), heads)
    key, value = split_heads(attention.k_proj(context), heads), split_heads(attention.v_proj(context), heads)
    dropout = attention.dropout if attention.training else 0.0
    out, weights = attend(attention, query, key, value, bias, attention.config._attn_implementation, dropout)
    return attention.out_proj(out), weights
