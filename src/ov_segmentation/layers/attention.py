"""Scaled dot-product attention through transformers' interface: eager, sdpa, or what else is registered there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import record_function
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import products

TILED_ATTENTION = "tiled_attention"
SCORES_AT_ONCE_BYTES = 2**22
LEAST_QUERIES = 64
# below this the calls cost more than the products
LEAST_ELEMENTS = 2**16
# oneDNN fills its vectors with outputs
KEYS_MULTIPLE = 16


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
    weights = F.dropout(weights, p=dropout, training=module.training)
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


def read_attention_from(config: PreTrainedConfig, part: nn.Module) -> None:
    """Let the attentions in `part`, transformers' layers built by a configuration of their own, run the implementation
    that `config` says, also after it was set there; they read nothing else."""
    for module in part.modules():
        if hasattr(module, "config"):
            module.config = config


def prefers_tiles(tensor: torch.Tensor) -> bool:
    """Whether `tiled_attention` of queries `[..., tokens, channels]` is the faster: on a CPU, without gradients."""
    large = tensor.shape[-2] >= LEAST_QUERIES and tensor.numel() >= LEAST_ELEMENTS
    return large and products.takes(tensor, torch.float32, torch.bfloat16)


def tiled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The formula for some heads and queries at a time, so that their scores stay in the processor's caches.

    Up to twice as fast as torch's fused attention, whose small products leave much of a processor unused. Scores are
    rounded to bfloat16 where that is the precision, as in eager attention.
    Profiles show it, and `profiling` counts it, as one operation: `TILED_ATTENTION`, with its number of multiply-adds.
    Arguments as for `attend`, and `scale` of the scores, if not 1 / sqrt(d).

    Returns:
        `[B, heads, Q, d]`, a view of `[Q, B, heads, d]`.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    multiply_adds = query.shape[:3].numel() * num_keys * (query.shape[3] + value.shape[3])
    with record_function(TILED_ATTENTION, str(multiply_adds)):
        padding, at_once = -num_keys % KEYS_MULTIPLE, SCORES_AT_ONCE_BYTES // query.element_size()
        # queries outermost, as `products.grouped` has it; scaled in the same pass
        query, scale = query.permute(2, 0, 1, 3), query.shape[-1] ** -0.5 if scale is None else scale
        query = torch.mul(query, scale, out=query.new_empty(query.shape))
        if padding:
            key, value = (F.pad(one, (0, 0, 0, padding)) for one in (key, value))
        elif num_queries * num_keys > at_once:
            # several tiles share a head's keys: put in order once, not for each
            key, value = key.contiguous(), value.contiguous()
        bias = None if bias is None else bias.expand(*key.shape[:2], num_queries, num_keys).permute(2, 0, 1, 3)
        result = query.new_empty(*query.shape[:3], value.shape[3])
        for rows, heads in _tiles(*query.shape[:3], key.shape[2], at_once):
            scores = products.grouped(query[(rows, *heads)], key[heads])
            if bias is not None:
                scores[..., :num_keys] += bias[(rows, *heads)]
            if padding:
                scores[..., num_keys:] = -torch.inf
            result[(rows, *heads)] = products.grouped(scores.softmax(dim=-1), value[heads], transposed=True)
        return result.permute(1, 2, 0, 3)


def _tiles(
    num_queries: int, batch: int, heads: int, num_keys: int, at_once: int
) -> Iterator[tuple[slice, tuple[slice, slice]]]:
    """Queries, and pictures and heads, with about `at_once` scores: all heads of several pictures, several heads of one
    picture, or some queries of one head."""
    of_head = num_queries * num_keys
    heads_at_once = min(heads, max(1, at_once // of_head))
    batch_at_once = max(1, at_once // (heads * of_head))
    rows_at_once = max(LEAST_QUERIES, at_once // (heads_at_once * num_keys))
    steps = (rows_at_once, batch_at_once, heads_at_once)
    for row, picture, head in itertools.product(*map(range, (0, 0, 0), (num_queries, batch, heads), steps)):
        yield (
            slice(row, row + rows_at_once),
            (slice(picture, picture + batch_at_once), slice(head, head + heads_at_once)),
        )


def split_heads(tokens: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`[B, T, heads * d]` -> `[B, heads, T, d]`."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)
