"""Pairs of picture and caption for contrastive training, cropped from a bank of synthetic scenes.

Three kinds of crops: one object, one piece of stuff, a window with several objects (crops of one object bind attributes
to objects, windows bring context). Only classes of the bank's tiers are in it, so no other composition can reach a
caption.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..data.scene_captions import stuff_phrase, thing_phrase, write_caption
from ..data.scenes import BLOCK, SceneBatch, SceneGenerator, scene_caption

GRID = 14
MAX_MENTIONS = 7
# Below this share of radius^2 an object is too hidden to be named; whole shapes cover 1.5 to 2.8.
VISIBLE_AREA = 0.8


@dataclass
class CropBatch:
    """Picture and caption pairs; pair i is the caption of picture i.

    Args:
        images: uint8 [B, 3, S, S].
        captions: sentences.
        fits: bool [B, B], `fits[i, j]`: caption j is true of picture i (its own or another's).
        classes: int64 [B], the class that the crop shows, -1 for windows with several objects.
    """

    images: torch.Tensor
    captions: list[str]
    fits: torch.Tensor
    classes: torch.Tensor


class SceneCrops:
    """Samples crops from a bank of scenes, a part of which is replaced from time to time.

    Args:
        scenes: the generator; crops number i of two samplers of equal arguments and seeds are equal.
        num_blocks: size of the bank in blocks of 128 scenes.
        crop_size: side of the pictures in pixels.
        zoom: smallest and largest half side of a crop of one object, in units of its radius.
        stuff_share, window_share: parts of a batch; the rest shows one object each.
        background_share: part of the one-object captions that add " on <stuff>".
        drop_share: part of the captions that leave attributes out ("a star", "a striped object").
        hard_share: part of the batches whose objects share few attributes, so that the others have to tell them apart.
        refreshed: how often `refresh` is taken to have been called already, to continue a training.
    """

    def __init__(
        self,
        scenes: SceneGenerator,
        num_blocks: int = 32,
        crop_size: int = 64,
        zoom: tuple[float, float] = (1.05, 2.3),
        stuff_share: float = 0.2,
        window_share: float = 0.28,
        background_share: float = 0.4,
        drop_share: float = 0.3,
        hard_share: float = 0.3,
        refreshed: int = 0,
    ) -> None:
        self.scenes, self.vocabulary = scenes, scenes.vocabulary
        self.crop_size, self.zoom = crop_size, zoom
        self.stuff_share, self.window_share = stuff_share, window_share
        self.background_share, self.drop_share, self.hard_share = background_share, drop_share, hard_share
        self._attributes = torch.tensor(self.vocabulary.thing_attributes)
        self._stuff_attributes = torch.tensor(self.vocabulary.stuff_attributes)
        self._next_block = num_blocks + refreshed
        self.bank = scenes.render(refreshed * BLOCK, num_blocks * BLOCK)
        if moved := refreshed % num_blocks * BLOCK:  # each block to where `refresh` would have put it
            self.bank = SceneBatch.concatenate([self.bank[-moved:], self.bank[:-moved]])
        self._index_objects()

    def refresh(self) -> None:
        """Replace the oldest block of the bank by new scenes."""
        first = self._next_block * BLOCK % len(self.bank)
        new = self.scenes.render(self._next_block * BLOCK, BLOCK)
        for name, value in vars(new).items():
            getattr(self.bank, name)[first : first + BLOCK] = value
        self._next_block += 1
        self._index_objects()

    def _index_objects(self) -> None:
        """Table of the objects that are visible enough to be named: scene, number, class."""
        numbers = torch.arange(self.bank.object_classes.shape[1], dtype=torch.int8)
        areas = torch.stack([(self.bank.instance_maps == number).flatten(1).sum(1) for number in numbers], dim=1)
        visible = areas > VISIBLE_AREA * self.bank.object_boxes[:, :, 2].square()
        self.visible = visible & (self.bank.object_classes >= 0)
        self.objects = self.visible.nonzero()
        self.object_classes = self.bank.object_classes[self.visible]

    def sample(self, batch_size: int, seed: int) -> CropBatch:
        """A batch that depends on the bank and the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        words = random.Random(seed)
        hard = words.random() < self.hard_share
        num_stuff = 0 if hard else round(batch_size * self.stuff_share)
        num_windows = 0 if hard else round(batch_size * self.window_share)
        single = self._object_boxes(batch_size - num_stuff - num_windows, hard, generator, words)
        stuff = self.stuff_boxes(num_stuff, generator)
        windows = self._window_boxes(num_windows, generator)
        boxes = torch.cat([single[0], stuff, windows])
        classes = torch.cat([single[1], torch.full((num_stuff + num_windows,), -1)])
        images, label_grid = self.crop(boxes), self.label_grid(boxes)
        present = torch.zeros(batch_size, len(self.vocabulary.names)).scatter_(1, label_grid, 1.0)
        if num_stuff:
            of_stuff = slice(len(single[1]), len(single[1]) + num_stuff)
            classes[of_stuff] = label_grid[of_stuff, 0]
        counts = torch.zeros_like(present).scatter_add_(1, label_grid, torch.ones(label_grid.shape))
        captions, accepted = self._describe(boxes, classes, counts, words)
        return CropBatch(images, captions, self._fits(present, accepted), classes)

    # ---------------------------------------------------------- where to look: boxes [n, 4] = scene, x, y, half side

    def _object_boxes(
        self, number: int, hard: bool, generator: torch.Generator, words: random.Random
    ) -> tuple[torch.Tensor, torch.Tensor]:
        candidates = torch.arange(len(self.objects))
        if hard:
            colours = torch.tensor(words.sample(range(len(self.vocabulary.colours)), 2))
            second, kinds = (1, self.vocabulary.patterns) if words.random() < 0.5 else (2, self.vocabulary.shapes)
            chosen = torch.tensor(words.sample(range(len(kinds)), second + 1))
            attributes = self._attributes[self.object_classes]
            alike = torch.isin(attributes[:, 0], colours) & torch.isin(attributes[:, second], chosen)
            candidates = alike.nonzero()[:, 0] if int(alike.sum()) >= number else candidates
        picked = candidates[torch.randperm(len(candidates), generator=generator)[:number]]
        return self.boxes_of(picked, generator)

    def boxes_of(
        self, picked: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes [n, 4] around the objects of some rows of `objects`, and their classes; without a generator centred."""
        scene, index = self.objects[picked].unbind(1)
        x, y, radius = self.bank.object_boxes[scene, index].unbind(1)
        draws = torch.rand(len(picked), 3, generator=generator) if generator else torch.full((len(picked), 3), 0.5)
        half = radius * (self.zoom[0] + (self.zoom[1] - self.zoom[0]) * draws[:, 0])
        x = x + (draws[:, 1] * 2 - 1) * 0.2 * radius
        y = y + (draws[:, 2] * 2 - 1) * 0.2 * radius
        return self._inside(scene, x, y, half), self.object_classes[picked]

    def stuff_boxes(self, number: int, generator: torch.Generator) -> torch.Tensor:
        """Windows that show one stuff class only; random windows are drawn until there are enough."""
        found = torch.zeros(0, 4)
        while len(found) < number:
            draws = torch.rand(16 * number, 4, generator=generator)
            half = (0.1 + 0.2 * draws[:, 3]) * self.scenes.size
            scene = (draws[:, 0] * len(self.bank)).floor().long()
            boxes = self._inside(scene, draws[:, 1] * self.scenes.size, draws[:, 2] * self.scenes.size, half)
            labels = self.label_grid(boxes)
            pure = (labels == labels[:, :1]).all(1) & (labels[:, 0] >= self.vocabulary.num_things)
            found = torch.cat([found, boxes[pure]])
        return found[:number]

    def _window_boxes(self, number: int, generator: torch.Generator) -> torch.Tensor:
        draws = torch.rand(number, 4, generator=generator)
        half = (0.32 + 0.18 * draws[:, 3]) * self.scenes.size
        scene = (draws[:, 0] * len(self.bank)).floor().long()
        return self._inside(scene, draws[:, 1] * self.scenes.size, draws[:, 2] * self.scenes.size, half)

    def _inside(self, scene: torch.Tensor, x: torch.Tensor, y: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
        """Boxes shifted into the scene; nothing outside of it exists that a crop could show."""
        half = half.clamp(max=self.scenes.size / 2)
        x, y = (torch.minimum(torch.maximum(value, half), self.scenes.size - half) for value in (x, y))
        return torch.stack([scene.float(), x, y, half], dim=1)

    # ------------------------------------------------------------------ pixels

    def label_grid(self, boxes: torch.Tensor) -> torch.Tensor:
        """Classes [n, GRID * GRID] at a regular grid of points inside each box."""
        steps = (torch.arange(GRID) + 0.5) / GRID * 2 - 1
        last = self.scenes.size - 1
        x = (boxes[:, 1, None] + steps * boxes[:, 3, None]).floor().clamp(0, last).long()
        y = (boxes[:, 2, None] + steps * boxes[:, 3, None]).floor().clamp(0, last).long()
        scene = boxes[:, 0].long()
        return self.bank.label_maps[scene[:, None, None], y[:, :, None], x[:, None, :]].flatten(1).long()

    def crop(self, boxes: torch.Tensor) -> torch.Tensor:
        """Pictures uint8 [n, 3, crop_size, crop_size] of boxes."""
        return crop_images(self.bank.images, boxes, self.crop_size)

    # ------------------------------------------------------------------ words

    def _describe(
        self, boxes: torch.Tensor, classes: torch.Tensor, counts: torch.Tensor, words: random.Random
    ) -> tuple[list[str], torch.Tensor]:
        """Captions, and for each of their mentions the classes it accepts: bool [B, MAX_MENTIONS, K]."""
        num_things = self.vocabulary.num_things
        accepted = torch.ones(len(boxes), MAX_MENTIONS, counts.shape[1], dtype=torch.bool)
        main_stuff = (counts[:, num_things:].argmax(1) + num_things).tolist()
        has_stuff = (counts[:, num_things:].sum(1) > 0).tolist()
        captions = []
        for row, index in enumerate(classes.tolist()):
            if index < 0:
                captions.append(self._describe_window(boxes[row], counts[row], accepted[row], words))
                continue
            phrase = self._mention(index, accepted[row, 0], words, words.random() < self.drop_share)
            if index < num_things and has_stuff[row] and words.random() < self.background_share:
                phrase = f"{phrase} on {self._mention(main_stuff[row], accepted[row, 1], words, False)}"
            captions.append(write_caption(phrase, words))
        return captions, accepted

    def _describe_window(
        self, box: torch.Tensor, counts: torch.Tensor, accepted: torch.Tensor, words: random.Random
    ) -> str:
        """Objects whose centre is in the window, and the stuff that covers at least a tenth of it, in random order."""
        scene, (x, y, half) = int(box[0]), box[1:].tolist()
        places = self.bank.object_boxes[scene]
        centred = (places[:, 0] - x).abs().lt(half) & (places[:, 1] - y).abs().lt(half) & self.visible[scene]
        things = [index for index in self.bank.object_classes[scene][centred].tolist() if counts[index] > 0]
        words.shuffle(things)
        num_things = self.vocabulary.num_things
        stuff = ((counts[num_things:] >= GRID * GRID / 10).nonzero()[:, 0] + num_things).tolist()[:2]
        mentions = [
            self._mention(index, accepted[position], words, False) for position, index in enumerate(things + stuff)
        ]
        return scene_caption(mentions[: len(things)], mentions[len(things) :])

    def _mention(self, index: int, accepted: torch.Tensor, words: random.Random, drop: bool) -> str:
        """Words for a class; `accepted` [K] is set to the classes that they fit."""
        accepted.fill_(False)
        num_things = self.vocabulary.num_things
        if index < num_things:
            table, part, names = self._attributes, accepted[:num_things], ("colour", "pattern", "shape")
        else:
            table, part, names = self._stuff_attributes, accepted[num_things:], ("colour", "texture")
        kept = words.sample(range(len(names)), words.randint(1, len(names) - 1)) if drop else list(range(len(names)))
        own = index if index < num_things else index - num_things
        part.copy_((table[:, kept] == table[own, kept]).all(1))
        phrase = thing_phrase if index < num_things else stuff_phrase
        return phrase(self.vocabulary, tuple(table[own].tolist()), [names[dim] for dim in kept])

    @staticmethod
    def _fits(present: torch.Tensor, accepted: torch.Tensor) -> torch.Tensor:
        """A caption fits a picture if each of its mentions accepts a class that is in the picture."""
        hits = present @ accepted.flatten(0, 1).float().T > 0
        fits = hits.unflatten(1, accepted.shape[:2]).all(-1)
        return fits | torch.eye(len(fits), dtype=torch.bool)


def crop_images(images: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear square crops.

    Args:
        images: uint8 [N, 3, S, S].
        boxes: [n, 4]: picture index, centre x, centre y, half side, in pixels.
        size: side of the crops.

    Returns:
        uint8 [n, 3, size, size].
    """
    side = images.shape[-1]
    steps = (torch.arange(size) + 0.5) / size * 2 - 1
    x = (boxes[:, 1, None] + steps * boxes[:, 3, None]) * 2 / side - 1
    y = (boxes[:, 2, None] + steps * boxes[:, 3, None]) * 2 / side - 1
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1)
    pictures = images[boxes[:, 0].long()].float()
    crops = F.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return crops.round_().to(torch.uint8)
