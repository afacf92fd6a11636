"""Conversion of SED's released checkpoints (detectron2 layout, the fine-tuned CLIP inside)."""

from __future__ import annotations

import os
from collections.abc import Iterable

from ...conversion import ConversionError, KeyRules, Rule, load_converted, read_checkpoint
from .configuration_sed import SEDConfig
from .foundations import WEIGHT_OR_BIAS, convnext_clip_rules
from .modeling_sed import SEDForOpenVocabularySegmentation

DEFAULT_TOKENIZER = "laion/CLIP-convnext_base_w_320-laion_aesthetic-s13B-b82K"

CLIP = r"sem_seg_head\.predictor\.clip_model\."
DECODER = r"sem_seg_head\.predictor\.transformer\."


def convnext_b_768() -> SEDConfig:
    """SED (B): the configuration's defaults."""
    return SEDConfig(weights_license="apache-2.0")


def convnext_l_768() -> SEDConfig:
    """SED (L): ConvNeXt-L with an MLP projection."""
    return SEDConfig(
        vision_config={
            "model_type": "convnext",
            "hidden_sizes": [192, 384, 768, 1536],
            "depths": [3, 3, 27, 3],
            "layer_norm_eps": 1e-6,
            "drop_path_rate": 0.1,
        },
        text_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 16,
            "projection_dim": 768,
            "hidden_act": "gelu",
            "bos_token_id": 49406,
            "eos_token_id": 49407,
        },
        projection_type="mlp",
        projection_dropout=0.1,
        weights_license="apache-2.0",
    )


VARIANTS = {"convnextB_768": convnext_b_768, "convnextL_768": convnext_l_768}


def _layer_rules(index: int) -> Iterable[Rule]:
    """Rules of decoder layer `index` (from 0), which the original calls decoder<index + 1>."""
    source, target = rf"{DECODER}decoder{index + 1}\.", f"decoder.layers.{index}."
    yield Rule(rf"{source}cnext\.(dwconv|pwconv1|pwconv2)\.{WEIGHT_OR_BIAS}", rf"{target}spatial.\1.\2")
    yield Rule(rf"{source}cnext\.norm\.{WEIGHT_OR_BIAS}", rf"{target}spatial.layernorm.\1")
    yield Rule(rf"{source}cnext\.gamma", f"{target}spatial.layer_scale_parameter")
    for old, new in (("q", "query"), ("k", "key"), ("v", "value")):
        yield Rule(rf"{source}attention\.attention\.{old}\.{WEIGHT_OR_BIAS}", rf"{target}class_attention.{new}.\1")
    for old, new in (("0", "fc1"), ("2", "fc2")):
        yield Rule(rf"{source}attention\.MLP\.{old}\.{WEIGHT_OR_BIAS}", rf"{target}class_attention.{new}.\1")
    yield Rule(rf"{source}attention\.(norm[12])\.{WEIGHT_OR_BIAS}", rf"{target}class_attention.\1.\2")
    yield Rule(rf"{source}up\.{WEIGHT_OR_BIAS}", rf"{target}upsampling.up.\1")
    for old, new in (("0", "conv1"), ("1", "norm1"), ("3", "conv2"), ("4", "norm2")):
        yield Rule(rf"{source}conv\.double_conv\.{old}\.{WEIGHT_OR_BIAS}", rf"{target}upsampling.{new}.\1")
    cost_guidance = rf"{DECODER}decoder_corr_guidance_projection\.{index}\.0\.{WEIGHT_OR_BIAS}"
    yield Rule(cost_guidance, rf"{target}cost_guidance.conv.\1")


def key_rules(config: SEDConfig) -> KeyRules:
    """The rules for checkpoints with `config`'s number of decoder layers."""
    layers = config.num_decoder_layers
    return KeyRules(
        [
            *convnext_clip_rules(CLIP),
            Rule(rf"{DECODER}conv1\.{WEIGHT_OR_BIAS}", r"decoder.cost_embedding.conv.\1"),
            Rule(rf"{DECODER}head0\.{WEIGHT_OR_BIAS}", r"decoder.cost_embedding.head.conv.\1"),
            # head1, head2: auxiliary, after the layer of that number; head: after the last one
            *(
                Rule(rf"{DECODER}head{i}\.{WEIGHT_OR_BIAS}", rf"decoder.layers.{i - 1}.head.conv.\1")
                for i in range(1, layers)
            ),
            Rule(rf"{DECODER}head\.{WEIGHT_OR_BIAS}", rf"decoder.layers.{layers - 1}.head.conv.\1"),
            Rule(rf"{DECODER}decoder_guidance_projection\.(\d)\.0\.{WEIGHT_OR_BIAS}", r"image_guidance.\1.\2"),
            *(rule for index in range(layers) for rule in _layer_rules(index)),
        ]
    )


def map_keys(keys: Iterable[str], config: SEDConfig) -> dict[str, list[str] | str]:
    """Each source key -> its target keys, or the reason why it is dropped."""
    return key_rules(config).map_keys(keys)


def convert(
    checkpoint: str | os.PathLike, config: SEDConfig, clip_checkpoint: str | os.PathLike | None = None
) -> SEDForOpenVocabularySegmentation:
    """The model of an original checkpoint file.

    Args:
        checkpoint: a released or trained file.
        config: of its size, see `VARIANTS`.
        clip_checkpoint: must be None: SED's checkpoints hold all of CLIP.

    Raises:
        ConversionError: see `conversion`.
        ValueError: `clip_checkpoint` was given.
    """
    if clip_checkpoint is not None:
        raise ValueError("SED's checkpoints hold CLIP themselves: there is no use for a clip_checkpoint.")
    if config.has_plain_encoder:
        raise ConversionError("SED's releases have ConvNeXt encoders, this configuration has CLIP's ViT.")
    weights = key_rules(config).convert(read_checkpoint(checkpoint))
    model = SEDForOpenVocabularySegmentation(config)
    load_converted(model, weights)
    return model


__all__ = ["DEFAULT_TOKENIZER", "VARIANTS", "convert", "key_rules", "map_keys"]
