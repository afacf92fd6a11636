"""Scores of semantic segmentation from one streaming confusion matrix.

The matrix is the only state, so the scores are exact however a data set is split over batches and processes, and memory
does not grow with pictures: 847 classes take 5.7 MB.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

Averaging = Literal["ground_truth", "union"]
LabelMap = Tensor | np.ndarray | Sequence[Any]

UNLABELLED = -1
"""The id that post-processing gives to pixels without a class (below the threshold)."""


@dataclass(frozen=True)
class SegmentationScores:
    """What a confusion matrix says. All shares are in [0, 1]; NaN where there is nothing to score.

    Attributes:
        miou: mean IoU under the averaging rule.
        iou_per_class: `[K]` float64; NaN for classes that occur neither in ground truth nor in predictions.
        accuracy_per_class: `[K]` float64, correct pixels / ground-truth pixels; NaN without ground-truth pixels.
        pixel_accuracy: correct pixels / ground-truth pixels (pAcc).
        mean_accuracy: mean of `accuracy_per_class` over the classes in the ground truth (mAcc).
        frequency_weighted_iou: IoU weighted by each class' share of the ground-truth pixels (fwIoU).
        miou_seen, miou_unseen: mean IoU of the two parts of a split under the same rule; None without a split.
        hiou: harmonic mean of `miou_seen` and `miou_unseen`; None without a split.
        averaging: the rule that was used.
        num_averaged: how many classes `miou` was divided by.
        num_pixels: ground-truth pixels that were scored.
    """

    miou: float
    iou_per_class: Tensor
    accuracy_per_class: Tensor
    pixel_accuracy: float
    mean_accuracy: float
    frequency_weighted_iou: float
    miou_seen: float | None
    miou_unseen: float | None
    hiou: float | None
    averaging: Averaging
    num_averaged: int
    num_pixels: int

    def figures(self) -> dict[str, float | int | str]:
        """The scalar scores that are there, as plain Python values: what goes into trackers and the ledger."""
        values = {name: value for name, value in vars(self).items() if not isinstance(value, Tensor)}
        return {name: value for name, value in values.items() if value is not None}


class ConfusionMatrix:
    """Counts of (ground truth, prediction) pixel pairs of a whole data set.

    `counts` is `[K, K + 1]` int64: row = ground-truth class, column = predicted class, last column = pixels predicted
    as unlabelled (-1). Those are misses: they are in the ground-truth total of their class and in no class'
    predictions. Ignored ground-truth pixels are left out of everything, of the predicted areas too (as in the
    originals' evaluators).

    Args:
        num_classes: K; any number.
        ignore_index: ground-truth ids that are not scored: one, several, or None. Image processors
            write -100.
    """

    def __init__(self, num_classes: int, ignore_index: int | Iterable[int] | None = -100) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}.")
        ignored = [ignore_index] if isinstance(ignore_index, int) else list(ignore_index or [])
        self.num_classes = num_classes
        self.ignore_index = tuple(sorted(int(index) for index in ignored))
        self.counts = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)

    def update(self, predictions: LabelMap | Iterable[LabelMap], references: LabelMap | Iterable[LabelMap]) -> None:
        """Count one picture, a batch of one size, or a list of pictures of any sizes.

        Args:
            predictions: class ids, -1 = unlabelled: `[H, W]` or `[B, H, W]`, or a list of `[H, W]`.
            references: ground truth of the same shapes.

        Raises:
            ValueError: shapes or numbers of pictures that differ; ids that are no class, neither ignored nor -1.
            TypeError: maps that do not hold integers.
        """
        predictions, references = _as_pictures(predictions), _as_pictures(references)
        if len(predictions) != len(references) and 1 in (len(predictions), len(references)):  # [B, H, W] beside a list
            predictions, references = (list(maps[0]) if len(maps) == 1 else maps for maps in (predictions, references))
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references.")
        for prediction, reference in zip(predictions, references, strict=True):
            self._count(_as_ids(prediction, "predictions"), _as_ids(reference, "references"))

    def _count(self, prediction: Tensor, reference: Tensor) -> None:
        if prediction.shape != reference.shape:
            raise ValueError(
                f"A prediction of shape {list(prediction.shape)} does not fit its reference of shape "
                f"{list(reference.shape)}: post-process with target_sizes = the references' sizes."
            )
        prediction, reference = prediction.flatten(), reference.flatten().to(prediction.device)
        if self.ignore_index:
            scored = reference != self.ignore_index[0]
            for index in self.ignore_index[1:]:
                scored &= reference != index
            prediction, reference = prediction[scored], reference[scored]
        if not len(reference):
            return
        self._check_range(reference, 0, "references", f"ignored: {list(self.ignore_index)}")
        self._check_range(prediction, UNLABELLED, "predictions", "unlabelled: -1")
        column = torch.where(prediction == UNLABELLED, self.num_classes, prediction)
        pairs = torch.bincount(reference * (self.num_classes + 1) + column).cpu()
        self.counts.view(-1)[: len(pairs)] += pairs

    def _check_range(self, ids: Tensor, smallest: int, name: str, also: str) -> None:
        low, high = (int(value) for value in ids.aminmax())
        if low < smallest or high >= self.num_classes:
            wrong = low if low < smallest else high
            raise ValueError(f"{name} hold the id {wrong}; classes are 0 to {self.num_classes - 1} ({also}).")

    def __iadd__(self, other: ConfusionMatrix) -> ConfusionMatrix:
        """Add the counts of another part of the same data set."""
        if other.num_classes != self.num_classes or other.ignore_index != self.ignore_index:
            raise ValueError(
                f"Matrices of {self.num_classes} classes ignoring {list(self.ignore_index)} and of {other.num_classes} "
                f"classes ignoring {list(other.ignore_index)} cannot be added."
            )
        self.counts += other.counts
        return self

    def reset(self) -> None:
        """Forget every count."""
        self.counts.zero_()

    def reduce(self, accelerator: Accelerator) -> ConfusionMatrix:
        """The sum over all processes, as a new matrix on every process; this one stays as it is.

        Exact, as the counts are integers. Every process must call it, also one that saw no picture. The data must be
        split without the duplicates that pad a last batch (`even_batches=False`, `split_between_processes`).
        """
        total = ConfusionMatrix(self.num_classes, self.ignore_index)
        total.counts = accelerator.reduce(self.counts.to(accelerator.device), reduction="sum").cpu()
        return total

    def compute(self, averaging: Averaging = "ground_truth", seen: Sequence[int] | None = None) -> SegmentationScores:
        """Scores of everything counted so far.

        Args:
            averaging: which classes the mean IoU is over. `"ground_truth"`: those with ground-truth pixels (newer
                evaluators). `"union"`: the sum of IoU over classes with ground truth, divided by the number of
                classes in ground truth or prediction (older evaluators; SAN's and OVSeg's papers), so that a class
                which is only predicted counts as 0.
            seen: ids of the classes seen in training; all others are unseen. Gives the split's scores.
        """
        if averaging not in get_args(Averaging):
            raise ValueError(f"averaging is one of {list(get_args(Averaging))}, got {averaging!r}.")
        counts = self.counts.to(torch.float64)
        correct = counts.diagonal()
        truth, predicted = counts.sum(1), counts[:, :-1].sum(0)
        iou = correct / (truth + predicted - correct)
        accuracy = correct / truth
        present = truth > 0
        counted = present if averaging == "ground_truth" else present | (predicted > 0)
        everything = torch.ones(self.num_classes, dtype=torch.bool)
        split = (None, None) if seen is None else self._split(seen)
        # A class outside the ground truth has an IoU of exactly 0, so both rules are the plain mean over `counted`.
        means = [None if part is None else float(iou[counted & part].mean()) for part in (everything, *split)]
        return SegmentationScores(
            miou=means[0],
            iou_per_class=iou,
            accuracy_per_class=accuracy,
            pixel_accuracy=float(correct.sum() / truth.sum()),
            mean_accuracy=float(accuracy[present].mean()),
            frequency_weighted_iou=float((truth * iou)[present].sum() / truth.sum()),
            miou_seen=means[1],
            miou_unseen=means[2],
            hiou=None if seen is None else _harmonic_mean(means[1], means[2]),
            averaging=averaging,
            num_averaged=int(counted.sum()),
            num_pixels=int(self.counts.sum()),
        )

    def _split(self, seen: Sequence[int]) -> tuple[Tensor, Tensor]:
        ids = sorted(int(index) for index in seen)
        if len(set(ids)) != len(ids) or not all(0 <= index < self.num_classes for index in ids):
            raise ValueError(f"seen must name each of its classes once, within 0 to {self.num_classes - 1}; got {ids}.")
        mask = torch.zeros(self.num_classes, dtype=torch.bool)
        mask[ids] = True
        return mask, ~mask


def _as_pictures(maps: LabelMap | Iterable[LabelMap]) -> list[LabelMap]:
    """One array (a picture, or a batch of one size) counts as one element."""
    return list(maps) if isinstance(maps, Iterable) and not isinstance(maps, (Tensor, np.ndarray)) else [maps]


def _as_ids(label_map: LabelMap, name: str) -> Tensor:
    """A label map of any integer type as an int64 tensor where it lies (16-bit unsigned maps included)."""
    tensor = label_map if isinstance(label_map, Tensor) else torch.from_numpy(_as_integers(np.asarray(label_map), name))
    if tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name} must hold integer class ids, got {tensor.dtype}.")
    return tensor.to(torch.int64)


def _as_integers(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype.kind not in "iub":
        raise TypeError(f"{name} must hold integer class ids, got {array.dtype}.")
    return array.astype(np.int64)


def _harmonic_mean(first: float, second: float) -> float:
    """2ab / (a + b); 0 where both are 0."""
    return 0.0 if first == second == 0 else 2 * first * second / (first + second)
