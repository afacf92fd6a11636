"""Class scores as functions of position, evaluated only where and for the classes that are needed.

A field says between what bounds its scores are in the rectangles of a grid, and what they are in one of them. Fields of
both families, and of several sliding views, look alike to `score_argmax.draw_label_map`.
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
# of a rectangle and a class: so many keep what they need of all queries in the caches
_PAIRS_AT_ONCE = 2048


class Bounds(NamedTuple):
    """What is known about K non-negative scores in each rectangle of a grid, without looking at every position.

    low, high: `[R, C, K]`: no score in the rectangle is below or above them.
    beaten: function of rectangles `[P]`, counted row by row, and classes `[P]` that says for which of these pairs there
        is a higher score at every position of the rectangle, `[P]`, as far as that can be told; None: no more can be
        told than bounds say.
    """

    low: torch.Tensor
    high: torch.Tensor
    beaten: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None


class Field(Protocol):
    """What can be asked for its scores. Spans are (start, stop) in pixels of the field."""

    size: tuple[int, int]
    num_classes: int
    device: torch.device

    def bounds(self, rows: Sequence[Span], columns: Sequence[Span]) -> Bounds:
        """Of each rectangle of a grid: R spans of rows and C spans of columns."""
        ...

    def scores(self, rows: Span, columns: Span, classes: torch.Tensor, with_total: bool = False) -> torch.Tensor:
        """`[rows, columns, n]` of the classes with the indices `classes` `[n]`; with `with_total`
        `[rows, columns, n + 1]`, the sum over all classes, pruned ones included, behind them."""
        ...


def _part(maps: torch.Tensor, place: tuple[Span, Span]) -> torch.Tensor:
    """A rectangle of `[h, w, C]`, channels last in memory too, as `maps` need not be."""
    (top, bottom), (left, right) = place
    part = maps[top:bottom, left:right]
    return part if part.stride(-1) == 1 else part.contiguous()


def _beyond(extremes: Sequence[torch.Tensor], activation: Activation | None) -> list[torch.Tensor]:
    """Least and greatest values, a little beyond them because interpolation rounds and activations may have steps."""
    if activation is None:
        return list(extremes)
    return [activation(x + sign * 1e-5 * x.abs().clamp(min=1)) for x, sign in zip(extremes, (-1, 1), strict=True)]


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

    def bounds(self, rows: Sequence[Span], columns: Sequence[Span]) -> Bounds:
        """See `Field`."""
        masks = _beyond(self.resize.extremes(self.logits, rows, columns), self.activation)
        low, high = (extreme @ self.weights for extreme in masks)
        flat = [extreme.flatten(0, 1) for extreme in (*masks, low, high)]
        return Bounds(low, high, lambda rectangles, classes: self._beaten(*flat, rectangles, classes))

    def _beaten(
        self,
        least: torch.Tensor,
        most: torch.Tensor,
        low: torch.Tensor,
        high: torch.Tensor,
        rectangles: torch.Tensor,
        classes: torch.Tensor,
    ) -> torch.Tensor:
        """Which classes score less than a mean of others, and so than one of them, for any masks within the bounds.

        The mean is over each query's strongest class, as much of each as its mask can be there: one class alone, which
        some query at a border always lacks, beats few.

        Args:
            least, most: `[R * C, N]`, bounds of the masks.
            low, high: `[R * C, K]`, of the scores.
            rectangles, classes: `[P]`, the pairs that are asked for.
        """
        share = most * self.highest
        mean = (share / share.sum(-1, keepdim=True)) @ self.of_strongest.t()
        mean_low, span = (least * mean).sum(-1), most - least
        # the least of mask * (mean - weight): at the mask's lower bound where the weight is the smaller, at the upper
        # one where it is the larger
        excess = [
            (self.by_class[some] - mean[where]).clamp_(min=0).mul_(span[where]).sum(-1)
            for where, some in zip(rectangles.split(_PAIRS_AT_ONCE), classes.split(_PAIRS_AT_ONCE), strict=True)
        ]
        pairs = (rectangles, classes)
        return mean_low[rectangles] - low[pairs] - torch.cat(excess) > SLACK * high[pairs]

    def scores(self, rows: Span, columns: Span, classes: torch.Tensor, with_total: bool = False) -> torch.Tensor:
        """See `Field`."""
        weights = self.weights[:, classes]
        if with_total:
            weights = torch.cat([weights, self.total_weights[:, None]], dim=1)
        masks = self.resize(_part(self.logits, self.resize.window(rows, columns)), rows, columns)
        return tall_product(self.activation(masks), weights)


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

    def bounds(self, rows: Sequence[Span], columns: Sequence[Span]) -> Bounds:
        """See `Field`."""
        extremes = _beyond(self.resize.extremes(self.maps, rows, columns), self.activation)
        return Bounds(*(self._keep(one, slice(None)) for one in extremes))

    def scores(self, rows: Span, columns: Span, classes: torch.Tensor, with_total: bool = False) -> torch.Tensor:
        """See `Field`."""
        seen = _part(self.maps, self.resize.window(rows, columns))
        if not with_total:
            return self._some(seen, rows, columns, classes)
        if self.activation is not None:
            total = self._some(seen, rows, columns, torch.arange(self.num_classes, device=self.device))
            total = total.sum(-1, keepdim=True)
        else:  # interpolation is linear: the sum of the maps is enough
            if self.summed is None:
                self.summed = self._keep(self.maps, slice(None)).sum(-1, keepdim=True)
            total = self.resize(_part(self.summed, self.resize.window(rows, columns)), rows, columns)
        return torch.cat([self._some(seen, rows, columns, classes), total], dim=-1)

    def _some(self, seen: torch.Tensor, rows: Span, columns: Span, classes: torch.Tensor) -> torch.Tensor:
        maps = self.resize(seen[..., classes], rows, columns)
        return self._keep(maps if self.activation is None else self.activation(maps), classes)

    def _keep(self, scores: torch.Tensor, classes: torch.Tensor | slice) -> torch.Tensor:
        return scores if self.kept is None else scores * self.kept[classes]


class ResizedField:
    """The scores of another field, interpolated to a size (height, width)."""

    def __init__(self, field: Field, size: tuple[int, int]) -> None:
        self.field, self.size = field, size
        self.num_classes, self.device = field.num_classes, field.device
        self.resize = Bilinear((field.size, size))

    def bounds(self, rows: Sequence[Span], columns: Sequence[Span]) -> Bounds:
        """See `Field`."""
        return self.field.bounds(*self.resize.windows(rows, columns))

    def scores(self, rows: Span, columns: Span, classes: torch.Tensor, with_total: bool = False) -> torch.Tensor:
        """See `Field`."""
        source = self.field.scores(*self.resize.window(rows, columns), classes, with_total)
        return self.resize(source, rows, columns)


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

    def bounds(self, rows: Sequence[Span], columns: Sequence[Span]) -> Bounds:
        """See `Field`."""
        whole = None if self.whole is None else self.whole.bounds(rows, columns)
        if not self.views:
            return whole
        shape = (len(rows), len(columns), self.num_classes)
        low, high = (torch.full(shape, value, device=self.device) for value in (torch.inf, 0.0))
        for (x0, y0, x1, y1), field in self.views:
            (down, view_rows), (across, view_columns) = _inside(rows, y0, y1), _inside(columns, x0, x1)
            if view_rows and view_columns:
                # an average lies between the extremes of its parts
                seen = field.bounds(view_rows, view_columns)
                torch.minimum(low[down, across], seen.low, out=low[down, across])
                torch.maximum(high[down, across], seen.high, out=high[down, across])
        return Bounds(low, high) if whole is None else Bounds((low + whole.low) / 2, (high + whole.high) / 2)

    def scores(self, rows: Span, columns: Span, classes: torch.Tensor, with_total: bool = False) -> torch.Tensor:
        """See `Field`."""
        whole = None if self.whole is None else self.whole.scores(rows, columns, classes, with_total)
        if not self.views:
            return whole
        count = self.count[slice(*rows), slice(*columns)]
        canvas = torch.zeros(*count.shape, len(classes) + with_total, device=self.device)
        for (x0, y0, x1, y1), field in self.views:
            top, bottom, left, right = max(rows[0], y0), min(rows[1], y1), max(columns[0], x0), min(columns[1], x1)
            if top < bottom and left < right:
                place = (slice(top - rows[0], bottom - rows[0]), slice(left - columns[0], right - columns[0]))
                part = ((top - y0, bottom - y0), (left - x0, right - x0))
                canvas[place] += field.scores(*part, classes, with_total)
        canvas /= count[..., None]
        return canvas if whole is None else (canvas + whole) / 2


def _inside(spans: Sequence[Span], start: int, stop: int) -> tuple[slice, list[Span]]:
    """Which of ascending spans overlap with one, and their parts in it, counted from its start."""
    which = [i for i, span in enumerate(spans) if max(span[0], start) < min(span[1], stop)]
    parts = [(max(spans[i][0], start) - start, min(spans[i][1], stop) - start) for i in which]
    return slice(which[0], which[-1] + 1) if which else slice(0), parts
