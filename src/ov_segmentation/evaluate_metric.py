"""The confusion matrix as an `evaluate.Metric`, for `evaluate.combine`, `evaluate.save` and scripts built on them.

Importing this module imports `evaluate`, which takes seconds; nothing else in the package does.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from .metrics import Averaging, ConfusionMatrix

_INPUTS = """
Args:
    predictions: list of `[H, W]` integer maps, -1 = unlabelled.
    references: list of `[H, W]` integer maps of the predictions' sizes.
Returns:
    The scalar fields of `ov_segmentation.metrics.SegmentationScores`, and the lists `iou_per_class` and
    `accuracy_per_class` (NaN: the class does not occur).
"""


class OpenVocabularySegmentationMetric(evaluate.Metric):
    """Mean IoU, pixel accuracy and the like over label maps of any size, streamed.

    Unlike evaluate's own metrics it keeps no map and writes no file: each `add` or `add_batch` goes into a confusion
    matrix. With several processes give every one its own part of the data and pass `accelerator` to `compute`.

    Args:
        num_classes: number of classes.
        ignore_index: ground-truth ids that are not scored: one, several, or None.
        averaging: `"ground_truth"` or `"union"`, see `ConfusionMatrix.compute`.
        seen: ids of the classes seen in training, for seen, unseen and harmonic mean IoU.
        **kwargs: for `evaluate.Metric` (`experiment_id`, ...).
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int | list[int] | None = -100,
        averaging: Averaging = "ground_truth",
        seen: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.matrix = ConfusionMatrix(num_classes, ignore_index)
        self.averaging: Averaging = averaging
        self.seen = seen
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        label_map = datasets.Sequence(datasets.Sequence(datasets.Value("int32")))
        return evaluate.MetricInfo(
            description="Open-vocabulary semantic segmentation scores from one streaming confusion matrix.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": label_map, "references": label_map}),
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Count one picture: `prediction` and `reference` are `[H, W]` integer maps."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Count several pictures: lists of `[H, W]` integer maps, or `[B, H, W]` arrays."""
        if kwargs:
            raise ValueError(f"The metric takes predictions and references, got also {sorted(kwargs)}.")
        if predictions is None or references is None:
            raise ValueError("The metric needs both predictions and references.")
        self.matrix.update(_without_lists(predictions), _without_lists(references))

    def compute(
        self, *, predictions: Any = None, references: Any = None, accelerator: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Scores of all pictures added since the last `compute`, and of those given here.

        `accelerator`: an `accelerate.Accelerator`; the counts of all its processes are summed. `averaging` and `seen`
        override the metric's own for this call.
        """
        options = {"averaging": self.averaging, "seen": self.seen}
        options.update({name: kwargs.pop(name) for name in tuple(options) if name in kwargs})
        if kwargs or predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references, **kwargs)
        matrix = self.matrix if accelerator is None else self.matrix.reduce(accelerator)
        scores = matrix.compute(**options)
        self.matrix.reset()
        per_class = {name: getattr(scores, name).tolist() for name in ("iou_per_class", "accuracy_per_class")}
        return {**scores.figures(), **per_class}

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, Any]:
        """`compute` does all the work; `evaluate.Metric` asks for this method."""
        return self.compute(predictions=predictions, references=references)


def _without_lists(maps: Any) -> Any:
    """Nested Python lists, as evaluate's users give them, become arrays, one a picture."""
    return [np.asarray(item) if isinstance(item, list) else item for item in maps] if isinstance(maps, list) else maps
