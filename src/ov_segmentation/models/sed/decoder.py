"""SED's gradual fusion decoder: cost embedding, three layers of aggregation and upsampling, category early rejection.

Everything works on (picture, class) pairs in chunks; maps are channels last. A layer's only coupling between classes is
the class attention, which is linear: its sums are gathered over all chunks first, so chunks change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from ...layers.linear_attention import ClassAttention, add_pooled, pool_positions
from ...layers.upsampling import GuidedUpsampling
from .configuration_sed import SEDConfig

COST_KERNEL_SIZE = 7


class ClassChunk(NamedTuple):
    """Some (picture, class) pairs on their way through the decoder, sorted by picture, then class.

    Args:
        features: `[n, h, w, C]`.
        cost: `[n, h, w, G]`: cost guidance at this resolution, to begin with the cost map; None where none is used.
        pairs: `[n]` int64, picture * K + class.
        counts: of each picture, how many of the n are its classes.
    """

    features: torch.Tensor
    cost: torch.Tensor | None
    pairs: torch.Tensor
    counts: tuple[int, ...]

    def select(self, keep: torch.Tensor) -> ClassChunk:
        """The pairs where `keep` `[n]` is true."""
        counts = tuple(int(part.sum()) for part in keep.split(list(self.counts)))
        cost = None if self.cost is None else self.cost[keep]
        return ClassChunk(self.features[keep], cost, self.pairs[keep], counts)

    @staticmethod
    def join(first: ClassChunk, second: ClassChunk) -> ClassChunk:
        """Both in one chunk; the pairs of `second` come after those of `first`."""
        cost = None if first.cost is None else torch.cat([first.cost, second.cost])
        counts = tuple(a + b for a, b in zip(first.counts, second.counts, strict=True))
        return ClassChunk(
            torch.cat([first.features, second.features]), cost, torch.cat([first.pairs, second.pairs]), counts
        )


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
        return self.conv(features.permute(0, 3, 1, 2))[:, 0]


class CostEmbedding(nn.Module):
    """From the cost map of a class, one channel per template, to features: a 7 x 7 convolution.

    `[n, P, h, w]` -> `[n, h, w, C]`; `head` predicts from them before the first layer.
    """

    def __init__(self, config: SEDConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(config.num_templates, config.hidden_size, COST_KERNEL_SIZE, padding=COST_KERNEL_SIZE // 2)
        self.head = SegmentationHead(config.hidden_size)

    def forward(self, cost: torch.Tensor) -> torch.Tensor:
        """Embed cost maps."""
        return self.conv(cost).permute(0, 2, 3, 1)


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
                lambda a, b: a + b,
                (self.class_attention.class_sums(pool_positions(c.features, pooling), c.counts) for c in chunks),
            )
            for i, chunk in enumerate(chunks):
                tokens = self.class_attention(pool_positions(chunk.features, pooling), chunk.counts, sums)
                chunks[i] = chunk._replace(features=add_pooled(chunk.features, tokens, pooling))

    def upsample(self, chunk: ClassChunk, image_guidance: torch.Tensor | None) -> ClassChunk:
        """Double the resolution of a chunk and of its cost guidance."""
        cost = None if self.cost_guidance is None else self.cost_guidance(chunk.cost)
        features = self.upsampling(chunk.features, chunk.counts, image_guidance, cost)
        return chunk._replace(features=features, cost=cost)

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
        results, logits = [], []
        while chunks:
            chunk = self.upsample(chunks.pop(0), image_guidance)
            if wants_logits:
                logits.append(self.head(chunk.features.detach() if detach else chunk.features))
            if wants_features:
                results.append(chunk)
        return results, torch.cat(logits) if wants_logits else None


def best_classes(logits: torch.Tensor, counts: Sequence[int], top_k: int) -> torch.Tensor:
    """Category early rejection (paper, section 3.4): who is among the k best classes anywhere in its picture.

    Args:
        logits: `[N, h, w]` of (picture, class) pairs, sorted by picture.
        counts: of each picture, how many of the N are its classes.
        top_k: k; a picture with fewer classes keeps all.

    Returns:
        `[N]` bool.
    """
    kept = []
    for of_picture in logits.flatten(1).split(list(counts)):
        best = of_picture.topk(min(top_k, len(of_picture)), dim=0, sorted=False).indices
        kept.append(
            torch.zeros(len(of_picture), dtype=torch.bool, device=logits.device).index_fill(0, best.flatten(), True)
        )
    return torch.cat(kept)


def reject(chunks: list[ClassChunk], logits: torch.Tensor, top_k: int, chunk_size: int) -> list[ClassChunk]:
    """What is left of all chunks after a rejection, neighbours joined as long as they fit `chunk_size` together."""
    counts = [sum(of_picture) for of_picture in zip(*(chunk.counts for chunk in chunks), strict=True)]
    keep = best_classes(logits.detach(), counts, top_k).split([len(chunk.pairs) for chunk in chunks])
    left: list[ClassChunk] = []
    for selection in keep:
        chunk = chunks.pop(0)
        chunk = chunk if selection.all() else chunk.select(selection)
        if left and len(left[-1].pairs) + len(chunk.pairs) <= chunk_size:
            left[-1] = ClassChunk.join(left[-1], chunk)
        elif len(chunk.pairs):
            left.append(chunk)
    return left
