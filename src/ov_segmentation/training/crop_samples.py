"""Pairs of masked crop and noun as training samples: their order, the part of a crop that is seen, CLIP's inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..data.mask_pairs import MaskPair, MaskPairs
from ..layers.mask_crops import CropGrid, crop_for_clip
from .adaptation_recipe import AdaptationRecipe
from .randomness import AUGMENTATION, SampleOrder, derive_generator


class CropSample(NamedTuple):
    """A pair, and the box (x0, y0, x1, y1) of the part of its crop that is seen."""

    pair: MaskPair
    box: tuple[int, int, int, int]


class CropSamples(Dataset):
    """The endless training sequence of pairs, by position; see `TrainingSamples`."""

    def __init__(self, pairs: MaskPairs, recipe: AdaptationRecipe) -> None:
        self.pairs, self.recipe = pairs, recipe
        self.order = SampleOrder(recipe.seed, len(pairs))

    def __getitem__(self, position: int) -> CropSample:
        epoch, index = self.order[position]
        pair = self.pairs[index]
        generator = derive_generator(self.recipe.seed, AUGMENTATION, epoch, index)
        return CropSample(pair, random_box(pair.mask, self.recipe.crop_scale, self.recipe.crop_ratio, generator))


def random_box(
    mask: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float], generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """A part of a crop (x0, y0, x1, y1) with a share of its area in `scale` and an aspect in `ratio`.

    The aspect is relative to the crop's own: a crop is stretched to a square whatever its form. After ten draws that do
    not fit, or show nothing of the mask, it is the whole crop.
    """
    height, width = mask.shape
    for _ in range(10):
        area = generator.uniform(*scale)
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(width * math.sqrt(area * aspect)), round(height * math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(generator.integers(0, width - w + 1)), int(generator.integers(0, height - h + 1))
            if mask[y : y + h, x : x + w].any():
                return x, y, x + w, y + h
    return 0, 0, width, height


def crop_inputs(samples: Sequence[CropSample], size: int, mask_fill: str = "mean") -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP's inputs as OVSeg makes them at inference: `[B, 3, size, size]` and bool masks `[B, size, size]`."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    grids = CropGrid.of(torch.tensor([sample.box for sample in samples]), size).split()
    crops, masks = [], []
    for ((crop, mask, _), _), grid in zip(samples, grids):
        picture = (torch.tensor(crop).permute(2, 0, 1).float() / 255 - mean) / std
        inputs = crop_for_clip(picture, torch.tensor(mask)[None], grid, mask_fill)
        crops.append(inputs[0])
        masks.append(inputs[1])
    return torch.cat(crops), torch.cat(masks)


class CropBatchMaker:
    """Turns samples into inputs of [`MaskAdaptation`].

    Args:
        tokenizer: CLIP's.
        size: side of CLIP's input.
        template: the text of a noun.
        mask_fill: what masked-out pixels become, see `OVSegConfig`.
    """

    def __init__(self, tokenizer: Any, size: int, template: str = "{}", mask_fill: str = "mean") -> None:
        self.tokenizer, self.size, self.template, self.mask_fill = tokenizer, size, template, mask_fill
        self._input_ids: dict[str, torch.Tensor] = {}

    def __call__(self, samples: Sequence[CropSample]) -> dict[str, torch.Tensor]:
        """`crops`, `masks` and `input_ids`."""
        crops, masks = crop_inputs(samples, self.size, self.mask_fill)
        return {"crops": crops, "masks": masks, "input_ids": self._tokens([sample.pair.noun for sample in samples])}

    def _tokens(self, nouns: Sequence[str]) -> torch.Tensor:
        """Input ids `[B, L]`; each noun is tokenised once."""
        if new := sorted(set(nouns) - set(self._input_ids)):
            texts = [self.template.replace("{}", noun) for noun in new]
            tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
            self._input_ids.update(zip(new, tokens["input_ids"]))
        return torch.stack([self._input_ids[noun] for noun in nouns])
