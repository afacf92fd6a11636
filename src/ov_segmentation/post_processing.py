"""From a model's outputs to label maps, scores and confidence. Needs nothing but the outputs and the sizes wanted.

Order of operations, as the methods' papers and released evaluations have it (all interpolation bilinear, half-pixel
centres, no anti-aliasing):

- mask family: mask logits to the padded input size, padding cropped. SAN (`resizes_mask_logits`): logits to the target
  size, then sigmoid, then the merge with `class_queries_scores`. OVSeg, DeOP: sigmoid (or sigmoid > `mask_threshold`),
  merge, then to the target size.
- per-class family: `score_function` at the resolution of the logits, then to the target size. The maps cover the
  picture exactly: the models make their own input from the part that `reshaped_input_sizes` names; nothing is cropped.
- sliding views, both families: maps to the size of the view's box (the global view: to a window's size), sigmoid
  ("softmax": before), merge; windows averaged on the canvas, then averaged with the global view's scores, interpolated
  to the canvas; then to the target size. The canvas covers the picture exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput

from .modeling_outputs import OpenVocabularySegmentationOutput
from .precision import full_precision
from .score_argmax import LabelMap, draw_label_map, undominated_classes
from .score_fields import ClassField, Field, MaskField, StitchedField
from .vocabulary import NO_OBJECT, resolve_background

UNLABELLED = -1

Background = int | str | Iterable[int | str]


class OpenVocabularySegmentationPostProcessorOutput(SemanticSegmentationPostProcessorOutput):
    """One picture's result.

    Attributes:
        segmentation: int64 `[H, W]`, class indices in the caller's order; -1 = unlabelled.
        segmentation_scores: `[K, H, W]`, the method's raw scores (they may exceed 1), or None if not asked for.
        confidence: `[H, W]`, best score / sum of all scores, 0 where all scores are 0, or None if not asked for.
    """

    confidence: torch.Tensor | None


@torch.no_grad()
def post_process_semantic_segmentation(
    outputs: OpenVocabularySegmentationOutput,
    target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None,
    return_segmentation_scores: bool = False,
    return_confidence: bool = False,
    background: Background | None = None,
    threshold: float | None = None,
    resizes_mask_logits: bool = True,
) -> list[torch.Tensor] | list[OpenVocabularySegmentationPostProcessorOutput]:
    """Label maps of a batch, one exclusive class per pixel.

    Without `return_segmentation_scores` nothing of size K x H x W is held.

    Args:
        outputs: of a model of either family, also with sliding views.
        target_sizes: (height, width) per picture, e.g. `batch["original_sizes"]`; None: `outputs.reshaped_input_sizes`.
        return_segmentation_scores: also all scores.
        return_confidence: also best score / sum of all scores per pixel.
        background: indices of classes that count as background: their pixels get the smallest of the indices.
            "no_object" (mask family; alone or in the list): the query's no-object probability is merged like a class,
            its score counts in the sum, and the pixels that it wins are -1. Names other than that are turned into
            indices by the processor and the pipeline. None: every pixel gets a class.
        threshold: pixels whose confidence is below it, or whose scores are all 0, become -1.
        resizes_mask_logits: mask family without views: what is interpolated to the target size, see the module's text.

    Returns:
        A list of int64 `[H, W]` label maps, or with either flag a list of
        `OpenVocabularySegmentationPostProcessorOutput`.

    Raises:
        ValueError: outputs of neither family, with NaN, or with rows that are not pictures x views; a number of target
            sizes that differs from the number of pictures; a background index out of range; a threshold not in [0, 1].
        TypeError: outputs that no model returns, a background class that is no index, a threshold that is no number.
    """
    check_threshold(threshold)
    num_pictures, num_classes = count_pictures(outputs)
    sizes = _target_sizes(outputs, target_sizes, num_pictures)
    folded, no_object = _background(background, num_classes, outputs.logits is not None)
    with_total = return_confidence or threshold is not None
    fields = score_fields(outputs, sizes, resizes_mask_logits, no_object, pruned=not return_segmentation_scores)
    results = []
    with full_precision(prediction_maps(outputs)):
        for (field, classes), size in zip(fields, sizes, strict=True):
            drawn = draw_label_map(field, size, with_total, return_segmentation_scores)
            results.append(_finish(drawn, classes, num_classes, folded, with_total, threshold))
    if not (return_segmentation_scores or return_confidence):
        return [result["segmentation"] for result in results]
    for result in results:
        result["confidence"] = result["confidence"] if return_confidence else None
    return [OpenVocabularySegmentationPostProcessorOutput(result) for result in results]


def check_threshold(threshold: float | None) -> None:
    """Check what confidences are compared with.

    Raises:
        TypeError: neither a number nor None.
        ValueError: a number not in [0, 1].
    """
    if threshold is None:
        return
    message = f"threshold is a confidence between 0 and 1, got {threshold!r}."
    if not isinstance(threshold, Real):
        raise TypeError(message)
    if not 0 <= threshold <= 1:
        raise ValueError(message)


def count_pictures(outputs: OpenVocabularySegmentationOutput) -> tuple[int, int]:
    """Number of pictures and of classes in the outputs of a model of either family.

    Raises:
        TypeError: something else.
        ValueError: outputs of neither family, or with rows that are not pictures x views.
    """
    if not hasattr(outputs, "logits"):
        raise TypeError(
            f"outputs must be the OpenVocabularySegmentationOutput that a model returns (without return_dict=False), "
            f"got {type(outputs).__name__}."
        )
    if (outputs.logits is None) == (outputs.class_queries_scores is None):
        raise ValueError(
            "The outputs must hold either logits (per-class family) or class_queries_scores and masks_queries_logits "
            "(mask family)."
        )
    num_rows, num_classes = (
        outputs.logits.shape[:2]
        if outputs.logits is not None
        else (len(outputs.class_queries_scores), outputs.class_queries_scores.shape[2])
    )
    num_views = 1 if outputs.view_boxes is None else len(outputs.view_boxes)
    if num_rows % num_views:
        raise ValueError(f"{num_rows} rows of output are not a multiple of the {num_views} sliding views.")
    return num_rows // num_views, num_classes


def score_fields(
    outputs: OpenVocabularySegmentationOutput,
    sizes: Sequence[tuple[int, int]],
    resizes_mask_logits: bool = True,
    no_object: bool = False,
    pruned: bool = False,
) -> Iterator[tuple[Field, torch.Tensor]]:
    """Per picture its scores, not yet evaluated anywhere, and the indices of the classes that they are of. Use it
    within `full_precision(prediction_maps(outputs))`.

    Args:
        sizes: (height, width) that each picture's scores are meant for.
        no_object: mask family: no-object is one more class behind the others.
        pruned: leave out classes that cannot win a pixel.
    """
    num_views = 1 if outputs.view_boxes is None else len(outputs.view_boxes)
    for picture, size in enumerate(sizes):
        rows = slice(picture * num_views, (picture + 1) * num_views)
        if outputs.logits is not None:
            yield _class_field(outputs, rows, pruned)
        else:
            target = size if resizes_mask_logits and outputs.view_boxes is None else None
            yield _mask_field(outputs, rows, picture, target, no_object, pruned)


def prediction_maps(outputs: OpenVocabularySegmentationOutput) -> torch.Tensor:
    """The logits of a model of either family that have a height and a width."""
    return outputs.masks_queries_logits if outputs.logits is None else outputs.logits


def _channels_last(views: torch.Tensor) -> list[torch.Tensor]:
    """Each of `[V, C, h, w]` as float32 `[h, w, C]`; of several views no second copy is made."""
    views = views.float().permute(0, 2, 3, 1)
    if not all(view.isfinite().all() for view in views):
        raise ValueError("The outputs hold NaN or infinite logits: check the pictures and the model's precision.")
    return list(views if len(views) > 1 else views.contiguous())


def _pair(sizes: Any) -> tuple[int, int]:
    height, width = (int(side) for side in sizes)
    return height, width


def _target_sizes(
    outputs: OpenVocabularySegmentationOutput, target_sizes: Any, num_pictures: int
) -> list[tuple[int, int]]:
    if target_sizes is None:
        target_sizes = outputs.reshaped_input_sizes
        if target_sizes is None:
            raise ValueError(
                "The outputs hold no reshaped_input_sizes: pass target_sizes, one (height, width) per picture."
            )
    try:
        sizes = [_pair(size) for size in target_sizes]
    except (TypeError, ValueError):
        raise ValueError(f"target_sizes must be one (height, width) per picture, got {target_sizes}.") from None
    if len(sizes) != num_pictures:
        raise ValueError(f"{num_pictures} pictures need as many target sizes (height, width), got {len(sizes)}.")
    if any(side < 1 for size in sizes for side in size):
        raise ValueError(f"Target sizes must be positive, got {sizes}.")
    return sizes


def _background(background: Background | None, num_classes: int, per_class: bool) -> tuple[list[int], bool]:
    """The indices to fold, ascending, and whether no-object competes."""
    if background is None:
        return [], False
    entries = [background] if isinstance(background, str) or not isinstance(background, Iterable) else list(background)
    indices = resolve_background([entry for entry in entries if not isinstance(entry, str)], None) or []
    names = {entry for entry in entries if isinstance(entry, str)}
    if names - {NO_OBJECT}:
        raise ValueError(
            f"background names {sorted(names - {NO_OBJECT})} cannot be resolved here: give their indices, or let the "
            f"processor or the pipeline look them up."
        )
    if names and per_class:
        raise ValueError('background="no_object" needs a method with a no-object class (OVSeg, SAN, DeOP).')
    wrong = [index for index in indices if index >= num_classes]
    if wrong:
        raise ValueError(f"background indices {wrong} are out of range: there are {num_classes} classes.")
    return indices, bool(names)


def _class_field(outputs: OpenVocabularySegmentationOutput, rows: slice, pruned: bool) -> tuple[Field, torch.Tensor]:
    logits, kept = outputs.logits[rows], outputs.kept_classes
    kept = None if kept is None else kept[rows]
    classes = torch.arange(logits.shape[1], device=logits.device)
    if outputs.score_function not in ("sigmoid", "softmax"):
        raise ValueError(f'score_function must be "sigmoid" or "softmax", got {outputs.score_function!r}.')
    if outputs.score_function == "softmax":
        logits = logits.float().softmax(1)
    if kept is not None and pruned:
        # a class that is kept nowhere scores 0 everywhere; one stays, so that there is something to look at
        classes = classes[kept.any(0)] if kept.any() else classes[:1]
        logits, kept = logits[:, classes], kept[:, classes]
    maps = _channels_last(logits)
    kept_rows = [None] * len(maps) if kept is None else list(kept)
    if outputs.view_boxes is None:
        scores = maps[0].sigmoid() if outputs.score_function == "sigmoid" else maps[0]
        return ClassField(scores, _pair(scores.shape[:2]), kept=kept_rows[0]), classes
    activation = torch.sigmoid if outputs.score_function == "sigmoid" else None
    boxes = _boxes(outputs)
    fields = [
        ClassField(view, size, activation, row) for view, row, size in zip(maps, kept_rows, _view_sizes(outputs, boxes))
    ]
    return StitchedField(fields, boxes, _pair(outputs.canvas_size)), classes


def _mask_field(
    outputs: OpenVocabularySegmentationOutput,
    rows: slice,
    picture: int,
    target: tuple[int, int] | None,
    no_object: bool,
    pruned: bool,
) -> tuple[Field, torch.Tensor]:
    """`target`: interpolate mask logits on to this size; None: stay at the input's size."""
    weights = outputs.class_queries_scores[rows].float()
    if not (weights >= 0).all():
        raise ValueError("class_queries_scores must be non-negative numbers, got negative ones or NaN.")
    if no_object:
        if outputs.class_queries_logits is None:
            raise ValueError('background="no_object" needs class_queries_logits in the outputs.')
        weights = torch.cat([weights, outputs.class_queries_logits[rows].float().softmax(-1)[..., -1:]], dim=-1)
    totals = weights.sum(-1)
    classes = torch.arange(weights.shape[-1], device=weights.device)
    if pruned:
        classes = undominated_classes(weights.flatten(0, 1))
        weights = weights[..., classes]
    masks = _channels_last(outputs.masks_queries_logits[rows])
    limit = outputs.mask_threshold

    def activation(logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid() if limit is None else (logits.sigmoid() > limit).float()

    if outputs.view_boxes is None:
        steps = [(_pair(outputs.padded_sizes[picture]), _pair(outputs.reshaped_input_sizes[picture]))]
        if target is not None:
            steps.append((target, target))
        return MaskField(masks[0], weights[0], totals[0], steps, activation), classes
    boxes = _boxes(outputs)
    fields = [
        MaskField(*view, [(size, size)], activation)
        for view, size in zip(zip(masks, weights, totals), _view_sizes(outputs, boxes))
    ]
    return StitchedField(fields, boxes, _pair(outputs.canvas_size)), classes


def _boxes(outputs: OpenVocabularySegmentationOutput) -> list[list[int]]:
    if outputs.canvas_size is None:
        raise ValueError("Outputs with view_boxes need the canvas_size that the boxes refer to.")
    return torch.as_tensor(outputs.view_boxes).tolist()


def _view_sizes(outputs: OpenVocabularySegmentationOutput, boxes: list[list[int]]) -> list[tuple[int, int]]:
    """The sizes (height, width) at which views are scored: their boxes', and a window's for the global view."""
    sizes = [(y1 - y0, x1 - x0) for x0, y0, x1, y1 in boxes]
    if sizes[-1] == _pair(outputs.canvas_size):
        sizes[-1] = sizes[0]
    return sizes


def _finish(
    drawn: LabelMap,
    classes: torch.Tensor,
    num_classes: int,
    folded: list[int],
    with_total: bool,
    threshold: float | None,
) -> dict[str, torch.Tensor | None]:
    """Original class indices, background, confidence, threshold. An index of `num_classes` stands for no-object."""
    segmentation = torch.where(drawn.best > 0, classes[drawn.index], 0)
    if folded:
        segmentation[torch.isin(segmentation, torch.tensor(folded, device=segmentation.device))] = folded[0]
    segmentation[segmentation == num_classes] = UNLABELLED
    confidence = None
    if with_total:
        # a best score is never above the sum, but its rounding may be
        confidence = torch.where(drawn.total > 0, drawn.best / drawn.total, 0).clamp(max=1)
        if threshold is not None:
            segmentation[(confidence < threshold) | (drawn.best == 0)] = UNLABELLED
    scores = None if drawn.scores is None else drawn.scores[:num_classes]
    return {"segmentation": segmentation, "segmentation_scores": scores, "confidence": confidence}
