"""What all configurations share."""

import inspect
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig

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
