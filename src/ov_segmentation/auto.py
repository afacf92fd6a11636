"""The auto class, and the one table that says which classes belong to a method.

Registration imports configurations and processors, which are light; models are found by name when they are asked for.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections import OrderedDict
from typing import Any, NamedTuple

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor
from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from .download_errors import loading_explained


class Method(NamedTuple):
    """A segmentation method: its display name is the prefix of its class names."""

    model_type: str
    name: str

    @property
    def config(self) -> str:
        """Name of the configuration class."""
        return f"{self.name}Config"

    @property
    def model(self) -> str:
        """Name of the model class."""
        return f"{self.name}ForOpenVocabularySegmentation"

    @property
    def image_processor(self) -> str:
        """Name of the image processor class."""
        return f"{self.name}ImageProcessor"

    @property
    def processor(self) -> str:
        """Name of the processor class."""
        return f"{self.name}Processor"

    @property
    def modules(self) -> dict[str, str]:
        """Class name -> module of this package that defines it."""
        folder = f"ov_segmentation.models.{self.model_type}"
        return {
            self.config: f"{folder}.configuration_{self.model_type}",
            self.model: f"{folder}.modeling_{self.model_type}",
            self.image_processor: f"{folder}.image_processing_{self.model_type}",
            self.processor: f"{folder}.processing_{self.model_type}",
        }


METHODS = (
    Method("san", "SAN"),
    Method("sed", "SED"),
    Method("ovseg", "OVSeg"),
    Method("deop", "DeOP"),
    Method("cat_seg", "CATSeg"),
    Method("esc_net", "ESCNet"),
)
CLASS_MODULES = {name: module for method in METHODS for name, module in method.modules.items()}


def load_class(name: str) -> Any:
    """A method's public class by name, its module imported on first use."""
    return getattr(importlib.import_module(CLASS_MODULES[name]), name)


class _LazyClass:
    """Stands for a class in transformers' own mappings; the module is imported when an attribute is asked for."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(load_class(self.__name__), attribute)


class _ByConfig(_LazyAutoMapping):
    """Configuration class -> model class, for our methods and plain CLIPs."""

    def _load_attr_from_module(self, model_type: str, attr: str) -> Any:
        return load_class(attr) if attr in CLASS_MODULES else getattr(transformers, attr)


# a plain CLIP is segmented with by DeOP's severance, which needs no training
MODEL_FOR_OPEN_VOCABULARY_SEGMENTATION_MAPPING = _ByConfig(
    OrderedDict([*((method.model_type, method.config) for method in METHODS), ("clip", "CLIPConfig")]),
    OrderedDict(
        [*((method.model_type, method.model) for method in METHODS), ("clip", "DeOPForOpenVocabularySegmentation")]
    ),
)


class AutoModelForOpenVocabularySegmentation(_BaseAutoModelClass):
    """Picks the model class of a checkpoint or configuration: `from_pretrained(path)`, `from_config(config)`.

    A plain CLIP (`model_type` "clip") is loaded as a DeOP without training, with a warning that says so.
    """

    _model_mapping = MODEL_FOR_OPEN_VOCABULARY_SEGMENTATION_MAPPING

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """transformers' `from_pretrained`; what cannot be found or downloaded is a `LoadingError` that says why."""
        with loading_explained(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


def register() -> None:
    """Make `AutoConfig`, `AutoModel`, `AutoProcessor` and `AutoImageProcessor` know our methods."""
    for method in METHODS:
        native = CONFIG_MAPPING_NAMES.get(method.model_type)
        if native is not None:
            warnings.warn(
                f"transformers now has a model type {method.model_type!r} ({native}) of its own; while ov_segmentation "
                f"is imported, {method.model_type!r} means ov_segmentation's {method.name}.",
                stacklevel=3,
            )
        config_class = load_class(method.config)
        AutoConfig.register(method.model_type, config_class, exist_ok=True)
        # model code is not imported before a model is asked for, hence no AutoModel.register
        MODEL_MAPPING.register(config_class, _LazyClass(method.model), exist_ok=True)
        AutoProcessor.register(config_class, load_class(method.processor), exist_ok=True)
        # one class for both backends: the same numbers whether torchvision is installed or not
        backends = dict.fromkeys(("pil", "torchvision"), load_class(method.image_processor))
        AutoImageProcessor.register(config_class, image_processor_classes=backends, exist_ok=True)
