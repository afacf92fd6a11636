"""SAM's mask decoder for many points of one picture.

The modules are transformers' own. A mask whose predicted IoU is too low is not computed, and the picture's map, which
all points share in the first block, is not repeated for each.

Source: Kirillov et al., "Segment Anything" (2023), appendix A.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from . import products
from .pieces import items_at_once
from .two_way_attention import final_attention, two_way_block

if TYPE_CHECKING:
    from transformers import SamModel


class PointDecoder:
    """Masks of points.

    Args:
        sam: the model.
        embeddings: `[1, C, h, w]`, its embeddings of the picture.
    """

    def __init__(self, sam: SamModel, embeddings: torch.Tensor) -> None:
        self.sam, self.decoder = sam, sam.mask_decoder
        self.grid = embeddings.shape[-2:]
        # of points alone, the dense prompt is that of no mask
        self.maps = _as_rows(embeddings).contiguous() + sam.prompt_encoder.no_mask_embed.weight
        self.positions = _as_rows(sam.get_image_wide_positional_embeddings())[0]

    def points_at_once(self, most: int) -> int:
        """How many points to decode in one call: `most`, on a CPU without gradients fewer if they would not stay in
        its caches."""
        return min(most, items_at_once(self.maps, self.maps.numel()) or most)

    def __call__(self, points: torch.Tensor, least_score: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The masks of `points` `[P, 2]` (x, y) whose predicted IoU is above `least_score`, of three per point.

        Returns:
            Logits `[n, 4h, 4w]` and predicted IoUs `[n]`, float32, in the order of the points.
        """
        tokens, maps = self._attend(points)
        scores = self.decoder.iou_prediction_head(tokens[:, 0])[:, 1:].float()
        good = scores > least_score
        some = good.any(dim=1)
        kernels = [mlp(tokens[some, 1 + i]) for i, mlp in enumerate(self.decoder.output_hypernetworks_mlps) if i]
        logits = self._masks(maps[some], torch.stack(kernels, dim=1))
        return logits[good[some]].float(), scores[good]

    def _attend(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[P, T, C]` (of the score, four of masks, then the prompt's) and maps `[P, h * w, C]`."""
        decoder, transformer = self.decoder, self.decoder.transformer
        labels = torch.ones(1, len(points), 1, dtype=torch.long, device=points.device)
        prompts, _ = self.sam.prompt_encoder(points[None, :, None], labels, None, None)
        outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        positions = torch.cat([outputs.expand(len(points), -1, -1), prompts[0].to(outputs.dtype)], dim=1)
        tokens, maps = positions, self.maps
        for block in transformer.layers:
            tokens, maps = two_way_block(block, tokens, maps, positions, self.positions)
        read = final_attention(transformer.final_attn_token_to_image, tokens, maps, positions, self.positions)
        return transformer.layer_norm_final_attn(tokens + read), maps

    def _masks(self, maps: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """Logits `[P, M, 4h, 4w]` of maps `[P, h * w, C]` and kernels `[P, M, C / 8]`."""
        decoder = self.decoder
        first = _doubled(decoder.upscale_conv1, maps)
        norm = decoder.upscale_layer_norm
        first = decoder.activation(F.layer_norm(first, norm.normalized_shape, norm.weight, norm.bias, norm.eps))
        second = decoder.activation(_doubled(decoder.upscale_conv2, first))
        logits = kernels @ second.flatten(1, 3).transpose(1, 2)
        # the four pixels of a pixel's four pixels stand behind each other
        parts = logits.unflatten(2, (*self.grid, 2, 2, 2, 2)).permute(0, 1, 2, 4, 6, 3, 5, 7)
        return parts.flatten(5).flatten(2, 4)


def _as_rows(maps: torch.Tensor) -> torch.Tensor:
    """`[B, C, h, w]` -> `[B, h * w, C]`."""
    return maps.flatten(2).transpose(1, 2)


def _doubled(convolution: nn.ConvTranspose2d, pixels: torch.Tensor) -> torch.Tensor:
    """A transposed convolution of 2 x 2 with stride 2 as a product: `[..., I]` -> `[..., 4, O]`, the last but one axis
    the four pixels (row by row) that a pixel becomes."""
    weight = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2)
    return products.linear(pixels, weight, convolution.bias.repeat(4)).unflatten(-1, (4, -1))
