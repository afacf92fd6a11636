"""Model and processor of one checkpoint, as the pipeline and the commands need them: a plain CLIP is one too."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoProcessor

from .auto import AutoModelForOpenVocabularySegmentation
from .processing_base import OpenVocabularySegmentationProcessor


def load_model_and_processor(source: str | os.PathLike, **arguments: Any) -> tuple[Any, Any]:
    """The model, in evaluation mode, and the processor that goes with it.

    Args:
        source: folder or Hub id of a checkpoint of ours, or of a plain CLIP, with which DeOP segments without training.
        arguments: of the model's `from_pretrained`.

    Raises:
        LoadingError: what cannot be found or downloaded.
        TypeError: no processor that makes texts of class names.
    """
    model = AutoModelForOpenVocabularySegmentation.from_pretrained(source, **arguments).eval()
    return model, processor_for(model, AutoProcessor.from_pretrained(source))


def processor_for(model: Any, processor: Any) -> OpenVocabularySegmentationProcessor:
    """`processor`, or, where it is a plain CLIP's own, the one with which `model` segments.

    Raises:
        TypeError: it is no processor of ours, nor is there one for it.
    """
    from transformers import CLIPProcessor

    if isinstance(processor, CLIPProcessor) and hasattr(model, "processor_for_clip"):
        processor = model.processor_for_clip(processor) or processor
    if not isinstance(processor, OpenVocabularySegmentationProcessor):
        raise TypeError(
            f"{type(model).__name__} needs a processor with a tokenizer, got {type(processor).__name__}: the one saved "
            f"with the model, or <Method>Processor(image_processor, tokenizer) where that has none. The pipeline takes "
            f"it as processor=."
        )
    return processor
