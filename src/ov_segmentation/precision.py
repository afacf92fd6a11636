"""Where half precision stops."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def full_precision(tensor: torch.Tensor) -> AbstractContextManager:
    """A context without autocast on the tensor's device: there it would run matrix products in half precision, of
    float32 tensors too, and sums over a picture's pixels leave the range of float16."""
    # the meta device, on which models are counted, has no autocast, and torch refuses to switch it off
    return nullcontext() if tensor.device.type == "meta" else torch.autocast(tensor.device.type, enabled=False)


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def in_float32(layer: nn.Conv2d | nn.Linear, features: torch.Tensor, rounded: bool = False) -> torch.Tensor:
    """`layer(features)`, computed in float32 whatever the precision of the layer's weights.

    For what is compared afterwards, class with class or position with position: bfloat16 has two to three digits, and
    differences of that size decide.

    Args:
        layer: has weights of one precision.
        features: of any.
        rounded: return the result in the precision of the weights.
    """
    own = layer.weight.dtype
    if own == torch.float32:
        return layer(features.float())
    # the layer keeps its weights, which other threads may be using
    weight, bias = layer.weight.float(), None if layer.bias is None else layer.bias.float()
    # to the weight's device, as accelerate does where layers are on several
    features = features.to(weight)
    if isinstance(layer, nn.Linear):
        result = nn.functional.linear(features, weight, bias)
    else:
        result = layer._conv_forward(features, weight, bias)
    return result.to(own) if rounded else result


def is_half_precision(modules: Iterable[nn.Module]) -> bool:
    """Whether all weights of the modules are there (not on the meta device) in float16 or bfloat16."""
    weights = [weight for module in modules for weight in module.parameters()]
    return all(weight.dtype in (torch.float16, torch.bfloat16) and not weight.is_meta for weight in weights)
