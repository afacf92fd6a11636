"""Training of a small Segment Anything on the regions of synthetic scenes, whatever their class.

Source: Kirillov et al., "Segment Anything" (2023), section 3 and appendix A: three masks for a prompt, of which only
the best is trained, focal (without class weights) and dice loss 20 : 1, and a head that learns the masks' IoU. In place
of its rounds of corrected prompts every step draws one kind of prompt: points, a box, or a point and a rough mask.

What minutes on a CPU need beside that is in [`init_for_short_training`] and in averaged weights (EMA).
"""

from __future__ import annotations

import copy
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import SamConfig, SamModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.sam.modeling_sam import SamAttention

from ..data.scene_vocabulary import TIERS, SceneVocabulary
from ..data.scenes import MAX_OBJECTS, SceneBatch, SceneGenerator
from ..layers.initialization import init_torch_defaults
from ..layers.sam_blocks import init_prompt_encoder
from ..strict_mapping import from_mapping
from .contrastive import learning_rate_factor, parameter_groups, write_log
from .one_file_checkpoint import OneFileFolder
from .run import TERMINATED, Terminated, termination_flag

PROMPTS = ("points", "box", "mask")
# kinds of prompts in the steps of a training: masks are learnt first
ROUND = ("points", "box", "points", "box", "mask")
# at the start: of projections of queries and keys, of norms before them, of what the kind of a prompt adds to its place
ATTENTION_GAIN, NORM_GAIN, LABEL_GAIN = 2.5, 0.3, 0.1
# of the frequencies of places: the fewer there are, the lower they have to be
TABLE_GAIN = 0.7
FOCAL_WEIGHT, DICE_WEIGHT, IOU_WEIGHT = 20.0, 1.0, 1.0
FOCAL_GAMMA = 2
MASK_LOGIT = 10.0
NUM_POINTS = 3
SMALLEST_REGION = 24


@dataclass(frozen=True)
class SamRecipe:
    """What a recipe file holds.

    Args:
        model: sub-configurations of `SamConfig`.
        vocabulary: "small" or "full" scene vocabulary.
        tiers: tiers of the training scenes.
        geometry: "easy" or "hard" scenes.
        scene_size: side of a scene in pixels, also SAM's input.
        steps: optimiser steps.
        batch_size: scenes in a step.
        prompts_per_scene: prompts for each scene of a step.
        learning_rate, weight_decay, betas, max_grad_norm: AdamW; the decay applies to matrices only.
        warmup_steps: steps of linear warm-up.
        decay_fraction: last part of the training in which the rate falls linearly to 0.
        ema_decay: decay of the averaged weights, which are the ones that are evaluated and saved.
        attention: attention implementation while training; "eager" is twice as fast on a CPU.
        autocast: None or "bfloat16".
        log_every: steps between lines of the log.
        checkpoint_every: steps between checkpoints, from which a run continues; changes no result.
        eval_every: steps between evaluations on a quarter of the scenes.
        eval_scenes: scenes of the evaluation.
    """

    model: dict[str, Any]
    vocabulary: str = "small"
    tiers: tuple[str, ...] = ("a",)
    geometry: str = "easy"
    scene_size: int = 96
    steps: int = 1200
    batch_size: int = 16
    prompts_per_scene: int = 4
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    warmup_steps: int = 50
    decay_fraction: float = 0.5
    ema_decay: float = 0.99
    attention: str = "eager"
    autocast: str | None = None
    log_every: int = 50
    checkpoint_every: int = 50
    eval_every: int = 250
    eval_scenes: int = 256

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> SamRecipe:
        """Read a recipe; `overrides` that are not None win. `RecipeError` says what is wrong."""
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return from_mapping(cls, {**values, **{key: value for key, value in overrides.items() if value is not None}})


class Prompts(NamedTuple):
    """Points inside regions of scenes.

    Args:
        points: `[B, P, n, 2]`, column and row of pixels, all of one region.
        targets: bool `[B, P, S, S]`, the regions.
    """

    points: torch.Tensor
    targets: torch.Tensor


