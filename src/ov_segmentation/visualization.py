"""Label maps as pictures: colours, overlays with a legend, and files that hold any number of classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

UNLABELLED_COLOR = (0, 0, 0)
# a file cannot hold -1: unlabelled pixels get the highest value that its pixels can have
_UNLABELLED_IN_FILE = (255, 65535)

_BACKGROUND_COLOR, _TEXT_COLOR = (255, 255, 255), (0, 0, 0)


def color_palette(num_classes: int) -> np.ndarray:
    """RGB colours `[K, 3]` uint8, all different; class k has the same colour whatever K is.

    PASCAL VOC's colours without its first, black: the bits of k + 1 go to red, green and blue in turn, the lowest to
    the most significant bit of a channel.
    """
    numbers = np.arange(1, num_classes + 1)[:, None] >> np.arange(3)
    bits = numbers[..., None] >> np.arange(0, 24, 3) & 1
    return (bits << np.arange(7, -1, -1)).sum(axis=-1).astype(np.uint8)


def colored_map(segmentation: Any, palette: np.ndarray | None = None) -> Image.Image:
    """An RGB picture of a label map `[H, W]` (array or tensor of class indices, -1 = unlabelled: black).

    Args:
        segmentation: the label map.
        palette: `[K, 3]` uint8; default `color_palette`.
    """
    segmentation = _as_label_map(segmentation)
    highest = int(segmentation.max(initial=-1))
    palette = color_palette(highest + 1) if palette is None else np.asarray(palette, dtype=np.uint8)
    if palette.ndim != 2 or palette.shape[1] != 3 or len(palette) <= highest:
        raise ValueError(f"palette must be [K, 3] with K > {highest}, the highest class; got {list(palette.shape)}.")
    colors = np.concatenate([palette, np.array([UNLABELLED_COLOR], dtype=np.uint8)])
    return Image.fromarray(colors[segmentation.clip(-1)])


def overlay(
    image: Image.Image | np.ndarray,
    segmentation: Any,
    labels: Sequence[str],
    palette: np.ndarray | None = None,
    alpha: float = 0.5,
    legend: bool = True,
) -> Image.Image:
    """The picture with its label map laid over it; unlabelled pixels stay as they are.

    Args:
        image: a PIL picture, or `[H, W, 3]` uint8.
        segmentation: `[H, W]` class indices of the picture's size, -1 = unlabelled.
        labels: K class names.
        palette: `[K, 3]` uint8; default `color_palette`.
        alpha: opacity of the colours, 0 to 1.
        legend: adds a column on the right that names the classes present, in class order.

    Raises:
        ValueError: sizes that differ, a class without a label, or an alpha outside 0 to 1.
    """
    image = (image if isinstance(image, Image.Image) else Image.fromarray(image)).convert("RGB")
    segmentation = _as_label_map(segmentation)
    if segmentation.shape != (image.height, image.width):
        raise ValueError(
            f"The label map is {segmentation.shape[0]} x {segmentation.shape[1]} (height x width), the picture "
            f"{image.height} x {image.width}. A picture with EXIF rotation must be turned upright first."
        )
    present = np.unique(segmentation[segmentation >= 0])
    if len(present) and present[-1] >= len(labels):
        raise ValueError(f"The label map holds class {present[-1]}, there are only {len(labels)} labels.")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}.")
    palette = color_palette(len(labels)) if palette is None else np.asarray(palette, dtype=np.uint8)
    opacity = Image.fromarray(np.where(segmentation >= 0, round(alpha * 255), 0).astype(np.uint8))
    blended = Image.composite(colored_map(segmentation, palette), image, opacity)
    if not legend or not len(present):
        return blended
    return _beside(blended, [(labels[k], tuple(palette[k].tolist())) for k in present])


def unlabelled_value(num_classes: int) -> int:
    """What stands for -1 in the file of a label map with so many classes: 255, or 65535 where 8 bits do not do.

    Raises:
        ValueError: more than 65535 classes.
    """
    for value in _UNLABELLED_IN_FILE:
        if num_classes <= value:
            return value
    raise ValueError(f"A 16-bit PNG holds classes up to 65534, the highest is {num_classes - 1}.")


def label_map_picture(segmentation: Any, num_classes: int | None = None) -> Image.Image:
    """A label map as a picture of class indices, of 8 or 16 bits; unlabelled pixels (-1) are 255 or 65535.

    Args:
        segmentation: `[H, W]`.
        num_classes: decides on the bits, so that all maps of one vocabulary are alike; default: the classes that occur.

    Raises:
        ValueError: a class index above 65534, or one that `num_classes` does not have.
    """
    segmentation = _as_label_map(segmentation)
    highest = int(segmentation.max(initial=-1))
    if num_classes is not None and highest >= num_classes:
        raise ValueError(f"The label map holds class {highest}, there are only {num_classes}.")
    unlabelled = unlabelled_value(highest + 1 if num_classes is None else num_classes)
    values = np.where(segmentation < 0, unlabelled, segmentation)
    return Image.fromarray(values.astype(np.uint8 if unlabelled == 255 else np.uint16))


def save_label_map(segmentation: Any, path: str | os.PathLike, num_classes: int | None = None) -> None:
    """Save a label map as a PNG of class indices; arguments, bits and errors: see [`label_map_picture`]."""
    label_map_picture(segmentation, num_classes).save(path, format="PNG")


def _as_label_map(segmentation: Any) -> np.ndarray:
    if hasattr(segmentation, "detach"):
        segmentation = segmentation.detach().cpu().numpy()
    segmentation = np.asarray(segmentation)
    if segmentation.ndim != 2 or not np.issubdtype(segmentation.dtype, np.integer):
        raise ValueError(
            f"A label map is [H, W] of integers, got {list(segmentation.shape)} of type {segmentation.dtype}."
        )
    return segmentation.astype(np.int64)


def _beside(image: Image.Image, entries: list[tuple[str, tuple[int, int, int]]]) -> Image.Image:
    """`image` with a legend on its right, in as many columns as its height asks for."""
    size = max(10, min(image.height // 24, 32))
    font = ImageFont.load_default(size)
    row, gap = round(1.4 * size), size // 2
    rows = max(1, (max(image.height, row + 2 * gap) - 2 * gap) // row)
    columns = [entries[start : start + rows] for start in range(0, len(entries), rows)]
    # three gaps: before the patch, before the text, behind the text
    widths = [row + 3 * gap + max(round(font.getlength(_one_line(text))) for text, _ in column) for column in columns]
    height = max(image.height, row + 2 * gap)
    canvas = Image.new("RGB", (image.width + sum(widths), height), _BACKGROUND_COLOR)
    canvas.paste(image, (0, 0))
    draw = ImageDraw.Draw(canvas)
    left = image.width
    for column, width in zip(columns, widths):
        for index, (text, color) in enumerate(column):
            top = gap + index * row
            draw.rectangle((left + gap, top + 1, left + gap + size, top + 1 + size), fill=color, outline=_TEXT_COLOR)
            draw.text((left + 2 * gap + size, top), _one_line(text), fill=_TEXT_COLOR, font=font)
        left += width
    return canvas


def _one_line(text: str) -> str:
    return " ".join(text.split())
