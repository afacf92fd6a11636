"""ResNet-c: bottleneck ResNet with a stem of three 3x3 convolutions, dilated last stages and frozen norms.

transformers' ResNet has one 7x7 stem convolution and no dilation, so this backbone is ours. Source: He et al., "Bag of
Tricks for Image Classification" (2019), section 4.2 (ResNet-C stem); Chen et al., "Rethinking Atrous Convolution"
(2017), section 3.2 (multi-grid).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import batch_norm
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_maskformer import NUM_STAGES, ResNetCConfig
from .fused_convolution import can_fuse, fused_convolution


class FrozenBatchNorm(nn.Module):
    """Batch normalisation whose statistics and affine map are constants (four buffers, none of them a counter)."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`[B, C, h, w]` to the same shape."""
        return batch_norm(features, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift of each channel, float32 `[C]`."""
        scale = self.weight.float() * (self.running_var.float() + self.eps).rsqrt()
        return scale, self.bias.float() - self.running_mean.float() * scale

    @torch.no_grad()
    def reset(self) -> None:
        """The identity, except for `eps`."""
        for buffer, value in ((self.weight, 1.0), (self.bias, 0.0), (self.running_mean, 0.0), (self.running_var, 1.0)):
            init.constant_(buffer, value)


class ConvNorm(nn.Module):
    """Convolution without bias, then the frozen norm, and if wanted a sum and a ReLU; `same` padding."""

    def __init__(self, channels_in: int, channels: int, kernel_size: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(channels_in, channels, kernel_size, stride, padding, dilation, bias=False)
        self.norm = FrozenBatchNorm(channels)

    def forward(
        self, features: torch.Tensor, rectifies: bool = False, added: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[B, C, h, w]` to `[B, channels, h / stride, w / stride]`; `added`, of that shape, may be overwritten."""
        if can_fuse(features):
            return fused_convolution(self.conv, *self.norm.affine(), features, rectifies, added)
        hidden = self.norm(self.conv(features))
        if added is not None:
            hidden += added
        return hidden.relu_() if rectifies else hidden


class Bottleneck(GradientCheckpointingLayer):
    """1x1, 3x3, 1x1 with a shortcut (He et al., 2016, figure 5).

    Args:
        keeps_input: whether its input is read by others too and must not be overwritten.
    """

    def __init__(
        self,
        channels_in: int,
        width: int,
        channels: int,
        stride: int,
        dilation: int,
        stride_in_1x1: bool,
        keeps_input: bool,
    ) -> None:
        super().__init__()
        self.keeps_input = keeps_input
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = ConvNorm(channels_in, width, 1, first)
        self.conv2 = ConvNorm(width, width, 3, second, dilation)
        self.conv3 = ConvNorm(width, channels, 1)
        needs_projection = channels_in != channels or stride != 1
        self.shortcut = ConvNorm(channels_in, channels, 1, stride) if needs_projection else nn.Identity()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`[B, C, h, w]` to `[B, channels, h / stride, w / stride]`."""
        hidden = self.conv2(self.conv1(features, rectifies=True), rectifies=True)
        shortcut = self.shortcut(features)
        if self.keeps_input and shortcut is features:
            shortcut = features.clone()
        return self.conv3(hidden, rectifies=True, added=shortcut)


class ResNetC(nn.Module):
    """Feature maps of strides 4, 8, 16, 32 (less with dilation), high resolution first."""

    def __init__(self, config: ResNetCConfig) -> None:
        super().__init__()
        self.config = config
        half = config.stem_channels // 2
        self.stem = nn.ModuleList(
            [ConvNorm(3, half, 3, stride=2), ConvNorm(half, half, 3), ConvNorm(half, config.stem_channels, 3)]
        )
        self.pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        dilations = (1, 1, config.stage3_dilation, config.stage4_dilation)
        self.stages = nn.ModuleList()
        channels_in = config.stem_channels
        for stage, depth in enumerate(config.depths):
            grid = config.stage4_multi_grid if stage == NUM_STAGES - 1 else [1] * depth
            blocks = []
            for index in range(depth):
                stride = 2 if index == 0 and stage > 0 and dilations[stage] == 1 else 1
                dilation = dilations[stage] * grid[index]
                width, channels = config.widths[stage], config.out_channels[stage]
                blocks.append(
                    Bottleneck(channels_in, width, channels, stride, dilation, config.stride_in_1x1, index == 0)
                )
                channels_in = channels
            self.stages.append(nn.Sequential(*blocks))

    @property
    def channels(self) -> list[int]:
        """Channels of the returned maps."""
        return list(self.config.out_channels)

    def freeze(self) -> None:
        """Stop the gradient of the stem and the first stages (`frozen_stages`); the norms hold no parameters."""
        for part in [self.stem, *self.stages][: self.config.frozen_stages]:
            part.requires_grad_(False)

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """`[B, 3, H, W]` to the outputs of the four stages."""
        hidden = pixel_values
        if can_fuse(hidden):
            hidden = hidden.contiguous(memory_format=torch.channels_last)
        for layer in self.stem:
            hidden = layer(hidden, rectifies=True)
        hidden = self.pool(hidden)
        maps = []
        for stage in self.stages:
            hidden = stage(hidden)
            maps.append(hidden)
        return maps
