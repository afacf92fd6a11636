"""What all configurations share."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from .strict_mapping import known_names

LEGACY_EOS_TOKEN_ID = 2


class OpenVocabularySegmentationConfig(PreTrainedConfig):
    """Base of all six configurations.

    Args:
        clip_stem: None, or the configuration (a dict) of the convolutional trunk that takes the place of CLIP's patch
            embedding. Only for models trained from nothing; Hub weights need None.
        weights_license: licence of the weights as an SPDX id or a Hub licence name ("mit", "cc-by-nc-4.0"), shown when
            a checkpoint is loaded. None: not stated.
        sliding_window: whether the picture is cut into overlapping views by default.
    """

    # what transformers' Trainer does not gather: no tensors, or without a row for each picture
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "loss_dict",
        "mask_threshold",
        "score_function",
        "text_embeds",
        "view_boxes",
        "canvas_size",
        "maps",
    ]

    clip_stem: dict[str, Any] | None = None
    weights_license: str | None = None
    sliding_window: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # `strict` checks no field whose type is a string, as all are under `from __future__ import annotations`
        types = inspect.get_annotations(cls, eval_str=True)
        for field in fields(cls):
            field.type = types.get(field.name, field.type)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        clip_config = getattr(self, "clip_config", None)
        if clip_config is not None:
            repair_legacy_token_ids(clip_config.text_config)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """transformers' `from_dict`, which sets `kwargs` on a configuration that has been checked without them."""
        found = super().from_dict(config_dict, **kwargs)
        (found[0] if isinstance(found, tuple) else found).validate()
        return found

    def validate_windows(self) -> None:
        """Check the geometry of the sliding window (called by `strict` on construction)."""
        # SED's canvas need not be a square
        name = "canvas_size" if hasattr(self, "canvas_size") else "canvas_pixels"
        canvas = getattr(self, name)
        sides = (canvas, canvas) if isinstance(canvas, int) else canvas
        if len(sides) != 2 or not 0 < self.window_stride <= self.window_pixels <= min(sides):
            raise ValueError(
                f"Windows need 0 < window_stride <= window_pixels <= {name}, got {self.window_stride}, "
                f"{self.window_pixels}, {canvas}."
            )


def configurations(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and those of its parts, at any depth."""
    yield config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from configurations(part)


def check_fields(config_class: type[PreTrainedConfig], values: Mapping[str, Any], where: str = "") -> None:
    """Check that a configuration class, and those nested in it, have fields of the names given.

    The classes themselves keep what they do not know, unread: files of other versions have to load.

    Args:
        config_class: the class.
        values: field -> value; the fields of a nested configuration may be a mapping too.
        where: dotted path of `values`, for the message.

    Raises:
        ValueError: an unknown field, with the closest known one.
    """
    # an instance also has what saved configurations hold beside the fields
    default = config_class()
    for name, value in values.items():
        if not hasattr(default, name) and name != "attn_implementation":
            known = [field.name for field in fields(config_class)]
            raise ValueError(f"Unknown configuration field {where + name!r}. {known_names(name, known)}")
        spec = config_class.sub_configs_defaults.get(name)
        if spec is not None and isinstance(value, Mapping):
            nested = spec.config_class
            if nested is AutoConfig:
                nested = spec.get_config_class(value.get("model_type", spec.model_type))
            check_fields(nested, value, f"{where}{name}.")


def check_positive(**limits: int | None) -> None:
    """Check numbers of classes or pictures at a time, given by name.

    Raises:
        ValueError: one is neither positive nor None (no limit).
    """
    for name, value in limits.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, or None for no limit; got {value}.")


def repair_legacy_token_ids(text_config: PreTrainedConfig) -> None:
    """Give a CLIP text config its true start and end ids.

    OpenAI's checkpoints on the Hub carry `eos_token_id=2`, a historical error that transformers works around by taking
    the highest id; CLIP's vocabulary ends with the start and the end token.
    """
    if text_config.eos_token_id == LEGACY_EOS_TOKEN_ID:
        text_config.eos_token_id = text_config.vocab_size - 1
        text_config.bos_token_id = text_config.vocab_size - 2
