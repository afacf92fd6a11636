"""The exported folder: model and processor as `pipeline` and `from_pretrained` load them, and where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .checkpointing import atomic_folder
from .recipe import Recipe, recipe_hash


def export_model(
    folder: Path,
    model: Any,
    weights: dict[str, torch.Tensor],
    processor: Any,
    recipe: Recipe,
    provenance: dict[str, Any],
) -> None:
    """Write model and processor, atomically.

    Every safetensors file carries metadata: the recipe's hash and seed, and `provenance` (command, steps, figures).

    Args:
        folder: replaced if it exists.
        model: the model, for its configuration.
        weights: its state dict, gathered from all processes.
        processor: the model's.
        recipe: the run's; `export.dtype` is the type of the written floating-point weights.
        provenance: name -> plain value.
    """
    dtype = getattr(torch, recipe.export.dtype)
    converted = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
    metadata = {"recipe_hash": recipe_hash(recipe), "seed": str(recipe.seed)}
    metadata |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in provenance.items()}

    def write(partial: Path) -> None:
        before = model.config.dtype
        model.save_pretrained(partial, state_dict=converted)
        # save_pretrained notes the type the model has, not that of the weights it is given
        model.config.dtype = dtype
        model.config.save_pretrained(partial)
        model.config.dtype = before
        processor.save_pretrained(partial)
        for file in partial.glob("*.safetensors"):
            _add_metadata(file, metadata)

    atomic_folder(folder, write)


def _add_metadata(file: Path, metadata: dict[str, str]) -> None:
    with safe_open(file, framework="pt") as opened:
        present = opened.metadata() or {}
    save_file(load_file(file), file, metadata={**present, **metadata})
