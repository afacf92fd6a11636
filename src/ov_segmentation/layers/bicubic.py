"""Bicubic interpolation as matrices: it is linear and separable, so a resize is two products.

For maps of many channels that is far faster than `torch.nn.functional.interpolate`, and each map may have its own span.
"""

from __future__ import annotations

import torch

# the cubic convolution parameter of torch.nn.functional.interpolate(mode="bicubic")
CUBIC_A = -0.75


def _sample_positions(start: torch.Tensor, stop: torch.Tensor, size: int) -> torch.Tensor:
    """Positions `[n, size]` in crop pixels of the output pixels' centres (align_corners False)."""
    centres = torch.arange(size, device=start.device, dtype=torch.float32) + 0.5
    return centres * ((stop - start).float() / size)[:, None] - 0.5


def bicubic_weights(start: torch.Tensor, stop: torch.Tensor, length: int, size: int) -> torch.Tensor:
    """Matrices `[n, size, length]` that resize the pixels `start..stop` `[n]` of a line of `length` pixels to `size`.

    Equal to `interpolate(line[start:stop], size, mode="bicubic")`.
    """
    return bicubic_matrices(*bicubic_taps(start, stop, size), length)


def bicubic_taps(start: torch.Tensor, stop: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and weights `[n, size, 4]` of the four taps of each output pixel, repeated at the crop's own edges."""
    position = _sample_positions(start, stop, size)
    base = position.floor()
    t = position - base
    far, near = t + 1, 1 - t
    taps = torch.stack([_cubic_outer(far), _cubic_inner(t), _cubic_inner(near), _cubic_outer(near + 1)], dim=-1)
    index = base[..., None].long() + torch.arange(-1, 3, device=start.device)
    return index.clamp(min=0).minimum((stop - start - 1)[:, None, None]) + start[:, None, None], taps


def bicubic_matrices(index: torch.Tensor, taps: torch.Tensor, length: int) -> torch.Tensor:
    """[`bicubic_taps`] as matrices `[n, size, length]`."""
    return taps.new_zeros(*index.shape[:2], length).scatter_add_(2, index, taps)


def _cubic_inner(x: torch.Tensor) -> torch.Tensor:
    return ((CUBIC_A + 2) * x - (CUBIC_A + 3)) * x * x + 1


def _cubic_outer(x: torch.Tensor) -> torch.Tensor:
    return ((CUBIC_A * x - 5 * CUBIC_A) * x + 8 * CUBIC_A) * x - 4 * CUBIC_A


def bicubic_resize(grid: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """`interpolate(grid, size, mode="bicubic")` of channels-last maps: `[h, w, D]` -> `[*size, D]`."""
    # made on the device: numbers that are copied to a GPU make it wait
    start = torch.zeros(1, dtype=torch.long, device=grid.device)
    rows, columns = (bicubic_weights(start, start + old, old, new)[0] for old, new in zip(grid.shape, size))
    # h x w x D -> h x w' x D -> h' x w' x D
    stretched = columns @ grid
    return (rows @ stretched.flatten(1)).unflatten(1, stretched.shape[1:])
