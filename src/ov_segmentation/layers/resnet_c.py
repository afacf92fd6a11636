"""ResNet-c: bottleneck ResNet with a stem of three 3x3 convolutions, dilated last stages and frozen norms.

transformers' ResNet has one 7x7 stem convolution and no dilation, so this backbone is ours. Source: He et al., "Bag of
Tricks for Image Classification" (2019), section 4.2 (ResNet-C stem); Chen et al., "Rethinking Atrous Convolution"
(2017), section 3.2 (multi-grid).
"""

from __future__ import annotations

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

NUM_STAGES = 4


@strict
class ResNetCConfig(PreTrainedConfig):
    """Configuration of `ResNetC`; the defaults are ResNet-101c as MaskFormer uses it.

    Args:
        stem_channels: channels of the third stem convolution; the first two have half as many.
        depths: bottlenecks per stage.
        widths: channels of the 3x3 convolutions, per stage.
        out_channels: channels of the stage outputs.
        stride_in_1x1: the stride sits in the first 1x1 convolution instead of the 3x3.
        stage3_dilation, stage4_dilation: dilation of the last two stages; above 1 the stage keeps its resolution.
        stage4_multi_grid: factors on the dilation of the last stage's bottlenecks.
        frozen_stages: 0: nothing, 1: the stem, 2: the stem and the first stage, and so on.
    """

    model_type = "ov_resnet_c"

    stem_channels: int = 128
    depths: list[int] | tuple[int, ...] = (3, 4, 23, 3)
    widths: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    out_channels: list[int] | tuple[int, ...] = (256, 512, 1024, 2048)
    stride_in_1x1: bool = False
    stage3_dilation: int = 1
    stage4_dilation: int = 1
    stage4_multi_grid: list[int] | tuple[int, ...] = (1, 2, 4)
    frozen_stages: int = 2

    def validate_architecture(self) -> None:
        """Four values per stage list, and one multi-grid factor per bottleneck of the last stage."""
        for name in ("depths", "widths", "out_channels"):
            if len(getattr(self, name)) != NUM_STAGES:
                raise ValueError(f"{name} needs {NUM_STAGES} values, one per stage, got {list(getattr(self, name))}.")
        if len(self.stage4_multi_grid) != self.depths[-1]:
            raise ValueError(
                f"stage4_multi_grid needs one factor for each of the {self.depths[-1]} bottlenecks of the last stage, "
                f"got {list(self.stage4_multi_grid)}."
            )


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
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return features * scale[:, None, None] + shift[:, None, None]

    @torch.no_grad()
    def reset(self) -> None:
        """The identity, except for `eps`."""
        for buffer, value in ((self.weight, 1.0), (self.bias, 0.0), (self.running_mean, 0.0), (self.running_var, 1.0)):
            init.constant_(buffer, value)


class ConvNorm(nn.Module):
    """Convolution without bias, then the frozen norm; `same` padding."""

    def __init__(self, channels_in: int, channels: int, kernel_size: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(channels_in, channels, kernel_size, stride, padding, dilation, bias=False)
        self.norm = FrozenBatchNorm(channels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`[B, C, h, w]` to `[B, channels, h / stride, w / stride]`."""
        return self.norm(self.conv(features))


class Bottleneck(GradientCheckpointingLayer):
    """1x1, 3x3, 1x1 with a shortcut (He et al., 2016, figure 5)."""

    def __init__(
        self, channels_in: int, width: int, channels: int, stride: int, dilation: int, stride_in_1x1: bool
    ) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = ConvNorm(channels_in, width, 1, first)
        self.conv2 = ConvNorm(width, width, 3, second, dilation)
        self.conv3 = ConvNorm(width, channels, 1)
        needs_projection = channels_in != channels or stride != 1
        self.shortcut = ConvNorm(channels_in, channels, 1, stride) if needs_projection else nn.Identity()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`[B, C, h, w]` to `[B, channels, h / stride, w / stride]`."""
        hidden = self.conv3(self.conv2(self.conv1(features).relu()).relu())
        return (hidden + self.shortcut(features)).relu()


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
                blocks.append(Bottleneck(channels_in, width, channels, stride, dilation, config.stride_in_1x1))
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
        for layer in self.stem:
            hidden = layer(hidden).relu()
        hidden = self.pool(hidden)
        maps = []
        for stage in self.stages:
            hidden = stage(hidden)
            maps.append(hidden)
        return maps
