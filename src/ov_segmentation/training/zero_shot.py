"""Zero-shot accuracy of a CLIP on crops of scenes, by tier: what open vocabulary means before any segmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..data.scene_vocabulary import TIERS, SceneVocabulary
from ..data.scenes import SceneGenerator
from .scene_crops import SceneCrops

ZOOM = (1.4, 1.4)
PROMPT = "a photo of a {}."
CHUNK = 256


@dataclass
class ZeroShotBank:
    """Crops of one class each: `images` uint8 [N, 3, S, S], `classes` int64 [N], and their vocabulary."""

    images: torch.Tensor
    classes: torch.Tensor
    vocabulary: SceneVocabulary

    @classmethod
    def render(cls, scenes: SceneGenerator, num_scenes: int, crop_size: int, max_per_tier: int = 1000) -> ZeroShotBank:
        """Things (half side 1.4 radius) and pure stuff windows of scenes; at most `max_per_tier` things of a tier."""
        bank = SceneCrops(scenes, num_blocks=max(1, num_scenes // 128), crop_size=crop_size, zoom=ZOOM)
        generator = torch.Generator().manual_seed(scenes.seed)
        tiers = torch.tensor([TIERS.index(tier) for tier in scenes.vocabulary.tiers])
        order = torch.randperm(len(bank.objects), generator=generator)
        chosen = [order[tiers[bank.object_classes[order]] == tier][:max_per_tier] for tier in range(len(TIERS))]
        boxes, classes = bank.boxes_of(torch.cat(chosen))
        stuff_boxes = bank.stuff_boxes(num_scenes, generator)
        boxes = torch.cat([boxes, stuff_boxes])
        classes = torch.cat([classes, bank.label_grid(stuff_boxes)[:, 0]])
        return cls(bank.crop(boxes), classes, scenes.vocabulary)


@torch.no_grad()
def zero_shot_accuracy(
    model: PreTrainedModel, tokenizer: Any, bank: ZeroShotBank, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Top-1 figures, each between 0 and 1.

    `{things,stuff}_{a,b,c}_all`: among all names, things and stuff of all tiers. `..._own`: among the names of the same
    kind and tier. `..._own_chance`: one over that number. `things_c_{colour,pattern,shape}`: the attribute of the best
    thing name is right. `all_chance`: one over the number of all names.
    """
    vocabulary = bank.vocabulary
    prompts = [PROMPT.format(name) for name in vocabulary.names]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt").to(device)
    texts = F.normalize(model.get_text_features(**inputs).pooler_output, dim=-1)
    mean = torch.tensor(OPENAI_CLIP_MEAN, device=device).view(1, 3, 1, 1)
    std = torch.tensor(OPENAI_CLIP_STD, device=device).view(1, 3, 1, 1)
    embeds = [
        model.get_image_features(pixel_values=(chunk.to(device).float() / 255 - mean) / std).pooler_output
        for chunk in bank.images.split(CHUNK)
    ]
    scores = (F.normalize(torch.cat(embeds), dim=-1) @ texts.T).cpu()
    figures = {"all_chance": 1 / len(vocabulary.names)}
    for kind in ("things", "stuff"):
        for tier in TIERS:
            own = torch.tensor(vocabulary.classes_of(tier, kind))
            rows = torch.isin(bank.classes, own)
            if not rows.any():
                continue
            truth = bank.classes[rows]
            figures[f"{kind}_{tier}_all"] = _share(scores[rows].argmax(1) == truth)
            figures[f"{kind}_{tier}_own"] = _share(own[scores[rows][:, own].argmax(1)] == truth)
            figures[f"{kind}_{tier}_own_chance"] = 1 / len(own)
            figures[f"{kind}_{tier}_crops"] = int(rows.sum())
    attributes = torch.tensor(vocabulary.thing_attributes)
    rows = torch.isin(bank.classes, torch.tensor(vocabulary.classes_of("c", "things")))
    best = scores[rows][:, : vocabulary.num_things].argmax(1)
    for dim, name in enumerate(("colour", "pattern", "shape")):
        figures[f"things_c_{name}"] = _share(attributes[best, dim] == attributes[bank.classes[rows], dim])
    return figures


def _share(correct: torch.Tensor) -> float:
    return round(correct.float().mean().item(), 4)
