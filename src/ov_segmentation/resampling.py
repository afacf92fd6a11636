"""Bilinear interpolation of any rectangle of the output, without computing the rest."""

from __future__ import annotations

import numpy as np
import torch

Span = tuple[int, int]


class _Axis:
    """Sampling positions along one axis: half-pixel centres, clamped at the borders, in float32 as torch has them."""

    def __init__(self, source: int, target: int) -> None:
        self.identity = source == target
        scale = np.float32(source) / np.float32(target)
        positions = scale * (np.arange(target, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
        positions = np.clip(positions, 0, source - 1)
        self.low = positions.astype(np.int64)
        self.high = np.minimum(self.low + 1, source - 1)
        self.weight = positions - self.low
        self._matrices: dict[tuple[Span, torch.device], torch.Tensor] = {}

    def window(self, span: Span) -> Span:
        return span if self.identity else (int(self.low[span[0]]), int(self.high[span[1] - 1]) + 1)

    def matrix(self, span: Span, device: torch.device) -> torch.Tensor:
        """`[output pixels of span, source pixels of its window]`, two non-zero entries per row at most."""
        if (span, device) not in self._matrices:
            start, stop = self.window(span)
            rows = np.arange(span[1] - span[0])
            matrix = np.zeros((len(rows), stop - start), dtype=np.float32)
            weight = self.weight[slice(*span)]
            matrix[rows, self.low[slice(*span)] - start] += 1 - weight
            matrix[rows, self.high[slice(*span)] - start] += weight
            self._matrices[span, device] = torch.from_numpy(matrix).to(device)
        return self._matrices[span, device]


class Bilinear:
    """`F.interpolate(mode="bilinear", align_corners=False)` from one size to another, rectangle by rectangle.

    Maps are channels-last, `[height, width, C]`; sizes are (height, width); spans are (start, stop) in output pixels.
    """

    def __init__(self, source: tuple[int, int], target: tuple[int, int]) -> None:
        self.rows, self.columns = (_Axis(*pair) for pair in zip(source, target))

    def window(self, rows: Span, columns: Span) -> tuple[Span, Span]:
        """The rectangle of the source that the output rectangle is made of."""
        return self.rows.window(rows), self.columns.window(columns)

    def __call__(self, window: torch.Tensor, rows: Span, columns: Span) -> torch.Tensor:
        """Output rectangle `[rows, columns, C]` from the source rectangle that `window` names."""
        if not self.columns.identity:
            window = self.columns.matrix(columns, window.device) @ window
        if not self.rows.identity:
            matrix = self.rows.matrix(rows, window.device)
            window = (matrix @ window.flatten(1)).unflatten(1, window.shape[1:])
        return window
