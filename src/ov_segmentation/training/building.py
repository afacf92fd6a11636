"""Model and processor of a recipe."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoProcessor, AutoTokenizer, PreTrainedConfig

from ..auto import METHODS, AutoModelForOpenVocabularySegmentation, Method, load_class
from ..configuration_base import check_fields
from ..data.word_tokenizer import build_word_tokenizer, words_of
from ..strict_mapping import RecipeError, unknown_key
from ..vocabulary import Vocabulary
from .randomness import INITIALISATION, derive_seed
from .recipe import ModelRecipe, ProcessorRecipe, Recipe
from .trainable import select_trainable

WORDS = "words"


def build_model_and_processor(recipe: Recipe, vocabularies: list[Vocabulary]) -> tuple[Any, Any]:
    """The model, in float32, with `requires_grad` set as the recipe asks, and its processor.

    Args:
        recipe: the run's.
        vocabularies: class names that a tokenizer made of words has to know.
    """
    torch.manual_seed(derive_seed(recipe.seed, INITIALISATION))
    if recipe.model.from_pretrained is not None:
        model = _pretrained(recipe.model)
        check_trained_to_segment(recipe.model.from_pretrained, model.config)
        processor = _pretrained_processor(recipe.model.from_pretrained, recipe.processor)
    else:
        method = find_method(recipe.model.model_type)
        processor = _new_processor(method, recipe, vocabularies)
        model = _around_clip(method, recipe.model) if recipe.model.from_clip else _random(method, recipe, processor)
    # a stream of its own: what was drawn before depends on where the weights come from
    torch.manual_seed(derive_seed(recipe.seed, INITIALISATION, 1))
    select_trainable(model, recipe.model.trainable, recipe.model.lora)
    if recipe.model.activation_checkpointing:
        model.activation_checkpointing_enable()
    return model, processor


def check_trained_to_segment(source: str, config: PreTrainedConfig) -> None:
    """Check that a checkpoint has something to train, which a CLIP that DeOP segments with without training has not.

    Args:
        source: folder or Hub id that the checkpoint is from.
        config: of the checkpoint.

    Raises:
        RecipeError: it has not; with what to do.
    """
    if config.model_type == "clip" or getattr(config, "proposals", None) == "none":
        raise RecipeError(
            f"{source} segments without training (a plain CLIP whose patches are classified): there is no loss to "
            f"fine-tune it by. Start from a checkpoint that was trained to segment, or train a method around the CLIP, "
            f"which a recipe for examples/train.py does: model: {{model_type: san, from_clip: ID-OR-FOLDER}} "
            f"(examples/recipes/)."
        )


def find_method(model_type: str) -> Method:
    """The row of the methods' table; `RecipeError` when there is none."""
    methods = {method.model_type: method for method in METHODS}
    if model_type not in methods:
        raise RecipeError(unknown_key(f"model.model_type: {model_type}", model_type, methods))
    return methods[model_type]


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _pretrained(recipe: ModelRecipe) -> Any:
    options = {} if recipe.attention is None else {"attn_implementation": recipe.attention}
    return AutoModelForOpenVocabularySegmentation.from_pretrained(
        recipe.from_pretrained, dtype=torch.float32, **options, **recipe.config
    )


def _around_clip(method: Method, recipe: ModelRecipe) -> Any:
    model_class = load_class(method.model)
    if recipe.from_sam is not None:
        model = model_class.from_clip_and_sam(recipe.from_clip, recipe.from_sam, **recipe.config)
    else:
        model = model_class.from_clip(recipe.from_clip, **recipe.config)
    if recipe.attention is not None:
        model.set_attn_implementation(recipe.attention)
    return model.float()


def _random(method: Method, recipe: Recipe, processor: Any) -> Any:
    values, config_class = dict(recipe.model.config), load_class(method.config)
    check_fields(config_class, values)
    if recipe.processor.tokenizer == WORDS:
        tokenizer = processor.tokenizer
        ids = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        # a CLIP of one piece, or (SED) its text tower beside another picture tower
        whole = "clip_config" in config_class.sub_configs_defaults
        holder = dict(values.get("clip_config") or {}) if whole else values
        holder["text_config"] = {**(holder.get("text_config") or {}), **ids}
        values = {**values, "clip_config": holder} if whole else holder
    config = config_class(**values)
    options = {} if recipe.model.attention is None else {"attn_implementation": recipe.model.attention}
    return load_class(method.model)._from_config(config, **options)


def _pretrained_processor(source: str, recipe: ProcessorRecipe) -> Any:
    processor = AutoProcessor.from_pretrained(source)
    image_processor = processor.image_processor
    if recipe.image_processor:
        image_processor = _image_processor(type(image_processor), recipe, image_processor.to_dict())
    tokenizer = processor.tokenizer if recipe.tokenizer is None else AutoTokenizer.from_pretrained(recipe.tokenizer)
    return type(processor)(image_processor, tokenizer, recipe.templates or processor.prompt_templates)


def _new_processor(method: Method, recipe: Recipe, vocabularies: list[Vocabulary]) -> Any:
    settings = recipe.processor
    processor_class = load_class(method.processor)
    image_processor = _image_processor(load_class(method.image_processor), settings, {})
    source = settings.tokenizer or recipe.model.from_clip
    if source is None:
        raise RecipeError(
            'processor.tokenizer is needed for a model with random weights: a folder, a Hub id, or "words" for a small '
            "one made from the class names."
        )
    if source == WORDS:
        templates = settings.templates or processor_class.default_templates
        tokenizer = build_word_tokenizer(words_of(templates, vocabularies))
    else:
        tokenizer = AutoTokenizer.from_pretrained(source)
    return processor_class(image_processor, tokenizer, settings.templates)


def _image_processor(image_processor_class: Any, recipe: ProcessorRecipe, base: dict[str, Any]) -> Any:
    known = image_processor_class().to_dict()
    for name in recipe.image_processor:
        if name not in known:
            raise RecipeError(unknown_key(f"processor.image_processor.{name}", name, known))
    return image_processor_class(**{**base, **recipe.image_processor})
