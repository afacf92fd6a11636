"""Linear attention over the classes at every position of a map, as SED and CAT-Seg aggregate their cost maps.

With the kernel phi(x) = elu(x) + 1 in the place of the softmax (Katharopoulos et al., "Transformers are RNNs", 2020),
all that a query needs to know of the keys and values are two sums over the classes. Sums of chunks add up, so any
number of classes can be processed in chunks with an exact result: `class_sums` of every chunk first, then `forward`.

Tokens are `[N, S, C]`: N pairs (picture, class), those of a picture next to each other, and S positions. `counts` says
how many of the N belong to each picture of the batch (0 for a picture that is not in the chunk).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from ..precision import full_precision
from .guided import guided_linear
from .pieces import in_pieces

EPSILON = 1e-6


class ClassSums(NamedTuple):
    """What a query needs to know of all classes of its picture, per position and head; d channels per head.

    Of float16 they are float32: it ends at 65,504, and products with sums over a thousand classes may go beyond.

    Args:
        key_values: `[B, S * heads, d, d]`, the sum over classes of phi(key) (outer product) value.
        keys: `[B, S * heads, d, 1]`, the sum over classes of phi(key).
    """

    key_values: torch.Tensor
    keys: torch.Tensor

    def __add__(self, other: ClassSums) -> ClassSums:  # type: ignore[override]
        return ClassSums(self.key_values + other.key_values, self.keys + other.keys)


class ClassLayer(GradientCheckpointingLayer):
    """What transformer layers over classes share: the projections, the norms, a ReLU MLP; no output projection.

    Args:
        channels: C.
        num_heads: has to divide `channels`.
        query_channels, key_channels, value_channels: what the three projections see.
        mlp_ratio: hidden channels of the MLP over `channels`.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        query_channels: int,
        key_channels: int,
        value_channels: int,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"num_heads {num_heads} has to divide the {channels} channels of the class attention.")
        self.channels, self.num_heads = channels, num_heads
        self.norm1 = nn.LayerNorm(channels)
        self.query = nn.Linear(query_channels, channels)
        self.key = nn.Linear(key_channels, channels)
        self.value = nn.Linear(value_channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, channels * mlp_ratio)
        self.fc2 = nn.Linear(channels * mlp_ratio, channels)

    def _split_heads(self, features: torch.Tensor) -> torch.Tensor:
        """`[N, S, C]` -> `[N, S * heads, d]`."""
        return features.view(features.shape[0], -1, self.channels // self.num_heads)

    def _add_mlp(self, tokens: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        tokens = tokens + attended
        return tokens + self.fc2(F.relu(self.fc1(self.norm2(tokens)), inplace=True))


class ClassAttention(ClassLayer):
    """Pre-norm transformer layer over classes: linear attention without output projection, then a ReLU MLP.

    Args:
        channels: C.
        num_heads: has to divide `channels`.
        guidance_channels: G, width of a vector per class that queries and keys also see; 0 for none.
        mlp_ratio: hidden channels of the MLP over `channels`.
    """

    def __init__(self, channels: int, num_heads: int, guidance_channels: int = 0, mlp_ratio: int = 4) -> None:
        guided = channels + guidance_channels
        super().__init__(channels, num_heads, guided, guided, channels, mlp_ratio)

    def _guided(self, linear: nn.Linear, tokens: torch.Tensor, guidance: torch.Tensor | None) -> torch.Tensor:
        """phi(linear([norm(tokens), guidance])) `[N, S, C]`; the guidance's share is computed once per class."""
        tokens = self.norm1(tokens)
        if guidance is None:
            return _positive(linear(tokens))
        return _positive(guided_linear(linear, tokens, guidance[:, None]))

    def class_sums(
        self, tokens: torch.Tensor, counts: Sequence[int], guidance: torch.Tensor | None = None
    ) -> ClassSums:
        """Sums over the classes of each picture.

        Args:
            tokens: `[N, S, C]`, not normalised.
            counts: of each picture in the batch, its number of tokens; they sum to N.
            guidance: `[N, G]`, with `guidance_channels`.
        """
        size = tokens.shape[1] * self.channels
        keys = self._split_heads(in_pieces(lambda *t: self._guided(self.key, *t), size, tokens, guidance))
        values = self._split_heads(in_pieces(lambda t: self.value(self.norm1(t)), size, tokens))
        products, sums = [], []
        for keys_of_one, values_of_one in zip(keys.split(list(counts)), values.split(list(counts)), strict=True):
            product, total = _sum_classes(keys_of_one, values_of_one)
            products.append(product)
            sums.append(total)
        return ClassSums(torch.stack(products), torch.stack(sums))

    def forward(
        self, tokens: torch.Tensor, counts: Sequence[int], sums: ClassSums, guidance: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Updated tokens `[N, S, C]`, residuals included.

        Args:
            tokens, counts, guidance: as for `class_sums`, of these classes alone.
            sums: over all classes of each picture.
        """
        size = tokens.shape[1] * self.channels
        queries = self._split_heads(in_pieces(lambda *t: self._guided(self.query, *t), size, tokens, guidance))
        # the normaliser is one more column of the same product
        key_values = torch.cat([sums.key_values, sums.keys], dim=-1)
        mixed = []
        for queries_of_one, key_values_of_one in zip(queries.split(list(counts)), key_values, strict=True):
            mixed.append(_mix(queries_of_one, key_values_of_one, tokens.dtype))
        attended = torch.cat(mixed).reshape(tokens.shape)
        return in_pieces(self._add_mlp, size * self.fc1.out_features // self.channels, tokens, attended)


class TextClassAttention(ClassLayer):
    """The same with keys and values from the texts of all classes (ESC-Net, Sec. 3.5); queries come from the maps.

    What a query needs to know of the classes then depends on the vocabulary alone, so no class waits for another.

    Args:
        channels: C.
        num_heads: has to divide `channels`.
        text_channels: G, width of a text.
        mlp_ratio: hidden channels of the MLP over `channels`.
    """

    def __init__(self, channels: int, num_heads: int, text_channels: int, mlp_ratio: int = 4) -> None:
        super().__init__(channels, num_heads, channels, text_channels, text_channels, mlp_ratio)

    def class_sums(self, texts: torch.Tensor) -> ClassSums:
        """Sums over all classes, `[1, heads, ...]`, of their texts `[K, G]`; no normalisation goes before."""
        keys, values = self._split_heads(_positive(self.key(texts))), self._split_heads(self.value(texts))
        products, sums = _sum_classes(keys, values)
        return ClassSums(products[None], sums[None])

    def forward(self, tokens: torch.Tensor, sums: ClassSums) -> torch.Tensor:
        """Updated tokens `[N, S, C]`, residuals included; `sums` are those of the whole vocabulary."""
        key_values = torch.cat([sums.key_values, sums.keys], dim=-1)[0]
        size = tokens.shape[1] * self.fc1.out_features
        return in_pieces(lambda some: self._add_mlp(some, self._attend(some, key_values)), size, tokens)

    def _attend(self, tokens: torch.Tensor, key_values: torch.Tensor) -> torch.Tensor:
        queries = _positive(self.query(self.norm1(tokens))).view(-1, self.num_heads, self.channels // self.num_heads)
        return _mix(queries, key_values, tokens.dtype).reshape(tokens.shape)


def _sum_classes(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the classes, `[M, d, d]` and `[M, d, 1]`, see `ClassSums`, of keys and values `[K, M, d]`."""
    with full_precision(keys):
        keys = keys.float() if keys.dtype == torch.float16 else keys
        products = torch.bmm(keys.permute(1, 2, 0), values.to(keys.dtype).transpose(0, 1))
        return products, keys.sum(dim=0)[..., None]


def _mix(queries: torch.Tensor, key_values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What queries `[n, M, d]` attend to, `[n, M, d]`; `key_values` `[M, d, d + 1]`: sums of keys behind the others."""
    with full_precision(queries):
        product = torch.bmm(queries.to(key_values.dtype).transpose(0, 1), key_values)
        return (product[..., :-1] / (product[..., -1:] + EPSILON)).transpose(0, 1).to(dtype)


def _positive(features: torch.Tensor) -> torch.Tensor:
    """phi(x) = elu(x) + 1, written so that it takes half the time."""
    return features.clamp(max=0).exp() + F.relu(features)


def repeated(sums: ClassSums, times: int) -> ClassSums:
    """The sums over `times` copies of the same class: padding tokens enter so."""
    return ClassSums(sums.key_values * times, sums.keys * times)


def pooling_side(pooling: int | None, grid: Sequence[int]) -> int:
    """Side of the pooling in front of a class attention over a map of `grid` positions; None, or 1: no pooling.

    Raises:
        ValueError: no number of positions, or more than the map has.
    """
    if pooling is not None and not 1 <= pooling <= min(grid):
        raise ValueError(f"class_attention_pooling must be between 1 (none) and {min(grid)}, got {pooling}.")
    return pooling or 1


def pool_positions(features: torch.Tensor, pooling: int) -> torch.Tensor:
    """Average-pooled tokens `[N, (h // pooling) * (w // pooling), C]` of a map `[N, h, w, C]`."""
    if pooling > 1:
        pooled = F.avg_pool2d(features.permute(0, 3, 1, 2), pooling)
        features = pooled.permute(0, 2, 3, 1)
    return features.flatten(1, 2)


def add_pooled(features: torch.Tensor, tokens: torch.Tensor, pooling: int) -> torch.Tensor:
    """A map `[N, h, w, C]` plus pooled tokens `[N, S, C]`, stretched to its size (bilinear, corners aligned)."""
    if pooling == 1:
        return features + tokens.view(features.shape)
    height, width = features.shape[1:3]
    pooled = tokens.view(tokens.shape[0], height // pooling, width // pooling, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(pooled, (height, width), mode="bilinear", align_corners=True)
    return features + resized.permute(0, 2, 3, 1)
