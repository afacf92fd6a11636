"""Sine position embeddings of a map, as MaskFormer's transformer and DeOP's heatmap decoder add them."""

from __future__ import annotations

import torch
from transformers.models.maskformer.modeling_maskformer import MaskFormerSinePositionEmbedding


class SinePositionEmbedding(MaskFormerSinePositionEmbedding):
    """transformers' module, computed in at least float32: half precision would round angles before the sine, with
    errors that are ten times those of rounding the result."""

    def forward(self, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """`[B, C, h, w]` for a map of that `shape`."""
        return super().forward(shape, device, torch.promote_types(dtype, torch.float32)).to(dtype)
