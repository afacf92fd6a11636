"""Image processor of DeOP."""

from __future__ import annotations

from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ...image_processing import OpenVocabularySegmentationImageProcessor


class DeOPImageProcessor(OpenVocabularySegmentationImageProcessor):
    """Short side to 512, long side at most 2560, MaskFormer's normalisation, padded to multiples of 32.

    CLIP sees the same values: the released weights were trained so.
    """

    size = {"shortest_edge": 512, "longest_edge": 2560}
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    pad_multiple = 32
    resizes_mask_logits = False


__all__ = ["DeOPImageProcessor"]
