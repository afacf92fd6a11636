"""Image processor of ESC-Net."""

from __future__ import annotations

from ...image_processing import OpenVocabularySegmentationImageProcessor


class ESCNetImageProcessor(OpenVocabularySegmentationImageProcessor):
    """Short side 640, long side at most 2560, CLIP's mean and deviation; the model makes its squares itself."""
