"""CLIP on masked crops: patches that a mask leaves empty give way to learned prompts, at the input and before the first
blocks.

Source: Liang et al., "Open-Vocabulary Semantic Segmentation with Mask-adapted CLIP" (2023), section 3.3, equation 3;
deep visual prompts (Jia et al., 2022), which the paper compares with in its Table 7, as an alternative.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import avg_pool2d
from transformers import CLIPVisionModel

from .clip_vision import clip_position_embedding, run_block, run_block_with_weights


def condense_masks(masks: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Per patch, whether any of its pixels is in the mask: bool `[n, H, W]` -> bool `[n, patches]`, row-major."""
    return (avg_pool2d(masks[:, None].float(), patch_size) > 0).flatten(1)


class MaskPrompts(nn.Module):
    """Learned tokens, one per depth and patch position, that replace the patches outside the mask.

    Args:
        depth: how many times tokens are replaced: at the input, then before blocks 2 to `depth`.
        num_patches: patches of a crop; 1 shares one token among all positions.
        hidden_size: width of CLIP's vision transformer.
    """

    def __init__(self, depth: int, num_patches: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(depth, num_patches, hidden_size))

    @property
    def depth(self) -> int:
        """How many times tokens are replaced."""
        return len(self.embedding)

    def replace(self, patches: torch.Tensor, occupied: torch.Tensor, level: int) -> torch.Tensor:
        """`patches` `[n, patches, D]` where `occupied` `[n, patches]`, the prompts of `level` elsewhere."""
        return torch.where(occupied[..., None], patches, self.embedding[level].to(patches.dtype))


class DeepPrompts(nn.Module):
    """Learned tokens put behind the class token, replaced by fresh ones before each of the first blocks.

    Args:
        depth: blocks that get prompts of their own.
        num_tokens: prompts per block.
        hidden_size: width of CLIP's vision transformer.
    """

    def __init__(self, depth: int, num_tokens: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(depth, num_tokens, hidden_size))

    @property
    def depth(self) -> int:
        """Blocks that get prompts of their own."""
        return len(self.embedding)


def encode_crops(
    vision_model: CLIPVisionModel,
    projection: nn.Module,
    crops: torch.Tensor,
    masks: torch.Tensor | None = None,
    prompts: MaskPrompts | DeepPrompts | None = None,
) -> torch.Tensor:
    """Projected class tokens `[n, D]`, not normalised, of square `crops` `[n, 3, S, S]`.

    Args:
        vision_model: CLIP's vision transformer.
        projection: its projection into the joint space.
        masks: bool `[n, S, S]`, needed by `MaskPrompts`.
        prompts: None runs CLIP as it is.
    """
    embeddings = vision_model.embeddings
    patches = embeddings.patch_embedding(crops)
    grid = (patches.shape[-2], patches.shape[-1])
    patches = patches.flatten(2).transpose(1, 2)
    mask_prompts = prompts if isinstance(prompts, MaskPrompts) else None
    deep_prompts = prompts if isinstance(prompts, DeepPrompts) else None
    occupied = None if mask_prompts is None else condense_masks(masks, crops.shape[-1] // grid[-1])
    if mask_prompts is not None:
        patches = mask_prompts.replace(patches, occupied, 0)
    tokens = torch.cat([embeddings.class_embedding.expand(len(patches), 1, -1), patches], dim=1)
    tokens = vision_model.pre_layrnorm(tokens + clip_position_embedding(vision_model, grid))
    for index, layer in enumerate(vision_model.encoder.layers):
        if mask_prompts is not None and 0 < index < mask_prompts.depth:
            tokens = torch.cat([tokens[:, :1], mask_prompts.replace(tokens[:, 1:], occupied, index)], dim=1)
        if deep_prompts is not None and index < deep_prompts.depth:
            fresh = deep_prompts.embedding[index].to(tokens.dtype).expand(len(tokens), -1, -1)
            used = 0 if index == 0 else fresh.shape[1]
            tokens = torch.cat([tokens[:, :1], fresh, tokens[:, 1 + used :]], dim=1)
        if index == len(vision_model.encoder.layers) - 1 and not torch.is_grad_enabled():
            tokens, _ = run_block_with_weights(layer, tokens, num_queries=1)  # nothing else is read
        else:
            tokens = run_block(layer, tokens)
    return projection(vision_model.post_layernorm(tokens[:, 0]))
