"""Linear layers of a concatenation [features, guidance], without concatenating.

Features belong to one class each, guidance often to all classes of a picture or to all positions of a class.
W [x, g] = W_x x + W_g g, so guidance's share is computed once and added, which saves half of the work where guidance is
as wide as the features.
"""

from __future__ import annotations

import torch
from torch import nn

from . import products


def guided_linear(linear: nn.Linear, features: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
    """linear([features, guidance]): `[..., C]` and a broadcastable `[..., G]` -> `[..., out_features]`."""
    channels = features.shape[-1]
    shared = products.linear(guidance, linear.weight[:, channels:], linear.bias)
    return products.linear(features, linear.weight[:, :channels]) + shared
