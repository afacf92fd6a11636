"""Image processor of SAN."""

from __future__ import annotations

from ...image_processing import OpenVocabularySegmentationImageProcessor


class SANImageProcessor(OpenVocabularySegmentationImageProcessor):
    """Short side to 640, long side at most 2560, zero-padded right and bottom to multiples of 32."""

    pad_multiple = 32


__all__ = ["SANImageProcessor"]
