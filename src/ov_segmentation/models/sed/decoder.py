"""SED's gradual fusion decoder: cost embedding, three layers of aggregation and upsampling, category early rejection.

Everything works on (row, class) pairs in chunks; a row is a picture or a view of one. Maps are channels last. A layer's
only coupling between classes is the class attention, which is linear: its sums are gathered over all chunks first, so
chunks change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ...layers.correlation import correlation
from .blocks import CostEmbedding, SEDDecoderLayer
from .chunks import ClassChunk, best_classes, join_small, reject
from .configuration_sed import SEDConfig

# logit of a rejected class: finite, because interpolating -inf gives NaN
REJECTED = -100.0


class DecoderOutput(NamedTuple):
    """What the decoder returns for R rows and K classes; rejected classes have the logit `REJECTED`.

    Args:
        logits: `[R, K, H, W]` of the last head.
        auxiliary: logits of the heads before it, the coarsest first; empty unless they were asked for.
        kept_classes: bool `[R, K]`; None without rejection.
    """

    logits: torch.Tensor
    auxiliary: list[torch.Tensor]
    kept_classes: torch.Tensor | None


class SEDDecoder(nn.Module):
    """From dense features and text embeddings to one logit map per class."""

    def __init__(self, config: SEDConfig) -> None:
        super().__init__()
        self.uses_cost = config.fuses_cost
        self.cost_embedding = CostEmbedding(config)
        self.layers = nn.ModuleList(SEDDecoderLayer(config, index) for index in range(config.num_decoder_layers))

    def forward(
        self,
        dense_features: torch.Tensor,
        image_guidance: Sequence[torch.Tensor],
        text_embeds: torch.Tensor,
        top_k: int | None,
        pooling: int,
        chunk_size: int | None,
        wants_auxiliary: bool,
    ) -> DecoderOutput:
        """Decode all classes of some rows.

        Args:
            dense_features: `[R, D, h, w]`.
            image_guidance: for each layer `[R, G, 2h, 2w]`, ...; empty without.
            text_embeds: `[K, P, D]`.
            top_k: keep, before each layer, the union over positions of the k best classes; None: keep all.
            pooling: average pooling in front of the class attention, 1 = none.
            chunk_size: pairs that go through a layer at a time; None: all.
            wants_auxiliary: whether the logits of the heads before the last are returned; they get no gradient path to
                the features.
        """
        rows, num_classes = dense_features.shape[0], text_embeds.shape[0]
        size = chunk_size or rows * num_classes

        def by_class(logits: torch.Tensor, pairs: Sequence[torch.Tensor]) -> torch.Tensor:
            return _scatter(logits, pairs, rows, num_classes)

        auxiliary: list[torch.Tensor] = []
        kept = torch.ones(rows, num_classes, dtype=torch.bool, device=dense_features.device)
        logits = None
        if top_k is not None:
            logits = self._early_logits(dense_features, text_embeds, size)
            kept = best_classes(logits, [num_classes] * rows, top_k).view(rows, num_classes)
            if wants_auxiliary:
                auxiliary.append(logits.view(rows, num_classes, *logits.shape[1:]))
        classes = None if top_k is None else [of_row.nonzero().flatten() for of_row in kept]
        chunks = join_small(self._embed(dense_features, text_embeds, classes, size), size)
        for index, layer in enumerate(self.layers):
            pairs = [chunk.pairs for chunk in chunks]
            if index == 0 and top_k is None and wants_auxiliary:
                logits = torch.cat([self.cost_embedding.head(chunk.features.detach()) for chunk in chunks])
                auxiliary.append(by_class(logits, pairs))
            elif index > 0:
                if wants_auxiliary:
                    auxiliary.append(by_class(logits, pairs))
                if top_k is not None:
                    chunks = reject(chunks, logits, top_k, size)
                    pairs = [chunk.pairs for chunk in chunks]
            is_last = index == len(self.layers) - 1
            chunks, logits = layer(
                chunks,
                image_guidance[index] if image_guidance else None,
                pooling,
                wants_features=not is_last,
                wants_logits=is_last or wants_auxiliary or top_k is not None,
                detach=not is_last,
            )
        kept_classes = None
        if top_k is not None:
            kept_classes = torch.zeros_like(kept).flatten().index_fill(0, torch.cat(pairs), True).view_as(kept)
        return DecoderOutput(by_class(logits, pairs), auxiliary, kept_classes)

    def _early_logits(self, dense_features: torch.Tensor, text_embeds: torch.Tensor, size: int) -> torch.Tensor:
        """Logits `[R * K, h, w]` before the first layer, `size` pairs at a time."""
        at_once = max(1, size // dense_features.shape[0])
        parts = []
        for some_embeds in text_embeds.split(at_once):
            cost = correlation(dense_features, some_embeds)
            logits = self.cost_embedding.early_logits(cost.flatten(0, 1).permute(0, 2, 3, 1))
            parts.append(logits.unflatten(0, cost.shape[:2]))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def _embed(
        self,
        dense_features: torch.Tensor,
        text_embeds: torch.Tensor,
        classes: Sequence[torch.Tensor] | None,
        size: int,
    ) -> Iterator[ClassChunk]:
        """Embedded cost maps of the given classes of each row (None: all), at most `size` of a row at a time."""
        rows, num_classes = dense_features.shape[0], text_embeds.shape[0]
        everything = torch.arange(num_classes, device=dense_features.device)
        for row in range(rows):
            of_row = everything if classes is None else classes[row]
            # without a split the number of classes of an exported program stays open
            for some in of_row.split(size) if size < num_classes else (of_row,):
                cost = correlation(dense_features[row : row + 1], text_embeds[some])[0].permute(0, 2, 3, 1).contiguous()
                features = self.cost_embedding(cost)
                yield ClassChunk(
                    features=features,
                    cost=cost.to(features.dtype) if self.uses_cost else None,
                    pairs=some + row * num_classes,
                    counts=tuple(some.shape[0] if other == row else 0 for other in range(rows)),
                )


def _scatter(logits: torch.Tensor, pairs: Sequence[torch.Tensor], rows: int, num_classes: int) -> torch.Tensor:
    """Logits `[N, h, w]` of (row, class) pairs -> `[rows, K, h, w]`; pairs that are missing have `REJECTED`."""
    size = logits.shape[1:]
    if logits.shape[0] == rows * num_classes:
        return logits.view(rows, num_classes, *size)
    result = logits.new_full((rows * num_classes, *size), REJECTED)
    return result.index_copy_(0, torch.cat(list(pairs)), logits).view(rows, num_classes, *size)
