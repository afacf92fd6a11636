"""Processor of ESC-Net."""

from __future__ import annotations

from ...processing_base import OpenVocabularySegmentationProcessor


class ESCNetProcessor(OpenVocabularySegmentationProcessor):
    """One template, "A photo of a {} in the scene"; of a name with commas, only the part before the first counts."""

    default_templates = "single_1"
    comma_rule = "first"
