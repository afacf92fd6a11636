"""Open-vocabulary semantic segmentation for Hugging Face Transformers.

Importing the package registers its configurations, models, processors and the pipeline task
"open-vocabulary-segmentation" with transformers. Public names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from .auto import CLASS_MODULES, AutoModelForOpenVocabularySegmentation, register
from .pipeline import OpenVocabularySegmentationPipeline, register_pipeline
from .vocabulary import Vocabulary

__version__ = "0.1.0"

_LAZY = {
    "OpenVocabularySegmentationMetric": "ov_segmentation.evaluate_metric",
    "OpenVocabularySegmentationOutput": "ov_segmentation.modeling_outputs",
    **CLASS_MODULES,
}

__all__ = [
    "AutoModelForOpenVocabularySegmentation",
    "OpenVocabularySegmentationPipeline",
    "Vocabulary",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
register_pipeline()
