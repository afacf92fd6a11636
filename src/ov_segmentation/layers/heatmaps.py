"""Classification anchors: for each proposal, where in CLIP's map its class can be read best.

Source: Han et al., DeOP (2023), section 3.3 (classification anchor learning, equations 3 and 4).
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.models.maskformer.configuration_maskformer import MaskFormerDetrConfig
from transformers.models.maskformer.modeling_maskformer import (
    MaskFormerDetrDecoderLayer,
    MaskFormerDetrSelfAttention,
)

from .attention import read_attention_from, split_heads
from .initialization import init_torch_defaults
from .sine_positions import SinePositionEmbedding


class Anchors(NamedTuple):
    """Heatmaps `[B, heads, N, h*w]`, masked and not renormalised, and what they pool, `[B, N, D]`, not normalised."""

    heatmaps: torch.Tensor
    embeddings: torch.Tensor


def pool_by_heatmaps(features: torch.Tensor, heatmaps: torch.Tensor) -> torch.Tensor:
    """Weighted sums `[B, N, D]` of `features` `[B, h*w, D]`, in the heatmaps' precision; of `[B, heads, N, h*w]` head i
    pools its slice of D."""
    features = features.to(heatmaps.dtype)
    return (heatmaps @ split_heads(features, heatmaps.shape[1])).transpose(1, 2).flatten(2)


def pool_by_masks(features: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Mask-weighted means `[B, N, D]` of `features` `[B, h*w, D]` (the paper's baseline), in the precision of `masks`
    `[B, N, h*w]`."""
    return masks @ features.to(masks.dtype) / masks.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(masks.dtype).tiny)


