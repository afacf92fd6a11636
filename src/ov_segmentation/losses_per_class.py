"""The loss of the per-class family (SED, CAT-Seg, ESC-Net): binary cross entropy of every class at every pixel."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .losses import global_mean_of_processes


def per_class_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, sizes: torch.Tensor, ignore_as_negative: bool
) -> torch.Tensor:
    """Mean binary cross entropy over classes and pixels, the logits resized to the pictures (bilinear).

    Args:
        logits: `[B, K, h, w]`; each map covers its whole picture, without padding.
        labels: `[B, H, W]` int64, negative = ignored.
        sizes: `[B, 2]`, height and width of each picture inside `labels`.
        ignore_as_negative: an ignored pixel is a negative of every class, as in the originals; False leaves it out.

    Returns:
        a scalar, normalised over the pixels of all processes.
    """
    total, pixels = logits.new_zeros((), dtype=torch.float32), 0
    for picture, label_map, (height, width) in zip(logits, labels, sizes.tolist(), strict=True):
        wanted = label_map[:height, :width]
        resized = F.interpolate(picture[None].float(), (height, width), mode="bilinear", align_corners=False)[0]
        known = wanted >= 0
        # -log(1 - p) everywhere, and where the class is there -log p in its place: the difference is the logit itself
        negatives = F.softplus(resized)
        total = total + (negatives.sum() if ignore_as_negative else (negatives * known).sum())
        total = total - (resized.gather(0, wanted.clamp(min=0)[None])[0] * known).sum()
        pixels = pixels + (known.numel() if ignore_as_negative else known.sum())
    count = torch.as_tensor(pixels * logits.shape[1], device=logits.device, dtype=torch.float32)
    return total / global_mean_of_processes(count).clamp(min=1)
