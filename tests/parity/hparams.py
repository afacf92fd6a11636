"""From a fixture's `hparams.json` to our configuration and image processor."""

from __future__ import annotations

import importlib
from typing import Any


def build(method: str, hparams: dict[str, Any]) -> tuple[Any, Any]:
    """`(config, image_processor)` for the fixtures of `method`; each method has its `hparams_<method>.py`."""
    return importlib.import_module(f"tests.parity.hparams_{method}").build(hparams)


def bare_names(hparams: dict[str, Any]) -> dict[str, Any]:
    """The same without the explanations in brackets: "no_object_weight [X]" and "seed (of torch)" lose them."""
    return {
        key.split(" [")[0].split(" (")[0].split(",")[0]: bare_names(value) if isinstance(value, dict) else value
        for key, value in hparams.items()
    }
