"""The pseudo prompt generator: k-means against scikit-learn and by hand, probabilities, points, boxes, masks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from ov_segmentation.layers.kmeans import farthest_points, kmeans, squared_distances
from ov_segmentation.layers.pseudo_prompts import PseudoPrompts, generate_pseudo_prompts, relative_probabilities

SIDE = 12
PIXELS = torch.tensor([[x, y] for y in range(SIDE) for x in range(SIDE)], dtype=torch.float64)
SETTINGS = {"num_objects": 5, "temperature": 1.0, "threshold": 0.5, "iterations": 10}


def random_masks(count: int, seed: int = 0) -> torch.Tensor:
    """Masks `[count, SIDE²]` of blobs of all sizes, none of fewer than ten pixels."""
    random = np.random.default_rng(seed)
    masks = []
    while len(masks) < count:
        middle, radius = random.uniform(0, SIDE, (random.integers(1, 5), 2)), random.uniform(1.5, 5)
        near = (np.linalg.norm(PIXELS.numpy()[:, None] - middle, axis=2) < radius).any(axis=1)
        mask = near & (random.random(SIDE**2) < random.uniform(0.5, 1))
        if mask.sum() >= 10:
            masks.append(mask)
    return torch.from_numpy(np.stack(masks))


def by_hand(pixels: np.ndarray, centres: np.ndarray, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's algorithm, one mask and one cluster at a time; the first of equally near centres."""
    centres = centres.copy()
    for _ in range(iterations):
        nearest = ((pixels[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
        for cluster in range(len(centres)):
            if (nearest == cluster).any():
                centres[cluster] = pixels[nearest == cluster].sum(axis=0) / (nearest == cluster).sum()
    return ((pixels[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1), centres


# ---------------------------------------------------------------------- k-means


def test_agrees_with_scikit_learn() -> None:
    """On 200 masks, all at once, from the start that the model uses. The pixels are a little off their grid: on it many
    are equally far from two centres, scikit-learn decides between them by rounding, and the clusters drift apart."""
    off_grid = PIXELS + 0.01 * torch.rand(PIXELS.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    masks = random_masks(200)
    starts, valid = farthest_points(off_grid, masks, masks.int().argmax(dim=1), 5)
    found = kmeans(off_grid, masks, starts, valid, 10)
    assert found.valid.all()
    for mask, start, labels, centres in zip(masks, starts, found.labels, found.centres, strict=True):
        pixels = off_grid[mask].numpy()
        reference = KMeans(5, init=start.numpy(), n_init=1, max_iter=10, tol=0, algorithm="lloyd").fit(pixels)
        distances = ((pixels[:, None] - centres.numpy()) ** 2).sum(axis=2)
        assert distances.min(axis=1).sum() == pytest.approx(reference.inertia_, rel=1e-9)
        nearest, second = np.sort(distances, axis=1)[:, :2].T
        assert (second - nearest > 1e-9).all(), "a pixel is equally far from two centres: choose other noise"
        np.testing.assert_array_equal(labels[mask].numpy(), reference.labels_)
        assert (labels[~mask] == -1).all()


def test_agrees_with_scikit_learn_on_the_grid_where_nothing_is_equally_near() -> None:
    """On the pixels and in the precision of the model: all masks in which no pixel is ever equally far from two
    centres, which would leave the choice to rounding."""
    pixels, masks = PIXELS.float(), random_masks(200)
    starts, valid = farthest_points(pixels, masks, masks.int().argmax(dim=1), 5)
    found = kmeans(pixels, masks, starts, valid, 10)
    compared = 0
    for mask, start, labels, centres in zip(masks, starts.double(), found.labels, found.centres.double(), strict=True):
        inside = PIXELS[mask].numpy()
        if any(_some_pixel_is_equally_near(inside, by_hand(inside, start.numpy(), step)[1]) for step in range(11)):
            continue
        compared += 1
        reference = KMeans(5, init=start.numpy(), n_init=1, max_iter=10, tol=0, algorithm="lloyd").fit(inside)
        distances = ((inside[:, None] - centres.numpy()) ** 2).sum(axis=2)
        assert distances.min(axis=1).sum() == pytest.approx(reference.inertia_, rel=1e-9)
        np.testing.assert_array_equal(labels[mask].numpy(), reference.labels_)
    assert compared >= 30


def _some_pixel_is_equally_near(pixels: np.ndarray, centres: np.ndarray) -> bool:
    nearest, second = np.sort(((pixels[:, None] - centres) ** 2).sum(axis=2), axis=1)[:, :2].T
    return bool((second - nearest < 1e-9).any())


@pytest.mark.parametrize("iterations", [0, 1, 10])
def test_agrees_with_the_algorithm_by_hand(iterations: int) -> None:
    """From the start that the model uses, ties included."""
    masks = random_masks(40, seed=1)
    starts, valid = farthest_points(PIXELS, masks, masks.int().argmax(dim=1), 5)
    found = kmeans(PIXELS, masks, starts, valid, iterations)
    for mask, start, labels, centres in zip(masks, starts, found.labels, found.centres, strict=True):
        expected_labels, expected_centres = by_hand(PIXELS[mask].numpy(), start.numpy(), iterations)
        np.testing.assert_array_equal(labels[mask].numpy(), expected_labels)
        np.testing.assert_array_equal(centres.numpy(), expected_centres)


def test_start_is_the_farthest_pixel_each_time() -> None:
    mask = torch.zeros(1, SIDE * SIDE, dtype=torch.bool)
    # from (0, 0): (5, 0) is farthest; then (2, 0) and (3, 0) are 2 away from the chosen, the first of them is taken
    mask[0, [0, 1, 2, 3, 5]] = True
    centres, valid = farthest_points(PIXELS, mask, torch.tensor([0]), 4)
    assert centres[0].tolist() == [[0, 0], [5, 0], [2, 0], [1, 0]]
    assert valid.tolist() == [[True] * 4]


def test_results_do_not_depend_on_the_batch() -> None:
    masks = random_masks(30, seed=2)
    pixels = PIXELS.float()

    def run(some: torch.Tensor) -> list[torch.Tensor]:
        start = farthest_points(pixels, some, some.int().argmax(dim=1), 5)
        return list(kmeans(pixels, some, *start, 10))

    together = run(masks)
    for i in range(len(masks)):
        assert all(torch.equal(one[0], every[i]) for one, every in zip(run(masks[i : i + 1]), together, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(run(masks), together, strict=True))


def test_half_precision_training_clusters_in_full() -> None:
    masks, pixels = random_masks(20, seed=3), PIXELS.float() + 1000
    start = farthest_points(pixels, masks, masks.int().argmax(dim=1), 5)
    expected = kmeans(pixels, masks, *start, 10)
    with torch.autocast("cpu", torch.bfloat16):
        found = kmeans(pixels, masks, *start, 10)
        maps = torch.rand(4, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        under_autocast = prompts(maps)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(under_autocast, prompts(maps), strict=True))


def test_clusters_that_lose_all_pixels_are_not_valid() -> None:
    """A centre far from everything owns nothing; scikit-learn would move it."""
    mask = torch.zeros(1, SIDE * SIDE, dtype=torch.bool)
    mask[0, :3] = True
    starts = torch.tensor([[[0.0, 0.0], [100.0, 100.0]]], dtype=torch.float64)
    found = kmeans(PIXELS, mask, starts, torch.tensor([[True, True]]), 3)
    assert found.valid.tolist() == [[True, False]]
    assert found.centres.tolist() == [[[1.0, 0.0], [100.0, 100.0]]]


def test_distances() -> None:
    distances = squared_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[[0.0, 0.0], [3.0, 0.0]]]))
    assert distances.tolist() == [[[0.0, 25.0], [9.0, 16.0]]]


# ---------------------------------------------------------------------- probabilities


def test_probabilities_by_hand() -> None:
    # mean 2, population variance (4 + 0 + 0 + 4) / 4 = 2
    found = relative_probabilities(torch.tensor([[0.0, 2.0, 2.0, 4.0]]), temperature=0.5)
    step = 2 / (math.sqrt(2) + 1e-6)
    expected = [math.exp(-0.5 * 2 * step), math.exp(-0.5 * step), math.exp(-0.5 * step), 1.0]
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_probabilities_are_the_softmax_over_its_highest_value_and_free_of_scale() -> None:
    maps = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = (maps - maps.mean(1, keepdim=True)) / maps.std(1, correction=0, keepdim=True)
    softmax = z.softmax(dim=1)
    found = relative_probabilities(maps, 1.0)
    torch.testing.assert_close(found, (softmax / softmax.amax(1, keepdim=True)).float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(relative_probabilities(1000 * maps + 7, 1.0), found, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- prompts


def prompts(maps: torch.Tensor, **changes: float) -> PseudoPrompts:
    return generate_pseudo_prompts(maps, **{**SETTINGS, **changes})


def test_prompts_of_two_separate_objects() -> None:
    maps = torch.zeros(1, 4, 6)
    maps[0, 0, 0:2] = torch.tensor([9.0, 10.0])
    maps[0, 3, 4:6] = torch.tensor([9.5, 9.0])
    found = prompts(maps, num_objects=2)
    assert found.valid.tolist() == [[True, True]]
    # x, then y; the first region holds the most probable pixel
    assert found.points.tolist() == [[[1, 0], [4, 3]]]
    assert found.boxes.tolist() == [[[0, 0, 1, 0], [4, 3, 5, 3]]]
    assert (found.masks > 0).nonzero().tolist() == [[0, 0, 0], [0, 0, 1], [0, 3, 4], [0, 3, 5]]
    probabilities = relative_probabilities(maps.flatten(1), 1.0).view(maps.shape)
    assert found.masks[0, 0, 1] == 1
    torch.testing.assert_close(found.masks, torch.where(probabilities >= 0.5, probabilities, 0.0))


def test_one_pixel() -> None:
    maps = torch.zeros(1, 4, 4)
    maps[0, 2, 1] = 1
    found = prompts(maps)
    assert found.valid.tolist() == [[True] + [False] * 4]
    assert found.points[0, 0].tolist() == [1, 2]
    assert found.boxes[0].tolist() == [[1, 2, 1, 2]] + [[0, 0, 0, 0]] * 4
    assert found.masks.sum() == 1


def test_two_pixels_asked_for_five_regions() -> None:
    maps = torch.zeros(1, 4, 4)
    maps[0, 0, 0], maps[0, 3, 3] = 1.0, 0.99
    found = prompts(maps)
    assert found.valid.tolist() == [[True, True, False, False, False]]
    assert found.points[0, :2].tolist() == [[0, 0], [3, 3]]


@pytest.mark.parametrize("value", [0.0, -3.5, 1e8])
def test_equal_everywhere(value: float) -> None:
    """Every pixel belongs to the class; the first one and the corners farthest from it start the regions."""
    found = prompts(torch.full((2, 8, 8), value))
    assert found.valid.all()
    assert (found.masks == 1).all()
    assert torch.equal(found.points[0], found.points[1])
    areas = (found.boxes[..., 2:] - found.boxes[..., :2] + 1).prod(dim=-1)
    assert (areas >= 64 / 5 / 2).all()
    assert len(found.points[0].unique(dim=0)) == 5


def test_the_highest_threshold_leaves_the_most_probable_pixel() -> None:
    maps = torch.randn(7, 5, 6, generator=torch.Generator().manual_seed(0))
    found = prompts(maps, threshold=1.0)
    assert found.valid.sum(1).tolist() == [1] * 7
    assert [[int(y) * 6 + int(x)] for x, y in found.points[:, 0].tolist()] == maps.flatten(1).argmax(1)[
        :, None
    ].tolist()


def test_points_are_the_most_probable_of_their_region_and_boxes_the_smallest() -> None:
    maps = torch.rand(20, 9, 7, generator=torch.Generator().manual_seed(1))
    found = prompts(maps, num_objects=3, threshold=0.2)
    assert found.valid.all()
    probabilities = relative_probabilities(maps.flatten(1), 1.0)
    inside = probabilities >= 0.2
    pixels = torch.tensor([[x, y] for y in range(9) for x in range(7)], dtype=torch.float32)
    start = farthest_points(pixels, inside, probabilities.argmax(1), 3)
    clusters = kmeans(pixels, inside, *start, 10)
    for i in range(20):
        for cluster in range(3):
            members = (clusters.labels[i] == cluster).nonzero()[:, 0]
            best = members[probabilities[i, members].argmax()]
            assert found.points[i, cluster].tolist() == pixels[best].tolist()
            expected = [*pixels[members].amin(0).tolist(), *pixels[members].amax(0).tolist()]
            assert found.boxes[i, cluster].tolist() == expected


def test_gradients_reach_the_map_through_the_masks() -> None:
    maps = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0))
    maps[2] = 1.0  # no deviation: a place where a careless square root has an infinite gradient
    maps.requires_grad_()
    found = prompts(maps, threshold=0.1)
    weights = torch.randn(found.masks.shape, generator=torch.Generator().manual_seed(1))
    (found.masks * weights).sum().backward()
    assert maps.grad.isfinite().all()
    assert (maps.grad[:2].abs().sum((1, 2)) > 0).all()
    assert not found.points.requires_grad
