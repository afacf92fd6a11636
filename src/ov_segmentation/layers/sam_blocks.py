"""Parts of SAM (Kirillov et al., "Segment Anything", 2023) on per-class feature maps, as ESC-Net uses them.

The modules are transformers' own, so weights of a `SamModel` drop in. ESC-Net takes the prompt encoder and single
two-way blocks of the mask decoder; SAM's image encoder and heads are not part of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import SamConfig, SamMaskDecoderConfig, SamModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.sam.modeling_sam import SamPromptEncoder, SamTwoWayAttentionBlock

from .pieces import in_pieces
from .pseudo_prompts import PseudoPrompts
from .sliding_window import resize
from .two_way_attention import two_way_block

# the mask encoder has two convolutions of stride 2
MASK_SCALE = 4
# the labels of SAM's point prompts
FOREGROUND, NOT_A_POINT = 1, -1


class PseudoPromptEncoder(nn.Module):
    """SAM's prompt encoder for pseudo prompts.

    Args:
        config: its prompt encoder's `image_size` and `patch_size` are those of the map's picture.
        prompt_types: of "points", "boxes", "masks", those that are used.
        mask_scale: logit of a mask's pixel of probability 1; that of probability 0 is the negative.
    """

    def __init__(self, config: SamConfig, prompt_types: Sequence[str], mask_scale: float) -> None:
        super().__init__()
        self.prompt_types, self.mask_scale = frozenset(prompt_types), mask_scale
        self.encoder = SamPromptEncoder(config)

    @property
    def patch_size(self) -> float:
        """Pixels along a side of a position."""
        return self.encoder.input_image_size / self.encoder.image_embedding_size[0]

    def forward(self, prompts: PseudoPrompts) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Embed the prompts of N maps.

        Returns:
            sparse embeddings `[N, T, C]`: of n points (and, without boxes, one padding point as in SAM), then of 2 n
            corners; None without points and boxes. Dense embeddings `[N or 1, h * w, C]`.
        """
        masks = None
        if "masks" in self.prompt_types:
            logits = self.mask_scale * (2 * prompts.masks[:, None] - 1)
            size = [MASK_SCALE * side for side in logits.shape[-2:]]
            masks = resize(logits, size).to(self.encoder.no_mask_embed.weight.dtype)
        points, labels, sparse = None, None, []
        if "points" in self.prompt_types:
            # the encoder adds half a pixel, to get from a pixel's index to its middle
            points = (prompts.points[:, None] + 0.5) * self.patch_size - 0.5
            labels = torch.where(prompts.valid, FOREGROUND, NOT_A_POINT)[:, None]
        embedded, dense = self.encoder(points, labels, None, masks)
        if embedded is not None:
            embedded = embedded[:, 0]
            # the padding point stands for a box that is not there
            sparse.append(embedded[:, :-1] if "boxes" in self.prompt_types else embedded)
        if "boxes" in self.prompt_types:
            sparse.append(self._embed_boxes(prompts))
        # the table of positions may be kept in float32
        return torch.cat(sparse, dim=1).to(dense.dtype) if sparse else None, dense.flatten(2).transpose(1, 2)

    def _embed_boxes(self, prompts: PseudoPrompts) -> torch.Tensor:
        """`[N, 2 n, C]`; transformers has no label for a box that is not there: its corners are no points."""
        first, last = prompts.boxes.split(2, dim=-1)
        boxes = torch.cat([first, last + 1], dim=-1)
        corners, _ = self.encoder(None, None, boxes * self.patch_size - 0.5, None)
        missing = ~prompts.valid[:, :, None, None]
        return torch.where(missing, self.encoder.not_a_point_embed.weight, corners).flatten(1, 2)

    def position_embeddings(self) -> torch.Tensor:
        """SAM's embeddings of the map's positions, `[h * w, C]`."""
        table = self.encoder.shared_embedding.positional_embedding
        rows, columns = (
            (torch.arange(side, device=table.device, dtype=torch.float32) + 0.5) / side
            for side in self.encoder.image_embedding_size
        )
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        embeddings = self.encoder.shared_embedding(torch.stack([x, y], dim=-1)).flatten(0, 1)
        return embeddings.to(self.encoder.no_mask_embed.weight.dtype)

    def unused_parts(self) -> list[str]:
        """Names of modules that are not trained: the random table of positions, as in SAM, and embeddings of prompts
        that are not used (`point_embed`: negative and positive points, then corners of boxes)."""
        masks, points, boxes = (kind in self.prompt_types for kind in ("masks", "points", "boxes"))
        uses = {
            "encoder.shared_embedding": False,
            "encoder.mask_embed": masks,
            "encoder.no_mask_embed": not masks,
            "encoder.not_a_point_embed": points or boxes,
            **{f"encoder.point_embed.{i}": used for i, used in enumerate((False, points, boxes, boxes))},
        }
        return [name for name, used in uses.items() if not used]

    def freeze_unused(self) -> None:
        """Freeze `unused_parts`."""
        for name in self.unused_parts():
            self.get_submodule(name).requires_grad_(False)


class SAMBlock(GradientCheckpointingLayer):
    """A two-way block of SAM's mask decoder: prompt tokens and a map attend to each other.

    Args:
        config: gives the width and the attention implementation.
        source_index: the block's place in SAM's decoder; the first one treats its queries differently.
    """

    def __init__(self, config: SamMaskDecoderConfig, source_index: int) -> None:
        super().__init__()
        self.block = SamTwoWayAttentionBlock(config, skip_first_layer_pe=source_index == 0)

    def forward(self, features: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Refined features.

        Args:
            features: `[N, h * w, C]`, the keys of SAM.
            tokens: `[N, T, C]`, the queries of SAM, and their own position embeddings.
            positions: `[h * w, C]`, position embeddings of the map.
        """
        return in_pieces(lambda *some: self._run(*some, positions), features[0].numel(), features, tokens)

    def _run(self, features: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return two_way_block(self.block, tokens, features, tokens, positions)[1]


def init_prompt_encoder(module: nn.Module) -> None:
    """Original SAM's initialisation of what a `SamPromptEncoder` holds beside convolutions: unit normal embeddings.

    transformers scales the table of positions by half of the image encoder's width, which leaves neighbours unrelated.
    """
    if isinstance(module, SamPromptEncoder):
        init.normal_(module.shared_embedding.positional_embedding)
        for embedding in (*module.point_embed, module.not_a_point_embed, module.no_mask_embed):
            init.normal_(embedding.weight)


@torch.no_grad()
def load_sam_parts(
    sam: SamModel,
    prompt_encoder: SamPromptEncoder,
    blocks: Sequence[SamTwoWayAttentionBlock],
    block_indices: Sequence[int],
    output_tokens: nn.Parameter | None = None,
) -> None:
    """Copy a pretrained SAM's weights.

    Args:
        sam: the source.
        prompt_encoder: gets SAM's.
        blocks: block i gets the weights of SAM's two-way block `block_indices[i]`.
        output_tokens: `[tokens, C]`, gets SAM's token of the mask quality, then its mask tokens.
    """
    prompt_encoder.load_state_dict(sam.prompt_encoder.state_dict())
    for block, index in zip(blocks, block_indices, strict=True):
        block.load_state_dict(sam.mask_decoder.transformer.layers[index].state_dict())
    if output_tokens is not None:
        decoder = sam.mask_decoder
        output_tokens.copy_(torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]))
