"""A convolution, the frozen norm behind it, a sum and a ReLU in one pass over the maps, on a CPU without gradients.

The norm is an affine map of each channel, so it goes into the convolution's weights. They are folded in each call: that
takes a few per cent of the convolution, and nothing is kept that could grow old. oneDNN adds and rectifies while it
writes; its operation is one that `torch.compile` uses.
"""

from __future__ import annotations

import torch
from torch import nn

# smaller maps gain nothing
LEAST_ELEMENTS = 2**16
_OPERATIONS = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None
_CONVOLUTION = getattr(_OPERATIONS, "_convolution_pointwise", None)
_CONVOLUTION_WITH_SUM = getattr(_OPERATIONS, "_convolution_pointwise_", None)


def can_fuse(features: torch.Tensor) -> bool:
    """Whether `fused_convolution` takes maps like these."""
    return (
        not torch.compiler.is_compiling()  # first: sizes are symbols then
        and _CONVOLUTION is not None
        and _CONVOLUTION_WITH_SUM is not None
        and features.device.type == "cpu"
        and features.numel() >= LEAST_ELEMENTS
        and type(features) is torch.Tensor
        and not torch.is_grad_enabled()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
    )


def fused_convolution(
    conv: nn.Conv2d,
    scale: torch.Tensor,
    shift: torch.Tensor,
    features: torch.Tensor,
    rectifies: bool,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """`relu(scale * conv(features) + shift + added)`, fastest with channels last.

    Args:
        conv: without bias.
        scale, shift: float32 `[C]`.
        features: `[B, C_in, h, w]`.
        rectifies: whether there is a ReLU.
        added: `[B, C, h', w']`, overwritten by the result; None: nothing is added.
    """
    weight = (conv.weight * scale[:, None, None, None]).to(features.dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    rest = (conv.padding, conv.stride, conv.dilation, conv.groups)
    shift = shift.to(features.dtype)
    activation = "relu" if rectifies else "none"
    if added is None:
        return _CONVOLUTION(features, weight, shift, *rest, activation, [], "")
    return _CONVOLUTION_WITH_SUM.binary(
        added, features, weight, shift, *rest, "add", 1.0, activation if rectifies else None, [], None
    )
