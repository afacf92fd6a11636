"""Prompts for SAM made from a map of scores (ESC-Net, Sec. 3.3): the pseudo prompt generator.

Where a class seems to be, k-means finds regions; each gives a point (its most probable pixel) and a box, and all
together, being disjoint, the one dense mask that SAM takes. All maps are done at once: pictures and classes alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .kmeans import farthest_points, kmeans

EPSILON = 1e-6


class PseudoPrompts(NamedTuple):
    """Prompts of N maps with n regions each, in positions of the map; the first coordinate is x.

    Args:
        points: `[N, n, 2]`, float32: column and row of the most probable pixel of each region.
        boxes: `[N, n, 4]`, float32: (x0, y0, x1, y1), the columns and rows of the first and last pixels of the region.
        valid: `[N, n]` bool; False where a map has fewer regions: its point and box mean nothing.
        masks: `[N, h, w]`: probability relative to the map's highest inside of the regions, 0 outside.
    """

    points: torch.Tensor
    boxes: torch.Tensor
    valid: torch.Tensor
    masks: torch.Tensor


def relative_probabilities(maps: torch.Tensor, temperature: float) -> torch.Tensor:
    """Softmax over positions over its highest value, after taking out the map's scale: `[N, S]` -> `[N, S]` in (0, 1].

    exp(t (z - max z)) with z = (map - mean) / (standard deviation + 1e-6), in float32. A map that is the same
    everywhere gives 1 everywhere.
    """
    maps = maps.float()
    deviation = maps.std(dim=1, correction=0, keepdim=True)
    z = (maps - maps.mean(dim=1, keepdim=True)) / (deviation + EPSILON)
    return (temperature * (z - z.amax(dim=1, keepdim=True))).exp()


def generate_pseudo_prompts(
    maps: torch.Tensor, num_objects: int, temperature: float, threshold: float, iterations: int
) -> PseudoPrompts:
    """The pseudo prompt generator.

    Args:
        maps: `[N, h, w]`, any scale; gradients reach them through `masks`.
        num_objects: n, regions per map at most.
        temperature: t, see `relative_probabilities`.
        threshold: pixels of at least this share of the highest probability belong to the class; at most 1.
        iterations: of k-means, which starts at the most probable pixel and those farthest apart.
    """
    height, width = maps.shape[1:]
    probabilities = relative_probabilities(maps.flatten(1), temperature)
    chosen = probabilities.detach()
    inside = chosen >= threshold
    rows, columns = torch.meshgrid(
        *(torch.arange(side, device=maps.device, dtype=torch.float32) for side in (height, width)), indexing="ij"
    )
    pixels = torch.stack([columns.flatten(), rows.flatten()], dim=1)
    start = farthest_points(pixels, inside, chosen.argmax(dim=1), num_objects)
    clusters = kmeans(pixels, inside, *start, iterations)
    # [N, n, S]
    members = clusters.labels[:, None] == torch.arange(num_objects, device=maps.device)[:, None]
    best = torch.where(members, chosen[:, None], -1).argmax(dim=2)
    first = torch.where(members[..., None], pixels, torch.inf).amin(dim=2)
    last = torch.where(members[..., None], pixels, -torch.inf).amax(dim=2)
    boxes = torch.cat([first, last], dim=2).masked_fill(~clusters.valid[..., None], 0)
    masks = (probabilities * inside).unflatten(1, (height, width))
    return PseudoPrompts(pixels[best], boxes, clusters.valid, masks)
