"""Matrix products of float32 through oneDNN where PyTorch would ask MKL: as precise, on some CPUs twice as fast.

PyTorch's `linear` calls MKL for float32, which leaves half of the vector units of AMD's processors unused; oneDNN,
which PyTorch itself calls for bfloat16 and for convolutions, does not. Its operation is one that `torch.compile` uses.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

# below this a call costs more than the product
LEAST_MULTIPLY_ADDS = 2**21
LEAST_TALL_ELEMENTS = 2**16
_PLAIN_TYPES = (torch.Tensor, nn.Parameter)
_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_TAKES_BFLOAT16 = _LINEAR is not None and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`: `[..., I]`, `[O, I]` and `[O]` -> `[..., O]`."""
    if not prefers_onednn(features, weight):
        return F.linear(features, weight, bias)
    return _multiply(features, weight, bias)


def _multiply(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # oneDNN knows neither repeated elements nor matrices without a dense axis, and for a weight whose rows lie apart it
    # has its reference code alone, a thousand times slower
    if 1 not in features.stride() or 0 in features.stride():
        features = features.contiguous()
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    return _LINEAR(features, weight, bias, "none", [], "")


def tall_product(features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`features @ weights`, `[..., I]` and `[I, O]` -> `[..., O]`, for many rows and few columns, of which MKL makes
    little even where the product is small."""
    if features.numel() < LEAST_TALL_ELEMENTS or not (takes(features) and takes(weights)):
        return features @ weights
    return _multiply(features, weights.t(), None)


def prefers_onednn(features: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `linear` takes oneDNN's way: not for small products, whose call would take longer."""
    return takes(features) and takes(weight) and features.numel() * len(weight) >= LEAST_MULTIPLY_ADDS


def grouped(features: torch.Tensor, weights: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """A product for each of several groups, as a 1 x 1 convolution in groups, for which oneDNN is asked; for
    `torch.bmm` in float32, MKL is.

    Args:
        features: `[M, *groups, I]`.
        weights: `[*groups, O, I]`, or `[*groups, I, O]` if `transposed`.

    Returns:
        `[M, *groups, O]`. It is slow where neither O nor I is a multiple of 16.
    """
    *groups, rows, columns = weights.shape
    if math.prod(groups) == 1:
        matrix = weights.view(rows, columns)
        return linear(features.flatten(1), matrix.t() if transposed else matrix).unflatten(1, (*groups, -1))
    pixels = features.flatten(1)[None, :, None].permute(0, 3, 1, 2)  # channels last in memory
    kernels = weights.reshape(-1, columns, 1, 1)
    convolve, outputs = (F.conv_transpose2d, columns) if transposed else (F.conv2d, rows)
    products = convolve(pixels, kernels, groups=math.prod(groups))
    return products.permute(0, 2, 3, 1)[0, :, 0].unflatten(1, (*groups, outputs))


def takes(tensor: torch.Tensor, *dtypes: torch.dtype) -> bool:
    """Whether oneDNN may multiply it: of one of the types (default: float32) and supported there, on a CPU, without
    gradients, tracing or autocast."""
    return (
        not torch.compiler.is_compiling()  # first: sizes are symbols then
        and _LINEAR is not None
        and tensor.dtype in (dtypes or (torch.float32,))
        and (tensor.dtype != torch.bfloat16 or _TAKES_BFLOAT16)
        and tensor.device.type == "cpu"
        and not torch.is_grad_enabled()
        and type(tensor) in _PLAIN_TYPES
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
    )


class Linear(nn.Linear):
    """`nn.Linear` by [`linear`]."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` -> `[..., out_features]`."""
        return linear(features, self.weight, self.bias)


def replace_linear(model: nn.Module) -> None:
    """Make every `nn.Linear` of a model, transformers' own modules included, a [`Linear`] in place."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
