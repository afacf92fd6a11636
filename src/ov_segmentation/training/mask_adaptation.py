"""Adaptation of OVSeg's CLIP to masked crops: fine-tuning, prompt tuning, or both, on pairs of crop and noun.

Liang et al., "Open-Vocabulary Semantic Segmentation with Mask-adapted CLIP" (2023), sections 3.2 and 3.3. The loss is
CLIP's own (Radford et al., 2021, section 2.3) over the pairs of all processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.functional import normalize
from transformers import CLIPModel
from transformers.utils import ModelOutput

from ..data.datasets import build_vocabulary
from ..data.mask_pairs import load_mask_pairs
from ..layers.mask_prompts import DeepPrompts, MaskPrompts, encode_crops
from ..precision import full_precision
from ..strict_mapping import RecipeError
from ..text_encoding import encode_prompts
from ..vocabulary import Vocabulary
from .adaptation_recipe import AdaptationRecipe, PromptsRecipe
from .building import WORDS, build_model_and_processor
from .contrastive import contrastive_loss
from .crop_samples import CropBatchMaker, CropSamples
from .masked_crop_accuracy import masked_crop_accuracy
from .run import TrainingRun

MAX_LOGIT_SCALE = math.log(100)


@dataclass
class AdaptationOutput(ModelOutput):
    """`loss`, its terms, and the L2-normalised features `[B, D]` of this process's pairs."""

    loss: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    image_features: torch.Tensor | None = None
    text_features: torch.Tensor | None = None


