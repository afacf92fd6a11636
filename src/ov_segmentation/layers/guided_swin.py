"""Swin blocks whose queries and keys also see a guidance map (CAT-Seg, Sec. 3.3: spatial aggregation).

Windows follow Liu et al., "Swin Transformer" (2021), without its relative position bias: a block with plain windows,
then one whose windows are shifted by half of their size. Values come from the features alone.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from . import products
from .attention import attend, split_heads
from .pieces import in_pieces

# what the original adds to the logits of pairs that the cyclic shift brought together
OTHER_REGION = -100.0


def window_order(grid: tuple[int, int], window: int, shift: int, device: torch.device) -> torch.Tensor:
    """Positions `[h * w]` of a map rolled by `-shift` both ways, window after window, row-major in and between them."""
    height, width = grid
    positions = torch.arange(height * width, device=device).view(height, width).roll((-shift, -shift), (0, 1))
    tiles = positions.view(height // window, window, width // window, window)
    return tiles.transpose(1, 2).flatten()


def shifted_window_mask(
    grid: tuple[int, int], window: int, shift: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Additive mask `[windows, 1, window², window²]`: `OTHER_REGION` between tokens that are no neighbours in the map.

    After the roll, the last `shift` rows and columns come from the other side of the map, so the last row and column of
    windows hold up to four regions.
    """

    def regions(length: int) -> torch.Tensor:
        wrapped = torch.arange(length, device=device) >= length - shift
        last = torch.arange(length, device=device) >= length - window
        return last.long() + wrapped.long()

    height, width = grid
    labels = (regions(height)[:, None] * 3 + regions(width)).flatten()
    labels = labels[window_order(grid, window, 0, device)].view(-1, window * window)
    different = labels[:, :, None] != labels[:, None, :]
    return (different.to(dtype) * OTHER_REGION)[:, None]


class GuidedWindowAttention(nn.Module):
    """Multi-head attention inside windows: queries and keys from [features, guidance], values from features.

    Args:
        config: gives the attention implementation.
        channels: C of the features.
        guidance_channels: G of the guidance.
        num_heads: has to divide `channels`.
    """

    is_causal = False

    def __init__(self, config: PreTrainedConfig, channels: int, guidance_channels: int, num_heads: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.query = nn.Linear(channels + guidance_channels, channels)
        self.key = nn.Linear(channels + guidance_channels, channels)
        self.value = nn.Linear(channels, channels)
        self.projection = nn.Linear(channels, channels)

    def shares(self, guidance: torch.Tensor) -> torch.Tensor:
        """What the guidance `[..., G]` adds to queries and keys side by side: `[..., 2 C]`."""
        channels = self.value.in_features
        return products.linear(guidance, torch.cat([part.weight[:, channels:] for part in (self.query, self.key)]))

    def forward(self, windows: torch.Tensor, shares: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Attend.

        Args:
            windows: `[R, T, W, S, C]`: R pictures of T classes, W windows of S positions.
            shares: `[R, 1 or T, W, S, 2 C]`, of the guidance.
            attention_mask: additive, `[W, 1, S, S]`, or None.

        Returns:
            same shape as `windows`.
        """
        channels, parts = windows.shape[-1], (self.query, self.key, self.value)
        weight = torch.cat([part.weight[:, :channels] for part in parts])
        packed = products.linear(windows, weight, torch.cat([part.bias for part in parts]))
        packed[..., : 2 * channels] += shares
        query, key, value = (split_heads(part.flatten(0, 2), self.num_heads) for part in packed.chunk(3, dim=-1))
        if attention_mask is not None:
            attention_mask = attention_mask.repeat(query.shape[0] // attention_mask.shape[0], 1, 1, 1)
        mixed, _ = attend(self, query, key, value, attention_mask, self.config._attn_implementation)
        return self.projection(mixed.view(windows.shape))


class GuidedSwinBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block over windows, with a GELU MLP."""

    def __init__(
        self,
        config: PreTrainedConfig,
        channels: int,
        guidance_channels: int,
        num_heads: int,
        window_size: int,
        shift: int,
        mlp_ratio: int,
    ) -> None:
        super().__init__()
        self.window_size, self.shift = window_size, shift
        self.norm1 = nn.LayerNorm(channels)
        self.attention = GuidedWindowAttention(config, channels, guidance_channels, num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, channels * mlp_ratio)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(channels * mlp_ratio, channels)

    def forward(self, features: torch.Tensor, guidance: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """`[R, T, h * w, C]` and normalised guidance `[R, 1 or T, h * w, G]` -> `[R, T, h * w, C]`."""
        window, shift = self.window_size, self.shift
        if min(grid) <= window:  # one window sees everything
            window, shift = min(grid), 0
        order = window_order(grid, window, shift, features.device)
        mask = shifted_window_mask(grid, window, shift, features.device, features.dtype) if shift else None
        tiles, back = (-1, window * window), order.argsort()

        def shares(guides: torch.Tensor) -> torch.Tensor:
            return self.attention.shares(guides.index_select(2, order)).unflatten(2, tiles)

        def run(some: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
            # the whole block works window by window, so that positions are moved only twice
            windows = some.index_select(2, order).unflatten(2, tiles)
            windows = windows + self.attention(self.norm1(windows), shares, mask)
            windows = windows + self.fc2(self.act(self.fc1(self.norm2(windows))))
            return windows.flatten(2, 3).index_select(2, back)

        if features.shape[0] > 1:
            return run(features, shares(guidance))
        # the classes of one picture, a few at a time
        size = features.shape[2] * self.fc1.out_features
        if guidance.shape[1] == 1:
            shared = shares(guidance)
            return in_pieces(lambda some: run(some[None], shared)[0], size, features[0])[None]
        return in_pieces(lambda some, guides: run(some[None], shares(guides[None]))[0], size, features[0], guidance[0])[
            None
        ]


class GuidedSwinPair(nn.Module):
    """A block with plain windows and one with windows shifted by half their size, under one normalised guidance.

    Args:
        config: gives the attention implementation.
        channels: C of the features.
        guidance_channels: G of the guidance.
        num_heads: heads of both blocks.
        window_size: positions along a window's side; has to divide the map's sides unless the map is smaller.
        mlp_ratio: hidden channels of the MLPs over `channels`.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        channels: int,
        guidance_channels: int,
        num_heads: int,
        window_size: int,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__()
        self.guidance_norm = nn.LayerNorm(guidance_channels)
        self.block1, self.block2 = (
            GuidedSwinBlock(config, channels, guidance_channels, num_heads, window_size, shift, mlp_ratio)
            for shift in (0, window_size // 2)
        )

    def forward(self, features: torch.Tensor, guidance: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Aggregate over positions.

        Args:
            features: `[R, T, h * w, C]`, R pictures of T classes.
            guidance: `[R, 1, h * w, G]`, the same for all classes, or `[R, T, h * w, G]`.
            grid: (h, w).

        Returns:
            `[R, T, h * w, C]`.
        """
        guidance = self.guidance_norm(guidance)
        return self.block2(self.block1(features, guidance, grid), guidance, grid)
