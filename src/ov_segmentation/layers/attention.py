"""Scaled dot-product attention through transformers' interface: eager, sdpa, or what else is registered there."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.profiler import record_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import products

TILED_ATTENTION = "tiled_attention"
SCORES_AT_ONCE = 2**21
SCORES_AT_ONCE_FLOAT32 = 2**20
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
    Profiles show it, and `profiling` counts it, as one operation, `TILED_ATTENTION`. Arguments as for `attend`.

    Returns:
        `[B, heads, Q, d]`; in float32 a view of `[B, Q, heads, d]`.
    """
    if bias is not None:
        bias = bias.expand(*query.shape[:3], key.shape[2])
    in_tiles = _head_by_head if query.dtype == torch.float32 else _in_stacks_of_heads
    with record_function(TILED_ATTENTION):
        return in_tiles(query, key, value, bias)


def _head_by_head(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """oneDNN's float32 product takes matrices, no stacks of them."""
    batch, heads, num_queries, channels = query.shape
    # one pass: copies whose rows lie side by side, which oneDNN needs
    keys = torch.mul(key, channels**-0.5, out=key.new_empty(key.shape))
    values = value.contiguous()
    result = query.new_empty(batch, num_queries, heads, values.shape[-1]).transpose(1, 2)
    at_once = max(LEAST_QUERIES, SCORES_AT_ONCE_FLOAT32 // keys.shape[2])
    for place in itertools.product(range(batch), range(heads)):
        of_head = result[place]
        for start in range(0, num_queries, at_once):
            rows = slice(start, start + at_once)
            scores = products.linear(query[place][rows], keys[place])
            if bias is not None:
                scores += bias[place][rows]
            of_head[rows] = products.linear(scores.softmax(dim=-1), values[place].t())
    return result


def _in_stacks_of_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    shape, num_queries, num_keys = query.shape[:3], query.shape[2], key.shape[2]
    keys = (key * key.shape[-1] ** -0.5).transpose(-1, -2).flatten(0, 1)
    queries, values = query.flatten(0, 1), value.flatten(0, 1)
    bias = None if bias is None else bias.flatten(0, 1)
    heads_at_once = max(1, SCORES_AT_ONCE // (num_queries * num_keys))
    queries_at_once = max(LEAST_QUERIES, SCORES_AT_ONCE // (heads_at_once * num_keys))
    result = torch.empty(len(queries), num_queries, values.shape[-1], dtype=value.dtype)
    for first in range(0, len(queries), heads_at_once):
        heads = slice(first, first + heads_at_once)
        for start in range(0, num_queries, queries_at_once):
            rows = slice(start, start + queries_at_once)
            scores = queries[heads, rows] @ keys[heads]
            if bias is not None:
                scores += bias[heads, rows]
            result[heads, rows] = scores.softmax(dim=-1) @ values[heads]
    return result.view(*shape, -1)


def split_heads(tokens: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`[B, T, heads * d]` -> `[B, heads, T, d]`."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)
