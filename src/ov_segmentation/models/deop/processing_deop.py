"""Processor of DeOP."""

from __future__ import annotations

from ...processing_base import OpenVocabularySegmentationProcessor


class DeOPProcessor(OpenVocabularySegmentationProcessor):
    """DeOP's image processor and CLIP's tokenizer; bare names, whole: the model adds its learned context."""

    default_templates = "{}"
    comma_rule = "keep"


__all__ = ["DeOPProcessor"]
