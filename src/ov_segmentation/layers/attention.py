"""Scaled dot-product attention through transformers' interface: eager, sdpa, or what else is registered there."""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import products

SCORES_AT_ONCE = 2**21
SCORES_AT_ONCE_FLOAT32 = 2**19
LEAST_QUERIES = 64
LEAST_TOKENS = 192
LEAST_TOKENS_FLOAT32 = 384
LEAST_CHANNELS_FLOAT32 = 64


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula written out, with the signature of transformers' attention functions; also returns the weights."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    implementation: str,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """softmax(query key^T / sqrt(d) + bias) value, heads merged again.

    Args:
        module: what attends; its attribute `is_causal` must be False.
        query: `[B, heads, Q, d]`.
        key, value: `[B, heads, T, d]`.
        bias: None, or additive, `[B or 1, heads or 1, Q, T]`.
        implementation: "sdpa", "eager", ...: `config._attn_implementation`.
        dropout: probability of dropping a weight.

    Returns:
        `[B, Q, heads * d]`, and the weights `[B, heads, Q, T]` where the implementation gives them (eager).
    """
    if implementation == "sdpa" and not dropout and prefers_tiles(query):
        return tiled_attention(query, key, value, bias).transpose(1, 2).flatten(2), None
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
    bias = None if bias is None else bias.to(query.dtype)
    out, weights = interface(module, query, key, value, bias, scaling=query.shape[-1] ** -0.5, dropout=dropout)
    return out.flatten(2), weights


def prefers_tiles(tensor: torch.Tensor) -> bool:
    """Whether `tiled_attention` of `[..., tokens, channels]` is the faster: on a CPU, without gradients."""
    if tensor.dtype == torch.float32:
        tokens, channels = tensor.shape[-2:]
        return products.takes(tensor) and tokens >= LEAST_TOKENS_FLOAT32 and channels >= LEAST_CHANNELS_FLOAT32
    return (
        tensor.device.type == "cpu"
        and tensor.dtype == torch.bfloat16
        and tensor.shape[-2] >= LEAST_TOKENS
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def tiled_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The formula for some heads and queries at a time, so that their scores stay in the processor's caches.

    Up to twice as fast in bfloat16 as torch's fused attention, whose small products leave the processor's bfloat16
    instructions unused, and 1.4 times in float32 (`products`). Scores are rounded to bfloat16, as in eager attention.
    Arguments as for `attend`.

    Returns:
        `[B, heads, Q, d]`.
    """
    shape, num_queries, num_keys = query.shape[:3], query.shape[2], key.shape[2]
    keys = (key * key.shape[-1] ** -0.5).transpose(-1, -2).flatten(0, 1)
    queries, values = query.flatten(0, 1), value.flatten(0, 1)
    bias = None if bias is None else bias.expand(*shape, num_keys).flatten(0, 1)
    # oneDNN's float32 product takes matrices, no stacks of them
    one_by_one = query.dtype == torch.float32
    if one_by_one:
        keys, values = keys.contiguous(), values.contiguous()
    at_once = SCORES_AT_ONCE_FLOAT32 if one_by_one else SCORES_AT_ONCE
    heads_at_once = 1 if one_by_one else max(1, at_once // (num_queries * num_keys))
    queries_at_once = max(LEAST_QUERIES, at_once // (heads_at_once * num_keys))
    result = torch.empty(len(queries), num_queries, values.shape[-1], dtype=value.dtype)

    def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return products.linear(left[0], right[0].t())[None] if one_by_one else left @ right

    for first in range(0, len(queries), heads_at_once):
        heads = slice(first, first + heads_at_once)
        for start in range(0, num_queries, queries_at_once):
            rows = slice(start, start + queries_at_once)
            scores = multiply(queries[heads, rows], keys[heads])
            if bias is not None:
                scores += bias[heads, rows]
            result[heads, rows] = multiply(scores.softmax(dim=-1), values[heads])
    return result.view(*shape, -1)


def split_heads(tokens: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`[B, T, heads * d]` -> `[B, heads, T, d]`."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)
