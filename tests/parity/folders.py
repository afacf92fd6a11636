"""Where fixtures lie: `<root>/<method>/<case>`, the root from PARITY_FIXTURES or what the tests ship."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

SHIPPED = Path(__file__).resolve().parents[1] / "fixtures"


class Case(NamedTuple):
    """One fixture folder, read."""

    folder: Path
    hparams: dict[str, Any]
    inputs: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]


def case_folders(method: str) -> list[Path]:
    """The folders of a method that hold a checkpoint and its outputs."""
    root = Path(os.environ.get("PARITY_FIXTURES", SHIPPED))
    return sorted(path.parent for path in root.glob(f"{method}/*/outputs.safetensors"))


def read_case(folder: Path) -> Case:
    """Hyperparameters, inputs and recorded tensors of a folder."""
    hparams = json.loads((folder / "hparams.json").read_text(encoding="utf-8"))
    return Case(folder, hparams, load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors"))
