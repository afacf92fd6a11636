"""What the parity tests share: finding fixtures, and comparing every recorded tensor or excusing it with a reason.

Fixtures are laid out as <folder>/<method>/<case>/; the folder is the environment variable PARITY_FIXTURES, or what
`tests/fixtures` ships. A method subclasses `Case`, whose functions recompute recorded tensors from recorded inputs.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from .hparams import build

SHIPPED = Path(__file__).parent.parent / "fixtures"


def case_folders(method: str, prefix: str = "") -> list[Path]:
    """The fixture folders of a method whose names begin with `prefix`; empty where there are none."""
    root = Path(os.environ.get("PARITY_FIXTURES") or SHIPPED)
    return sorted(path.parent for path in (root / method).glob(f"{prefix}*/outputs.safetensors"))


def each_case(method: str, prefix: str = "") -> pytest.MarkDecorator:
    """Parametrizes a test with `folder`, for each case of a method."""
    folders = case_folders(method, prefix)
    return pytest.mark.parametrize("folder", folders, ids=[folder.name for folder in folders])


def each_recorded_tensor(method: str, prefix: str = "") -> pytest.MarkDecorator:
    """Parametrizes a test with `folder` and `name`, for each tensor in `outputs.safetensors` of each case."""
    pairs = []
    for folder in case_folders(method, prefix):
        with safe_open(folder / "outputs.safetensors", "pt") as file:
            pairs += [pytest.param(folder, name, id=f"{folder.name}-{name}") for name in sorted(file.keys())]
    return pytest.mark.parametrize(("folder", "name"), pairs)


class Case:
    """One fixture: its numbers, and our converted model.

    Attributes:
        hparams, inputs, expected: what the files hold.
        config, image_processor: what `hparams` build.
    """

    def __init__(self, method: str, folder: Path) -> None:
        self.folder = folder
        self.hparams = json.loads((folder / "hparams.json").read_text())
        self.inputs = load_file(folder / "inputs.safetensors")
        self.expected = load_file(folder / "outputs.safetensors")
        self.config, self.image_processor = build(method, self.hparams)

    @property
    def checkpoint(self) -> Path:
        """The original's checkpoint file."""
        return self.folder / "original.pth"

    @classmethod
    @functools.cache
    def load(cls, folder: Path) -> Any:
        """The case of a folder, made once."""
        return cls(folder)


class Comparison(NamedTuple):
    """How tensors are recomputed and compared.

    Args:
        pattern: a regular expression for whole names of recorded tensors.
        compute: (case, match of the pattern) -> our tensor.
        tolerance: of the largest difference; relative to the recorded tensor's norm where `relative`.
    """

    pattern: str
    compute: Callable[[Any, re.Match], torch.Tensor]
    tolerance: float
    relative: bool = False


def check_recorded(case: Case, name: str, comparisons: list[Comparison], excused: dict[str, str]) -> None:
    """Compare the recorded tensor `name`; a name that is neither compared nor excused fails."""
    for comparison in comparisons:
        match = re.fullmatch(comparison.pattern, name)
        if match:
            found = comparison.compute(case, match)
            assert_close(found, case.expected[name], comparison.tolerance, comparison.relative)
            return
    assert any(re.fullmatch(pattern, name) for pattern in excused), f"no comparison and no excuse for {name}"


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float, relative: bool = False) -> None:
    """Equal shape, and no difference above the tolerance (relative: norm of the difference over the norm)."""
    assert found.shape == expected.shape, f"shape {list(found.shape)}, recorded {list(expected.shape)}"
    difference = found.detach().double() - expected.double()
    if relative:
        limit = max(tolerance * expected.double().norm().item(), 1e-6 if expected.numel() == 1 else 0)
        worst = difference.norm().item()
    else:
        limit, worst = tolerance, difference.abs().max().item() if difference.numel() else 0.0
    assert worst <= limit, f"off by {worst:.2e}, allowed {limit:.2e}"
