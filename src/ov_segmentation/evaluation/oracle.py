"""Masks or names? What a model would score if one of the two were perfect (after OVSeg's figure 1).

Both are defined on what every method has, its scores and its map, so that methods can be compared:

- oracle masks: the regions are the ground truth's (one per class and picture), the model only names them: a region gets
  the class with the highest mean score inside it.
- oracle classes: the segments are the model's (one per class of its map), only their names are given: a segment gets
  the ground-truth class that most of its scored pixels have.

If oracle masks score far above the plain map, the masks are the problem; if oracle classes do, the names.
"""

from __future__ import annotations

from typing import Literal

import torch

from ..metrics import UNLABELLED
from ..modeling_outputs import OpenVocabularySegmentationOutput
from ..region_scores import region_scores

Oracle = Literal["masks", "classes"]
ORACLES = ("masks", "classes")


def with_oracle_masks(
    outputs: OpenVocabularySegmentationOutput, label_map: torch.Tensor, resizes_mask_logits: bool
) -> torch.Tensor:
    """The names that a model gives to the ground truth's regions, as a map.

    Args:
        outputs: for one picture.
        label_map: int `[H, W]`, negative = not scored.
        resizes_mask_logits: of the image processor.

    Returns:
        int64 `[H, W]` indices of the vocabulary; -1 where nothing is scored.
    """
    result = torch.full(label_map.shape, UNLABELLED, dtype=torch.int64)
    scored = label_map >= 0
    if not scored.any():
        return result
    _, inverse = label_map[scored].unique(return_inverse=True)
    regions = result.clone()
    regions[scored] = inverse
    names = region_scores(outputs, [regions], resizes_mask_logits)[0].argmax(1).cpu()
    result[scored] = names[inverse]
    return result


def with_oracle_classes(
    prediction: torch.Tensor, label_map: torch.Tensor, label_of_class: torch.Tensor
) -> torch.Tensor:
    """A model's segments under the names of the ground truth.

    Args:
        prediction: int64 `[H, W]` indices of the vocabulary, -1 = unlabelled.
        label_map: int `[H, W]`, negative = not scored.
        label_of_class: `[K]` the id in the label maps of each name.

    Returns:
        int64 `[H, W]` ids of the label maps; unlabelled pixels stay.
    """
    inside = (label_map >= 0) & (prediction >= 0)
    num_labels = int(label_of_class.max()) + 1
    pairs = prediction[inside] * num_labels + label_map[inside].long()
    counts = torch.bincount(pairs, minlength=len(label_of_class) * num_labels).view(len(label_of_class), num_labels)
    # a segment without a scored pixel has no say
    names = torch.where(counts.sum(1) > 0, counts.argmax(1), label_of_class)
    return torch.where(prediction >= 0, names[prediction.clamp(min=0)], UNLABELLED)
