"""Skips from the image tower to a decoder of per-class maps (CAT-Seg, Sec. 3.4)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class ProjectedSkip(nn.Module):
    """Features of the image tower, upsampled and projected: `[R, C, h, w]` -> `[R, out, scale * h, scale * w]`.

    Args:
        in_channels: width of the tower.
        upsampled_channels: between a transposed convolution and the projection; None: upsampling is bilinear.
        out_channels: of the skip.
        scale: upsampling factor.
    """

    def __init__(self, in_channels: int, upsampled_channels: int | None, out_channels: int, scale: int) -> None:
        super().__init__()
        if upsampled_channels is None:
            self.upsample = nn.Upsample(scale_factor=scale, mode="bilinear", align_corners=False)
        else:
            self.upsample = nn.ConvTranspose2d(in_channels, upsampled_channels, scale, stride=scale)
        self.projection = nn.Conv2d(upsampled_channels or in_channels, out_channels, 3, padding=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Upsample, convolve, ReLU."""
        return F.relu(self.projection(self.upsample(features)))
