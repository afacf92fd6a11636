"""Parts of SED's decoder: cost embedding, spatial and class aggregation, cost guidance, heads (paper, section 3.3)."""

from __future__ import annotations

from functools import reduce
from operator import add

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from ...layers.linear_attention import ClassAttention, add_pooled, pool_positions
from ...layers.one_channel import one_channel
from ...layers.pieces import in_pieces
from ...layers.upsampling import GuidedUpsampling
from ...precision import in_float32
from .chunks import ClassChunk
from .configuration_sed import SEDConfig

COST_KERNEL_SIZE = 7


class LargeKernelBlock(GradientCheckpointingLayer):
    """Spatial aggregation: a ConvNeXt block with a larger kernel, one residual around all of it.

    `[n, h, w, C]` -> `[n, h, w, C]`: depthwise convolution, LayerNorm, Linear, GELU, Linear, scale per channel.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.layernorm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.layer_scale_parameter = nn.Parameter(torch.ones(channels))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Aggregate each class's map."""
        return in_pieces(self._aggregate, 4 * features[0].numel(), features)

    def _aggregate(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.dwconv(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        hidden = self.pwconv2(F.gelu(self.pwconv1(self.layernorm(hidden))))
        return torch.addcmul(features, hidden, self.layer_scale_parameter)


class SegmentationHead(nn.Module):
    """One logit per position: a 3 x 3 convolution, `[n, h, w, C]` -> `[n, h, w]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The logits."""
        return one_channel(self.conv, features)


class CostEmbedding(nn.Module):
    """From the cost map of a class, one channel per template, to features: a 7 x 7 convolution.

    `head` predicts from the features, before the first layer.
    """

    def __init__(self, config: SEDConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(config.num_templates, config.hidden_size, COST_KERNEL_SIZE, padding=COST_KERNEL_SIZE // 2)
        self.head = SegmentationHead(config.hidden_size)

    def forward(self, cost: torch.Tensor) -> torch.Tensor:
        """Features `[n, h, w, C]` of cost maps `[n, h, w, P]`, which are float32."""
        embedded = in_float32(self.conv, cost.permute(0, 3, 1, 2), rounded=True)
        return embedded.permute(0, 2, 3, 1).contiguous()

    def early_logits(self, cost: torch.Tensor) -> torch.Tensor:
        """The head's logits `[n, h, w]` of cost maps `[n, h, w, P]`, without the features.

        Both convolutions are linear: each of the head's nine taps sees one channel, a 7 x 7 convolution of the cost
        map, and what it sees is moved and added. For the classes that are rejected that is a fourteenth of the work.
        """
        taps = self.head.conv.weight[0].flatten(1).float()
        weight = torch.einsum("cu,cpkl->upkl", taps, self.conv.weight.float())
        bias = torch.einsum("cu,c->u", taps, self.conv.bias.float())
        seen = F.conv2d(cost.permute(0, 3, 1, 2), weight, bias, padding=COST_KERNEL_SIZE // 2)
        height, width = seen.shape[-2:]
        seen = F.pad(seen, (1, 1, 1, 1)).unflatten(1, (3, 3))
        moved = (seen[:, y, x, y : y + height, x : x + width] for y in range(3) for x in range(3))
        return reduce(add, moved) + self.head.conv.bias


class CostGuidance(nn.Module):
    """The next level of the cost guidance: `[n, h, w, G]` -> `[n, 2h, 2w, G']`, transposed 2 x 2 convolution, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)

    def forward(self, cost: torch.Tensor) -> torch.Tensor:
        """Double the resolution."""
        return F.relu(self.conv(cost.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class SEDDecoderLayer(nn.Module):
    """One layer: spatial aggregation, class aggregation, guided upsampling; `head` predicts from the result.

    Args:
        config: of the model.
        index: of the layer, from 0.
    """

    def __init__(self, config: SEDConfig, index: int) -> None:
        super().__init__()
        channels = [config.hidden_size, *config.decoder_dims][index]
        out_channels, guidance = config.decoder_dims[index], config.guidance_dims[index]
        self.spatial = LargeKernelBlock(channels, config.kernel_sizes[index]) if config.spatial_aggregation else None
        self.class_attention = (
            ClassAttention(channels, config.num_attention_heads) if config.class_aggregation else None
        )
        self.cost_guidance = None
        if config.fuses_cost:
            below = config.guidance_dims[index - 1] if index else config.num_templates
            self.cost_guidance = CostGuidance(below, guidance)
        image_channels = guidance if config.fuses_features else 0
        class_channels = guidance if config.fuses_cost else 0
        self.upsampling = GuidedUpsampling(channels, channels - guidance, image_channels, class_channels, out_channels)
        self.head = SegmentationHead(out_channels)

    def aggregate(self, chunks: list[ClassChunk], pooling: int) -> None:
        """Spatial and class aggregation of all chunks, in place in the list."""
        if self.spatial is not None:
            for i, chunk in enumerate(chunks):
                chunks[i] = chunk._replace(features=self.spatial(chunk.features))
        if self.class_attention is not None:
            sums = reduce(
                add, (self.class_attention.class_sums(pool_positions(c.features, pooling), c.counts) for c in chunks)
            )
            for i, chunk in enumerate(chunks):
                tokens = self.class_attention(pool_positions(chunk.features, pooling), chunk.counts, sums)
                chunks[i] = chunk._replace(features=add_pooled(chunk.features, tokens, pooling))

    def forward(
        self,
        chunks: list[ClassChunk],
        image_guidance: torch.Tensor | None,
        pooling: int,
        wants_features: bool,
        wants_logits: bool,
        detach: bool,
    ) -> tuple[list[ClassChunk], torch.Tensor | None]:
        """Run the layer.

        Args:
            chunks: all pairs. The list is used up, so that memory is freed on the way.
            image_guidance: `[B, G, 2h, 2w]`.
            pooling: average pooling in front of the class attention, 1 = none.
            wants_features, wants_logits: what of the two results is needed.
            detach: no gradient from the logits to the features (auxiliary heads).

        Returns:
            the chunks at twice the resolution, and the head's logits `[N, 2h, 2w]` of all pairs.
        """
        self.aggregate(chunks, pooling)
        height, width = chunks[0].features.shape[1:3]
        prepared = self.upsampling.prepare((2 * height, 2 * width), image_guidance)
        results, logits = [], []
        while chunks:
            chunk = chunks.pop(0)
            cost = None if self.cost_guidance is None else self.cost_guidance(chunk.cost)
            features = self.upsampling(chunk.features, chunk.counts, prepared, cost)
            chunk = chunk._replace(features=features, cost=cost)
            if wants_logits:
                logits.append(self.head(chunk.features.detach() if detach else chunk.features))
            if wants_features:
                results.append(chunk)
        return results, torch.cat(logits) if wants_logits else None
