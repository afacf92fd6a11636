"""Image processor of OVSeg."""

from __future__ import annotations

from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ...image_processing import OpenVocabularySegmentationImageProcessor


class OVSegImageProcessor(OpenVocabularySegmentationImageProcessor):
    """Short side to 640, long side at most 2560, MaskFormer's normalisation, zero-padded to multiples of 32.

    The model turns the values into CLIP's normalisation for the crops.
    """

    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    pad_multiple = 32
    resizes_mask_logits = False


__all__ = ["OVSegImageProcessor"]
