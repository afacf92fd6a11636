"""How shapes, patterns and textures of the synthetic scenes are drawn: batched formulas, no loop over pictures.

A shape is a table of its outline's radius over the angle, so one formula renders all of them:
`alpha = clamp(outline(shape, angle) * radius - distance + 0.5)`. Patterns and textures are scalar fields in [0, 1] or
[-1, 1]. Lengths are pixels of a 96 px scene.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch.nn import functional as F

from .scene_vocabulary import STUFF_TEXTURES, THING_PATTERNS, THING_SHAPES

NUM_ANGLES = 512
RING_HOLE = 0.55

# RGB of the words; things are saturated, stuff is muted, so "green" things stand out on "green" stuff.
THING_RGB = {
    "red": (0.86, 0.12, 0.14),
    "orange": (0.97, 0.53, 0.05),
    "yellow": (0.95, 0.89, 0.12),
    "green": (0.10, 0.68, 0.20),
    "cyan": (0.10, 0.80, 0.84),
    "blue": (0.12, 0.26, 0.88),
    "purple": (0.56, 0.14, 0.74),
    "pink": (0.97, 0.48, 0.74),
}
STUFF_RGB = {
    "green": (0.42, 0.55, 0.40),
    "blue": (0.42, 0.52, 0.66),
    "brown": (0.47, 0.36, 0.26),
    "gray": (0.54, 0.54, 0.54),
    "purple": (0.50, 0.40, 0.57),
    "pink": (0.76, 0.58, 0.60),
}


def _polygon_outline(points: list[tuple[float, float]]) -> torch.Tensor:
    """Radius [NUM_ANGLES] at which a ray from the origin leaves a polygon that is star-shaped around the origin."""
    angles = (torch.arange(NUM_ANGLES) / NUM_ANGLES * 2 - 1) * math.pi
    ray_x, ray_y = angles.cos()[:, None], angles.sin()[:, None]
    start = torch.tensor(points)
    edge = start.roll(-1, 0) - start
    denominator = ray_x * edge[:, 1] - ray_y * edge[:, 0]
    along_ray = (start[:, 0] * edge[:, 1] - start[:, 1] * edge[:, 0]) / denominator
    along_edge = (start[:, 0] * ray_y - start[:, 1] * ray_x) / denominator
    hit = (along_edge >= -1e-4) & (along_edge <= 1 + 1e-4) & (along_ray > 0)
    return along_ray.where(hit, 0.0).nan_to_num(0.0).amax(1)


def _regular_points(radii: list[float]) -> list[tuple[float, float]]:
    """Points at equal angles, the first one up (the y axis of pictures points down)."""
    step = 2 * math.pi / len(radii)
    return [(r * math.sin(i * step), -r * math.cos(i * step)) for i, r in enumerate(radii)]


@lru_cache(maxsize=1)
def shape_outlines() -> tuple[torch.Tensor, torch.Tensor]:
    """Outline radii [shapes, NUM_ANGLES] and inner radii [shapes] (0 but for the ring); the object's radius is 1."""
    arm = 0.34
    heart = []
    for index in range(96):
        t = 2 * math.pi * index / 96
        y = 12 * math.cos(t) - 4 * math.cos(2 * t) - 1.5 * math.cos(3 * t) - 0.7 * math.cos(4 * t)
        heart.append((15 * math.sin(t) ** 3 / 14, -(y + 2) / 14))
    polygons = {
        "square": [(0.84, 0.84), (-0.84, 0.84), (-0.84, -0.84), (0.84, -0.84)],
        "triangle": [(0.0, -1.0), (0.98, 0.78), (-0.98, 0.78)],
        "star": _regular_points([1.1, 0.46] * 5),
        "cross": [
            (arm, -1.0), (arm, -arm), (1.0, -arm), (1.0, arm), (arm, arm), (arm, 1.0),
            (-arm, 1.0), (-arm, arm), (-1.0, arm), (-1.0, -arm), (-arm, -arm), (-arm, -1.0),
        ],
        "heart": heart,
        "bar": [(1.1, 0.4), (-1.1, 0.4), (-1.1, -0.4), (1.1, -0.4)],
    }  # fmt: skip
    round_outline = torch.full((NUM_ANGLES,), 0.95)
    outlines = [_polygon_outline(polygons[name]) if name in polygons else round_outline for name in THING_SHAPES]
    holes = torch.tensor([RING_HOLE if name == "ring" else 0.0 for name in THING_SHAPES])
    return torch.stack(outlines), holes


