"""Processor of SAN."""

from __future__ import annotations

from ...processing_base import OpenVocabularySegmentationProcessor


class SANProcessor(OpenVocabularySegmentationProcessor):
    """SAN's image processor and CLIP's tokenizer; names go into the 14 ViLD templates whole, commas and all."""

    default_templates = "vild_14"
    comma_rule = "keep"


__all__ = ["SANProcessor"]
