"""Processor of SED."""

from __future__ import annotations

from ...processing_base import OpenVocabularySegmentationProcessor


class SEDProcessor(OpenVocabularySegmentationProcessor):
    """SED's image processor and CLIP's tokenizer.

    Synonyms (", " in a name) go one by one into the 80 ImageNet templates, which stay apart: each is a channel of the
    cost map."""

    default_templates = "imagenet_80"
    comma_rule = "split"


__all__ = ["SEDProcessor"]
