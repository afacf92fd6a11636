"""Overlapping views of a picture: windows of a canvas, and the whole picture as one more view.

The model sees every view as a picture of its own (row b * V + v); post-processing puts their scores together again
(`view_boxes`, `canvas_size`). After CAT-Seg's published evaluation, which has a 640 x 640 canvas, windows of 384 every
256 pixels, and the global view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from ..modeling_outputs import ImageState, join_states


class Windows(NamedTuple):
    """Of a sliding window: side of a window, distance between windows, (height, width) of the canvas they are cut
    from, and whether the whole picture is one more view. In canvas pixels."""

    pixels: int
    stride: int
    canvas_size: tuple[int, int]
    global_view: bool


def resize(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear, corners not aligned, not antialiased, in float32: `[B, C, h, w]` -> `[B, C, *size]`."""
    if maps.shape[-2:] == tuple(size):
        return maps
    return F.interpolate(maps.float(), size=tuple(size), mode="bilinear", align_corners=False).to(maps.dtype)


def split_pictures(pixel_values: torch.Tensor, sizes: torch.Tensor) -> list[torch.Tensor]:
    """The pictures of a padded batch `[B, 3, H, W]` without their padding, `[1, 3, h, w]` each; `sizes` `[B, 2]`."""
    return [
        picture[None, :, :height, :width] for picture, (height, width) in zip(pixel_values, sizes.tolist(), strict=True)
    ]


def window_offsets(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side; the last one ends with the canvas.

    Raises:
        ValueError: the window is longer than the side.
    """
    if window > length:
        raise ValueError(f"A window of {window} pixels does not fit a canvas of {length}: make the canvas larger.")
    offsets = list(range(0, length - window + 1, stride))
    return offsets if offsets[-1] == length - window else [*offsets, length - window]


def view_boxes(canvas_size: tuple[int, int], window: int, stride: int, global_view: bool) -> torch.Tensor:
    """Boxes of the views `[V, 4]` (x0, y0, x1, y1) in canvas pixels: windows row-major, then the whole canvas."""
    height, width = canvas_size
    boxes = [
        [x, y, x + window, y + window]
        for y in window_offsets(height, window, stride)
        for x in window_offsets(width, window, stride)
    ]
    if global_view:
        boxes.append([0, 0, width, height])
    return torch.tensor(boxes)


def cut_views(
    pictures: Sequence[torch.Tensor], canvas_size: tuple[int, int], window: int, stride: int, global_view: bool
) -> torch.Tensor:
    """The views of every picture, row b * V + v in the order of [`view_boxes`].

    Args:
        pictures: `[1, 3, h, w]` each, any size; each is stretched to the canvas.
        canvas_size: (height, width).
        window: side of a view in canvas pixels.
        stride: between windows.
        global_view: adds the picture itself, stretched to the window's size.

    Returns:
        `[B * V, 3, window, window]`.
    """
    views = list(each_view(pictures, canvas_size, window, stride, global_view))
    return torch.cat(views)


def each_view(
    pictures: Sequence[torch.Tensor], canvas_size: tuple[int, int], window: int, stride: int, global_view: bool
) -> Iterator[torch.Tensor]:
    """The rows of [`cut_views`] `[1, 3, window, window]` one after the other: no more than one canvas is held."""
    windows = view_boxes(canvas_size, window, stride, global_view=False).tolist()
    for picture in pictures:
        canvas = resize(picture, canvas_size)
        for x0, y0, x1, y1 in windows:
            yield canvas[..., y0:y1, x0:x1]
        if global_view:
            yield resize(picture, (window, window))


def view_batches(views: Iterable[torch.Tensor], at_once: int | None) -> Iterator[torch.Tensor]:
    """Views `[1, 3, h, w]` that come one after the other, joined `at_once` of them at a time; None: all."""
    views = iter(views)
    while some := list(islice(views, at_once)):
        yield torch.cat(some)


def encode_each(
    encode: Callable[..., ImageState],
    pictures: Sequence[torch.Tensor],
    canvas_size: tuple[int, int],
    window: int,
    stride: int,
    global_view: bool,
    **options: Any,
) -> ImageState:
    """The state of all views, encoded one after the other: memory grows with what is kept of them alone, and on a
    processor one at a time is no slower.

    Args:
        encode: a model's `_encode_image`.
        pictures, canvas_size, window, stride, global_view: see [`cut_views`].
        options: keywords of `encode`, `reshaped_input_sizes` excepted.
    """
    geometry = (canvas_size, window, stride, global_view)
    boxes, views = view_boxes(*geometry), each_view(pictures, *geometry)
    states = (encode(view, reshaped_input_sizes=torch.tensor([view.shape[-2:]]), **options) for view in views)
    state = join_states(states, len(pictures) * len(boxes))
    state.view_boxes, state.canvas_size = boxes, canvas_size
    return state
