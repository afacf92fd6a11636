"""The inputs of a per-class model: whole pictures or views of them, stretched to the size that its encoder takes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .picture_stretching import stretch_pictures
from .sliding_window import Windows, cut_views, resize, split_pictures, view_boxes


class ModelViews(NamedTuple):
    """R model inputs `[R, 3, height, width]`: pictures, or B * V views (row b * V + v) with their boxes `[V, 4]`."""

    pixel_values: torch.Tensor
    boxes: torch.Tensor | None
    canvas_size: tuple[int, int] | None


def make_model_views(
    pixel_values: torch.Tensor,
    sizes: torch.Tensor,
    input_size: tuple[int, int],
    windows: Windows | None,
    pad_multiple: int | None = None,
) -> ModelViews:
    """Cut pictures out of their padding, and into views if asked.

    Args:
        pixel_values: `[B, 3, H, W]`, padded right and bottom.
        sizes: `[B, 2]`, height and width of each picture.
        input_size: (height, width) of the model's input.
        windows: of the sliding window; None: whole pictures.
        pad_multiple: see `stretch_pictures`; whole pictures only.
    """
    if windows is None:
        return ModelViews(stretch_pictures(pixel_values, sizes, input_size, pad_multiple), None, None)
    pixels, stride, canvas_size, global_view = windows
    views = cut_views(split_pictures(pixel_values, sizes), canvas_size, pixels, stride, global_view)
    return ModelViews(
        resize(views, input_size), view_boxes(canvas_size, pixels, stride, global_view), tuple(canvas_size)
    )
