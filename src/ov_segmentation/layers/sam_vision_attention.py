"""Attention of SAM's image encoder, whose relative positions stand beside queries and keys in place of a bias.

The bias of a query and a key is a number of the query and the key's row, plus one of the query and the key's column. So
it is a product too: of these numbers, and of vectors that are 1 at the key's row and column. Scores then come out of
one product for a few queries at a time; written out, the bias of SAM's 4,096 positions takes 0.8 GB in each layer.

Source: Li et al., "MViTv2" (2022), section 4.1, decomposed relative positions.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.sam.modeling_sam import SamVisionSdpaAttention

from .attention import prefers_tiles, tiled_attention


class SAMVisionAttention(SamVisionSdpaAttention):
    """transformers' module, on CPUs without gradients in tiles."""

    def forward(self, hidden_states: torch.Tensor, output_attentions: bool = False) -> tuple[torch.Tensor, None]:
        """`[B, h, w, C]` -> `[B, h, w, C]`, and None for the weights."""
        if output_attentions or not self.use_rel_pos or not prefers_tiles(hidden_states.flatten(1, 2)):
            return super().forward(hidden_states, output_attentions)
        height, width = hidden_states.shape[1:3]
        projected = self.qkv(hidden_states).flatten(1, 2).unflatten(-1, (3, self.num_attention_heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        of_rows, of_columns = (
            self.get_rel_pos(length, length, table)
            for length, table in ((height, self.rel_pos_h), (width, self.rel_pos_w))
        )
        grid = query.unflatten(2, (height, width))
        by_row = torch.einsum("bnhwc,hkc->bnhwk", grid, of_rows)
        by_column = torch.einsum("bnhwc,wkc->bnhwk", grid, of_columns)
        queries = torch.cat([grid * self.scale, by_row, by_column], dim=-1).flatten(2, 3)
        rows, columns = (torch.eye(length, dtype=key.dtype, device=key.device) for length in (height, width))
        place = torch.cat([rows.repeat_interleave(width, dim=0), columns.repeat(height, 1)], dim=-1)
        keys = torch.cat([key, place.expand(*key.shape[:2], -1, -1)], dim=-1)
        attended = tiled_attention(queries, keys, value, scale=1.0)
        return self.proj(attended.transpose(1, 2).flatten(2).unflatten(1, (height, width))), None


def replace_sam_attention(model: nn.Module) -> None:
    """Make every `SamVisionSdpaAttention` in a model a [`SAMVisionAttention`] in place."""
    for module in model.modules():
        if type(module) is SamVisionSdpaAttention:
            module.__class__ = SAMVisionAttention
