"""Processor of SED."""

from __future__ import annotations

from ...processing_base import OpenVocabularySegmentationProcessor


class SEDProcessor(OpenVocabularySegmentationProcessor):
    """SED's image processor and CLIP's tokenizer; synonyms (", " in a name) go one by one into the 80 ImageNet templates."""

    default_templates = "imagenet_80"
    comma_rule = "split"


__all__ = ["SEDProcessor"]