def build_sam(recipe: SamRecipe) -> SamModel:
    """The untrained model of a recipe."""
    config = SamConfig(**recipe.model)
    config.vision_config.initializer_range = config.initializer_range
    model = SamModel(config)
    init_for_short_training(model)
    model.set_attn_implementation(recipe.attention)
    return model


@torch.no_grad()
def init_for_short_training(model: SamModel) -> None:
    """Initialise a SAM so that minutes are enough to learn where its prompts are.

    From the weights of transformers (normal, 0.02) or of torch, masks are the same for all prompts of a picture after
    a thousand steps: signals shrink in every layer of the decoder, and attention that is nearly uniform does not tell
    positions apart. So projections keep the size of what they are given (normal, fan-in), those of queries and keys
    between prompts and picture are equal, and places outweigh what is there: attention starts as a kernel that is
    highest where both are at the same place. It does so with one or two heads; those of four are too narrow at a width
    of 32. The table of positions is fixed, as in the original.
    """
    for module in model.vision_encoder.modules():
        init_torch_defaults(module)
    nn.init.normal_(model.vision_encoder.pos_embed, std=0.02)
    for module in (*model.mask_decoder.modules(), *model.prompt_encoder.modules()):
        init_prompt_encoder(module)
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            # a transposed convolution of stride 2 reads each input channel once
            inputs = len(module.weight) if isinstance(module, nn.ConvTranspose2d) else module.weight[0].numel()
            nn.init.normal_(module.weight, std=inputs**-0.5)
            nn.init.zeros_(module.bias)
    encoder, transformer = model.prompt_encoder, model.mask_decoder.transformer
    for labels in (*encoder.point_embed, encoder.not_a_point_embed, encoder.no_mask_embed):
        labels.weight.mul_(LABEL_GAIN)
    for module in (*transformer.layers.modules(), model.vision_encoder.neck.layer_norm2):
        if isinstance(module, nn.LayerNorm):
            nn.init.constant_(module.weight, NORM_GAIN)
    between = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        between += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for attention in between:
        _start_as_kernel(attention)
    table = encoder.shared_embedding
    table.positional_embedding.mul_(TABLE_GAIN)
    model.shared_image_embedding.positional_embedding.copy_(table.positional_embedding)
    for positions in (table, model.shared_image_embedding):
        positions.requires_grad_(False)


def _start_as_kernel(attention: SamAttention) -> None:
    nn.init.orthogonal_(attention.q_proj.weight, gain=ATTENTION_GAIN)
    attention.k_proj.weight.copy_(attention.q_proj.weight)


def scene_regions(scenes: SceneBatch) -> torch.Tensor:
    """Region numbers `[B, S, S]` int64: objects 0 to 4, stuff 5 and, where there are two classes of it, 6."""
    second = scenes.label_maps == scenes.stuff_classes[:, 1, None, None]
    alike = scenes.stuff_classes[:, 0] == scenes.stuff_classes[:, 1]
    stuff = MAX_OBJECTS + (second & ~alike[:, None, None]).long()
    instances = scenes.instance_maps.long()
    return torch.where(instances >= 0, instances, stuff)


