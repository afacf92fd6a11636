"""What the models say to arguments that are no tensors."""

from __future__ import annotations

from typing import Any

import torch


def check_tensors(**given: Any) -> None:
    """A TypeError for what is not a tensor: a processor gives lists unless it is told otherwise."""
    for name, value in given.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f'{name} must be a tensor, got {type(value).__name__}: pass return_tensors="pt" to the processor.'
            )
