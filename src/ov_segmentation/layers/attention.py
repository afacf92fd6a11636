"""Scaled dot-product attention through transformers' interface: eager, sdpa, or what else is registered there."""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


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
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
    bias = None if bias is None else bias.to(query.dtype)
    out, weights = interface(module, query, key, value, bias, scaling=query.shape[-1] ** -0.5, dropout=dropout)
    return out.flatten(2), weights


def split_heads(tokens: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`[B, T, heads * d]` -> `[B, heads, T, d]`."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)
