"""How good class-agnostic proposals are, by the two definitions that DeOP's published code has.

DeOP's Table 8 says "Recall@30/50" and does not say by which; the thresholds suggest `recall_of_regions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import interpolate


@dataclass
class ProposalScores:
    """Counts over a data set, and the shares they give; NaN where there is nothing to divide by.

    Attributes:
        candidates: proposals (`precision_of_proposals`) or predicted regions (`recall_of_regions`).
        hits_seen, hits_unseen: candidates that fit a region of a seen or unseen class.
        found_seen, found_unseen: regions that a candidate fits.
        regions_seen, regions_unseen: ground-truth regions.
    """

    candidates: int = 0
    hits_seen: int = 0
    hits_unseen: int = 0
    found_seen: int = 0
    found_unseen: int = 0
    regions_seen: int = 0
    regions_unseen: int = 0

    def __iadd__(self, other: ProposalScores) -> ProposalScores:
        """Add the counts of other pictures."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    def figures(self) -> dict[str, float]:
        """All shares.

        "precision": hits / candidates; the original calls it "AP" of proposals and "Recall" of predicted regions.
        "hits_per_region_seen", "_unseen": the original's R_Seen and R_Unseen; above 1 where several candidates fit the
        same region. "recall", "recall_seen", "recall_unseen": the share of regions that were found at all.
        """
        regions, found = self.regions_seen + self.regions_unseen, self.found_seen + self.found_unseen
        return {
            "precision": _share(self.hits_seen + self.hits_unseen, self.candidates),
            "hits_per_region_seen": _share(self.hits_seen, self.regions_seen),
            "hits_per_region_unseen": _share(self.hits_unseen, self.regions_unseen),
            "recall": _share(found, regions),
            "recall_seen": _share(self.found_seen, self.regions_seen),
            "recall_unseen": _share(self.found_unseen, self.regions_unseen),
        }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def precision_of_proposals(
    mask_logits: torch.Tensor,
    label_map: torch.Tensor,
    seen: Sequence[int],
    iou: float = 0.5,
    count_ignored: bool = True,
) -> ProposalScores:
    """Proposals that fit a ground-truth region (option SEG_AP of the original, with `iou` 0.5).

    A proposal (sigmoid, resized bilinearly to the label map, above 0.5; empty ones do not count) hits the first region,
    in ascending order of its class, with which its IoU exceeds `iou`.

    Args:
        mask_logits: `[N, h, w]` over the picture, padding cropped.
        label_map: int64 `[H, W]`; negative = ignored.
        seen: ids of the classes seen in training.
        iou: threshold.
        count_ignored: the ignored pixels are one region more, the last and a seen one, as in the original.
    """
    probabilities = mask_logits[None].float().sigmoid()
    masks = interpolate(probabilities, size=tuple(label_map.shape), mode="bilinear", align_corners=False)[0] > 0.5
    return _count(masks, label_map, seen, iou, count_ignored)


def recall_of_regions(
    segmentation: torch.Tensor,
    label_map: torch.Tensor,
    seen: Sequence[int],
    iou: float = 0.3,
    count_ignored: bool = True,
) -> ProposalScores:
    """Regions of a final label map that fit a ground-truth region (option SEG_AP_OUTPUT of the original).

    Args:
        segmentation: int64 `[H, W]`, the predicted classes; each one that occurs is a region.
        label_map, seen, iou, count_ignored: see `precision_of_proposals`.
    """
    predicted = segmentation.unique()
    return _count(segmentation[None] == predicted[:, None, None], label_map, seen, iou, count_ignored)


def _count(
    masks: torch.Tensor, label_map: torch.Tensor, seen: Sequence[int], iou: float, count_ignored: bool
) -> ProposalScores:
    if not 0 <= iou < 1:
        raise ValueError(f"iou is a threshold in [0, 1), got {iou}.")
    if masks.shape[1:] != label_map.shape:
        raise ValueError(f"Masks of {list(masks.shape[1:])} pixels do not fit a label map of {list(label_map.shape)}.")
    label_map = label_map.clamp(min=-1)
    classes = label_map.unique()
    known = classes[classes >= 0]
    # the ignored region comes last: the original's id for it, 255, is the highest
    classes = torch.cat([known, classes[classes < 0]]) if count_ignored else known
    regions = (label_map[None] == classes[:, None, None]).flatten(1).float()
    flat = masks.flatten(1).to(regions)
    flat = flat[flat.any(dim=1)]
    common = flat @ regions.T
    fits = common / (flat.sum(dim=1)[:, None] + regions.sum(dim=1)[None] - common) > iou
    is_seen = torch.isin(classes, torch.as_tensor(list(seen), device=classes.device)) | (classes < 0)
    # the first region that fits takes the hit
    first = fits & (fits.int().cumsum(dim=1) == 1)
    found = fits.any(dim=0)
    return ProposalScores(
        candidates=len(flat),
        hits_seen=int(first[:, is_seen].sum()),
        hits_unseen=int(first[:, ~is_seen].sum()),
        found_seen=int((found & is_seen).sum()),
        found_unseen=int((found & ~is_seen).sum()),
        regions_seen=int(is_seen.sum()),
        regions_unseen=int((~is_seen).sum()),
    )


__all__ = ["ProposalScores", "precision_of_proposals", "recall_of_regions"]
