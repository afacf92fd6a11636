"""Proposal scores against counting by hand and against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from ov_segmentation.proposal_recall import ProposalScores, precision_of_proposals, recall_of_regions

TRUTH = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2], [-100, -100, -100, -100]])
SEEN = [0, 2]


def as_logits(*masks: list[list[int]]) -> torch.Tensor:
    return torch.tensor(masks).float() * 20 - 10


def test_proposals_by_hand() -> None:
    """Fits class 0 exactly; class 1 with IoU 1/2; the ignored row; nothing; empty."""
    proposals = as_logits(
        [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]],
        [[1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]],
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
    )
    half, third = (precision_of_proposals(proposals, TRUTH, SEEN, iou) for iou in (0.5, 0.3))
    assert half == ProposalScores(4, 2, 0, 2, 0, 3, 1), "an IoU of exactly 0.5 does not exceed it"
    assert third == ProposalScores(4, 2, 1, 2, 1, 3, 1)
    assert third.figures()["precision"] == 3 / 4
    assert third.figures()["recall"] == 3 / 4
    without = precision_of_proposals(proposals, TRUTH, SEEN, 0.3, count_ignored=False)
    assert without == ProposalScores(4, 1, 1, 1, 1, 2, 1)


def test_regions_by_hand() -> None:
    found = torch.tensor([[0, 0, 0, 0], [5, 5, 7, 7], [5, 2, 2, 2], [2, 2, 2, 2]])
    scores = recall_of_regions(found, TRUTH, SEEN)
    # the upper row fits class 0 (2/6) and class 1 (2/6), and the first takes the hit; 5 fits class 0 too (2/5); 7 fits
    # class 1 (2/4); the lower rows fit class 2 (3/8), before the ignored region (4/7)
    assert scores == ProposalScores(4, 3, 1, 3, 1, 3, 1)
    figures = scores.figures()
    assert (figures["precision"], figures["hits_per_region_seen"], figures["recall_unseen"]) == (1.0, 1.0, 1.0)


def test_several_candidates_may_fit_one_region() -> None:
    scores = precision_of_proposals(as_logits(*[[[1, 1], [0, 0]]] * 3), torch.tensor([[4, 4], [0, 0]]), [4])
    assert (scores.figures()["hits_per_region_seen"], scores.figures()["recall_seen"]) == (3.0, 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_against_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(-1, 4, (6, 7), generator=generator)
    logits = torch.randn(9, 6, 7, generator=generator)
    hits, found = {True: 0, False: 0}, set()
    for mask in logits > 0:
        fitting = []
        for label in [*range(4), -1]:
            region = truth == label
            if region.any() and (mask & region).sum() / (mask | region).sum() > 0.2:
                fitting.append(label)
        found |= set(fitting)
        if fitting:
            hits[fitting[0] in (1, 3, -1)] += 1
    scores = precision_of_proposals(logits, truth, [1, 3], iou=0.2)
    assert (scores.hits_seen, scores.hits_unseen) == (hits[True], hits[False])
    assert scores.found_seen + scores.found_unseen == len(found)


def test_counts_add_up_and_nothing_is_nan() -> None:
    total = ProposalScores()
    assert all(math.isnan(value) for value in total.figures().values())
    for _ in range(3):
        total += recall_of_regions(TRUTH.clamp(min=0), TRUTH, SEEN)
    assert total.regions_seen == 9
    assert total.candidates == 9


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="threshold"):
        recall_of_regions(TRUTH, TRUTH, SEEN, iou=1.0)
    with pytest.raises(ValueError, match="do not fit"):
        recall_of_regions(TRUTH[1:], TRUTH, SEEN)
