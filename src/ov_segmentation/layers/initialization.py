"""PyTorch's own initialisation, for heads that the original implementations left at it.

transformers re-initialises every Linear and convolution with a normal distribution; a model's `_init_weights` calls
`init_torch_defaults` to get back what `nn.Linear(...)` and `nn.Conv2d(...)` would have drawn.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import initialization as init


@torch.no_grad()
def init_torch_defaults(module: nn.Module) -> None:
    """Initialise a Linear or (transposed) convolution as PyTorch does; any other module is left as it is.

    Loaded tensors keep their values (`transformers.initialization`).
    """
    if not isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        return
    init.kaiming_uniform_(module.weight, a=math.sqrt(5))
    if module.bias is not None:
        bound = 1 / math.sqrt(module.weight[0].numel())
        init.uniform_(module.bias, -bound, bound)