def shape_alpha(shape: torch.Tensor, radius: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Coverage [n, h, w] in [0, 1] of shapes.

    Args:
        shape: indices into THING_SHAPES, [n].
        radius: [n], pixels.
        x, y: coordinates in the object's own, rotated frame, [n, h, w], pixels.
    """
    outlines, holes = shape_outlines()
    distance = (x.square() + y.square()).sqrt()
    bins = ((torch.atan2(y, x) / math.pi + 1) * (NUM_ANGLES / 2)).round().long() % NUM_ANGLES
    outer = outlines[shape[:, None, None], bins] * radius[:, None, None]
    inner = (holes[shape] * radius)[:, None, None]
    return torch.minimum(outer - distance, distance - inner + (inner == 0) * 1e3).add_(0.5).clamp_(0, 1)


def pattern_field(
    pattern: torch.Tensor, period: torch.Tensor, angle: torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """Share [n, h, w] in [0, 1] of an object's second tone.

    Args:
        pattern: indices into THING_PATTERNS, [n].
        period: pixels, [n].
        angle: direction of the pattern in radians, [n].
        x, y: pixel coordinates around the object, [n, h, w].
    """
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    scale = (2 * math.pi / period)[:, None, None]
    u, v = (x * cos + y * sin) * scale, (y * cos - x * sin) * scale
    field = torch.zeros_like(x)
    for index, name in enumerate(THING_PATTERNS):
        rows = (pattern == index).nonzero()[:, 0]
        if name == "plain" or len(rows) == 0:
            continue
        ur, vr = u[rows], v[rows]
        # 2.5 turns a sine into a wave with soft edges about one pixel wide.
        if name == "striped":
            part = ur.sin() * 2.5 + 0.3
        elif name == "dotted":
            part = (ur.cos() + vr.cos() - 0.75) * 2.5
        elif name == "checkered":
            part = (ur * 0.6).sin() * (vr * 0.6).sin() * 4 + 0.5
        else:
            part = (torch.maximum(ur.cos(), vr.cos()) - 0.72) * 4
        field[rows] = part.clamp(0, 1)
    return field


def texture_field(texture: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Brightness pattern [n, size, size] in about [-1, 1] of stuff regions.

    Args:
        texture: indices into STUFF_TEXTURES, [n].
        size: side of the scene in pixels.
        generator: source of all random numbers.
    """
    field = torch.empty(len(texture), size, size)
    axis = torch.arange(size, dtype=torch.float32)
    grid_y, grid_x = torch.meshgrid(axis, axis, indexing="ij")
    for index, name in enumerate(STUFF_TEXTURES):
        rows = (texture == index).nonzero()[:, 0]
        number = len(rows)
        if number == 0:
            continue
        draws = torch.rand(number, 4, 1, 1, generator=generator)
        if name in ("grainy", "cloudy", "speckled"):
            cells = {"grainy": size // 2, "cloudy": max(size // 16, 2), "speckled": size // 3}[name]
            noise = torch.rand(number, 1, cells, cells, generator=generator)
            if name == "speckled":
                noise = (noise > 0.9).float() * 1.6 - 0.25
            else:
                noise = noise * 2 - 1
            if name == "cloudy":
                part = F.interpolate(noise, size=(size, size), mode="bilinear", align_corners=True)
            else:
                part = F.interpolate(noise, size=(size, size), mode="nearest")
            field[rows] = part[:, 0]
            continue
        angle = (draws[:, 0] - 0.5) * (0.3 if name == "tiled" else 2 * math.pi)
        u = grid_x * angle.cos() + grid_y * angle.sin()
        v = grid_y * angle.cos() - grid_x * angle.sin()
        phase_u, phase_v = draws[:, 1] * 2 * math.pi, draws[:, 2] * 2 * math.pi
        if name == "wavy":
            period = 7 + 3 * draws[:, 3]
            bend = 2.2 * (v * (2 * math.pi / 26) + phase_v).sin()
            field[rows] = ((u + bend) * (2 * math.pi / period) + phase_u).sin() * 0.8
        else:
            scale = 2 * math.pi / (10 + 3 * draws[:, 3])
            joints = torch.maximum((u * scale + phase_u).cos(), (v * scale + phase_v).cos())
            field[rows] = 0.25 - ((joints - 0.86) * 9).clamp(0, 1) * 1.25
    return field
