"""Swin as a backbone of MaskFormer: transformers' `SwinBackbone` with stochastic depth on both residual branches.

transformers drops only the attention branch; Liu et al., "Swin Transformer" (2021), and the originals drop both, which
matters in training alone.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import SwinConfig
from transformers.models.swin.modeling_swin import SwinBackbone as TransformersSwinBackbone
from transformers.models.swin.modeling_swin import SwinLayer, SwinMLP

from .sub_models import build_sub_model

STAGES = ["stage1", "stage2", "stage3", "stage4"]


class _DroppedMLP(SwinMLP):
    """The MLP of a Swin block followed by stochastic depth, under the same parameter names."""

    def __init__(self, config: SwinConfig, dim: int, drop_path: nn.Module) -> None:
        super().__init__(config, dim)
        self.drop_path = drop_path

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[B, L, C]` to the same shape."""
        return self.drop_path(super().forward(hidden_states))


class SwinBackbone(nn.Module):
    """Feature maps of strides 4, 8, 16, 32, each with its own LayerNorm, high resolution first."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        config.set_output_features_output_indices(out_features=STAGES, out_indices=None)
        self.model = build_sub_model(TransformersSwinBackbone, config)
        # a final norm that no feature map passes through
        self.model.swin.layernorm = nn.Identity()
        for layer in self.model.modules():
            # transformers hangs closures on the stages that keep what nobody reads, and cannot be pickled
            layer._forward_hooks.clear()
            if isinstance(layer, SwinLayer):
                dim = layer.layernorm_before.normalized_shape[0]
                layer.mlp = _DroppedMLP(config, dim, layer.drop_path)

    @property
    def channels(self) -> list[int]:
        """Channels of the returned maps."""
        return list(self.model.channels)

    def freeze(self) -> None:
        """Swin is trained as a whole: nothing to freeze."""

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """`[B, 3, H, W]` to the outputs of the four stages."""
        return list(self.model(pixel_values).feature_maps)
