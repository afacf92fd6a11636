"""How well a Segment Anything finds the regions of synthetic scenes, beside what a disc would do."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F
from transformers import SamModel

from ..data.scene_vocabulary import TIERS
from ..data.scenes import MAX_OBJECTS, SceneGenerator
from .sam_prompts import SMALLEST_REGION, ask, draw_prompts, mask_iou, scene_regions


@torch.no_grad()
def evaluate_sam(model: SamModel, scenes: SceneGenerator, count: int, batch_size: int = 16) -> dict[str, float]:
    """Mean IoU of masks from one point, drawn in random regions of scenes of all tiers.

    Returns:
        `things_{a,b,c}`, `stuff_{a,b,c}`, `iou`: of the mask that the model itself thinks best; `best_of_three`: of
        the best mask; `box`: the same as `iou` from the region's box, `mask`: from the point and a rough mask;
        `disc`: a disc around the point in place of a model, as large as an average object; the last four also over
        `_things` and `_stuff` alone; `prompts`: how many.
    """
    names = {"points": "iou", "box": "box", "mask": "mask"}
    columns: dict[str, list[torch.Tensor]] = {
        name: [] for name in (*names.values(), "best_of_three", "disc", "classes")
    }
    generator = torch.Generator().manual_seed(scenes.seed)
    radius = _mean_object_radius(scenes)
    for batch in scenes.batches(batch_size, count):
        prompts = draw_prompts(scene_regions(batch), 4, 1, generator)
        targets = prompts.targets.flatten(0, 1)
        for kind, name in names.items():
            logits, scores = ask(model, batch.images, prompts, kind)
            masks = F.interpolate(logits, targets.shape[-2:], mode="bilinear") > 0
            found = mask_iou(masks, targets[:, None])
            columns[name].append(found.gather(1, scores.argmax(1, keepdim=True))[:, 0])
            if kind == "points":
                columns["best_of_three"].append(found.amax(1))
        columns["disc"].append(mask_iou(_discs(prompts.points.flatten(0, 1)[:, 0], radius, targets.shape[-1]), targets))
        x, y = prompts.points[:, :, 0].long().unbind(-1)
        columns["classes"].append(batch.label_maps[torch.arange(len(batch))[:, None], y, x].flatten().long())
    found = {name: torch.cat(parts) for name, parts in columns.items()}
    classes = found.pop("classes")
    figures = {name: float(values.mean()) for name, values in found.items()}
    for kind in ("things", "stuff"):
        of_kind = torch.isin(classes, torch.tensor(scenes.vocabulary.classes_of(TIERS, kind)))
        for name in ("best_of_three", "box", "mask", "disc"):
            figures[f"{name}_{kind}"] = float(found[name][of_kind].mean())
        for tier in TIERS:
            wanted = torch.isin(classes, torch.tensor(scenes.vocabulary.classes_of((tier,), kind)))
            if wanted.any():
                figures[f"{kind}_{tier}"] = float(found["iou"][wanted].mean())
    return figures | {"prompts": len(classes)}


def _mean_object_radius(scenes: SceneGenerator) -> float:
    """Radius of the disc with the mean area of visible objects in the first scenes."""
    batch = scenes.render(0, 64)
    areas = torch.stack([(batch.instance_maps == index).sum((1, 2)) for index in range(MAX_OBJECTS)])
    return math.sqrt(float(areas[areas >= SMALLEST_REGION].float().mean()) / math.pi)


def _discs(centres: torch.Tensor, radius: float, size: int) -> torch.Tensor:
    """Bool masks `[n, size, size]` of discs around `centres` `[n, 2]`."""
    axis = torch.arange(size)
    x, y = centres[:, 0, None, None], centres[:, 1, None, None]
    return (axis[None, None, :] - x) ** 2 + (axis[None, :, None] - y) ** 2 <= radius**2
