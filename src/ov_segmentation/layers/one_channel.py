"""The last convolution of per-class maps, to one logit per position, several times faster on a CPU.

A convolution with one output channel leaves the processor's vector units empty. It is linear: a matrix product gives
what each of the nine taps sees, and the nine results are moved and added.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ..precision import in_float32
from .pieces import in_pieces


def one_channel(conv: nn.Conv2d, maps: torch.Tensor) -> torch.Tensor:
    """`conv`, 3 x 3 with padding and one output channel, of channels-last maps: `[n, h, w, C]` -> `[n, h, w]`.

    In float32 whatever comes in, and so returned: rounded, the logits of many classes would be equal.
    """
    if maps.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return in_float32(conv, maps.permute(0, 3, 1, 2))[:, 0]
    taps, bias = conv.weight[0].flatten(1).float().t().contiguous(), conv.bias.float()

    def add_taps(some: torch.Tensor) -> torch.Tensor:
        seen = (taps @ some.flatten(0, 2).float().t()).view(3, 3, *some.shape[:3])
        padded = F.pad(bias.view(1, 1, 1).expand(some.shape[:3]), (1, 1, 1, 1))
        height, width = some.shape[1:3]
        for y in range(3):
            for x in range(3):
                padded[:, 2 - y : 2 - y + height, 2 - x : 2 - x + width] += seen[y, x]
        return padded[:, 1:-1, 1:-1]

    return in_pieces(add_taps, maps.shape[1:].numel(), maps)
