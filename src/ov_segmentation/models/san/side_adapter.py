"""SAN's side network: a small ViT that takes in CLIP's features and gives masks and attention biases (section 3.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import gelu, interpolate
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from ...layers.attention import attend, split_heads
from ...layers.clip_vision import resize_position_grid
from ...layers.initialization import init_torch_defaults
from ...layers.mlp import MLP
from .configuration_san import SANConfig

Grid = tuple[int, int]


class SideFeatures(NamedTuple):
    """Output of one supervised depth: `queries` `[B, N, C]`, `visual` `[B, h*w, C]` row by row."""

    queries: torch.Tensor
    visual: torch.Tensor


class Proposals(NamedTuple):
    """What the decoder makes of one depth, on the side network's grid.

    Args:
        mask_logits: `[B, N, h, w]`.
        attention_bias: `[B, layers, heads, N, h, w]`.
    """

    mask_logits: torch.Tensor
    attention_bias: torch.Tensor


class SideBlock(GradientCheckpointingLayer):
    """A pre-norm transformer block with packed query, key and value, exact GELU, and no final norm."""

    is_causal = False

    def __init__(self, config: SANConfig) -> None:
        super().__init__()
        width, eps = config.side_hidden_size, config.side_layer_norm_eps
        hidden = int(width * config.side_mlp_ratio)
        self.config = config
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[B, T, C]` -> `[B, T, C]`."""
        heads = self.config.side_num_attention_heads
        query, key, value = (split_heads(x, heads) for x in self.qkv(self.norm1(tokens)).chunk(3, dim=-1))
        attended, _ = attend(self, query, key, value, None, self.config._attn_implementation)
        tokens = tokens + self.proj(attended)
        return tokens + self.fc2(gelu(self.fc1(self.norm2(tokens))))

    def init_weights(self) -> None:
        """Linear layers truncated normal, biases 0."""
        for linear in (self.qkv, self.proj, self.fc1, self.fc2):
            init.trunc_normal_(linear.weight, std=self.config.initializer_range)
            init.zeros_(linear.bias)


class FusionLayer(nn.Module):
    """Adds CLIP's tokens to the side network's visual tokens (equation 1): norm, projection, bilinear resize, sum."""

    def __init__(self, config: SANConfig) -> None:
        super().__init__()
        clip_width = config.clip_config.vision_config.hidden_size
        self.norm = nn.LayerNorm(clip_width, eps=config.side_layer_norm_eps)
        self.proj = nn.Linear(clip_width, config.side_hidden_size)

    def project(self, clip_tokens: torch.Tensor, clip_grid: Grid) -> torch.Tensor:
        """CLIP's visual tokens `[B, L, D]` -> map `[B, C, *clip_grid]`."""
        return self.proj(self.norm(clip_tokens)).transpose(1, 2).unflatten(2, clip_grid)

    def forward(self, visual: torch.Tensor, grid: Grid, clip_tokens: torch.Tensor, clip_grid: Grid) -> torch.Tensor:
        """`visual` `[B, h*w, C]` with CLIP's visual tokens `[B, L, D]` added."""
        projected = self.project(clip_tokens, clip_grid)
        resized = interpolate(projected.float(), size=grid, mode="bilinear", align_corners=False)
        return visual + resized.to(visual.dtype).flatten(2).transpose(1, 2)

    def init_weights(self) -> None:
        """The original's initialisation of a 1x1 convolution."""
        init.kaiming_uniform_(self.proj.weight, a=1)
        init.zeros_(self.proj.bias)


