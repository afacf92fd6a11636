"""ESC-Net's blocks: pseudo prompts, a SAM block, vision-language fusion; and what passes between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from ...layers.guided_swin import GuidedSwinPair
from ...layers.linear_attention import ClassSums, TextClassAttention
from ...layers.pseudo_prompts import PseudoPrompts, generate_pseudo_prompts
from ...layers.sam_blocks import PseudoPromptEncoder, SAMBlock
from .configuration_esc_net import ESCNetConfig


@dataclass
class ClassChunk:
    """Some (row, class) pairs on their way through the blocks, sorted by row; a row is a picture or a view of one.

    Args:
        rows: `[n]` int64, the row of each pair.
        used_rows: the rows that the pairs belong to.
        counts: of each of these rows, how many of the n are its classes.
        features: `[n, h * w, C]`, the residual stream E.
        keys: `[n, h * w, S]`, the map that SAM refines: of the picture, later of the class.
        prompt_map: `[n, h, w]`, what the first block's prompts are made from: the correlation.
        tokens: `[n, T, S]`, queries of the SAM blocks beside those of the prompts; None: none.
        refined: `[n, h * w, C]`, the refined map F' of the present block, projected.
        records: name -> `[n, ...]`, what was asked for on the way.
    """

    rows: torch.Tensor
    used_rows: slice
    counts: list[int]
    features: torch.Tensor
    keys: torch.Tensor
    prompt_map: torch.Tensor
    tokens: torch.Tensor | None = None
    refined: torch.Tensor | None = None
    records: dict[str, torch.Tensor] = field(default_factory=dict)


def chunk_bounds(counts: list[int], chunk_size: int | None) -> Iterator[tuple[slice, slice, list[int]]]:
    """Cut rows with `counts` pairs each into chunks of `chunk_size` pairs.

    Yields:
        the chunk's pairs and its rows as slices, and how many of its pairs belong to each of these rows.
    """
    ends = [sum(counts[: row + 1]) for row in range(len(counts))]
    total = ends[-1]
    at_once = chunk_size or max(1, total)
    for start in range(0, total, at_once):
        stop = min(start + at_once, total)
        shares = [min(end, stop) - max(end - count, start) for end, count in zip(ends, counts, strict=True)]
        used = [row for row, share in enumerate(shares) if share > 0]
        rows = slice(used[0], used[-1] + 1)
        yield slice(start, stop), rows, [max(0, share) for share in shares[rows]]


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
            maps = self.prompt_map(chunk.features)[..., 0].unflatten(1, maps.shape[1:])
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
        grid = tuple(chunk.prompt_map.shape[1:])
        features = self.spatial(chunk.features[None], chunk.refined[None], grid)[0]
        chunk.features, chunk.refined = self.classes(features, sums), None
