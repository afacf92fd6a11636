"""Processor of DeOP."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ...processing_base import OpenVocabularySegmentationProcessor

if TYPE_CHECKING:
    from transformers import CLIPProcessor

NATIVE_SIDE = 224


class DeOPProcessor(OpenVocabularySegmentationProcessor):
    """DeOP's image processor and CLIP's tokenizer; bare names, whole: the model adds its learned context."""

    default_templates = "{}"
    comma_rule = "keep"

    @classmethod
    def from_clip(cls, clip: str | os.PathLike | CLIPProcessor) -> DeOPProcessor:
        """The processor of a DeOP without training: a plain CLIP's tokenizer, mean and deviation, and 14 templates.

        Pictures get a short side of 512, or of twice CLIP's own where that is below 224.

        Args:
            clip: folder or Hub id of a CLIP, or its processor.
        """
        from transformers import AutoProcessor, CLIPProcessor

        from .image_processing_deop import DeOPImageProcessor

        processor: Any = clip if isinstance(clip, CLIPProcessor) else AutoProcessor.from_pretrained(clip)
        if not isinstance(processor, CLIPProcessor):
            raise ValueError(f"{clip} holds no CLIP: its processor is a {type(processor).__name__}.")
        theirs = processor.image_processor
        side = theirs.crop_size["height"]
        image_processor = DeOPImageProcessor(
            size={"shortest_edge": 512 if side >= NATIVE_SIDE else 2 * side, "longest_edge": 2560},
            image_mean=list(theirs.image_mean),
            image_std=list(theirs.image_std),
            pad_multiple=None,
        )
        return cls(image_processor, processor.tokenizer, "vild_14")


__all__ = ["DeOPProcessor"]
