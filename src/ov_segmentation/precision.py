"""Where half precision stops."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def full_precision(tensor: torch.Tensor) -> AbstractContextManager:
    """A context without autocast on the tensor's device: there it would run matrix products in half precision, of
    float32 tensors too, and sums over a picture's pixels leave the range of float16."""
    # the meta device, on which models are counted, has no autocast, and torch refuses to switch it off
    return nullcontext() if tensor.device.type == "meta" else torch.autocast(tensor.device.type, enabled=False)
