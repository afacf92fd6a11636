"""Mean score of every class inside given regions, without ever holding all scores of a picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .modeling_outputs import OpenVocabularySegmentationOutput
from .post_processing import count_pictures, prediction_maps, score_fields
from .precision import full_precision, widest_float
from .resampling import Bilinear

_BYTES_AT_ONCE = 64 * 2**20


@torch.no_grad()
def region_scores(
    outputs: OpenVocabularySegmentationOutput,
    regions: Sequence[torch.Tensor],
    resizes_mask_logits: bool = True,
) -> list[torch.Tensor]:
    """What a model's scores say about regions that somebody else drew.

    Args:
        outputs: of a model of either family, also with sliding views.
        regions: per picture int64 `[H, W]`: the pixel's region, 0 to R - 1, or -1 for none.
        resizes_mask_logits: see `post_processing.post_process_semantic_segmentation`.

    Returns:
        Per picture `[R, K]`: the mean over a region's pixels of the scores that post-processing computes at the
        regions' size. A region without pixels scores 0.
    """
    num_pictures, num_classes = count_pictures(outputs)
    if len(regions) != num_pictures:
        raise ValueError(f"{num_pictures} pictures need as many maps of regions, got {len(regions)}.")
    sizes = [tuple(region.shape) for region in regions]
    means = []
    with full_precision(prediction_maps(outputs)):
        for (field, _), region in zip(score_fields(outputs, sizes, resizes_mask_logits), regions, strict=True):
            height, width = region.shape
            region = region.to(field.device)
            resize = Bilinear((field.size, (height, width)))
            wide = widest_float(field.device)
            sums = torch.zeros(int(region.max()) + 1, num_classes, dtype=wide, device=field.device)
            every_class = torch.arange(num_classes, device=field.device)
            step = max(1, _BYTES_AT_ONCE // (4 * width * num_classes))
            for top in range(0, height, step):
                rows, columns = (top, min(top + step, height)), (0, width)
                part = region[slice(*rows)]
                inside = part >= 0
                if inside.any():
                    scores = resize(field.scores(*resize.window(rows, columns), every_class), rows, columns)
                    sums.index_add_(0, part[inside], scores[inside].to(wide))
            pixels = torch.bincount(region[region >= 0], minlength=len(sums))
            means.append((sums / pixels.clamp(min=1)[:, None]).float())
    return means
