"""Synthetic scenes: textured shapes on stuff regions, with exact label maps and captions, rendered from a seed.

Nothing is stored: scene number i of a seed is the same picture in every run, whatever the batch size, because scenes
are rendered in blocks of fixed size and every block has its own random generator. One thread renders hundreds a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .scene_difficulty import DIFFICULTIES
from .scene_drawing import STUFF_RGB, THING_RGB, pattern_field, shape_alpha, texture_field
from .scene_vocabulary import STUFF_TEXTURES, THING_PATTERNS, THING_SHAPES, SceneVocabulary

BLOCK = 128
MAX_OBJECTS = 5
REFERENCE_SIZE = 96
GEOMETRIES = {
    # radius range in pixels of a 96 px scene, largest rotation, largest log aspect; hard bars have any rotation
    "easy": {"radius": (11.0, 20.0), "rotation": 0.15, "aspect": 0.04},
    "hard": {"radius": (8.0, 19.0), "rotation": 0.5, "aspect": 0.15},
}
NOISE = 0.035
COLOUR_JITTER = 0.07
NUM_PLACES = 8


@dataclass
class SceneBatch:
    """Rendered scenes.

    Args:
        images: uint8 [B, 3, S, S].
        label_maps: int16 [B, S, S], class index into `vocabulary.names`; every pixel has a class.
        instance_maps: int8 [B, S, S], number of the object that owns a pixel, -1 on stuff.
        object_classes: int64 [B, 5], thing class of each object, -1 where a scene has fewer.
        object_boxes: float [B, 5, 3], centre x, centre y, radius in pixels.
        stuff_classes: int64 [B, 2], the two regions' classes (equal in scenes of one region).
        captions: one sentence per scene, the visible objects in drawing order and the stuff.
    """

    images: torch.Tensor
    label_maps: torch.Tensor
    instance_maps: torch.Tensor
    object_classes: torch.Tensor
    object_boxes: torch.Tensor
    stuff_classes: torch.Tensor
    captions: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice) -> SceneBatch:
        return SceneBatch(**{name: value[index] for name, value in vars(self).items()})

    @classmethod
    def concatenate(cls, batches: Sequence[SceneBatch]) -> SceneBatch:
        """Join batches along the first dimension."""
        columns = {name: [getattr(batch, name) for batch in batches] for name in cls.__dataclass_fields__}
        captions = [caption for part in columns.pop("captions") for caption in part]
        return cls(**{name: torch.cat(parts) for name, parts in columns.items()}, captions=captions)


class SceneGenerator:
    """Renders scenes of a vocabulary. Scene i depends on the arguments and i alone.

    Args:
        vocabulary: the classes, a [`SceneVocabulary`].
        size: side of a scene in pixels; everything drawn scales with it, but for textures and patterns, whose periods
            are pixels (a larger scene shows more of them).
        seed: any non-negative integer.
        tiers: tiers whose classes are drawn, as objects and as background alike, so that nothing else can leak.
        geometry: "easy" (default) or "hard" (smaller objects, more rotation and distortion).
        difficulty: "standard" (default), "crowded" (overlap), "harsh" (lighting, blur, noise, JPEG) or "crowded_harsh".
    """

    def __init__(
        self,
        vocabulary: SceneVocabulary,
        size: int = REFERENCE_SIZE,
        seed: int = 0,
        tiers: Sequence[str] = ("a", "b", "c"),
        geometry: str = "easy",
        difficulty: str = "standard",
    ) -> None:
        if difficulty not in DIFFICULTIES:
            raise ValueError(f"Unknown difficulty {difficulty!r}: choose one of {list(DIFFICULTIES)}.")
        if geometry not in GEOMETRIES:
            raise ValueError(f"Unknown geometry {geometry!r}: choose one of {list(GEOMETRIES)}.")
        if size < 32:
            raise ValueError(f"size={size}: scenes need at least 32 pixels to show five objects.")
        self.vocabulary, self.size, self.seed = vocabulary, size, seed
        self.tiers, self.geometry, self.difficulty = tuple(tiers), geometry, DIFFICULTIES[difficulty]
        self.things = torch.tensor(vocabulary.classes_of(tiers, "things"))
        self.stuff = torch.tensor(vocabulary.classes_of(tiers, "stuff"))
        if len(self.things) == 0 or len(self.stuff) == 0:
            raise ValueError(f"tiers={list(tiers)} hold no thing or no stuff class: nothing to draw.")
        self._last_block: tuple[int, SceneBatch] | None = None
        thing_table = [
            (vocabulary.colours[c], vocabulary.patterns[p], vocabulary.shapes[s])
            for c, p, s in vocabulary.thing_attributes
        ]
        self._thing_rgb = torch.tensor([THING_RGB[colour] for colour, _, _ in thing_table])
        self._thing_pattern = torch.tensor([THING_PATTERNS.index(pattern) for _, pattern, _ in thing_table])
        self._thing_shape = torch.tensor([THING_SHAPES.index(shape) for _, _, shape in thing_table])
        stuff_table = [
            (vocabulary.stuff_colours[c], vocabulary.stuff_textures[t]) for c, t in vocabulary.stuff_attributes
        ]
        self._stuff_rgb = torch.tensor([STUFF_RGB[colour] for colour, _ in stuff_table])
        self._stuff_texture = torch.tensor([STUFF_TEXTURES.index(texture) for _, texture in stuff_table])

    def render(self, start: int, count: int) -> SceneBatch:
        """Scenes `start`, ..., `start + count - 1`."""
        if start < 0 or count < 1:
            raise ValueError(f"render(start={start}, count={count}): start is at least 0 and count at least 1.")
        parts = []
        for block in range(start // BLOCK, (start + count - 1) // BLOCK + 1):
            first = max(start - block * BLOCK, 0)
            last = min(start + count - block * BLOCK, BLOCK)
            if self._last_block is None or self._last_block[0] != block:
                self._last_block = (block, self._render_block(block))
            parts.append(self._last_block[1][first:last])
        return SceneBatch.concatenate(parts)

    def batches(self, batch_size: int, num: int, start: int = 0) -> Iterator[SceneBatch]:
        """Scenes `start`, ..., `start + num - 1` in batches; the last one may be smaller."""
        for first in range(start, start + num, batch_size):
            yield self.render(first, min(batch_size, start + num - first))

    @torch.no_grad()
    def _render_block(self, block: int) -> SceneBatch:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + block) % 2**63)
        canvas, labels, stuff_classes = self._stuff_layer(generator)
        classes, boxes = self._place_objects(generator)
        instances = torch.full_like(labels, -1)
        for index in range(MAX_OBJECTS):
            self._draw_object(index, classes[:, index], boxes[:, index], canvas, labels, instances, generator)
        margin = self._margin
        inner = slice(margin, margin + self.size)
        labels, instances = labels[:, inner, inner].contiguous(), instances[:, inner, inner].contiguous()
        images = self._light(canvas[:, :, inner, inner], generator)
        # a generator of its own: the standard scenes' draws stay as they are
        images = self.difficulty.spoil(images, torch.Generator().manual_seed(generator.initial_seed() + 1))
        captions = self._captions(labels, instances, classes)
        return SceneBatch(images, labels, instances.to(torch.int8), classes, boxes, stuff_classes, captions)

    @property
    def _scale(self) -> float:
        return self.size / REFERENCE_SIZE

    @property
    def _margin(self) -> int:
        """Half the side of an object's window; also the canvas's border, so that windows never leave it."""
        largest, aspect = GEOMETRIES[self.geometry]["radius"][1], GEOMETRIES[self.geometry]["aspect"]
        return math.ceil(largest * self._scale * 1.1 * math.exp(aspect)) + 2

    def _stuff_layer(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Padded canvas [B, 3, S', S'], label map int16 [B, S', S'] and the two classes [B, 2] of each scene."""
        size = self.size + 2 * self._margin
        chosen = torch.randint(len(self.stuff), (BLOCK, 2), generator=generator)
        single = torch.rand(BLOCK, generator=generator) < 0.3
        chosen[:, 1] = torch.where(single, chosen[:, 0], chosen[:, 1])
        classes = self.stuff[chosen]
        rows = (classes - self.vocabulary.num_things).flatten()
        fields = texture_field(self._stuff_texture[rows], self.size, generator)
        amplitude = 0.16 + 0.1 * torch.rand(BLOCK * 2, 1, 1, 1, generator=generator)
        colour = self._jitter(self._stuff_rgb[rows], generator)[:, :, None, None]
        regions = (colour * (1 + amplitude * fields[:, None])).unflatten(0, (BLOCK, 2))
        alike = (classes[:, 0] == classes[:, 1])[:, None, None, None]
        regions[:, 1] = torch.where(alike, regions[:, 0], regions[:, 1])  # one class shows no border
        draws = torch.rand(BLOCK, 5, 1, 1, generator=generator)
        axis = torch.arange(self.size, dtype=torch.float32) / self.size - 0.5
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        angle = draws[:, 0] * 2 * math.pi
        across, along = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
        wave = 0.05 * draws[:, 1] * (along * (6 + 10 * draws[:, 2]) + draws[:, 3] * 6.28).sin()
        second = across + wave > (draws[:, 4] - 0.5) * 0.5
        scene = torch.where(second[:, None], regions[:, 1], regions[:, 0])
        margin = self._margin
        canvas = torch.zeros(BLOCK, 3, size, size)
        labels = torch.zeros(BLOCK, size, size, dtype=torch.int16)
        inner = slice(margin, margin + self.size)
        canvas[:, :, inner, inner] = scene
        maps = torch.where(second, classes[:, 1, None, None], classes[:, 0, None, None])
        labels[:, inner, inner] = maps.to(torch.int16)
        return canvas, labels, classes

    def _place_objects(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Classes [B, 5] (-1: no object) and boxes [B, 5, 3]; of eight random places the one with the least overlap, in
        crowded scenes the first."""
        count = torch.randint(1, MAX_OBJECTS + 1, (BLOCK, 1), generator=generator)
        classes = self.things[torch.randint(len(self.things), (BLOCK, MAX_OBJECTS), generator=generator)]
        if not self.difficulty.crowded:
            classes = classes.where(torch.arange(MAX_OBJECTS) < count, -1)
        low, high = (value * self._scale for value in GEOMETRIES[self.geometry]["radius"])
        radius = low + (high - low) * torch.rand(BLOCK, MAX_OBJECTS, generator=generator)
        places = torch.rand(BLOCK, MAX_OBJECTS, NUM_PLACES, 2, generator=generator)
        border = radius[:, :, None, None] * 0.85
        places = border + places * (self.size - 2 * border)
        chosen = places[:, :1, 0]
        for index in range(1, MAX_OBJECTS):
            gap = (places[:, index, :, None] - chosen[:, None]).square().sum(-1).sqrt()
            gap = gap / (radius[:, index, None, None] + radius[:, None, :index])
            best = torch.zeros(BLOCK, dtype=torch.long) if self.difficulty.crowded else gap.amin(-1).argmax(1)
            chosen = torch.cat([chosen, places[torch.arange(BLOCK), index, best][:, None]], dim=1)
        return classes, torch.cat([chosen, radius[:, :, None]], dim=-1)

    def _draw_object(
        self,
        index: int,
        classes: torch.Tensor,
        boxes: torch.Tensor,
        canvas: torch.Tensor,
        labels: torch.Tensor,
        instances: torch.Tensor,
        generator: torch.Generator,
    ) -> None:
        """Draw the index-th object of all scenes that have one, in place, into windows around the objects."""
        geometry, margin = GEOMETRIES[self.geometry], self._margin
        draws = torch.rand(BLOCK, 9, generator=generator)
        jitter = torch.rand(BLOCK, 3, generator=generator)
        rows = (classes >= 0).nonzero()[:, 0]
        classes, boxes, draws, jitter = classes[rows], boxes[rows], draws[rows], jitter[rows]
        shape, pattern = self._thing_shape[classes], self._thing_pattern[classes]
        corner = boxes[:, :2].floor().long()  # window's first pixel on the padded canvas: centre - margin + margin
        offset = torch.arange(2 * margin)
        columns, lines = corner[:, 0, None] + offset, corner[:, 1, None] + offset
        x = (columns + 0.5 - margin - boxes[:, 0, None])[:, None, :].expand(-1, 2 * margin, -1)
        y = (lines + 0.5 - margin - boxes[:, 1, None])[:, :, None].expand(-1, -1, 2 * margin)
        rotation = (draws[:, 0] * 2 - 1) * geometry["rotation"]
        if self.geometry == "hard":
            rotation = torch.where(shape == THING_SHAPES.index("bar"), (draws[:, 0] * 2 - 1) * math.pi, rotation)
        stretch = ((draws[:, 1] * 2 - 1) * geometry["aspect"]).exp()[:, None, None]
        cos, sin = rotation.cos()[:, None, None], rotation.sin()[:, None, None]
        own_x, own_y = (x * cos + y * sin) / stretch, (y * cos - x * sin) * stretch
        alpha = shape_alpha(shape, boxes[:, 2], own_x, own_y)
        period = 5.5 + 2.5 * draws[:, 2]
        share = pattern_field(pattern, period, draws[:, 3] * math.pi, x + draws[:, 4, None, None] * 8, y)
        main = (self._thing_rgb[classes] + (jitter * 2 - 1) * COLOUR_JITTER).clamp(0, 1)
        tone = torch.where(draws[:, 5] < 0.5, 0.03 + 0.12 * draws[:, 6], 0.85 + 0.12 * draws[:, 6])
        colour = torch.lerp(main[:, :, None, None], tone[:, None, None, None], share[:, None])
        light = draws[:, 7] * 2 * math.pi
        shade = (x * light.cos()[:, None, None] + y * light.sin()[:, None, None]) / boxes[:, 2, None, None]
        colour = colour * (1 + 0.12 * shade)[:, None]
        scenes, grid_y, grid_x = rows[:, None, None], lines[:, :, None], columns[:, None, :]
        below = canvas[scenes, :, grid_y, grid_x]  # channels last: advanced indices around a slice
        canvas[scenes, :, grid_y, grid_x] = torch.lerp(below, colour.permute(0, 2, 3, 1), alpha[..., None])
        covered = alpha >= 0.5
        window = labels[scenes, grid_y, grid_x]
        labels[scenes, grid_y, grid_x] = torch.where(covered, classes[:, None, None].to(torch.int16), window)
        window = instances[scenes, grid_y, grid_x]
        instances[scenes, grid_y, grid_x] = window.masked_fill(covered, index)

    @staticmethod
    def _jitter(rgb: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return (rgb + (torch.rand(rgb.shape, generator=generator) * 2 - 1) * COLOUR_JITTER / 2).clamp(0, 1)

    def _light(self, canvas: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Contrast, brightness, a linear illumination gradient and sensor noise; uint8 pictures."""
        draws = torch.rand(BLOCK, 4, 1, 1, 1, generator=generator)
        axis = torch.linspace(-1, 1, self.size)
        gradient = 1 + 0.1 * ((draws[:, 0] * 2 - 1) * axis + (draws[:, 1] * 2 - 1) * axis[:, None])
        contrast, brightness = 0.85 + 0.3 * draws[:, 2], 0.12 * (draws[:, 3] - 0.5)
        images = (canvas - 0.5).mul_(contrast).add_(0.5 + brightness).mul_(gradient)
        noise = torch.randn(images.shape, generator=generator)
        return images.add_(noise, alpha=NOISE).mul_(255).round_().clamp_(0, 255).to(torch.uint8)

    def _captions(self, labels: torch.Tensor, instances: torch.Tensor, classes: torch.Tensor) -> list[str]:
        """One sentence per scene; what owns no pixel is not mentioned."""
        names, num_things = self.vocabulary.names, self.vocabulary.num_things
        numbers = torch.arange(MAX_OBJECTS, dtype=instances.dtype)
        visible = torch.stack([(instances == number).flatten(1).any(1) for number in numbers], dim=1)
        sentences = []
        for label_map, seen, objects in zip(labels, visible.tolist(), classes.tolist(), strict=True):
            stuff = [names[index] for index in label_map.unique().tolist() if index >= num_things]
            things = [names[index] for index, shown in zip(objects, seen, strict=True) if shown]
            sentences.append(scene_caption(things, stuff))
        return sentences


def scene_caption(things: Sequence[str], stuff: Sequence[str]) -> str:
    """Sentence "a X and a Y on S and T". The article is always "a", as in prompt templates ("a {}" for every name)."""
    parts = [" and ".join(f"a {name}" for name in things), " and ".join(stuff)]
    return " on ".join(part for part in parts if part)
