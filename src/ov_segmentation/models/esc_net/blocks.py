"""ESC-Net's blocks: pseudo prompts, a SAM block, vision-language fusion."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ...layers.guided_swin import GuidedSwinPair
from ...layers.linear_attention import ClassSums, TextClassAttention
from ...layers.pseudo_prompts import PseudoPrompts, generate_pseudo_prompts
from ...layers.sam_blocks import PseudoPromptEncoder, SAMBlock
from ...precision import in_float32
from .chunks import ClassChunk, average_over_classes
from .configuration_esc_net import ESCNetConfig

# SAM's image neck ends with a layer norm of this epsilon
NECK_EPS = 1e-6


class SAMNeck(nn.Module):
    """Image features in SAM's width, normalised as SAM's image encoder leaves them: `[R, D, h, w]` -> `[R, h * w, S]`.

    Args:
        in_channels: D.
        out_channels: S.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.projection = nn.Linear(in_channels, out_channels, bias=False)
        self.norm = nn.LayerNorm(out_channels, eps=NECK_EPS)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project and normalise every position."""
        return self.norm(self.projection(features.flatten(2).transpose(1, 2)))


class ESCNetBlock(nn.Module):
    """Refines the map of each class with SAM, then fuses it into the residual stream (paper, Secs. 3.3 to 3.5).

    Args:
        config: the model's.
        index: the block's place, from 0.
    """

    def __init__(self, config: ESCNetConfig, index: int) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.prompt_settings = (
            config.num_objects,
            config.prompt_temperature,
            config.prompt_threshold,
            config.kmeans_iterations,
        )
        self.prompt_map, self.sam = None, None
        if config.use_sam_blocks:
            if index > 0:
                # without bias: the prompts are made from the map less its mean
                self.prompt_map = nn.Linear(hidden, 1, bias=False)
            self.sam = SAMBlock(config.sam_config.mask_decoder_config, config.sam_block_indices[index])
        self.refinement = nn.Linear(config.sam_hidden_size, hidden)
        self.spatial = GuidedSwinPair(config, hidden, hidden, heads, config.window_size)
        self.classes = TextClassAttention(hidden, heads, config.text_guidance_size)

    def pseudo_prompts(self, chunk: ClassChunk) -> PseudoPrompts:
        """Prompts of every pair, from the correlation in the first block, later from the residual stream."""
        maps = chunk.prompt_map
        if self.prompt_map is not None:
            # float32: which pixels are chosen hangs on small differences
            maps = in_float32(self.prompt_map, chunk.features)[..., 0].unflatten(1, chunk.grid)
        return generate_pseudo_prompts(maps, *self.prompt_settings)

    def refine(
        self, chunk: ClassChunk, prompt_encoder: PseudoPromptEncoder | None, positions: torch.Tensor | None
    ) -> PseudoPrompts | None:
        """Set `keys` and `refined` of the chunk (Eq. 2).

        Args:
            chunk: the pairs.
            prompt_encoder: SAM's; None without SAM blocks.
            positions: `[h * w, S]`, SAM's position embeddings.

        Returns:
            the prompts that were used; None without SAM blocks.
        """
        prompts = None
        if self.sam is not None:
            prompts = self.pseudo_prompts(chunk)
            sparse, dense = prompt_encoder(prompts)
            queries = torch.cat([part for part in (chunk.tokens, sparse) if part is not None], dim=1)
            chunk.keys = self.sam(chunk.keys + dense, queries, positions)
        chunk.refined = self.refinement(chunk.keys)
        return prompts

    def fuse(self, chunk: ClassChunk, sums: ClassSums) -> None:
        """Set `features` of the chunk: spatial aggregation guided by `refined`, then class attention.

        Args:
            chunk: the pairs.
            sums: of the class attention, over the whole vocabulary.
        """
        features = self.spatial(chunk.features[None], chunk.refined[None], chunk.grid)[0]
        chunk.features, chunk.refined = self.classes(features, sums), None


def run_blocks(
    blocks: Iterable[ESCNetBlock],
    chunks: list[ClassChunk],
    sums: list[ClassSums],
    prompt_encoder: PseudoPromptEncoder | None,
    averaged_classes: int | None,
    keep_states: bool,
    keep_maps: bool,
) -> None:
    """All blocks, in place, over chunks that advance together.

    Args:
        blocks: in order.
        chunks: some of all chunks; all of them where maps are averaged.
        sums: each block's class sums.
        prompt_encoder: SAM's; None without SAM blocks.
        averaged_classes: K, to average the refined maps of K classes; None: each class keeps its own.
        keep_states: record the residual stream before and after each block.
        keep_maps: record the prompts, and the activation after each block.
    """
    positions = None if prompt_encoder is None else prompt_encoder.position_embeddings()
    for chunk in chunks:
        if keep_states:
            chunk.records["features_0"] = chunk.features
    for index, (block, of_classes) in enumerate(zip(blocks, sums, strict=True), start=1):
        for chunk in chunks:
            prompts = block.refine(chunk, prompt_encoder, positions)
            if keep_maps and prompts is not None:
                record_prompts(chunk, prompts, index)
        if averaged_classes is not None:
            average_over_classes(chunks, averaged_classes)
        for chunk in chunks:
            block.fuse(chunk, of_classes)
            if keep_states:
                chunk.records[f"features_{index}"] = chunk.features
            if keep_maps:
                # our reading of Figure 6: how much of the class's features is where
                chunk.records[f"activation_{index}"] = chunk.features.norm(dim=2).unflatten(1, chunk.grid)


def record_prompts(chunk: ClassChunk, prompts: PseudoPrompts, index: int) -> None:
    """Keep the prompts of block `index`: masks `[n, h, w]`; points `[n, objects, 3]`: x, y, and whether it is one."""
    chunk.records[f"mask_prompt_{index}"] = prompts.masks
    valid = prompts.valid[..., None].to(prompts.points.dtype)
    chunk.records[f"point_prompt_{index}"] = torch.cat([prompts.points, valid], dim=-1)
