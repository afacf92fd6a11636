"""Multi-layer perceptron with ReLU between the layers: the projection heads of DETR's descendants."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from .initialization import init_torch_defaults


class MLP(nn.Module):
    """`num_layers` linear layers with ReLU between them, none at the end: `[..., input_dim]` -> `[..., output_dim]`."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        self.layers = nn.ModuleList(nn.Linear(m, n) for m, n in pairwise(widths))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Apply all layers to the last dimension."""
        for layer in self.layers[:-1]:
            features = layer(features).relu()
        return self.layers[-1](features)

    def init_weights(self) -> None:
        """PyTorch's default initialisation, as in the original implementations."""
        for layer in self.layers:
            init_torch_defaults(layer)
