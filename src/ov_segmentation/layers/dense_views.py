"""The picture side of the per-class methods on dense CLIP features: what the model sees of each picture, encoded."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import CLIPModel

from .configuration_dense_clip import DenseCLIPConfig
from .dense_clip import DenseCLIPFeatures, dense_clip_views
from .model_views import make_model_views


class DenseViews(NamedTuple):
    """R encoded rows: pictures, or B * V views (row b * V + v) with their boxes `[V, 4]` on a canvas."""

    dense: DenseCLIPFeatures
    boxes: torch.Tensor | None
    canvas_size: tuple[int, int] | None


def encode_views(
    clip: CLIPModel,
    config: DenseCLIPConfig,
    pixel_values: torch.Tensor,
    *,
    reshaped_input_sizes: torch.Tensor,
    sliding_window: bool,
    crop_batch_size: int | None,
    output_attentions: bool = False,
    pad_multiple: int | None = None,
    **unused: Any,
) -> DenseViews:
    """Dense features of whole pictures, or of the views of the sliding window.

    Args:
        clip: both towers.
        config: the model's.
        pixel_values: `[B, 3, H, W]`, padded right and bottom.
        reshaped_input_sizes: `[B, 2]`, height and width of each picture.
        sliding_window: views in the place of the whole picture.
        crop_batch_size: rows that the image tower takes at once; None: all.
        output_attentions: keep the attention weights.
        pad_multiple: see `make_model_views`.
        unused: what else `_encode_image` of a model is given.
    """
    square, windows = (config.image_size, config.image_size), config.windows if sliding_window else None
    views = make_model_views(pixel_values, reshaped_input_sizes, square, windows, pad_multiple)
    dense = dense_clip_views(
        clip, views.pixel_values, config.skip_layers, config.dense_residual, crop_batch_size, output_attentions
    )
    return DenseViews(dense, views.boxes, views.canvas_size)
