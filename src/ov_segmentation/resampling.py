"""Bilinear interpolation of any rectangle of the output, without computing the rest."""

from __future__ import annotations

from collections.abc import Sequence

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

    def edges(self, span: Span, device: torch.device) -> tuple[torch.Tensor, Span]:
        """`[2, source pixels of its window]`, the first and the last output pixel of a span as `matrix` has them, and
        the source pixels between them. What is interpolated has its extremes over the span at one of these."""
        first, last = (self.matrix((i, i + 1), device)[0] for i in (span[0], span[1] - 1))
        start, stop = self.window(span)
        edges = torch.zeros(2, stop - start, device=device)
        edges[0, : len(first)], edges[1, -len(last) :] = first, last
        return edges, (int(self.low[span[0]]) + 1, int(self.low[span[1] - 1]) + 1)


class _Chain:
    """Several axes in turn, each taking the first pixels of what the one before it gives: one matrix."""

    def __init__(self, axes: list[_Axis]) -> None:
        self.axes = [axis for axis in axes if not axis.identity]
        self.identity = not self.axes
        self._matrices: dict[tuple[Span, torch.device], torch.Tensor] = {}

    def window(self, span: Span) -> Span:
        for axis in reversed(self.axes):
            span = axis.window(span)
        return span

    def matrix(self, span: Span, device: torch.device) -> torch.Tensor:
        """As of `_Axis`."""
        if (span, device) not in self._matrices:
            last, *before = reversed(self.axes)
            matrix, seen = last.matrix(span, device), last.window(span)
            for axis in before:
                matrix, seen = matrix @ axis.matrix(seen, device), axis.window(seen)
            self._matrices[span, device] = matrix
        return self._matrices[span, device]

    def edges(self, span: Span, device: torch.device) -> tuple[torch.Tensor, Span]:
        """As of `_Axis`: what the axes after the first one interpolate stays within the bounds of that."""
        if self.identity:
            ends = torch.zeros(2, span[1] - span[0], device=device)
            ends[0, 0] = ends[1, -1] = 1
            return ends, (span[0] + 1, span[1] - 1)
        first, *later = self.axes
        for axis in reversed(later):
            span = axis.window(span)
        return first.edges(span, device)


class Bilinear:
    """`F.interpolate(mode="bilinear", align_corners=False)`, once or several times, rectangle by rectangle.

    Maps are channels-last, `[height, width, C]`; sizes are (height, width); spans are (start, stop) in output pixels.

    Args:
        steps: (source, target) of each interpolation; a source that is smaller than the target before it is the upper
            left part of that.
    """

    def __init__(self, *steps: tuple[tuple[int, int], tuple[int, int]]) -> None:
        self.rows, self.columns = (_Chain([_Axis(source[i], target[i]) for source, target in steps]) for i in (0, 1))

    def window(self, rows: Span, columns: Span) -> tuple[Span, Span]:
        """The rectangle of the source that the output rectangle is made of."""
        return self.rows.window(rows), self.columns.window(columns)

    def windows(self, rows: Sequence[Span], columns: Sequence[Span]) -> tuple[list[Span], list[Span]]:
        """The same for a grid of rectangles."""
        return [self.rows.window(span) for span in rows], [self.columns.window(span) for span in columns]

    def extremes(
        self, maps: torch.Tensor, rows: Sequence[Span], columns: Sequence[Span]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Least and greatest value, or a little beyond, of each channel in each rectangle of an output grid.

        Args:
            maps: `[h, w, C]`, the whole source.
            rows, columns: R and S spans.

        Returns:
            `[R, S, C]` twice.
        """
        across = [self.columns.edges(span, maps.device) for span in columns]
        edges = torch.zeros(len(columns), 2, maps.shape[1], device=maps.device)
        for matrix, span, (of_span, _) in zip(edges, columns, across):
            matrix[:, slice(*self.columns.window(span))] = of_span
        # of the source's columns and then the edges; which of them a rectangle has, the last one repeated
        width = maps.shape[1]
        places = [[*range(*inner), width + 2 * i, width + 2 * i + 1] for i, (_, inner) in enumerate(across)]
        longest = max(map(len, places))
        index = torch.tensor([one + one[-1:] * (longest - len(one)) for one in places], device=maps.device)
        found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for span in rows:
            down, inner = self.rows.edges(span, maps.device)
            ends = (down @ maps[slice(*self.rows.window(span))].flatten(1)).unflatten(1, maps.shape[1:])
            strip = torch.cat([ends, maps[slice(*inner)]])
            # a mean of lower bounds is one of the mean
            for extremes, reduce in zip(found, (torch.amin, torch.amax)):
                line = reduce(strip, 0)
                line = torch.cat([line, edges.flatten(0, 1) @ line])
                extremes.append(reduce(line[index], 1))
        return torch.stack(found[0]), torch.stack(found[1])

    def __call__(self, window: torch.Tensor, rows: Span, columns: Span) -> torch.Tensor:
        """Output rectangle `[rows, columns, C]` from the source rectangle that `window` names."""
        if not self.columns.identity:
            window = self.columns.matrix(columns, window.device) @ window
        if self.rows.identity:
            return window
        matrix = self.rows.matrix(rows, window.device)
        return (matrix @ window.flatten(1)).unflatten(1, window.shape[1:])
