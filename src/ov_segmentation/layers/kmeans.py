"""k-means on the pixels of many masks at once, without randomness.

Every mask chooses among the same positions, so all of them advance together, cluster by cluster and step by step; with
integer coordinates the sums over pixels are exact, and with them the result does not depend on what shares the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..precision import full_precision

# labels are uint8 on the way
MAX_CLUSTERS = 255
# label of the pixels outside of a mask
OUTSIDE = MAX_CLUSTERS


class Clusters(NamedTuple):
    """Clusters of N masks over S positions, k in each.

    Args:
        labels: `[N, S]` int64, the cluster of each pixel; -1 outside of the mask.
        centres: `[N, k, 2]`, the mean of each cluster's pixels; where the cluster is not valid, meaningless.
        valid: `[N, k]` bool: clusters that own a pixel.
    """

    labels: torch.Tensor
    centres: torch.Tensor
    valid: torch.Tensor


def squared_distances(coordinates: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """`[S, 2]` and `[N, k, 2]` -> `[N, k, S]`, element by element: a matrix product would round by its shape."""
    down = coordinates[:, 0] - centres[..., :1]
    across = coordinates[:, 1] - centres[..., 1:]
    return down * down + across * across


def farthest_points(
    coordinates: torch.Tensor, masks: torch.Tensor, first: torch.Tensor, num_clusters: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Start of k-means: a given pixel, then again and again the pixel farthest from all that were chosen.

    Args:
        coordinates: `[S, 2]`.
        masks: `[N, S]` bool, at least one pixel each.
        first: `[N]` int64, a pixel inside of each mask.
        num_clusters: k.

    Returns:
        centres `[N, k, 2]`, and `[N, k]` bool: False where all distinct pixels had been chosen before. Of pixels that
        are equally far, the first is taken.
    """
    chosen, valid = [first], [torch.ones_like(first, dtype=torch.bool)]
    nearest = squared_distances(coordinates, coordinates[first][:, None])[:, 0]
    for _ in range(num_clusters - 1):
        distance, index = nearest.masked_fill(~masks, -1).max(dim=1)
        chosen.append(index)
        valid.append(distance > 0)
        nearest = torch.minimum(nearest, squared_distances(coordinates, coordinates[index][:, None])[:, 0])
    return coordinates[torch.stack(chosen, dim=1)], torch.stack(valid, dim=1)


def kmeans(
    coordinates: torch.Tensor, masks: torch.Tensor, centres: torch.Tensor, valid: torch.Tensor, iterations: int
) -> Clusters:
    """Lloyd's algorithm: each pixel to its nearest centre, each centre to the mean of its pixels.

    Args:
        coordinates: `[S, 2]`; sums over pixels are exact if they are integers.
        masks: `[N, S]` bool, at least one pixel each.
        centres: `[N, k, 2]` to start with; k at most `MAX_CLUSTERS`.
        valid: `[N, k]` bool: centres that take part; at least one per mask.
        iterations: of both steps; then pixels are assigned once more.

    Returns:
        the clusters. A pixel between two centres belongs to the first; a centre that loses all pixels stays where it is
        and may win some back.
    """

    def nearest(centres: torch.Tensor) -> torch.Tensor:
        """`[N, S]` uint8, centre by centre: a comparison costs a fraction of a reduction over a short dimension."""
        closest = squared_distances(coordinates, centres[:, :1])[:, 0]
        labels = torch.zeros_like(closest, dtype=torch.uint8)
        for index in range(1, centres.shape[1]):
            distances = squared_distances(coordinates, centres[:, index, None])[:, 0]
            labels.masked_fill_(distances < closest, index)
            closest = torch.minimum(closest, distances)
        return labels.masked_fill_(~masks, OUTSIDE)

    clusters = torch.arange(centres.shape[1], device=masks.device, dtype=torch.uint8)[:, None]
    with_one = torch.cat([coordinates, torch.ones_like(coordinates[:, :1])], dim=1)
    # infinitely far from everything
    centres = centres.masked_fill(~valid[..., None], torch.inf)
    # autocast would run the sums over pixels, a matrix product, in half precision
    with full_precision(masks):
        for _ in range(iterations):
            members = (nearest(centres)[:, None] == clusters).to(coordinates.dtype)
            sums, counts = (members @ with_one).split((2, 1), dim=2)
            centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    labels = nearest(centres)
    owned = (labels[:, None] == clusters).any(dim=2)
    return Clusters(labels.long().masked_fill_(~masks, -1), centres, owned)
