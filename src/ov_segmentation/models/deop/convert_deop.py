"""Conversion of DeOP's release, of its proposal network and of its learned text prompt."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from ...conversion import Drop, KeyRules, Rule, load_converted, read_checkpoint, split_in_three
from ...conversion_maskformer import WEIGHT, detectron2_rules
from .configuration_deop import DeOPConfig
from .modeling_deop import DeOPForOpenVocabularySegmentation

DEFAULT_TOKENIZER = "openai/clip-vit-base-patch16"


def coco156_r101c_vitb16() -> DeOPConfig:
    """The release: the configuration's defaults."""
    return DeOPConfig()


def voc15_r101c_vitb16() -> DeOPConfig:
    """The same model, trained on the 15 seen classes of PASCAL VOC; no weights were released."""
    return DeOPConfig()


def stage2_proposal_coco156() -> DeOPConfig:
    """The proposal network of the second stage, with the text prompt of the first."""
    return DeOPConfig(training_stage="segmentation")


def stage1_prompt_coco156() -> DeOPConfig:
    """The text prompt of the first stage."""
    return DeOPConfig(training_stage="proposals")


VARIANTS = {
    "coco156_r101c_vitb16": coco156_r101c_vitb16,
    "voc15_r101c_vitb16": voc15_r101c_vitb16,
    "stage2_proposal_coco156": stage2_proposal_coco156,
    "stage1_prompt_coco156": stage1_prompt_coco156,
}
# our keys that the third stage adds, and the second
_ANCHORS, _PROPOSALS = r"(heatmap_decoder|visual_prompts)\.", r"(proposal_network\.|no_object_embedding$)"


def key_rules(config: DeOPConfig) -> KeyRules:
    """The rules for checkpoints of `config`'s parts."""
    table = r"clip_adapter\.clip_model\.visual\."
    layer, ours = r"decoder\.layers\.(\d+)\.", r"heatmap_decoder.layers.\1."
    last, our_last = r"decoder\.outlayer\.", "heatmap_decoder.heatmap_layer."
    norms = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
    rules: list[Rule | Drop] = [
        Rule(rf"{table}learned_position", "visual_prompts.input_table.embedding"),
        Rule(rf"{table}transformer\.resblocks\.(\d+)\.learned_position", r"visual_prompts.block_tables.\1.embedding"),
        Rule(r"query_embedding\.weight", "heatmap_decoder.query_embedding.weight"),
        Rule(rf"decoder\.norm\.{WEIGHT}", r"heatmap_decoder.layernorm.\1"),
    ]
    attentions = ((layer, ours, "self_attn", "self_attn", 2), (layer, ours, "multihead_attn_my", "encoder_attn", 2))
    for source, target, theirs, name, group in (*attentions, (last, our_last, "self_attn", "self_attn", 1)):
        packed = tuple(rf"{target}{name}.{part}_proj.\{group}" for part in "qkv")
        rules.append(Rule(rf"{source}{theirs}\.in_proj_{WEIGHT}", packed, split_in_three))
        rules.append(Rule(rf"{source}{theirs}\.out_proj\.{WEIGHT}", rf"{target}{name}.o_proj.\{group}"))
    rules += [Rule(rf"{layer}norm{i + 1}\.{WEIGHT}", rf"{ours}{norm}.\2") for i, norm in enumerate(norms)]
    rules += [Rule(rf"{layer}linear{i}\.{WEIGHT}", rf"{ours}mlp.fc{i}.\2") for i in (1, 2)]
    projections = tuple(rf"{our_last}{part}_projection.\1" for part in ("query", "key", "value"))
    rules.append(Rule(rf"{last}multihead_attn_my\.in_proj_{WEIGHT}", projections, split_in_three))
    rules.append(Rule(rf"{last}norm1\.{WEIGHT}", rf"{our_last}self_attn_layer_norm.\1"))
    return detectron2_rules(config.mask_config, *rules)


def map_keys(keys: Iterable[str], config: DeOPConfig) -> dict[str, list[str] | str]:
    """Each source key -> its target keys, or the reason why it is dropped."""
    return key_rules(config).map_keys(keys)


def convert(
    checkpoint: str | os.PathLike, config: DeOPConfig, clip_checkpoint: str | os.PathLike | None = None
) -> DeOPForOpenVocabularySegmentation:
    """The model of an original checkpoint file.

    Args:
        checkpoint: the release, or a checkpoint of the first or second training stage, which fills a part of the model
            and leaves the rest initialised.
        config: of its size, see `VARIANTS`.
        clip_checkpoint: must be None: DeOP's checkpoints hold all of CLIP.

    Raises:
        ConversionError: see `conversion`; a part that its stage trains is incomplete.
    """
    if clip_checkpoint is not None:
        raise ValueError("DeOP's checkpoints hold CLIP themselves: there is no use for a clip_checkpoint.")
    weights = key_rules(config).convert(read_checkpoint(Path(checkpoint)))
    model = DeOPForOpenVocabularySegmentation(config)
    load_converted(model, weights, _later_parts(weights))
    return model


def preferred_variant(checkpoint: str | os.PathLike) -> str:
    """The variant of a checkpoint's training stage, as their shapes are all the same; of the third, what was released.

    Raises:
        ConversionError: see `conversion`.
    """
    mapped = map_keys(read_checkpoint(checkpoint), DeOPConfig()).values()
    later = _later_parts(key for targets in mapped if not isinstance(targets, str) for key in targets)
    stages = {None: "coco156_r101c_vitb16", _ANCHORS: "stage2_proposal_coco156"}
    return stages.get(later, "stage1_prompt_coco156")


def _later_parts(keys: Iterable[str]) -> str | None:
    """A regular expression of our keys that only training stages after that of a checkpoint with `keys` fill."""
    keys = list(keys)
    if any(re.match(_ANCHORS, key) for key in keys):
        return None
    return _ANCHORS if any(re.match(_PROPOSALS, key) for key in keys) else f"{_ANCHORS}|{_PROPOSALS}"
