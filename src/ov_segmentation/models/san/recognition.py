"""SAN's mask recognition: CLIP's last blocks, with class tokens of the mask queries steered by attention biases (3.3).

A query's SLS token, a copy of CLIP's class token, sees the visual tokens, biased, and itself. Nothing sees it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import adaptive_max_pool2d
from transformers import CLIPVisionModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ...layers.attention import attend, split_heads

BLOCKED = -100.0


def pool_bias(attention_bias: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Attention biases `[B, layers, heads, N, h, w]` to `[B, layers, heads, N, L]` on CLIP's grid, by the maximum."""
    pooled = adaptive_max_pool2d(attention_bias.flatten(1, 3), grid)
    return pooled.flatten(2).unflatten(1, attention_bias.shape[1:4])


def masked_attention_bias(bias: torch.Tensor) -> torch.Tensor:
    """The mask of the one-sequence form, order SLS, CLS, visual.

    Args:
        bias: `[B, heads, N, L]`.

    Returns:
        `[B, heads, N+1+L, N+1+L]`: SLS rows see themselves (0) and the visual tokens (biased); the other rows see
        everything but SLS tokens. What is blocked is -100, as in the original.
    """
    batch, heads, num_queries, num_visual = bias.shape
    length = num_queries + 1 + num_visual
    mask = bias.new_zeros(batch, heads, length, length)
    itself = torch.eye(num_queries, dtype=bias.dtype, device=bias.device)
    mask[..., :num_queries] = BLOCKED
    mask[..., :num_queries, :num_queries] = BLOCKED * (1 - itself)
    mask[..., :num_queries, num_queries] = BLOCKED
    mask[..., :num_queries, num_queries + 1 :] = bias
    return mask


def cross_attention_bias(bias: torch.Tensor) -> torch.Tensor:
    """The bias of the cross-attention form: `[B, heads, N, L]` -> `[B, heads, N, L+N]`, keys visual, then SLS.

    An SLS token's own key has bias 0, the other SLS tokens' keys are shut out.
    """
    num_queries = bias.shape[2]
    others = torch.full((num_queries, num_queries), torch.finfo(bias.dtype).min, dtype=bias.dtype, device=bias.device)
    others.fill_diagonal_(0)
    return torch.cat([bias, others.expand(*bias.shape[:2], -1, -1)], dim=-1)


class CrossRecognitionBlock(GradientCheckpointingLayer):
    """One of CLIP's blocks, applied to SLS tokens as cross-attention. It has no weights: the block is an argument."""

    def forward(
        self, sls: torch.Tensor, tokens: torch.Tensor, bias: torch.Tensor, layer: nn.Module, is_last: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Run `layer`, a `CLIPEncoderLayer`.

        Args:
            sls: `[B, N, D]`.
            tokens: CLS and visual tokens `[B, 1 + L, D]`.
            bias: `[B, heads, N, L+N]` from `cross_attention_bias`.
            layer: the block.
            is_last: leaves `tokens` as they are, because nobody will read them.

        Returns:
            `sls` and `tokens` after the block, and the attention weights `[B, heads, N, L+N]` where there are any.
        """
        num_queries, attention = sls.shape[1], layer.self_attn
        hidden = torch.cat([sls, tokens], dim=1)
        normed = layer.layer_norm1(hidden)
        asking = normed[:, :num_queries] if is_last else normed
        query = split_heads(attention.q_proj(asking), attention.num_heads)
        key = split_heads(attention.k_proj(normed), attention.num_heads)
        value = split_heads(attention.v_proj(normed), attention.num_heads)

        def attend_with(rows: slice, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None) -> tuple:
            dropout = attention.dropout if attention.training else 0.0
            return attend(
                attention, query[:, :, rows], keys, values, bias, attention.config._attn_implementation, dropout
            )

        def seen_by_sls(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x[:, :, num_queries + 1 :], x[:, :, :num_queries]], dim=2)

        attended, weights = attend_with(slice(num_queries), seen_by_sls(key), seen_by_sls(value), bias)
        if not is_last:
            rest, _ = attend_with(slice(num_queries, None), key[:, :, num_queries:], value[:, :, num_queries:], None)
            attended = torch.cat([attended, rest], dim=1)
        hidden = hidden[:, : attended.shape[1]] + attention.out_proj(attended)
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        if is_last:
            return hidden, tokens, weights
        return hidden[:, :num_queries], hidden[:, num_queries:], weights


class MaskRecognition(nn.Module):
    """Mask embeddings from attention biases, through CLIP's last blocks. Without weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.cross_block = CrossRecognitionBlock()

    def forward(
        self, vision_model: CLIPVisionModel, start: torch.Tensor, bias: torch.Tensor, num_layers: int, form: str
    ) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        """Recognise masks.

        Args:
            vision_model: CLIP's.
            start: CLS and visual tokens `[B, 1 + L, D]` before the last `num_layers` blocks.
            bias: `[B, 1 or num_layers, 1 or heads, N, L]`.
            num_layers: recognition blocks.
            form: "cross" or "masked".

        Returns:
            SLS tokens `[B, N, D]` after CLIP's last LayerNorm; the attention weights of each block (cross form, eager).
        """
        blocks = vision_model.encoder.layers[-num_layers:]
        num_queries = bias.shape[3]
        sls = start[:, :1].expand(-1, num_queries, -1)
        bias = bias.to(start.dtype)
        if bias.shape[2] == 1:
            bias = bias.expand(-1, -1, vision_model.config.num_attention_heads, -1, -1)
        build = cross_attention_bias if form == "cross" else masked_attention_bias
        masks = [build(layer_bias) for layer_bias in bias.unbind(1)]
        masks = masks * num_layers if len(masks) == 1 else masks
        weights: list[torch.Tensor | None] = []
        if form == "cross":
            tokens = start
            for i, (block, mask) in enumerate(zip(blocks, masks, strict=True), start=1):
                sls, tokens, seen = self.cross_block(sls, tokens, mask, block, i == num_layers)
                weights.append(seen)
        else:
            tokens = torch.cat([sls, start], dim=1)
            for block, mask in zip(blocks, masks, strict=True):
                tokens = block(tokens, mask)
            sls = tokens[:, :num_queries]
        return vision_model.post_layernorm(sls), tuple(weights)
