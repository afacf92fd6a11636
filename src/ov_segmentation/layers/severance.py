"""Patch severance: CLIP blocks in which patches no longer exchange information, so that each keeps its own meaning.

Source: Han et al., "Open-Vocabulary Semantic Segmentation with Decoupled One-Pass Network" (DeOP, 2023), section 3.2:
general patch severance (GPS, equation 2) and mask-guided patch severance (MPS). What the released weights were trained
with is neither: each token's own value is multiplied by the sum of its mask probabilities ("mask_gain").
"""

from __future__ import annotations

import torch
from torch import nn

from .clip_vision import attend_to, run_block


def token_masks(masks: torch.Tensor, num_leading: int) -> torch.Tensor:
    """Mask probabilities `[B, N, h, w]` on the patch grid as `[B, N, T]` per token; leading tokens are in all masks."""
    patches = masks.flatten(2)
    return torch.cat([patches.new_ones(*patches.shape[:2], num_leading), patches], dim=-1)


def severed_values(values: torch.Tensor, mode: str, masks: torch.Tensor | None) -> torch.Tensor:
    """What takes the place of attention's output, before the output projection: `[B, T, C]`.

    Args:
        values: `[B, T, C]`, the value projection of each token.
        mode: "identity": each token keeps its own value; "mask_gain": multiplied by the sum of its mask probabilities;
            "mask_guided": attention whose weights are softmax(A^T A), A the token masks.
        masks: `[B, N, T]` from `token_masks`; unused by "identity".
    """
    if mode == "identity":
        return values
    if masks is None:
        raise ValueError(f"Severance {mode!r} needs proposals: choose 'identity' where there are none.")
    if mode == "mask_gain":
        return masks.sum(dim=1)[..., None] * values
    return (masks.transpose(1, 2) @ masks).softmax(dim=-1) @ values


def severed_block(
    layer: nn.Module,
    tokens: torch.Tensor,
    mode: str,
    masks: torch.Tensor | None = None,
    alpha: float = 1.0,
    residual_scale: float = 1.0,
) -> torch.Tensor:
    """A `CLIPEncoderLayer` with severed attention: `[B, T, C]` -> `[B, T, C]`.

    Args:
        mode, masks: see `severed_values`; "none" is the ordinary block.
        alpha: share of the severed values; the rest is ordinary attention (equation 2).
        residual_scale: factor on the residual of the attention half.
    """
    if mode == "none" and residual_scale == 1.0:
        return run_block(layer, tokens)
    attention, normed = layer.self_attn, layer.layer_norm1(tokens)
    mixed = 0.0
    if mode != "none" and alpha > 0:
        severed = severed_values(attention.v_proj(normed), mode, masks)
        mixed = alpha * attention.out_proj(severed)
    if mode == "none" or alpha < 1:
        attended, _ = attend_to(attention, normed, normed, None)
        mixed = mixed + (1.0 if mode == "none" else 1 - alpha) * attended
    hidden = residual_scale * tokens + mixed
    return hidden + layer.mlp(layer.layer_norm2(hidden))
