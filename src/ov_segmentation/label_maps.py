"""Label maps of any integer type: reading, resizing, ignored ids."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import PIL.Image
from transformers.utils import is_torch_tensor

from .image_reading import open_picture

IGNORED = -100


def read_label_map(label_map: Any) -> np.ndarray:
    """One label map as int32 `[H, W]`, a copy.

    Args:
        label_map: a path, a PIL picture of mode 1, L, P (its palette indices are the classes), I;16 or I, or an array
            or tensor `[H, W]` of any integer type or bool.

    Raises:
        ValueError: float values, several channels, or ids that need more than 32 bits.
        TypeError: not a label map at all.
    """
    if isinstance(label_map, (str, os.PathLike, PIL.Image.Image)):
        label_map = open_picture(label_map)
        if label_map.mode not in ("1", "L", "P") and not label_map.mode.startswith("I"):
            raise ValueError(
                f"a label map has one channel of class indices (PIL modes 1, L, P, I;16, I), got mode {label_map.mode}."
            )
        try:
            label_map = np.array(label_map)
        except (OSError, SyntaxError) as error:
            raise ValueError(f"cannot decode it: {error}") from error
    elif is_torch_tensor(label_map):
        if label_map.is_floating_point():
            raise ValueError(f"class indices are integers, got {label_map.dtype}.")
        label_map = label_map.detach().cpu().numpy()
    if not isinstance(label_map, np.ndarray):
        raise TypeError(f"a label map is a path, PIL image, array or tensor, got {type(label_map).__name__}.")
    if label_map.dtype != bool and not np.issubdtype(label_map.dtype, np.integer):
        raise ValueError(f"class indices are integers, got {label_map.dtype}.")
    if label_map.ndim != 2 or 0 in label_map.shape:
        raise ValueError(f"a label map is [H, W], got shape {list(label_map.shape)}.")
    limits = np.iinfo(np.int32)
    if label_map.dtype.itemsize > 2 and (label_map.max() > limits.max or label_map.min() < limits.min):
        raise ValueError(f"class indices need more than 32 bits: {label_map.min()}..{label_map.max()}.")
    return label_map.astype(np.int32)


def resize_label_map(label_map: np.ndarray, height: int, width: int) -> np.ndarray:
    """Nearest neighbours as PIL finds them, which is how the originals resize labels (torch's two rules differ)."""
    if label_map.shape == (height, width):
        return label_map
    return np.array(PIL.Image.fromarray(label_map).resize((width, height), PIL.Image.Resampling.NEAREST))


def ignore_ids(label_map: np.ndarray, ignore_index: int | Iterable[int] | None) -> np.ndarray:
    """`label_map` as int64 with the ids of `ignore_index` (one, several, or None) replaced by -100.

    Raises:
        ValueError: a negative id that is neither -100 nor in `ignore_index`.
    """
    given = [] if ignore_index is None else [ignore_index] if isinstance(ignore_index, int) else ignore_index
    ids = [index for index in given if index != IGNORED]  # that one has its place already
    labels = label_map.astype(np.int64)
    if ids:
        labels[np.isin(labels, ids)] = IGNORED
    negative = labels[(labels < 0) & (labels != IGNORED)]
    if negative.size:
        raise ValueError(
            f"{negative[0]} is no class index; if it marks pixels to ignore, pass ignore_index={negative[0]}."
        )
    return labels