class MaskAdaptation(nn.Module):
    """A CLIP and visual prompts in contrastive training on masked crops; parts of an OVSeg model, under its names.

    Args:
        clip: trained on its image side, or not at all; the temperature is trained in both cases.
        visual_prompts: None: CLIP sees crops as they are.
        train_clip, train_prompts: what is trained.
        equal_nouns, gather_with_gradient: see `AdaptationRecipe`.
    """

    def __init__(
        self,
        clip: CLIPModel,
        visual_prompts: MaskPrompts | DeepPrompts | None,
        train_clip: bool,
        train_prompts: bool,
        equal_nouns: str = "negatives",
        gather_with_gradient: bool = True,
    ) -> None:
        super().__init__()
        self.clip, self.visual_prompts = clip, visual_prompts
        self.equal_nouns, self.gather_with_gradient = equal_nouns, gather_with_gradient
        self.requires_grad_(False)
        self.clip.logit_scale.requires_grad_(True)
        if train_clip:
            self.clip.vision_model.requires_grad_(True)
            self.clip.visual_projection.requires_grad_(True)
        if train_prompts:
            self.visual_prompts.requires_grad_(True)

    def forward(self, crops: torch.Tensor, masks: torch.Tensor, input_ids: torch.Tensor) -> AdaptationOutput:
        """The symmetric contrastive loss.

        Args:
            crops: `[B, 3, S, S]` in CLIP's normalisation.
            masks: bool `[B, S, S]`.
            input_ids: `[B, L]`: the text of each crop's noun.
        """
        clip = self.clip
        images = encode_crops(clip.vision_model, clip.visual_projection, crops, masks, self.visual_prompts)
        images = normalize(images.float(), dim=-1)
        with torch.no_grad():
            texts = encode_prompts(input_ids, clip.text_model.config.eos_token_id, self._text_features).float()
        all_images, all_texts = gather_features(images, self.gather_with_gradient), gather_features(texts, False)
        fits = torch.eye(len(all_texts), dtype=torch.bool, device=texts.device)
        with full_precision(all_images):
            if self.equal_nouns == "ignored":
                # the text side is frozen: equal nouns have equal features, up to the batch they were computed in
                fits = all_texts @ all_texts.T > 1 - 1e-5
            loss = contrastive_loss(all_images, all_texts, clip.logit_scale.float(), fits)
        return AdaptationOutput(
            loss=loss, loss_dict={"loss_contrastive": loss}, image_features=images, text_features=texts
        )

    def _text_features(self, input_ids: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        hidden = self.clip.text_model(input_ids=input_ids).last_hidden_state
        return self.clip.text_projection(hidden[torch.arange(len(hidden), device=hidden.device), ends])


def gather_features(features: torch.Tensor, with_gradient: bool) -> torch.Tensor:
    """The features `[B, D]` of all processes, in their order, `[processes * B, D]`.

    Every process computes the same loss of all features, and averaging gradients over processes divides each process's
    own by their number. `with_gradient` multiplies them by it beforehand, which gives what one process with all pairs
    has; without, the gradient of the features is 1/processes of that, as in the original.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return features
    processes, rank = distributed.get_world_size(), distributed.get_rank()
    gathered = [torch.empty_like(features) for _ in range(processes)]
    distributed.all_gather(gathered, features.detach().contiguous())
    if with_gradient:
        constant = features.detach()
        features = constant + processes * (features - constant)
    gathered[rank] = features
    return torch.cat(gathered)


# ---------------------------------------------------------------------- the run


def adapt(recipe: AdaptationRecipe, output: str | Path, resume: str = "auto", command: str = "") -> dict[str, Any]:
    """Adapt the CLIP of an OVSeg model and export the model; arguments, folder, errors: see `training.loop.train`."""
    return AdaptationRun(recipe, Path(output), resume).execute(command)


class AdaptationRun(TrainingRun):
    """A run of [`adapt`], scored by its zero-shot accuracy on masked crops."""

    score_name = "top1"

    def prepare(self) -> None:
        """Load the pairs; build the model, its prompts and what is trained of it."""
        recipe, data = self.recipe, self.recipe.data
        self.pairs = load_mask_pairs(data.sources, data.split, data.probabilities, recipe.seed)
        self.test_pairs, names = None, []
        if data.evaluation is not None:
            self.test_pairs = load_mask_pairs(
                data.evaluation, data.evaluation_split, max_samples=data.max_evaluation_samples
            )
            names = self.test_pairs.nouns if data.class_names is None else data.class_names
        self.evaluates = self.test_pairs is not None
        vocabularies = [build_vocabulary(names, "ovseg")] if names else []
        self.class_names = vocabularies[0] if names else None
        if recipe.processor.tokenizer == WORDS:
            vocabularies.append(Vocabulary(self.pairs.nouns))
        self.model, self.processor = build_model_and_processor(recipe, vocabularies)
        if self.model.config.model_type != "ovseg":
            raise RecipeError(f"model must be an OVSeg model, the recipe's is {self.model.config.model_type}.")
        prepare_prompts(self.model, recipe.prompts)
        self.trained = MaskAdaptation(
            self.model.clip,
            self.model.visual_prompts,
            recipe.train_clip,
            recipe.prompts.use == "trained",
            recipe.equal_nouns,
            recipe.gather_with_gradient,
        )
        self.samples = CropSamples(self.pairs, recipe)
        config = self.model.config
        self.make_batch = CropBatchMaker(self.processor.tokenizer, config.crop_size, recipe.template, config.mask_fill)
        self.model.to(self.accelerator.device)  # evaluation needs all of it

    def describe_data(self) -> str:
        """Numbers of pairs and nouns."""
        return f"{len(self.pairs):,} pairs of {len(self.pairs.nouns):,} nouns"

    @torch.no_grad()
    def after_step(self) -> None:
        """The temperature factor stays between 1 and 100."""
        self.trained.clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def evaluate(self) -> dict[str, Any]:
        """Zero-shot accuracy on the evaluation's crops."""
        return masked_crop_accuracy(
            self.model, self.processor, self.test_pairs, self.class_names, self.accelerator, self._bar("evaluating")
        )

    def exported_weights(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The whole model's: what is not adapted is as it was."""
        return {**self.model.state_dict(), **weights}


def prepare_prompts(model: Any, recipe: PromptsRecipe) -> None:
    """Give an OVSeg model the prompts that a recipe asks for, in place.

    Raises:
        RecipeError: prompts are to stay as they are and there are none.
    """
    if recipe.use == "none":
        model.set_visual_prompts("none")
        return
    config, wanted = model.config, (recipe.kind, recipe.depth, recipe.number)
    given = (config.prompt_type, config.prompt_depth, config.num_deep_prompts)
    fits = given[0] == recipe.kind and all(w is None or w == g for w, g in zip(wanted[1:], given[1:]))
    if recipe.use == "frozen" and not fits:
        raise RecipeError(
            f"prompts.use is 'frozen', but the model has no such prompts: its prompt_type is {config.prompt_type!r}, "
            f"depth {config.prompt_depth}. Train prompts first (use: trained), or leave them out (use: none)."
        )
    if recipe.fresh or not fits:
        model.set_visual_prompts(*wanted)
