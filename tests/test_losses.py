"""The set criterion against plain references written loop by loop."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import distributed

from ov_segmentation.losses import (
    MaskClassificationCriterion,
    Match,
    Prediction,
    SeededDraws,
    masks_from_labels,
    sample_points,
    sum_losses,
)

COSTS = {"class": 2.0, "mask": 5.0, "dice": 5.0}
WEIGHTS = {"ce": 2.0, "mask": 5.0, "dice": 5.0}


def make_prediction(batch: int = 2, queries: int = 5, classes: int = 4, size: int = 6, suffix: str = "") -> Prediction:
    generator = torch.Generator().manual_seed(len(suffix))
    return Prediction(
        suffix,
        torch.randn(batch, queries, classes + 1, generator=generator).requires_grad_(),
        torch.randn(batch, queries, size, size, generator=generator).requires_grad_(),
    )


def make_labels() -> torch.Tensor:
    labels = torch.full((2, 12, 12), -100)
    labels[0, :6], labels[0, 6:, :4] = 3, 1
    labels[1, 2:9, 2:9] = 0
    return labels


def test_masks_from_labels_leaves_ignored_pixels_out() -> None:
    first, second = masks_from_labels(make_labels())
    assert first.classes.tolist() == [1, 3] and second.classes.tolist() == [0]
    assert first.masks.sum().item() == 6 * 12 + 6 * 4 and second.masks.sum().item() == 49


def test_sample_points_is_bilinear_between_pixel_centres() -> None:
    maps = torch.arange(4.0).view(1, 2, 2)
    points = torch.tensor([[[0.25, 0.25], [0.75, 0.25], [0.5, 0.5], [0.0, 0.0]]])
    assert sample_points(maps, points).tolist() == [[0.0, 1.0, 1.5, 0.0]]


@pytest.mark.parametrize(("mask_loss", "num_points"), [("bce", None), ("focal", None), ("bce", 64)])
def test_match_is_the_cheapest_assignment(mask_loss: str, num_points: int | None) -> None:
    criterion = MaskClassificationCriterion(COSTS, WEIGHTS, mask_loss, num_points)
    prediction, targets = make_prediction(), masks_from_labels(make_labels())
    points = SeededDraws(torch.tensor([5, 6]))
    matches = criterion.match(prediction, targets, SeededDraws(torch.tensor([5, 6])))
    for i, (target, match) in enumerate(zip(targets, matches, strict=True)):
        masks = target.masks.float()
        if num_points is None:
            wanted = torch.nn.functional.interpolate(masks[:, None], size=(6, 6), mode="nearest").flatten(1)
            logits = prediction.mask_logits[i].flatten(1)
        else:
            drawn = points.uniform("matcher", i, (1, num_points, 2))
            wanted = sample_points(masks, drawn.expand(len(masks), -1, -1))
            logits = sample_points(prediction.mask_logits[i], drawn.expand(5, -1, -1))

        def cost(q: int, t: int, i: int = i, logits=logits, wanted=wanted, target=target) -> float:
            p, y = logits[q].sigmoid(), wanted[t]
            error = -(y * p.log() + (1 - y) * (1 - p).log())
            if mask_loss == "focal":
                hit = p * y + (1 - p) * (1 - y)
                if ((y == 0) | (y == 1)).all():
                    error = torch.where(y == 1, 0.25, 0.75) * (1 - hit) ** 2 * error
            dice = 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
            probability = prediction.class_logits[i, q].softmax(-1)[target.classes[t]]
            return float(5 * error.mean() + 5 * dice - 2 * probability)

        best = min(
            itertools.permutations(range(5), len(masks)), key=lambda qs: sum(cost(q, t) for t, q in enumerate(qs))
        )
        found = dict(zip(match.targets.tolist(), match.queries.tolist(), strict=True))
        assert [found[t] for t in range(len(masks))] == list(best)


@pytest.mark.parametrize("mask_loss", ["bce", "focal"])
def test_terms_on_whole_masks(mask_loss: str) -> None:
    criterion = MaskClassificationCriterion(COSTS, WEIGHTS, mask_loss)
    prediction, labels = make_prediction(), make_labels()
    matches = [Match(torch.tensor([0, 4]), torch.tensor([1, 0])), Match(torch.tensor([2]), torch.tensor([0]))]
    losses = criterion([prediction], labels, SeededDraws(torch.tensor([0, 0])), {"": matches})

    ce = weights = mask = dice = 0.0
    wanted = {(0, 0): 3, (0, 4): 1, (1, 2): 0}
    upsampled = torch.nn.functional.interpolate(prediction.mask_logits, size=(12, 12), mode="bilinear")
    for b, q in itertools.product(range(2), range(5)):
        target = wanted.get((b, q), 4)
        weight = 0.1 if target == 4 else 1.0
        ce -= weight * prediction.class_logits[b, q].log_softmax(-1)[target].item()
        weights += weight
    for (b, q), c in wanted.items():
        p, y = upsampled[b, q].sigmoid(), (labels[b] == c).float()
        hit = p * y + (1 - p) * (1 - y)
        focal = torch.where(y == 1, 0.25, 0.75) * (1 - hit) ** 2
        mask += ((focal if mask_loss == "focal" else 1.0) * -hit.log()).mean().item()
        dice += 1 - (2 * (p * y).sum() + 1).item() / (p.sum() + y.sum() + 1).item()
    assert losses["loss_ce"].item() == pytest.approx(2 * ce / weights, rel=1e-5)
    assert losses["loss_mask"].item() == pytest.approx(5 * mask / 3, rel=1e-5)
    assert losses["loss_dice"].item() == pytest.approx(5 * dice / 3, rel=1e-5)


def test_points_are_the_uncertain_candidates_and_fresh_ones() -> None:
    criterion = MaskClassificationCriterion(COSTS, WEIGHTS, num_points=40)
    maps = torch.linspace(-3, 3, 16).expand(2, 16, 16).contiguous()  # zero at the vertical middle line
    points = criterion.uncertain_points(maps, "", [2], SeededDraws(torch.tensor([1])))
    assert points.shape == (2, 40, 2)
    distance = (points[:, :30, 0] - 0.5).abs()
    assert distance.max() < 0.2 < (points[:, 30:, 0] - 0.5).abs().max()


def test_draws_depend_on_the_pictures_seed_alone() -> None:
    criterion = MaskClassificationCriterion(COSTS, WEIGHTS, num_points=32)
    prediction, labels = make_prediction(), make_labels()
    targets = masks_from_labels(labels)
    together = criterion.match(prediction, targets, SeededDraws(torch.tensor([7, 8])))
    second = Prediction("", prediction.class_logits[1:], prediction.mask_logits[1:])
    alone = criterion.match(second, targets[1:], SeededDraws(torch.tensor([8])))
    assert torch.equal(together[1].queries, alone[0].queries)
    assert torch.equal(
        SeededDraws(torch.tensor([7, 8])).uniform("", 1, (3,)), SeededDraws(torch.tensor([8])).uniform("", 0, (3,))
    )


def test_a_batch_of_ignored_pixels_gives_a_finite_loss_and_gradients() -> None:
    criterion = MaskClassificationCriterion(COSTS, WEIGHTS, num_points=32)
    main, auxiliary = make_prediction(), make_prediction(suffix="_0")
    losses = criterion([main, auxiliary], torch.full((2, 12, 12), -100), SeededDraws(torch.tensor([1, 2])))
    assert set(losses) == {f"loss_{kind}{suffix}" for kind in ("ce", "mask", "dice") for suffix in ("", "_0")}
    sum_losses(losses).backward()
    assert losses["loss_mask"].item() == losses["loss_dice"].item() == 0.0
    assert math.isfinite(losses["loss_ce"].item())
    assert main.mask_logits.grad.abs().max() == 0 and auxiliary.class_logits.grad.isfinite().all()


def test_one_mask_beside_processes_without_any_counts_as_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    criterion = MaskClassificationCriterion(COSTS, WEIGHTS, num_points=32)
    labels = torch.full((2, 12, 12), -100)
    labels[0, :6] = 3
    prediction, seeds = make_prediction(), torch.tensor([1, 2])
    alone = criterion([prediction], labels, SeededDraws(seeds))
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(distributed, "all_reduce", lambda total: None)  # the three others add nothing
    shared = criterion([prediction], labels, SeededDraws(seeds))
    for name in ("loss_mask", "loss_dice"):
        torch.testing.assert_close(shared[name] / 4, alone[name])
