"""Class scores as functions of position, evaluated only where and for the classes that are needed.

A field has `num_classes`, a `size` (height, width), a `device` and `window(rows, columns)`, which looks at one
rectangle of it. Fields of both families, and of several sliding views, look alike to `score_argmax.draw_label_map`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from .layers.products import tall_product
from .resampling import Bilinear, Span

Activation = Callable[[torch.Tensor], torch.Tensor]

# More than rounding can shift a score: bounds and scores are sums of the same terms in another order.
SLACK = 1e-4


class Window(NamedTuple):
    """One rectangle of a field of K non-negative scores.

    low, high: `[K]`: no score in the rectangle is below or above them.
    scores: function of class indices `[n]` that gives their scores `[rows, columns, n]`; with a second argument of True
        `[rows, columns, n + 1]`, the sum over all classes, pruned ones included, behind them.
    beaten: function of class indices `[n]` that says of which there is a higher score everywhere, `[n]`, as far as
        that can be told without looking at every position; None: no more can be told than bounds say.
    """

    low: torch.Tensor
    high: torch.Tensor
    scores: Callable[[torch.Tensor, bool], torch.Tensor]
    beaten: Callable[[torch.Tensor], torch.Tensor] | None = None


class Field(Protocol):
    """What can be asked for its scores."""

    size: tuple[int, int]
    num_classes: int
    device: torch.device

    def window(self, rows: Span, columns: Span) -> Window:
        """Look at one rectangle; spans are (start, stop) in pixels of the field."""
        ...


def _part(maps: torch.Tensor, place: tuple[slice, slice]) -> torch.Tensor:
    """A rectangle of `[h, w, C]`, channels last in memory too, as `maps` need not be."""
    part = maps[place]
    return part if part.stride(-1) == 1 else part.contiguous()


def _bounds(maps: torch.Tensor, activation: Activation | None) -> torch.Tensor:
    """`[2, C]`: what each channel of `maps` `[h, w, C]`, interpolated and activated, is never below and never above."""
    # rows first: several times faster than both axes at once
    bounds = torch.stack([maps.amin(0).amin(0), maps.amax(0).amax(0)])
    if activation is None:
        return bounds
    # interpolation rounds, and activations may have steps
    margin = 1e-5 * bounds.abs().clamp(min=1)
    margin[0] *= -1
    return activation(bounds + margin)


class MaskField:
    """Mask family: score[k] = sum over queries n of weights[n, k] * activation(mask logit n) (SAN eq. 4, MaskFormer).

    Args:
        logits: `[h, w, N]` mask logits.
        weights: `[N, K]`, non-negative.
        total_weights: `[N]`, the sum of the weights over all classes, pruned ones included.
        sizes: the logits are interpolated to each of these (height, width) in turn, each result cropped to what the
            next one takes: `[(resized to, cropped to), ...]`. The last crop is the field's size.
        activation: monotone, applied after the last interpolation.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        weights: torch.Tensor,
        total_weights: torch.Tensor,
        sizes: Sequence[tuple[tuple[int, int], tuple[int, int]]],
        activation: Activation,
    ) -> None:
        self.logits, self.weights, self.total_weights, self.activation = logits, weights, total_weights, activation
        sources = [(logits.shape[0], logits.shape[1]), *(cropped for _, cropped in sizes)]
        # nothing but cropping lies between the interpolations: they are one
        self.resize = Bilinear(*((source, resized) for source, (resized, _) in zip(sources, sizes)))
        self.size, self.num_classes, self.device = sources[-1], weights.shape[1], logits.device
        self.by_class = weights.t().contiguous()
        self.highest, strongest = weights.max(1)
        self.of_strongest = weights[:, strongest]

    def window(self, rows: Span, columns: Span) -> Window:
        """Look at one rectangle."""
        (top, bottom), (left, right) = self.resize.window(rows, columns)
        # interpolating along rows changes nothing about the bounds, and is left for those who ask for scores
        maps = self.resize.along_columns(_part(self.logits, (slice(top, bottom), slice(left, right))), columns)
        bounds = _bounds(maps, self.activation)
        low, high = bounds @ self.weights

        def scores(classes: torch.Tensor, with_total: bool) -> torch.Tensor:
            weights = self.weights[:, classes]
            if with_total:
                weights = torch.cat([weights, self.total_weights[:, None]], dim=1)
            return tall_product(self.activation(self.resize.along_rows(maps, rows)), weights)

        return Window(low, high, scores, lambda classes: self._beaten(*bounds, classes))

    def _beaten(self, low: torch.Tensor, high: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Which classes score less than a mean of others, and so than one of them, for any masks within the bounds.

        The mean is over each query's strongest class, as much of each as its mask can be there: one class alone, which
        some query at a border always lacks, beats few.

        Args:
            low, high: `[N]`, of the masks.
            classes: `[n]`.
        """
        share = high * self.highest
        mean = self.of_strongest @ (share / share.sum())
        weights = self.by_class[classes]
        # of low * (mean - weight) where the weight is the smaller, of high * (mean - weight) where it is the larger
        least_gap = low @ mean - weights @ low - (weights - mean).clamp_(min=0) @ (high - low)
        return least_gap > SLACK * (weights @ high)


class ClassField:
    """Per-class family: one map per class.

    Args:
        maps: `[h, w, K]` logits, or scores if there is no activation.
        size: (height, width) that the maps are interpolated to.
        activation: monotone, applied after the interpolation; None: `maps` are scores already.
        kept: bool `[K]`; the others score exactly 0. None: all are kept.
    """

    def __init__(
        self,
        maps: torch.Tensor,
        size: tuple[int, int],
        activation: Activation | None = None,
        kept: torch.Tensor | None = None,
    ) -> None:
        self.maps, self.activation, self.size = maps, activation, size
        self.num_classes, self.device = maps.shape[-1], maps.device
        self.kept = None if kept is None else kept.to(maps.dtype)
        self.resize = Bilinear(((maps.shape[0], maps.shape[1]), size))
        self.summed = None

    def window(self, rows: Span, columns: Span) -> Window:
        """Look at one rectangle."""
        (top, bottom), (left, right) = self.resize.window(rows, columns)
        source = (slice(top, bottom), slice(left, right))
        seen = _part(self.maps, source)
        low, high = self._keep(_bounds(seen, self.activation), slice(None))

        def some(classes: torch.Tensor) -> torch.Tensor:
            maps = self.resize(seen[..., classes], rows, columns)
            return self._keep(maps if self.activation is None else self.activation(maps), classes)

        def total() -> torch.Tensor:
            if self.activation is not None:
                return some(torch.arange(self.num_classes, device=self.device)).sum(-1, keepdim=True)
            if self.summed is None:  # interpolation is linear: the sum of the maps is enough
                self.summed = self._keep(self.maps, slice(None)).sum(-1, keepdim=True)
            return self.resize(self.summed[source], rows, columns)

        def scores(classes: torch.Tensor, with_total: bool) -> torch.Tensor:
            return torch.cat([some(classes), total()], dim=-1) if with_total else some(classes)

        return Window(low, high, scores)

    def _keep(self, scores: torch.Tensor, classes: torch.Tensor | slice) -> torch.Tensor:
        return scores if self.kept is None else scores * self.kept[classes]


class ResizedField:
    """The scores of another field, interpolated to a size (height, width)."""

    def __init__(self, field: Field, size: tuple[int, int]) -> None:
        self.field, self.size = field, size
        self.num_classes, self.device = field.num_classes, field.device
        self.resize = Bilinear((field.size, size))

    def window(self, rows: Span, columns: Span) -> Window:
        """Look at one rectangle."""
        source = self.field.window(*self.resize.window(rows, columns))
        return Window(
            source.low,
            source.high,
            lambda classes, with_total: self.resize(source.scores(classes, with_total), rows, columns),
            source.beaten,
        )


class StitchedField:
    """Sliding views on a canvas: windows that overlap are averaged, then averaged with the global view if there is one
    (CAT-Seg, section 7 of its released evaluation).

    Args:
        fields: one per view, each of its box's size; the global view's, of any size, is interpolated to the canvas.
        boxes: `[V][4]` (x0, y0, x1, y1) in canvas pixels. The last one is the global view if it is the whole canvas.
        size: (height, width) of the canvas.

    Raises:
        ValueError: a box does not lie on the canvas, or the views leave a part of it uncovered.
    """

    def __init__(self, fields: Sequence[Field], boxes: Sequence[Sequence[int]], size: tuple[int, int]) -> None:
        self.size, self.num_classes, self.device = size, fields[0].num_classes, fields[0].device
        height, width = size
        for x0, y0, x1, y1 in boxes:
            if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
                raise ValueError(f"View box {(x0, y0, x1, y1)} does not lie on the canvas of {height} x {width}.")
        views = list(zip(boxes, fields))
        self.whole = ResizedField(views.pop()[1], size) if tuple(boxes[-1]) == (0, 0, width, height) else None
        self.views = views
        self.count = torch.zeros(size, device=self.device)
        for (x0, y0, x1, y1), _ in views:
            self.count[y0:y1, x0:x1] += 1
        if views and not self.count.all():
            raise ValueError(f"The sliding windows leave {int((self.count == 0).sum())} canvas pixels uncovered.")

    def window(self, rows: Span, columns: Span) -> Window:
        """Look at one rectangle."""
        if not self.views:
            return self.whole.window(rows, columns)
        parts = []
        for (x0, y0, x1, y1), field in self.views:
            top, bottom, left, right = max(rows[0], y0), min(rows[1], y1), max(columns[0], x0), min(columns[1], x1)
            if top < bottom and left < right:
                place = (slice(top - rows[0], bottom - rows[0]), slice(left - columns[0], right - columns[0]))
                parts.append((place, field.window((top - y0, bottom - y0), (left - x0, right - x0))))
        # an average lies between the extremes of its parts
        low = torch.stack([part.low for _, part in parts]).amin(0)
        high = torch.stack([part.high for _, part in parts]).amax(0)
        count = self.count[slice(*rows), slice(*columns)]
        whole = None if self.whole is None else self.whole.window(rows, columns)

        def scores(classes: torch.Tensor, with_total: bool) -> torch.Tensor:
            canvas = torch.zeros(*count.shape, len(classes) + with_total, device=self.device)
            for place, part in parts:
                canvas[place] += part.scores(classes, with_total)
            canvas /= count[..., None]
            return canvas if whole is None else (canvas + whole.scores(classes, with_total)) / 2

        if whole is not None:
            low, high = (low + whole.low) / 2, (high + whole.high) / 2
        return Window(low, high, scores)
