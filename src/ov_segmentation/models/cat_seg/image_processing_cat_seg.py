"""Image processor of CAT-Seg."""

from __future__ import annotations

from ...image_processing import OpenVocabularySegmentationImageProcessor


class CATSegImageProcessor(OpenVocabularySegmentationImageProcessor):
    """Short side 640, long side at most 2560, CLIP's mean and deviation; the model cuts its squares itself."""
