"""Untrained models around a trained CLIP, for the methods that hold a `CLIPModel`."""

from __future__ import annotations

import os
from typing import Any

from transformers import CLIPConfig, CLIPModel

from .configuration_base import OpenVocabularySegmentationConfig, check_fields
from .layers.clip_stem import install_clip_stem, load_clip, split_clip_config
from .layers.quick_gelu import replace_quick_gelu
from .layers.sub_models import build_sub_model


class FromCLIPMixin:
    """`build_clip` for constructors, `from_clip` for users; part of the models' base class."""

    @staticmethod
    def build_clip(config: OpenVocabularySegmentationConfig) -> CLIPModel:
        """A `CLIPModel` by `config.clip_config`, with the convolutional trunk of `config.clip_stem` if there is one."""
        clip = build_sub_model(CLIPModel, config.clip_config)
        install_clip_stem(clip, config.clip_stem)
        replace_quick_gelu(clip)
        return clip

    @classmethod
    def config_for_clip(cls, clip_config: CLIPConfig) -> dict[str, Any]:
        """Configuration values that follow from CLIP's size when the caller of `from_clip` does not give them."""
        return {}

    @classmethod
    def from_clip(cls, clip: str | os.PathLike | CLIPModel, **config: Any) -> Any:
        """An untrained model around a trained CLIP: what training starts from. For methods that hold a `CLIPModel`.

        Args:
            clip: a Hub id or folder of a `CLIPModel`, or the model itself.
            config: values for the method's configuration.

        Returns:
            The model in float32, frozen as the method trains it.

        Raises:
            ValueError: a value for a field that the configuration does not have.
        """
        check_fields(cls.config_class, config)
        if not isinstance(clip, CLIPModel):
            clip = load_clip(clip)
        clip_config, clip_stem = split_clip_config(clip.config)
        values = {"clip_config": clip_config, "clip_stem": clip_stem, **cls.config_for_clip(clip_config), **config}
        model = cls(cls.config_class(**values))
        model.clip.load_state_dict(clip.state_dict())
        # torch's default may be another dtype
        return model.float()
