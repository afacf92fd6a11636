"""Configurations: every field's type is checked."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import PreTrainedConfig

from ov_segmentation.auto import METHODS, Method, load_class
from ov_segmentation.layers.clip_stem import CLIPStemConfig
from ov_segmentation.layers.configuration_maskformer import MaskProposalConfig, ResNetCConfig
from ov_segmentation.layers.convnext_clip import ConvNextCLIPConfig

CLASSES = [load_class(method.config) for method in METHODS]
CLASSES += [CLIPStemConfig, ConvNextCLIPConfig, MaskProposalConfig, ResNetCConfig]


@pytest.mark.parametrize("config_class", CLASSES)
def test_every_field_has_a_type_that_is_checked(config_class: type) -> None:
    """`strict` passes over types that are strings, as they are under `from __future__ import annotations`."""
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = [field for field in dataclasses.fields(config_class) if field.name not in inherited]
    assert own
    assert [field.name for field in own if isinstance(field.type, str)] == []
    assert "__validators__" in vars(config_class), "decorate it with @strict"


def test_layer_configurations_refuse_wrong_types() -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match="num_groups"):
        CLIPStemConfig(num_groups="eight")


@pytest.mark.parametrize("config_class", CLASSES)
def test_documents_its_fields(config_class: type) -> None:
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)} | {"initializer_range"}
    documentation = "".join(inspect.getdoc(c) or "" for c in config_class.__mro__ if c.__module__.startswith("ov_seg"))
    own = [field.name for field in dataclasses.fields(config_class) if field.name not in inherited]
    assert [name for name in own if name not in documentation] == []


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.model_type)
@pytest.mark.parametrize(
    "windows",
    [
        {"window_stride": 0},
        {"window_stride": -4},
        {"window_stride": 9999},
        {"window_pixels": 0},
        {"window_pixels": 9999},
    ],
    ids=str,
)
def test_windows_that_do_not_fit_are_refused(method: Method, windows: dict[str, int]) -> None:
    config_class = load_class(method.config)
    with pytest.raises(StrictDataclassClassValidationError, match="0 < window_stride <= window_pixels <= canvas"):
        config_class(**windows)
    with pytest.raises(StrictDataclassClassValidationError):  # as from_pretrained sets what it is given
        config_class.from_dict(config_class().to_dict(), **windows)


def test_a_canvas_has_two_sides() -> None:
    with pytest.raises(StrictDataclassClassValidationError, match="canvas_size"):
        load_class("SEDConfig")(canvas_size=(1280,))
