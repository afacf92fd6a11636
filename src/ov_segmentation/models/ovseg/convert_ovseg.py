"""Conversion of OVSeg's releases, of CLIP adaptation checkpoints joined to them, and of SimBaseline."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable
from typing import Any

from ...conversion import ConversionError, KeyRules, Rule, StateDict, load_converted, read_checkpoint
from ...conversion_clip import clip_rules
from ...conversion_maskformer import detectron2_rules, is_second_adapter
from .configuration_ovseg import OVSegConfig
from .modeling_ovseg import OVSegForOpenVocabularySegmentation

DEFAULT_TOKENIZER = "openai/clip-vit-large-patch14"
VIT_B_16 = {"vision_config": {"patch_size": 16, "image_size": 224}}
RESNET_101C = {"backbone_config": {"model_type": "ov_resnet_c"}}


def ovseg_swinbase_vitl14() -> OVSegConfig:
    """Swin-B and ViT-L/14: the configuration's defaults."""
    return OVSegConfig(weights_license="cc-by-nc-4.0")


def ovseg_r101c_vitb16() -> OVSegConfig:
    """ResNet-101c and ViT-B/16."""
    return OVSegConfig(
        clip_config=VIT_B_16, mask_config=RESNET_101C, mask_threshold=0.5, weights_license="cc-by-nc-4.0"
    )


def simbaseline_coco156() -> OVSegConfig:
    """SimBaseline on the 156 seen classes of COCO-Stuff, with a learned text prompt."""
    return OVSegConfig(
        clip_config=VIT_B_16,
        mask_config={"backbone_config": {**RESNET_101C["backbone_config"], "frozen_stages": 0}},
        mask_threshold=0.5,
        prompt_type="none",
        num_context_vectors=16,
        ensemble_weight=0.8,
    )


VARIANTS = {
    "ovseg_swinbase_vitL14_ft_mpt": ovseg_swinbase_vitl14,
    "ovseg_R101c_vitB16_ft_mpt": ovseg_r101c_vitb16,
    "simbaseline_coco156": simbaseline_coco156,
}


def image_processor_values(config: OVSegConfig) -> dict[str, Any]:
    """Test resize and normalisation of a release: 512 / 2048 for OVSeg's ResNet, 640 / 2560 for the others."""
    resnet = config.mask_config.backbone_config.model_type == "ov_resnet_c"
    small = resnet and config.num_context_vectors == 0  # SimBaseline's ResNet, with a learned prompt, is tested at 640
    size = {"shortest_edge": 512, "longest_edge": 2048} if small else {"shortest_edge": 640, "longest_edge": 2560}
    return {"size": size, "image_mean": list(config.image_mean), "image_std": list(config.image_std)}


def prompt_templates(config: OVSegConfig) -> list[str] | None:
    """Bare names where the text prompt is learned; None: OVSeg's 14 templates."""
    return ["{}"] if config.num_context_vectors else None


MASK_PROMPTS = "visual_prompts.embedding"


def key_rules(config: OVSegConfig) -> KeyRules:
    """The rules for checkpoints of `config`'s parts."""
    return detectron2_rules(config.mask_config, Rule(r"clip_adapter\.clip_model\.visual\.mask_embedding", MASK_PROMPTS))


def map_keys(keys: Iterable[str], config: OVSegConfig) -> dict[str, list[str] | str]:
    """Each source key -> its target keys, or the reason why it is dropped."""
    keys = list(keys)
    second = [key for key in keys if is_second_adapter(key)]
    if second:
        raise ConversionError(
            "This is SimBaseline's VOC variant with two prompt learners and a second CLIP, which is not supported; the "
            "COCO-Stuff variant is. Keys of the second adapter:",
            second,
        )
    return key_rules(config).map_keys(keys)


def convert(
    checkpoint: str | os.PathLike, config: OVSegConfig, clip_checkpoint: str | os.PathLike | None = None
) -> OVSegForOpenVocabularySegmentation:
    """The model of an original checkpoint file.

    Args:
        checkpoint: a release, or a MaskFormer trained with the original code.
        config: of its size, see `VARIANTS`.
        clip_checkpoint: an adapted CLIP (open_clip's training checkpoint): its weights, mask prompts among them,
            replace those in `checkpoint`. Without mask prompts (fine-tuned only) the model has none, with a warning:
            those in `checkpoint` are of another CLIP, or were never trained.

    Raises:
        ConversionError: see `conversion`.
    """
    source = read_checkpoint(checkpoint)
    map_keys(source, config)
    weights = key_rules(config).convert(source)
    if clip_checkpoint is not None:
        adapted = convert_adapted_clip(read_checkpoint(clip_checkpoint))
        if MASK_PROMPTS not in adapted:
            weights.pop(MASK_PROMPTS, None)
            config = _without_mask_prompts(config, clip_checkpoint)
        weights.update(adapted)
    model = OVSegForOpenVocabularySegmentation(config)
    load_converted(model, weights)
    return model


def _without_mask_prompts(config: OVSegConfig, clip_checkpoint: str | os.PathLike) -> OVSegConfig:
    if config.prompt_type != "mask":
        return config
    warnings.warn(
        f'{clip_checkpoint} holds no mask prompts: the model is made without them (prompt_type="none").', stacklevel=3
    )
    config = copy.deepcopy(config)
    config.prompt_type = "none"
    return config


def convert_adapted_clip(source: StateDict) -> StateDict:
    """An open_clip checkpoint of OVSeg's CLIP adaptation, under our names: `clip.*` and the mask prompts."""
    return KeyRules([Rule(r"visual\.mask_embedding", MASK_PROMPTS), *clip_rules()]).convert(source)
