"""Upsampling of per-class feature maps with guidance: the decoder block of SED, CAT-Seg and ESC-Net.

The block is: transposed 2 x 2 convolution (ESC-Net: bilinear upsampling), concatenation with guidance maps, then twice
3 x 3 convolution, GroupNorm, ReLU. Nothing lies between the transposed convolution and the first 3 x 3 convolution, and
guidance from the picture is the same for every class, so the block computes what it can once:

- the two convolutions are one transposed 4 x 4 convolution (half the multiply-adds);
- the picture's share of the first convolution is computed once per picture and added to all of its classes;
- nothing is concatenated or repeated per class.

Results differ from the plain order by rounding only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .pieces import in_pieces

CHANNELS_PER_GROUP = 16


class PreparedUpsampling(NamedTuple):
    """What a block computes once for all classes.

    Args:
        combined: `[C, out_channels, 4, 4]`, both convolutions in one; None where upsampling is bilinear.
        shared: `[1 or B, out_channels, 2h, 2w]`, from biases and image guidance.
    """

    combined: torch.Tensor | None
    shared: torch.Tensor

    def of_pictures(self, rows: slice) -> PreparedUpsampling:
        """The share of some pictures of the batch."""
        return self if self.shared.shape[0] == 1 else self._replace(shared=self.shared[rows])


class GuidedUpsampling(GradientCheckpointingLayer):
    """Twice the resolution, guided: `[N, h, w, C]` -> `[N, 2h, 2w, out_channels]`, channels last.

    Args:
        in_channels: C.
        up_channels: after the transposed convolution; None: upsampling is bilinear, all channels stay.
        image_channels: of the guidance that all classes of a picture share; 0 for none.
        class_channels: of the guidance that each class has of its own; 0 for none.
        out_channels: a multiple of 16 (the GroupNorms have 16 channels per group).
    """

    def __init__(
        self, in_channels: int, up_channels: int | None, image_channels: int, class_channels: int, out_channels: int
    ) -> None:
        super().__init__()
        self.splits = (up_channels or in_channels, image_channels, class_channels)
        self.up = None if up_channels is None else nn.ConvTranspose2d(in_channels, up_channels, 2, stride=2)
        self.conv1 = nn.Conv2d(sum(self.splits), out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(out_channels // CHANNELS_PER_GROUP, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(out_channels // CHANNELS_PER_GROUP, out_channels)

    def prepare(self, size: tuple[int, int], image_guidance: torch.Tensor | None) -> PreparedUpsampling:
        """What does not depend on the classes: once for a call or several.

        Args:
            size: (2h, 2w), of the output.
            image_guidance: `[B, image_channels, 2h, 2w]`.
        """
        of_up, of_image, _ = self.conv1.weight.split(self.splits, dim=1)
        if self.up is None:
            if image_guidance is None:
                return PreparedUpsampling(None, of_up.new_zeros(1, of_up.shape[0], 1, 1))
            return PreparedUpsampling(None, F.conv2d(image_guidance, of_image, padding=1))
        # [in, out, 4, 4]: what an impulse becomes under the 2 x 2 and then the 3 x 3 convolution
        combined = F.conv2d(self.up.weight, of_up, padding=2)
        # the bias between the two is a constant map, which the second one pads with zeros
        of_bias = torch.einsum("oukl,u->okl", of_up, self.up.bias)[:, None]
        shared = F.conv2d(of_bias.new_ones(1, 1, *size), of_bias, padding=1)
        if image_guidance is not None:
            shared = shared + F.conv2d(image_guidance, of_image, padding=1)
        return PreparedUpsampling(combined, shared.contiguous(memory_format=torch.channels_last))

    def forward(
        self,
        features: torch.Tensor,
        counts: Sequence[int],
        prepared: PreparedUpsampling,
        class_guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Upsample maps of N (picture, class) pairs.

        Args:
            features: `[N, h, w, C]`.
            counts: of each picture in the batch, how many of the N are its classes.
            prepared: from `prepare`.
            class_guidance: `[N, 2h, 2w, class_channels]`.
        """
        shared = prepared.shared
        elements = 4 * features.shape[1] * features.shape[2] * self.conv1.out_channels
        if shared.shape[0] == 1:
            return in_pieces(lambda f, c: self._run(prepared, f, c, shared), elements, features, class_guidance)
        # not repeat_interleave: a GPU would be waited for, to see how long the result is
        shared = torch.cat([row.expand(count, -1, -1, -1) for row, count in zip(shared.split(1), counts, strict=True)])
        return in_pieces(lambda f, c, s: self._run(prepared, f, c, s), elements, features, class_guidance, shared)

    def _run(
        self,
        prepared: PreparedUpsampling,
        features: torch.Tensor,
        class_guidance: torch.Tensor | None,
        shared: torch.Tensor,
    ) -> torch.Tensor:
        features = features.permute(0, 3, 1, 2)
        if self.up is None:
            larger = F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)
            mixed = F.conv2d(larger, self.conv1.weight[:, : self.splits[0]], padding=1)
        else:
            mixed = F.conv_transpose2d(features, prepared.combined, stride=2, padding=1)
        mixed += shared
        if class_guidance is not None:
            of_class = self.conv1.weight[:, -self.splits[2] :]
            mixed += F.conv2d(class_guidance.permute(0, 3, 1, 2), of_class, padding=1)
        hidden = F.relu(self.norm1(mixed), inplace=True)
        return F.relu(self.norm2(self.conv2(hidden)), inplace=True).permute(0, 2, 3, 1)
