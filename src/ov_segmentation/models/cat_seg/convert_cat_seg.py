"""Original CAT-Seg checkpoints to [`CATSegForOpenVocabularySegmentation`]."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from ...conversion import Drop, KeyRules, Rule, load_converted, read_checkpoint
from ...conversion_clip import clip_rules
from .configuration_cat_seg import CATSegConfig
from .modeling_cat_seg import CATSegForOpenVocabularySegmentation

DEFAULT_TOKENIZER = "openai/clip-vit-base-patch16"

CLIP = r"sem_seg_head\.predictor\.clip_model\."
AGGREGATOR = r"sem_seg_head\.predictor\.transformer\."
WEIGHT_OR_BIAS = r"(weight|bias)"
LAYER = rf"{AGGREGATOR}layers\.(\d+)\."
BLOCK = rf"{LAYER}swin_block\.block_(\d)\."
# our own numbers of stages start at 0
STAGES = (("1", "0"), ("2", "1"))


def _projections(source: str, target: str) -> list[Rule]:
    names = (("q", "query"), ("k", "key"), ("v", "value"))
    return [
        Rule(rf"{source}{old}\.{WEIGHT_OR_BIAS}", f"{target}.{new}.\\{source.count('(') + 1}") for old, new in names
    ]


def _split_clip_weights(tower: str, target: str) -> Rule:
    """Query, key and value weights stand alone in these files; their biases are packed as in any OpenAI CLIP."""
    return Rule(
        rf"{CLIP}{tower}resblocks\.(\d+)\.attn\.([qkv])_proj_weight",
        rf"clip.{target}.encoder.layers.\1.self_attn.\2_proj.weight",
    )


def _rules() -> Iterable[Rule | Drop]:
    yield _split_clip_weights(r"visual\.transformer\.", "vision_model")
    yield _split_clip_weights(r"transformer\.", "text_model")
    yield from clip_rules(CLIP)
    spatial, classes = r"layers.\1.spatial.block\2", r"layers.\1.classes"
    yield Drop(rf"{BLOCK}attn_mask", "the mask of shifted windows, a constant that the model builds itself")
    yield Rule(rf"{BLOCK}norm(\d)\.{WEIGHT_OR_BIAS}", rf"{spatial}.norm\3.\4")
    yield from _projections(rf"{BLOCK}attn\.", f"{spatial}.attention")
    yield Rule(rf"{BLOCK}attn\.proj\.{WEIGHT_OR_BIAS}", rf"{spatial}.attention.projection.\3")
    yield Rule(rf"{BLOCK}mlp\.fc(\d)\.{WEIGHT_OR_BIAS}", rf"{spatial}.fc\3.\4")
    yield Rule(rf"{LAYER}swin_block\.guidance_norm\.{WEIGHT_OR_BIAS}", r"layers.\1.spatial.guidance_norm.\2")
    yield Rule(rf"{LAYER}attention\.padding_tokens", r"layers.\1.padding_token", torch.flatten)
    yield Rule(rf"{LAYER}attention\.padding_guidance", r"layers.\1.padding_guidance", torch.flatten)
    yield from _projections(rf"{LAYER}attention\.attention\.", classes)
    yield Rule(rf"{LAYER}attention\.MLP\.0\.{WEIGHT_OR_BIAS}", rf"{classes}.fc1.\2")
    yield Rule(rf"{LAYER}attention\.MLP\.2\.{WEIGHT_OR_BIAS}", rf"{classes}.fc2.\2")
    yield Rule(rf"{LAYER}attention\.norm(\d)\.{WEIGHT_OR_BIAS}", rf"{classes}.norm\2.\3")
    yield Rule(rf"{AGGREGATOR}conv1\.{WEIGHT_OR_BIAS}", r"cost_embedding.\1")
    yield Rule(rf"{AGGREGATOR}guidance_projection\.0\.{WEIGHT_OR_BIAS}", r"appearance_projection.\1")
    yield Rule(rf"{AGGREGATOR}text_guidance_projection\.0\.{WEIGHT_OR_BIAS}", r"text_projection.\1")
    yield Rule(rf"{AGGREGATOR}decoder_guidance_projection\.(\d)\.0\.{WEIGHT_OR_BIAS}", r"skips.\1.projection.\2")
    for old, new in STAGES:
        stage = rf"{AGGREGATOR}decoder{old}\."
        yield Rule(rf"upsample{old}\.{WEIGHT_OR_BIAS}", rf"skips.{new}.upsample.\1")
        yield Rule(rf"{stage}up\.{WEIGHT_OR_BIAS}", rf"decoder.{new}.up.\1")
        for place, part in enumerate(("conv1", "norm1", None, "conv2", "norm2")):
            if part is not None:
                yield Rule(rf"{stage}conv\.double_conv\.{place}\.{WEIGHT_OR_BIAS}", rf"decoder.{new}.{part}.\1")
    yield Rule(rf"{AGGREGATOR}head\.{WEIGHT_OR_BIAS}", r"head.\1")


RULES = KeyRules(_rules())


def _vitb_384() -> CATSegConfig:
    return CATSegConfig(pad_multiple=32, weights_license="mit")


def _vitl_336() -> CATSegConfig:
    clip_config = {
        "projection_dim": 768,
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 336,
            "projection_dim": 768,
        },
        "text_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "projection_dim": 768,
        },
    }
    return CATSegConfig(
        clip_config=clip_config, image_size=336, skip_layers=(7, 15), pad_multiple=32, weights_license="mit"
    )


VARIANTS = {"vitb_384": _vitb_384, "vitl_336": _vitl_336}


def map_keys(keys: Iterable[str], config: CATSegConfig) -> dict[str, list[str] | str]:
    """Each key of an original checkpoint -> our keys, or the reason why it is dropped.

    Raises:
        ConversionError: keys that have no place in the model.
    """
    return RULES.map_keys(keys)


def convert(
    checkpoint: str | os.PathLike, config: CATSegConfig, clip_checkpoint: str | os.PathLike | None = None
) -> CATSegForOpenVocabularySegmentation:
    """A model with the weights of an original checkpoint file, which holds its own, fine-tuned CLIP.

    Args:
        checkpoint: the file.
        config: of the variant; see `VARIANTS`.
        clip_checkpoint: must be None.

    Raises:
        ConversionError: the file is damaged, of another method or variant, or incomplete.
        ValueError: `clip_checkpoint` was given.
    """
    if clip_checkpoint is not None:
        raise ValueError("CAT-Seg fine-tunes both towers of CLIP and stores them: it takes no clip_checkpoint.")
    weights = RULES.convert(read_checkpoint(checkpoint))
    model = CATSegForOpenVocabularySegmentation(config)
    load_converted(model, weights)
    return model.eval()


__all__ = ["DEFAULT_TOKENIZER", "VARIANTS", "convert", "map_keys"]
