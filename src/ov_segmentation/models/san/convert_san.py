"""Conversion of SAN's released checkpoints (detectron2 layout, CLIP split into three parts)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from ...conversion import Drop, KeyRules, Rule, load_converted, pointwise, read_checkpoint
from ...conversion_clip import clip_text_rules, clip_vision_rules
from .configuration_san import SANConfig
from .modeling_san import SANForOpenVocabularySegmentation

DEFAULT_TOKENIZER = "openai/clip-vit-base-patch16"


def san_vit_b_16() -> SANConfig:
    """ViT-B/16: the configuration's defaults."""
    return SANConfig(weights_license="mit")


def san_vit_large_14() -> SANConfig:
    """ViT-L/14 at 336 pixels."""
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 336,
        "projection_dim": 768,
    }
    return SANConfig(
        clip_config={"projection_dim": 768, "text_config": text, "vision_config": vision},
        num_feature_layers=18,
        num_recognition_layers=6,
        clip_input_scale=0.7,
        weights_license="mit",
    )


VARIANTS = {"san_vit_b_16": san_vit_b_16, "san_vit_large_14": san_vit_large_14}


def key_rules(config: SANConfig) -> KeyRules:
    """The rules for checkpoints of `config`'s size."""
    first_recognition_block = config.clip_config.vision_config.num_hidden_layers - config.num_recognition_layers

    def rename(key: str) -> str:
        """Put CLIP's vision tower together again; the recognition blocks were renumbered from 0."""
        match = re.fullmatch(r"clip_rec_head\.resblocks\.(\d+)\.(.*)", key)
        if match:
            return f"visual.transformer.resblocks.{int(match[1]) + first_recognition_block}.{match[2]}"
        key = key.replace("clip_visual_extractor.resblocks.", "visual.transformer.resblocks.")
        return re.sub(r"^(clip_visual_extractor|clip_rec_head)\.", "visual.", key)

    side, ours = r"side_adapter_network\.", "side_adapter."
    block, our_block = rf"{side}vit_model\.blocks\.(\d+)\.", rf"{ours}blocks.\1."
    # fusion layers are numbered in the order of the fusion map, ours are called by their side layer
    fusions = [
        rule
        for number, (_, side_layer) in enumerate(config.fusion_map)
        for rule in _fusion_rules(rf"{side}fusion_layers\.layer_{number}\.", f"{ours}fusion_layers.{side_layer}.")
    ]
    return KeyRules(
        [
            Rule(rf"{side}query_embed", f"{ours}query_embedding"),
            Rule(rf"{side}query_pos_embed", f"{ours}query_position_embedding"),
            Rule(rf"{side}vit_model\.pos_embed", f"{ours}position_embedding"),
            Rule(rf"{side}vit_model\.patch_embed\.proj\.(weight|bias)", rf"{ours}patch_embedding.\1"),
            Rule(rf"{block}(norm[12])\.(weight|bias)", rf"{our_block}\2.\3"),
            Rule(rf"{block}(?:attn|mlp)\.(qkv|proj|fc1|fc2)\.(weight|bias)", rf"{our_block}\2.\3"),
            *fusions,
            *_mlp_rules(rf"{side}mask_decoder\.query_mlp", f"{ours}decoder.query_mlp"),
            *_mlp_rules(rf"{side}mask_decoder\.pix_mlp", f"{ours}decoder.pixel_mlp"),
            *_mlp_rules(rf"{side}mask_decoder\.attn_mlp", f"{ours}decoder.bias_mlp"),
            Rule(rf"{side}mask_decoder\.bias_scaling\.(weight|bias)", rf"{ours}decoder.bias_scaling.\1"),
            *clip_vision_rules(),
            *clip_text_rules(r"ov_classifier\."),
            Rule(r"ov_classifier\.logit_scale", "clip.logit_scale", lambda value: value.reshape(())),
            Rule(r"ov_classifier\.bg_embed", "background_embedding"),
            Drop(r"criterion\.empty_weight", "class weights of the loss, for the number of training classes"),
        ],
        rename,
    )


def _mlp_rules(source: str, target: str) -> list[Rule]:
    return [
        Rule(rf"{source}\.layers\.(\d+)\.weight", rf"{target}.layers.\1.weight", pointwise),
        Rule(rf"{source}\.layers\.(\d+)\.bias", rf"{target}.layers.\1.bias"),
    ]


def _fusion_rules(source: str, target: str) -> list[Rule]:
    return [
        Rule(rf"{source}input_proj\.0\.(weight|bias)", rf"{target}norm.\1"),
        Rule(rf"{source}input_proj\.1\.weight", f"{target}proj.weight", pointwise),
        Rule(rf"{source}input_proj\.1\.bias", f"{target}proj.bias"),
    ]


def map_keys(keys: Iterable[str], config: SANConfig) -> dict[str, list[str] | str]:
    """Each source key -> its target keys, or the reason why it is dropped."""
    return key_rules(config).map_keys(keys)


def convert(
    checkpoint: str | os.PathLike, config: SANConfig, clip_checkpoint: str | os.PathLike | None = None
) -> SANForOpenVocabularySegmentation:
    """The model of an original checkpoint file.

    Args:
        checkpoint: a released or trained file.
        config: of its size, see `VARIANTS`.
        clip_checkpoint: must be None: SAN's checkpoints hold all of CLIP.

    Raises:
        ConversionError: see `conversion`.
    """
    if clip_checkpoint is not None:
        raise ValueError("SAN's checkpoints hold CLIP themselves: there is no use for a clip_checkpoint.")
    weights = key_rules(config).convert(read_checkpoint(checkpoint))
    model = SANForOpenVocabularySegmentation(config)
    load_converted(model, weights)
    return model
