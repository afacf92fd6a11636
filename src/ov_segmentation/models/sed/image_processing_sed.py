"""Image processor of SED."""

from __future__ import annotations

from ...image_processing import OpenVocabularySegmentationImageProcessor


class SEDImageProcessor(OpenVocabularySegmentationImageProcessor):
    """Short side to 640, long side at most 2560, zero-padded right and bottom to the batch's largest.

    The model makes its square input of it."""


__all__ = ["SEDImageProcessor"]