class ProposalDecoder(nn.Module):
    """Mask logits and attention biases from queries and visual tokens (section 3.3); one for all supervised depths."""

    def __init__(self, config: SANConfig) -> None:
        super().__init__()
        width, hidden, depth = config.side_hidden_size, config.mask_hidden_dim, config.mask_num_layers
        self.config = config
        self.query_mlp = MLP(width, hidden, config.mask_embed_dim, depth)
        self.pixel_mlp = MLP(width, hidden, config.mask_embed_dim, depth)
        if config.decoupled_head:
            out = config.mask_embed_dim * config.attention_bias_heads * config.num_bias_layers
            self.bias_mlp = MLP(width, hidden, out, depth)
        if config.rescale_attention_bias:
            self.bias_scaling = nn.Linear(1, 1)

    def forward(self, features: SideFeatures, grid: Grid) -> Proposals:
        """Proposals of one depth, on the grid (h, w) of its visual tokens."""
        query = self.query_mlp(features.queries)
        masks = query @ self.pixel_mlp(features.visual).transpose(1, 2)
        if self.config.decoupled_head:
            bias = self._own_bias(query, features.visual)
        else:
            bias = (masks.detach() if self.config.detach_clip_from_masks else masks)[:, None, None]
        if self.config.rescale_attention_bias:
            bias = self.bias_scaling(bias[..., None])[..., 0]
        return Proposals(masks.unflatten(-1, grid), bias.unflatten(-1, grid))

    def _own_bias(self, query: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        if self.config.detach_clip_from_masks:
            query, visual = query.detach(), visual.detach()
        split = (self.config.num_bias_layers, self.config.attention_bias_heads, self.config.mask_embed_dim)
        features = self.bias_mlp(visual).unflatten(-1, split)  # [B, h*w, layers, heads, C]
        bias = features.flatten(1, 3) @ query.transpose(1, 2)
        return bias.unflatten(1, features.shape[1:4]).permute(0, 2, 3, 4, 1)

    def init_weights(self) -> None:
        """PyTorch's default (the MLPs initialise themselves)."""
        if self.config.rescale_attention_bias:
            init_torch_defaults(self.bias_scaling)


class SideAdapterNetwork(nn.Module):
    """The ViT with its queries, the fusion layers and the decoder."""

    def __init__(self, config: SANConfig) -> None:
        super().__init__()
        width, patch = config.side_hidden_size, config.side_patch_size
        side = config.side_image_size // patch
        self.config = config
        self.stored_grid = (side, side)
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.empty(1, side * side, width))
        self.query_embedding = nn.Parameter(torch.empty(1, config.num_queries, width))
        self.query_position_embedding = nn.Parameter(torch.empty(1, config.num_queries, width))
        self.blocks = nn.ModuleList(SideBlock(config) for _ in range(config.side_num_layers))
        self.fusion_layers = nn.ModuleDict(
            {str(side_layer): FusionLayer(config) for _, side_layer in config.fusion_map}
        )
        self.decoder = ProposalDecoder(config)
        self._clip_layer_of = {side_layer: clip_layer for clip_layer, side_layer in config.fusion_map}

    def positions(self, grid: Grid) -> torch.Tensor:
        """Position embedding of queries and visual tokens `[1, N + h*w, C]`.

        The stored grid is resized when the number of tokens differs, not when the shape does: the original's rule.
        """
        visual = self.position_embedding
        if grid[0] * grid[1] != visual.shape[1]:
            visual = resize_position_grid(visual, self.stored_grid, grid)
        return torch.cat([self.query_position_embedding, visual], dim=1)

    def fuse(
        self, layer: int, tokens: torch.Tensor, grid: Grid, clip: list[torch.Tensor], clip_grid: Grid
    ) -> torch.Tensor:
        """`tokens` `[B, N + h*w, C]` with CLIP's features for side layer `layer`, if any, added to the visual ones."""
        if layer not in self._clip_layer_of:
            return tokens
        queries, visual = tokens.split([self.config.num_queries, tokens.shape[1] - self.config.num_queries], dim=1)
        clip_tokens = clip[self._clip_layer_of[layer]][:, 1:]
        visual = self.fusion_layers[str(layer)](visual, grid, clip_tokens, clip_grid)
        return torch.cat([queries, visual], dim=1)

    def forward(
        self, pixel_values: torch.Tensor, clip: list[torch.Tensor], clip_grid: Grid, supervised: list[int]
    ) -> tuple[list[SideFeatures], Grid, list[torch.Tensor]]:
        """Run the side network.

        Args:
            pixel_values: `[B, 3, H, W]`.
            clip: CLIP's tokens `[B, 1 + L, D]`, class token first, after layers 0, 1, 2, ...
            clip_grid: the grid of its L visual tokens.
            supervised: side layers, counted from 1 and rising, whose outputs are wanted.

        Returns:
            The outputs of those layers; the grid (h, w); the tokens `[B, N + h*w, C]` before the first block and after
            each one.
        """
        visual = self.patch_embedding(pixel_values)
        grid = (visual.shape[-2], visual.shape[-1])
        queries = self.query_embedding.expand(len(visual), -1, -1)
        positions = self.positions(grid)
        tokens = torch.cat([queries, visual.flatten(2).transpose(1, 2)], dim=1) + positions
        tokens = self.fuse(0, tokens, grid, clip, clip_grid)
        states, outputs = [tokens], []
        for i, block in enumerate(self.blocks, start=1):
            if i > 1:
                tokens = tokens + positions
            tokens = self.fuse(i, block(tokens), grid, clip, clip_grid)
            states.append(tokens)
            if i in supervised:
                outputs.append(SideFeatures(tokens[:, : self.config.num_queries], tokens[:, self.config.num_queries :]))
        return outputs, grid, states

    def init_weights(self) -> None:
        """The tokens and the patch embedding; blocks, fusion layers and decoder initialise themselves."""
        init.trunc_normal_(self.position_embedding, std=self.config.initializer_range)
        init.normal_(self.query_embedding, std=self.config.initializer_range)
        init.normal_(self.query_position_embedding, std=self.config.initializer_range)
        init_torch_defaults(self.patch_embedding)
