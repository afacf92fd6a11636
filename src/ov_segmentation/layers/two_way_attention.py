"""Attention between few tokens and a large map, as in SAM's mask decoder, without projecting the map.

A head's score is `(W_q t) . (W_k m)` for a token t and a position m of the map, which is `(W_k^T W_q t) . m`: with T
tokens and heads of size d, T < d, it is less work to take the map's projection to the tokens than to compute it for
every position. The same holds for values. The modules are transformers' own; elsewhere than on CPUs without gradients
they run as they are.

Source: Kirillov et al., "Segment Anything" (2023), appendix A.
"""

from __future__ import annotations

import torch
from transformers.models.sam.modeling_sam import SamAttention, SamTwoWayAttentionBlock

from . import products


def two_way_block(
    block: SamTwoWayAttentionBlock,
    tokens: torch.Tensor,
    maps: torch.Tensor,
    token_positions: torch.Tensor,
    map_positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A two-way block of SAM's mask decoder.

    Args:
        block: transformers' module.
        tokens: `[N, T, C]`, SAM's queries.
        maps: `[N, L, C]`, SAM's keys, or `[1, L, C]` for all tokens.
        token_positions: `[N, T, C]`.
        map_positions: `[L, C]`.

    Returns:
        New tokens `[N, T, C]` and maps `[N, L, C]`.
    """
    if not folds(block.cross_attn_image_to_token, tokens, maps):
        several = maps.expand(tokens.shape[0], -1, -1)[:, None]
        queries, keys, _ = block(tokens[:, None], several, token_positions[:, None], map_positions, None)
        return queries[:, 0], keys[:, 0]
    query = tokens[:, None] if block.skip_first_layer_pe else (tokens + token_positions)[:, None]
    attended = block.self_attn(query, query, tokens[:, None])[0][:, 0]
    tokens = block.layer_norm1(attended if block.skip_first_layer_pe else tokens + attended)
    positioned = with_positions(maps, map_positions)
    read = tokens_read_map(block.cross_attn_token_to_image, tokens + token_positions, positioned, maps)
    tokens = block.layer_norm2(tokens + read)
    tokens = block.layer_norm3(tokens + block.mlp(tokens))
    read = map_reads_tokens(block.cross_attn_image_to_token, positioned, tokens + token_positions, tokens)
    new_maps = torch.add(maps, read.transpose(0, 1), out=maps.new_empty(len(tokens), *maps.shape[1:]))
    return tokens, block.layer_norm4(new_maps)


def final_attention(
    attention: SamAttention,
    tokens: torch.Tensor,
    maps: torch.Tensor,
    token_positions: torch.Tensor,
    map_positions: torch.Tensor,
) -> torch.Tensor:
    """What the tokens read from the maps behind the last block, `[N, T, C]`; arguments as for `two_way_block`."""
    query = tokens + token_positions
    if folds(attention, tokens, maps):
        return tokens_read_map(attention, query, with_positions(maps, map_positions), maps)
    return attention(query[:, None], (maps + map_positions)[:, None], maps[:, None])[0][:, 0]


def folds(attention: SamAttention, tokens: torch.Tensor, maps: torch.Tensor) -> bool:
    """Whether the map's projections are taken to the tokens: on a CPU, without gradients, for few tokens."""
    size_of_head = attention.internal_dim // attention.num_attention_heads
    return tokens.shape[1] < size_of_head and products.takes(maps, torch.float32, torch.bfloat16)


def with_positions(maps: torch.Tensor, map_positions: torch.Tensor) -> torch.Tensor:
    """`[N, L, C]` + `[L, C]` -> `[L, N, C]`, as `products.grouped` has it."""
    result = maps.new_empty(maps.shape[1], len(maps), maps.shape[2])
    return torch.add(maps.transpose(0, 1), map_positions[:, None], out=result)


def tokens_read_map(
    attention: SamAttention, tokens: torch.Tensor, positioned: torch.Tensor, maps: torch.Tensor
) -> torch.Tensor:
    """`attention(tokens, positioned, maps)`.

    Args:
        attention: transformers' module.
        tokens: `[N, T, C]`.
        positioned: `[L, M, C]`, maps with their positions; M is N, or 1 for all tokens.
        maps: `[M, L, C]`.

    Returns:
        `[N, T, C]`.
    """
    heads, num_maps = attention.num_attention_heads, len(maps)
    query = _by_head(attention.q_proj(tokens), heads) * attention.scaling
    # a key's bias is the same for all positions: it goes out of the softmax
    folded = torch.einsum("nthd,hdc->nthc", query, attention.k_proj.weight.unflatten(0, (heads, -1)))
    scores = products.grouped(positioned, folded.reshape(num_maps, -1, folded.shape[-1]))
    mixed = (scores.softmax(dim=0).permute(1, 2, 0) @ maps).view_as(folded)
    value = torch.einsum("nthc,hdc->nthd", mixed, attention.v_proj.weight.unflatten(0, (heads, -1))).flatten(2)
    return attention.out_proj(value + attention.v_proj.bias)


def map_reads_tokens(
    attention: SamAttention, positioned: torch.Tensor, tokens: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """`attention(positioned, tokens, values)`.

    Args:
        attention: transformers' module.
        positioned: `[L, M, C]`, maps with their positions; M is N, or 1 for all tokens.
        tokens: `[N, T, C]`.
        values: `[N, T, C]`.

    Returns:
        `[L, N, C]`.
    """
    heads, (length, num_maps, channels) = attention.num_attention_heads, positioned.shape
    key = _by_head(attention.k_proj(tokens), heads) * attention.scaling
    value = _by_head(attention.v_proj(values), heads)
    query_weight = attention.q_proj.weight.unflatten(0, (heads, -1))
    out_weight = attention.out_proj.weight.unflatten(1, (heads, -1))
    folded = torch.einsum("nthd,hdc->nthc", key, query_weight)
    offset = torch.einsum("nthd,hd->nth", key, attention.q_proj.bias.unflatten(0, (heads, -1)))
    # the weights of a head sum to 1, so that the heads' shares of the bias sum to it
    folded_value = torch.einsum("nthd,chd->nthc", value, out_weight) + attention.out_proj.bias / heads
    scores = products.grouped(positioned, folded.reshape(num_maps, -1, channels)).reshape(length, *offset.shape)
    # heads last: torch's softmax over a last axis of a few elements takes four times as long
    weights = scores.add_(offset).softmax(dim=-2).flatten(2)
    return products.grouped(weights, folded_value.flatten(1, 2), transposed=True)


def _by_head(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """`[N, T, heads * d]` -> `[N, T, heads, d]`."""
    return tokens.unflatten(-1, (heads, -1))
