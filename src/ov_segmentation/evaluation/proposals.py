"""Proposal recall of a benchmark: both definitions of `ov_segmentation.proposal_recall`, at IoU 0.3 and 0.5."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import interpolate

from ..modeling_outputs import OpenVocabularySegmentationOutput
from ..proposal_recall import ProposalScores, precision_of_proposals, recall_of_regions
from .state import EvaluationError

THRESHOLDS = (0.3, 0.5)


def count_proposals(
    outputs: OpenVocabularySegmentationOutput,
    prediction: torch.Tensor,
    label_map: torch.Tensor,
    seen: Sequence[int] | None,
) -> dict[str, ProposalScores]:
    """One picture's counts, by "proposals@0.3", "proposals@0.5", "regions@0.3" and "regions@0.5".

    Args:
        outputs: for one picture. Without mask proposals (per-class family) there are counts of regions alone.
        prediction: int64 `[H, W]`, the final map of label ids, -1 = unlabelled.
        label_map: int `[H, W]`, negative = ignored.
        seen: ids of the classes seen in training; None: all.

    Raises:
        EvaluationError: proposals of sliding windows, each of which shows a part of the picture.
    """
    label_map = label_map.long()
    seen = label_map.clamp(min=0).unique().tolist() if seen is None else seen
    counts = {}
    if outputs.masks_queries_logits is not None:
        if outputs.view_boxes is not None:
            raise EvaluationError(
                "--proposal-recall compares masks of the whole picture: leave it out, or --set sliding_window=false."
            )
        logits = outputs.masks_queries_logits[:1].float()
        padded, resized = (sizes[0].tolist() for sizes in (outputs.padded_sizes, outputs.reshaped_input_sizes))
        logits = interpolate(logits, size=padded, mode="bilinear", align_corners=False)[0]
        logits = logits[:, : resized[0], : resized[1]].cpu()
        for iou in THRESHOLDS:
            counts[f"proposals@{iou}"] = precision_of_proposals(logits, label_map, seen, iou)
    for iou in THRESHOLDS:
        counts[f"regions@{iou}"] = recall_of_regions(prediction, label_map, seen, iou)
    return counts
