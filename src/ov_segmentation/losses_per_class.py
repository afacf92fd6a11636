"""The loss of the per-class family (SED, CAT-Seg, ESC-Net): binary cross entropy of every class at every pixel."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .losses import mean_of_step
from .modeling_outputs import OpenVocabularySegmentationOutput

# larger than this, resized logits are made for some classes at a time, and again in the backward pass
ELEMENTS_AT_ONCE = 2**24


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
        a scalar, normalised over the pixels of the whole optimizer step.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    for picture, label_map, (height, width) in zip(logits, labels, sizes.tolist(), strict=True):
        wanted = label_map[:height, :width]
        at_once = max(1, ELEMENTS_AT_ONCE // wanted.numel())
        if at_once >= len(picture):
            total = total + _summed_cross_entropy(picture, wanted, 0, ignore_as_negative)
        else:
            for first in range(0, len(picture), at_once):
                some = picture[first : first + at_once]
                total = total + checkpoint(
                    _summed_cross_entropy, some, wanted, first, ignore_as_negative, use_reentrant=False
                )

    def count(labels: torch.Tensor, reshaped_input_sizes: torch.Tensor) -> torch.Tensor:
        sizes = reshaped_input_sizes.tolist()
        maps = (label_map[:height, :width] for label_map, (height, width) in zip(labels, sizes, strict=True))
        return sum(((label_map >= 0) | ignore_as_negative).sum() for label_map in maps) * logits.shape[1]

    return total / mean_of_step(count, least_sum=1, labels=labels, reshaped_input_sizes=sizes)


def add_per_class_loss(
    outputs: OpenVocabularySegmentationOutput, labels: torch.Tensor, sizes: torch.Tensor, ignore_as_negative: bool
) -> None:
    """Set `loss` and `loss_dict` of outputs to the `per_class_cross_entropy` of their logits."""
    outputs.loss = per_class_cross_entropy(outputs.logits, labels, sizes, ignore_as_negative)
    outputs.loss_dict = {"loss_sem_seg": outputs.loss}


def _summed_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, first: int, ignore_as_negative: bool
) -> torch.Tensor:
    """Sum over classes and pixels for one picture: `logits` `[k, h, w]` of the classes from `first` on."""
    resized = F.interpolate(logits[None].float(), labels.shape, mode="bilinear", align_corners=False)[0]
    # -log(1 - p) everywhere, and where the class is there -log p in its place: the difference is the logit itself
    negatives = F.softplus(resized)
    total = negatives.sum() if ignore_as_negative else (negatives * (labels >= 0)).sum()
    places = labels - first
    here = (places >= 0) & (places < len(logits))
    of_label = resized.gather(0, places.clamp(0, len(logits) - 1)[None])[0]
    return total - (of_label * here).sum()