class HeatmapLayer(nn.Module):
    """Self-attention of the anchor queries, then one softmax map per head and query over all positions.

    `value_projection` is stored by the released weights and has no influence: heatmaps pool the memory itself, so that
    segment embeddings stay in CLIP's space.
    """

    def __init__(self, layer_config: MaskFormerDetrConfig, num_heads: int) -> None:
        super().__init__()
        size, dropout = layer_config.d_model, layer_config.dropout
        self.num_heads = num_heads
        self.self_attn = MaskFormerDetrSelfAttention(
            layer_config, size, layer_config.decoder_attention_heads, dropout=dropout
        )
        self.self_attn_layer_norm = nn.LayerNorm(size)
        self.query_projection = nn.Linear(size, size)
        self.key_projection = nn.Linear(size, size)
        self.value_projection = nn.Linear(size, size)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, queries: torch.Tensor, query_positions: torch.Tensor, memory: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Heatmaps `[B, heads, N, h*w]` of `queries` `[B, N, D]` over `memory` `[B, h*w, D]`."""
        attended, _ = self.self_attn(queries, position_embeddings=query_positions)
        queries = self.self_attn_layer_norm(queries + self.dropout(attended))
        query = split_heads(self.query_projection(queries + query_positions), self.num_heads)
        key = split_heads(self.key_projection(memory + positions), self.num_heads)
        return self.dropout((query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(dim=-1))


class HeatmapDecoder(nn.Module):
    """Anchor queries, `num_layers` ordinary decoder layers over CLIP's map, and the heatmap layer.

    Args:
        size: D, width of CLIP's joint space.
        num_queries: N, one anchor query per proposal.
        num_layers: K ordinary layers before the heatmap layer (paper, table 5).
        num_heads: heads of all attentions.
        num_heatmaps: heatmaps per query, each pooling its share of the channels (8 released, 1 in equation 3).
        feedforward_size: hidden width of the ordinary layers.
        dropout: everywhere.
        config: says which implementation of attention to run.
    """

    def __init__(
        self,
        size: int,
        num_queries: int,
        num_layers: int,
        num_heads: int,
        num_heatmaps: int,
        feedforward_size: int,
        dropout: float,
        config: PreTrainedConfig,
    ) -> None:
        super().__init__()
        layer_config = MaskFormerDetrConfig(
            d_model=size,
            decoder_attention_heads=num_heads,
            decoder_ffn_dim=feedforward_size,
            dropout=dropout,
            attention_dropout=dropout,
            activation_dropout=dropout,
        )
        self.query_embedding = nn.Embedding(num_queries, size)
        self.position_embedding = SinePositionEmbedding(num_position_features=size // 2, normalize=True)
        self.layers = nn.ModuleList(MaskFormerDetrDecoderLayer(layer_config) for _ in range(num_layers))
        self.heatmap_layer = HeatmapLayer(layer_config, num_heatmaps)
        # stored by the released weights, without influence: it norms intermediate outputs that nothing reads
        self.layernorm = nn.LayerNorm(size)
        read_attention_from(config, self)

    def forward(self, features: torch.Tensor, masks: torch.Tensor) -> Anchors:
        """Anchors of proposals.

        Args:
            features: CLIP's map `[B, D, h, w]`, normalised.
            masks: mask probabilities `[B, N, h, w]` on the same grid.
        """
        positions = self.position_embedding(features.shape, features.device, features.dtype)
        memory, positions = features.flatten(2).transpose(1, 2), positions.flatten(2).transpose(1, 2)
        query_positions = self.query_embedding.weight.expand(len(features), -1, -1)
        queries = torch.zeros_like(query_positions)
        for layer in self.layers:
            queries = layer(queries, None, positions, query_positions, memory)
        heatmaps = self.heatmap_layer(queries, query_positions, memory, positions) * masks.flatten(2)[:, None]
        return Anchors(heatmaps, pool_by_heatmaps(memory, heatmaps))


class ConvolutionalHeatmapDecoder(nn.Module):
    """Heatmaps from convolutions in place of queries (equation 4): softmax over all positions, times the mask.

    The published code has no such decoder, so the layout is ours: as the query decoder has one learned query for each
    proposal, the last of `num_layers` + 1 convolutions has one output channel for each heatmap of each proposal; the
    ones before keep `hidden_size` channels and end in a ReLU. All keep the resolution (zero padding); none knows of
    positions or of the masks.

    Args:
        size: D, width of CLIP's joint space.
        num_queries: N, proposals.
        num_layers: convolutions before the last one.
        num_heatmaps: heatmaps per proposal, each pooling its share of the channels.
        hidden_size: channels between the convolutions.
        kernel_size: odd.
        dropout: on the heatmaps, as the query decoder has it.
    """

    def __init__(
        self,
        size: int,
        num_queries: int,
        num_layers: int,
        num_heatmaps: int,
        hidden_size: int,
        kernel_size: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.num_heatmaps = num_heatmaps
        widths = [size] + [hidden_size] * num_layers + [num_queries * num_heatmaps]
        self.layers = nn.ModuleList(
            nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2) for inputs, outputs in pairwise(widths)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: torch.Tensor, masks: torch.Tensor) -> Anchors:
        """Anchors of proposals, see `HeatmapDecoder`."""
        hidden = features
        for layer in self.layers[:-1]:
            hidden = layer(hidden).relu()
        scores = self.layers[-1](hidden).flatten(2).unflatten(1, (self.num_heatmaps, -1))
        heatmaps = self.dropout(scores.softmax(dim=-1)) * masks.flatten(2)[:, None]
        return Anchors(heatmaps, pool_by_heatmaps(features.flatten(2).transpose(1, 2), heatmaps))


@torch.no_grad()
def init_heatmap_weights(module: nn.Module) -> None:
    """Initial weights of either decoder; any other module is left as it is.

    The framework's defaults, as in the original: Xavier for the packed queries, keys and values of attention, whose
    three blocks count as one matrix, and no bias; PyTorch's own for the rest; N(0, 1) for the queries.
    """
    if isinstance(module, ConvolutionalHeatmapDecoder):
        for layer in module.layers:
            init_torch_defaults(layer)
    elif isinstance(module, HeatmapDecoder):
        init.normal_(module.query_embedding.weight)
        for name, part in module.named_modules():
            if not isinstance(part, nn.Linear):
                continue
            if name.endswith(("q_proj", "k_proj", "v_proj", "_projection")):
                init.xavier_uniform_(part.weight, gain=0.5**0.5)
            else:
                init_torch_defaults(part)
            if "attn" in name or name.endswith("_projection"):
                init.zeros_(part.bias)
