"""Pictures of a padded batch, each without its padding, stretched to one size: the input of the per-class methods.

How much of a row is padding is data, which neither `torch.compile` nor `torch.export` can trace through; to them the
stretching is one operator with a known output shape.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def stretch_pictures(
    pixel_values: torch.Tensor, sizes: torch.Tensor, size: tuple[int, int], pad_multiple: int | None = None
) -> torch.Tensor:
    """Cut each picture out of its padding and stretch it: bilinear, corners not aligned, not antialiased, in float32.

    Args:
        pixel_values: `[B, 3, H, W]`, padded right and bottom. No gradient flows to it.
        sizes: `[B, 2]`, height and width of each picture.
        size: (height, width) of the result.
        pad_multiple: pads each picture, once it is cut out, with zeros right and bottom to multiples of this (CAT-Seg's
            original, which so stretches padding too).

    Returns:
        `[B, 3, *size]`.
    """
    return torch.ops.ov_segmentation.stretch_pictures(pixel_values, sizes, *size, pad_multiple or 1)


@torch.library.custom_op(
    "ov_segmentation::stretch_pictures",
    mutates_args=(),
    schema="(Tensor pixel_values, Tensor sizes, SymInt height, SymInt width, int multiple) -> Tensor",
)
def _stretch_pictures(
    pixel_values: torch.Tensor, sizes: torch.Tensor, height: int, width: int, multiple: int
) -> torch.Tensor:
    result = pixel_values.new_empty(len(pixel_values), pixel_values.shape[1], height, width)
    for picture, stretched, (rows, columns) in zip(pixel_values, result, sizes.tolist(), strict=True):
        cut = F.pad(picture[None, :, :rows, :columns].float(), (0, -columns % multiple, 0, -rows % multiple))
        stretched.copy_(F.interpolate(cut, (height, width), mode="bilinear", align_corners=False)[0])
    return result


@_stretch_pictures.register_fake
def _(pixel_values: torch.Tensor, sizes: torch.Tensor, height: int, width: int, multiple: int) -> torch.Tensor:
    return pixel_values.new_empty(len(pixel_values), pixel_values.shape[1], height, width)
