"""CLIP's vision transformer with visual prompts and severed blocks: one pass, a feature per patch."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import interpolate, normalize
from transformers import CLIPModel, CLIPVisionModel

from ...layers.clip_vision import clip_position_embedding, resize_position_grid
from ...layers.severance import severed_block, token_masks
from .configuration_deop import DeOPConfig


class PromptTable(nn.Module):
    """A learned vector for the class token and for each patch position, added to the tokens ("adding" prompts).

    Args:
        side: of the stored position grid, in patches.
        hidden_size: width of CLIP's vision transformer.
    """

    def __init__(self, side: int, hidden_size: int) -> None:
        super().__init__()
        self.side = side
        self.embedding = nn.Parameter(torch.zeros(1 + side * side, hidden_size))

    def forward(self, grid: tuple[int, int]) -> torch.Tensor:
        """`[1, 1 + h*w, D]` for a patch grid (h, w)."""
        table = self.embedding[None]
        # the original compares token counts, not grids: 12 x 48 patches take a 24 x 24 table as it is
        if grid[0] * grid[1] == self.side * self.side:
            return table
        return torch.cat([table[:, :1], resize_position_grid(table[:, 1:], (self.side, self.side), grid)], dim=1)


class VisualPrompts(nn.Module):
    """The learned tables (or tokens) of all levels. Source: DeOP, section 3.3 and table 7."""

    def __init__(self, config: DeOPConfig) -> None:
        super().__init__()
        vision = config.clip_config.vision_config
        side = config.visual_prompt_image_size // vision.patch_size
        self.input_table = self.tokens = None
        self.block_tables = nn.ModuleDict()
        if config.visual_prompts == "added":
            self.input_table = PromptTable(side, vision.hidden_size)
            for block in config.visual_prompt_layers:
                self.block_tables[str(block)] = PromptTable(side, vision.hidden_size)
        elif config.visual_prompts == "prepended":
            self.tokens = nn.Parameter(torch.zeros(config.num_prepended_prompts, vision.hidden_size))


def clip_positions(vision_model: CLIPVisionModel, grid: tuple[int, int]) -> torch.Tensor:
    """CLIP's position embedding for a grid; as it is when the number of patches is native, see `PromptTable`."""
    weight = vision_model.embeddings.position_embedding.weight[None]
    if grid[0] * grid[1] == weight.shape[1] - 1:
        return weight
    return clip_position_embedding(vision_model, grid)


def severed_clip_tokens(
    vision_model: CLIPVisionModel,
    prompts: VisualPrompts,
    config: DeOPConfig,
    pixel_values: torch.Tensor,
    masks: torch.Tensor | None,
    kinds: list[str] | None = None,
) -> tuple[list[torch.Tensor], tuple[int, int], int]:
    """Tokens before each block and after the last one, the patch grid, and how many tokens stand before the patches.

    Args:
        pixel_values: `[B, 3, H, W]`.
        masks: mask probabilities `[B, N, h, w]` on the patch grid, for the kinds of severance that need them.
        kinds: what each block does; None: as the config says.
    """
    embeddings = vision_model.embeddings
    patches = embeddings.patch_embedding(pixel_values)
    grid = (patches.shape[-2], patches.shape[-1])
    class_token = embeddings.class_embedding.expand(len(patches), 1, -1)
    tokens = torch.cat([class_token, patches.flatten(2).transpose(1, 2)], dim=1)
    tokens = tokens + clip_positions(vision_model, grid)
    if prompts.input_table is not None:
        tokens = tokens + prompts.input_table(grid)
    leading = 1
    if prompts.tokens is not None:
        learned = prompts.tokens.to(tokens.dtype).expand(len(tokens), -1, -1)
        tokens = torch.cat([tokens[:, :1], learned, tokens[:, 1:]], dim=1)
        leading += learned.shape[1]
    per_token = None if masks is None else token_masks(masks, leading)
    states = [vision_model.pre_layrnorm(tokens)]
    kinds = config.severance_of_blocks() if kinds is None else kinds
    for index, (layer, kind) in enumerate(zip(vision_model.encoder.layers, kinds, strict=True)):
        hidden = states[-1]
        if str(index) in prompts.block_tables:
            hidden = hidden + prompts.block_tables[str(index)](grid)
        scale = config.severance_residual_scale if kind != "none" else 1.0
        states.append(severed_block(layer, hidden, kind, per_token, config.severance_alpha, scale))
    return states, grid, leading


class SeveredClipMixin:
    """The part of the model that gives CLIP's map of patches."""

    config: DeOPConfig
    clip: CLIPModel
    visual_prompts: VisualPrompts

    def _on_grid(self, masks: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """`[B, N, h, w]` on CLIP's grid: as released, bilinear samples; for other masks the share of each patch, since
        samples would miss small ones."""
        if self.config.proposals == "maskformer":
            return interpolate(masks.float(), size=tuple(grid), mode="bilinear", align_corners=False).to(masks.dtype)
        return interpolate(masks.float(), size=tuple(grid), mode="area").to(masks.dtype)

    def clip_map(self, pixel_values: torch.Tensor, mask_logits: torch.Tensor | None) -> torch.Tensor:
        """CLIP's L2-normalised feature of each patch, `[B, D, gh, gw]`; see `patch_features`."""
        return normalize(self.patch_features(pixel_values, mask_logits), dim=1)

    def patch_features(
        self, pixel_values: torch.Tensor, mask_logits: torch.Tensor | None, kinds: list[str] | None = None
    ) -> torch.Tensor:
        """CLIP's projected feature of each patch, `[B, D, gh, gw]`.

        Args:
            mask_logits: `[B, N, h, w]` of the proposals, at any resolution; None: there are none.
            kinds: what each of CLIP's blocks does; None: as the config says.
        """
        vision = self.clip.vision_model
        masks = None
        if mask_logits is not None:
            patch_size = vision.config.patch_size
            grid = (pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size)
            # severance resizes logits, pooling probabilities (so the original); binary masks are shares either way
            if self.config.proposals == "maskformer":
                masks = self._on_grid(mask_logits, grid).sigmoid()
            else:
                masks = self._on_grid(mask_logits.sigmoid(), grid)
        states, grid, leading = severed_clip_tokens(
            vision, self.visual_prompts, self.config, pixel_values, masks, kinds
        )
        patches = self.clip.visual_projection(vision.post_layernorm(states[-1][:, leading:]))
        return patches.transpose(1, 2).unflatten(2, grid)