def draw_prompts(regions: torch.Tensor, count: int, points: int, generator: torch.Generator) -> Prompts:
    """`count` regions of each scene, equally likely whatever their size, and `points` pixels of each, all equally
    likely; regions of less than 24 pixels are not drawn."""
    size = regions.shape[-1]
    flat = regions.flatten(1)
    areas = torch.zeros(len(regions), MAX_OBJECTS + 2, dtype=torch.long).scatter_add_(1, flat, torch.ones_like(flat))
    weights = torch.where(areas >= SMALLEST_REGION, 1 / areas, 0.0).gather(1, flat)
    first = torch.multinomial(weights, count, replacement=True, generator=generator)
    targets = flat[:, None] == flat.gather(1, first)[:, :, None]
    pixels = torch.multinomial(targets.float().flatten(0, 1), points, replacement=True, generator=generator)
    pixels = pixels.unflatten(0, first.shape)
    # SAM itself adds the half pixel of their centres
    places = torch.stack([pixels % size, pixels // size], dim=-1).float()
    return Prompts(places, targets.unflatten(2, (size, size)))


def boxes_of(targets: torch.Tensor) -> torch.Tensor:
    """Bounding boxes `[..., 4]` (x, y of two corners, in pixels) of masks `[..., S, S]` that are not empty."""
    columns, rows = targets.any(-2).float(), targets.any(-1).float()

    def ends(line: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return line.argmax(-1), line.shape[-1] - line.flip(-1).argmax(-1)

    (left, right), (top, bottom) = ends(columns), ends(rows)
    return torch.stack([left, top, right, bottom], dim=-1).float()


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 pictures `[B, 3, S, S]` to SAM's `pixel_values`."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (images.float() / 255 - mean) / std


def ask(model: SamModel, images: torch.Tensor, prompts: Prompts, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Three masks for every prompt.

    Args:
        images: uint8 `[B, 3, S, S]`.
        kind: "points", "box", or "mask": one point and the region's mask, on a grid of an eighth of the picture.

    Returns:
        Mask logits `[B * P, 3, m, m]` and predicted IoU `[B * P, 3]`, float32.
    """
    count = prompts.targets.shape[1]
    embeddings = model.vision_encoder(normalise(images)).last_hidden_state.repeat_interleave(count, dim=0)
    points, targets = prompts.points.flatten(0, 1), prompts.targets.flatten(0, 1)
    given: dict[str, torch.Tensor] = {}
    if kind == "box":
        given["input_boxes"] = boxes_of(targets)[:, None]
    else:
        given["input_points"] = points[:, None] if kind == "points" else points[:, None, :1]
        given["input_labels"] = torch.ones(given["input_points"].shape[:-1], dtype=torch.long)
    if kind == "mask":
        side = 4 * model.config.prompt_encoder_config.image_embedding_size
        rough = F.adaptive_avg_pool2d(targets[:, None].float(), targets.shape[-1] // 8)
        given["input_masks"] = F.interpolate((2 * rough - 1) * MASK_LOGIT, (side, side), mode="bilinear")
    found = model(image_embeddings=embeddings, multimask_output=True, **given)
    return found.pred_masks[:, 0].float(), found.iou_scores[:, 0].float()


def sam_loss(logits: torch.Tensor, predicted_iou: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Focal and dice loss of each prompt's best mask, and the squared error of all predicted IoU.

    Args:
        logits: `[n, 3, m, m]`.
        predicted_iou: `[n, 3]`.
        targets: bool `[n, S, S]`.
    """
    wanted = F.interpolate(targets[:, None].float(), logits.shape[-2:], mode="area").expand_as(logits)
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    hit = probability * wanted + (1 - probability) * (1 - wanted)
    focal = ((1 - hit) ** FOCAL_GAMMA * entropy).mean((-2, -1))
    shared = (probability * wanted).sum((-2, -1))
    dice = 1 - (2 * shared + 1) / (probability.sum((-2, -1)) + wanted.sum((-2, -1)) + 1)
    masks = (FOCAL_WEIGHT * focal + DICE_WEIGHT * dice).amin(1).mean()
    found = mask_iou(logits.detach() > 0, wanted > 0.5)
    return masks + IOU_WEIGHT * F.mse_loss(predicted_iou, found)


def mask_iou(masks: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """IoU `[...]` of bool masks `[..., h, w]`; 0 where both are empty."""
    shared, either = (masks & targets).sum((-2, -1)), (masks | targets).sum((-2, -1))
    return shared / either.clamp(min=1)


def train_sam(recipe: SamRecipe, output: str | Path, seed: int = 0, progress_bar: bool = True) -> dict[str, Any]:
    """Train, evaluate and save a SAM; equal arguments give equal weights on one machine.

    A run that was killed, or stopped by SIGTERM, continues from its last checkpoint, to the same bits; one that is over
    is not done again.

    Args:
        recipe: what to train.
        output: folder for the model (`SamModel.from_pretrained`), recipe and log (`train_log.jsonl`).
        seed: of weights, scenes and prompts.
        progress_bar: show one.

    Returns:
        The last line of the log: step, seconds (wall clock, and of the processor), loss and figures of
        [`evaluate_sam`].

    Raises:
        RunFolderError: `output` holds a run of another recipe.
        CheckpointError: a checkpoint could not be written or read.
        Terminated: SIGTERM came; everything is saved.
    """
    output = Path(output)
    identity = {**asdict(recipe), "seed": seed}
    del identity["checkpoint_every"]
    folder = OneFileFolder(output, identity)
    result = folder.claim()
    if result is not None:
        return result
    torch.manual_seed(seed)
    model = build_sam(recipe).train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    options = {"size": recipe.scene_size, "geometry": recipe.geometry}
    vocabulary = SceneVocabulary.by_name(recipe.vocabulary)
    # as for CLIP: even seeds are for training, odd ones for evaluation
    scenes = SceneGenerator(vocabulary, seed=2 * seed, tiers=recipe.tiers, **options)
    groups = parameter_groups(model, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas)
    parts = {"model": model, "average": average, "optimizer": optimizer}
    state = folder.load(**parts)
    start, cpu_start = time.monotonic() - state.seconds, time.process_time() - state.cpu_seconds
    write_log(output, state.lines)
    with termination_flag() as stop, tqdm(total=recipe.steps, initial=state.step, disable=not progress_bar) as bar:
        # a run that was killed between its last step and its end has only that end before it
        while state.step < recipe.steps:
            step = state.step
            factor = learning_rate_factor(step / recipe.steps, step, recipe.warmup_steps, recipe.decay_fraction)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * factor
            state.losses.append(_train_step(model, optimizer, scenes, recipe, seed, step))
            update_average(average, model, min(recipe.ema_decay, (1 + step) / (10 + step)))
            state.step += 1
            is_last = state.step == recipe.steps
            bar.update()
            if is_last or state.step % recipe.log_every == 0:
                bar.set_postfix(loss=f"{state.losses[-1]:.3f}")
                line = {
                    "step": state.step,
                    "scenes": state.step * recipe.batch_size,
                    "seconds": round(time.monotonic() - start, 1),
                    "cpu_seconds": round(time.process_time() - cpu_start, 1),
                    "loss": sum(state.losses) / len(state.losses),
                }
                state.losses.clear()
                if is_last or state.step % recipe.eval_every == 0:
                    count = recipe.eval_scenes // (1 if is_last else 4)
                    line |= evaluate_sam(average, SceneGenerator(vocabulary, seed=2 * seed + 1, **options), count)
                state.lines.append(line)
                write_log(output, state.lines)
            if is_last or stop[0] or state.step % recipe.checkpoint_every == 0:
                state.seconds, state.cpu_seconds = time.monotonic() - start, time.process_time() - cpu_start
                folder.save(state, **parts)
            if stop[0] and not is_last:
                raise Terminated(TERMINATED)
    average.save_pretrained(output)
    folder.finish(state.lines[-1])
    return state.lines[-1]


@torch.no_grad()
def update_average(average: SamModel, model: SamModel, decay: float) -> None:
    """Move the averaged weights towards the model's by the share 1 - decay."""
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


def _train_step(
    model: SamModel,
    optimizer: torch.optim.Optimizer,
    scenes: SceneGenerator,
    recipe: SamRecipe,
    seed: int,
    step: int,
) -> float:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**62)
    batch = scenes.render(step * recipe.batch_size, recipe.batch_size)
    kind = ROUND[step % len(ROUND)]
    points = int(torch.randint(1, NUM_POINTS + 1, (), generator=generator))
    prompts = draw_prompts(scene_regions(batch), recipe.prompts_per_scene, points, generator)
    with torch.autocast("cpu", torch.bfloat16) if recipe.autocast else nullcontext():
        logits, predicted_iou = ask(model, batch.images, prompts, kind)
    loss = sam_loss(logits, predicted_iou, prompts.targets.flatten(0, 1))
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"The loss is {loss.item()} at step {step}: lower learning_rate or max_grad_norm.")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
    optimizer.step()
    return loss.item()


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
