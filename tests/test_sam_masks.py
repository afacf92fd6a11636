"""Non-maximum suppression against a plain reference, and the steps from SAM's logits to masks of the picture."""

from __future__ import annotations

import pytest
import torch

from ov_segmentation.layers.mask_nms import box_overlaps, mask_overlaps, suppress
from ov_segmentation.layers.sam_masks import FAR_OUTSIDE, _on_canvas, make_exclusive, point_grid, stability


def overlap_of_boxes(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(0, width) * max(0, height)
    union = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - common
    return common / union if union else 0.0


def greedy(overlap, scores: list[float], threshold: float) -> list[int]:
    """The textbook's loop."""
    waiting, kept = sorted(range(len(scores)), key=lambda i: (-scores[i], i)), []
    while waiting:
        best = waiting.pop(0)
        kept.append(best)
        waiting = [i for i in waiting if overlap(best, i) <= threshold]
    return kept


@pytest.mark.parametrize("seed", range(20))
def test_boxes_against_the_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 12, (40, 2), generator=generator)
    boxes = torch.cat([corners, corners + torch.randint(0, 9, (40, 2), generator=generator)], dim=1)
    scores = torch.randint(0, 8, (40,), generator=generator) / 8  # with ties
    rows = boxes.tolist()
    for threshold in (0.0, 0.3, 0.7):
        expected = greedy(lambda i, j: overlap_of_boxes(rows[i], rows[j]), scores.tolist(), threshold)
        assert suppress(box_overlaps(boxes), scores, threshold).tolist() == expected


@pytest.mark.parametrize("seed", range(5))
def test_masks_against_the_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(25, 4, 5, generator=generator) > 0.5
    masks[0] = False
    scores = torch.rand(25, generator=generator)

    def overlap(i: int, j: int) -> float:
        return (masks[i] & masks[j]).sum().item() / max(1, (masks[i] | masks[j]).sum().item())

    for threshold in (0.25, 0.35, 0.5):
        assert suppress(mask_overlaps(masks), scores, threshold).tolist() == greedy(overlap, scores.tolist(), threshold)


def test_a_suppressed_candidate_suppresses_nothing() -> None:
    """0 takes out 1; 2 overlaps 1 alone and stays; 3 overlaps 2 and goes."""
    overlaps = torch.eye(5)
    for i, j in ((0, 1), (1, 2), (2, 3)):
        overlaps[i, j] = overlaps[j, i] = 0.9
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    assert suppress(overlaps, scores, 0.5).tolist() == [0, 2, 4]


def test_nothing_to_suppress() -> None:
    assert suppress(box_overlaps(torch.zeros(0, 4)), torch.zeros(0), 0.5).tolist() == []


def test_point_grid_covers_the_picture() -> None:
    points = point_grid(4, 40.0, 80.0)
    assert points.shape == (16, 2)
    assert points[:5].tolist() == [[10, 5], [30, 5], [50, 5], [70, 5], [10, 15]]


def test_stability_is_an_overlap() -> None:
    logits = torch.tensor([[[3.0, 3.0, 0.5, -0.5, -3.0]], [[-3.0] * 5]])
    assert stability(logits, 1.0).tolist() == [0.5, 0.0]


def test_exclusive_masks_keep_the_smallest() -> None:
    large, small = torch.full((4, 4), 5.0), torch.full((4, 4), -1.0)
    small[1:3, 1:3] = 2.0
    large[3] = -4.0
    found = make_exclusive(torch.stack([large, small]))
    assert (found[0, 1:3, 1:3] == FAR_OUTSIDE).all()
    assert (found[1, 1:3, 1:3] == 2.0).all()
    assert (found[0, 0] == 5.0).all()
    assert (found[1, 0] == FAR_OUTSIDE).all()
    assert torch.equal(found[:, 3], torch.stack([large[3], small[3]]))  # pixels of no mask stay undecided


def test_masks_land_where_they_were_seen() -> None:
    """SAM saw a picture of 32 x 64 in a square of 64; the frame is 48 x 64, of which 16 rows are padding."""
    square = torch.full((1, 16, 16), -10.0)  # a quarter of SAM's input
    square[:, 2:5, 4:12] = 10.0
    found = _on_canvas(square, (48 / 64, 1.0), (12, 16), exclusive=False)
    assert found.shape == (1, 12, 16)
    torch.testing.assert_close(found, square[:, :12])
