"""The CLIPs that SED can be built around: OpenCLIP's ConvNeXt as LAION publishes it, ours of the scenes, plain ViTs."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from transformers import CLIPModel, PreTrainedConfig
from transformers.utils import cached_file

from ...conversion import ConversionError, Drop, KeyRules, Rule, StateDict, read_checkpoint
from ...conversion_clip import clip_text_rules
from ...layers.clip_stem import load_clip
from ...layers.convnext_clip import ConvNextCLIPConfig, ConvNextCLIPModel, load_convnext_clip

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
WEIGHT_OR_BIAS = r"(weight|bias)"


def convnext_clip_rules(source: str = "") -> list[Rule | Drop]:
    """Rules for OpenCLIP's ConvNeXt CLIP -> `vision_model`, `visual_projection` and `text_model` of SED.

    Args:
        source: a regular expression in front of the names, its dot included.
    """
    trunk, ours = rf"{source}visual\.trunk\.", "vision_model."
    stage, our_stage = rf"{trunk}stages\.(\d+)\.", rf"{ours}encoder.stages.\1."
    block, our_block = rf"{stage}blocks\.(\d+)\.", rf"{our_stage}layers.\2."
    return [
        Rule(rf"{trunk}stem\.0\.{WEIGHT_OR_BIAS}", rf"{ours}embeddings.patch_embeddings.\1"),
        Rule(rf"{trunk}stem\.1\.{WEIGHT_OR_BIAS}", rf"{ours}embeddings.layernorm.\1"),
        Rule(rf"{stage}downsample\.([01])\.{WEIGHT_OR_BIAS}", rf"{our_stage}downsampling_layer.\2.\3"),
        Rule(rf"{block}conv_dw\.{WEIGHT_OR_BIAS}", rf"{our_block}dwconv.\3"),
        Rule(rf"{block}norm\.{WEIGHT_OR_BIAS}", rf"{our_block}layernorm.\3"),
        Rule(rf"{block}mlp\.fc([12])\.{WEIGHT_OR_BIAS}", rf"{our_block}pwconv\3.\4"),
        Rule(rf"{block}gamma", f"{our_block}layer_scale_parameter"),
        Rule(rf"{trunk}head\.norm\.{WEIGHT_OR_BIAS}", rf"{ours}layernorm.\1"),
        Rule(rf"{source}visual\.head\.proj\.weight", "visual_projection.weight"),
        Rule(rf"{source}visual\.head\.mlp\.fc([12])\.{WEIGHT_OR_BIAS}", r"visual_projection.fc\1.\2"),
        *clip_text_rules(source, "text_model.text_model", "text_model.text_projection"),
        Drop(rf"{source}logit_scale", "CLIP's temperature: SED's cost map is the plain cosine"),
    ]


def find_open_clip(name_or_path: str | os.PathLike) -> Path | None:
    """OpenCLIP's configuration file in a folder or Hub repository; None where there is none."""
    found = cached_file(
        name_or_path,
        OPEN_CLIP_CONFIG,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=True,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def read_open_clip(name_or_path: str | os.PathLike) -> tuple[dict[str, Any], StateDict]:
    """A ConvNeXt CLIP in OpenCLIP's layout.

    Args:
        name_or_path: folder or Hub id with `open_clip_config.json` and the weights: safetensors, or a pickle that is
            read without running code.

    Returns:
        values of [`SEDConfig`] that follow from it, and the weights under SED's names.

    Raises:
        ConversionError: the weights are missing, damaged, or no ConvNeXt CLIP.
    """
    config_file = find_open_clip(name_or_path)
    if config_file is None:
        raise ConversionError(f"{name_or_path} has no {OPEN_CLIP_CONFIG}.")
    model_config = json.loads(config_file.read_text(encoding="utf-8")).get("model_cfg", {})
    for name in OPEN_CLIP_WEIGHTS:
        weights_file = cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False)
        if weights_file is not None:
            source = read_checkpoint(weights_file)
            values = _config_values(model_config, source)
            return values, KeyRules(convnext_clip_rules(r"(?:text\.)?")).convert(source)
    raise ConversionError(f"{name_or_path} has none of {', '.join(OPEN_CLIP_WEIGHTS)}.")


def _config_values(model_config: dict[str, Any], weights: StateDict) -> dict[str, Any]:
    """What the configuration does not spell out (a timm model's sizes) is read off the tensors."""
    if "visual.trunk.stem.0.weight" not in weights:
        raise ConversionError("This is no ConvNeXt CLIP: it has no visual.trunk.stem.0.weight.", list(weights)[:5])
    vision, text = model_config.get("vision_cfg", {}), model_config.get("text_cfg", {})
    prefix = "text." if "text.token_embedding.weight" in weights else ""
    vocab_size, width = weights[f"{prefix}token_embedding.weight"].shape
    blocks = [re.fullmatch(r"visual\.trunk\.stages\.(\d+)\.blocks\.(\d+)\.gamma", key) for key in weights]
    depths: dict[int, int] = {}
    for match in filter(None, blocks):
        depths[int(match[1])] = max(depths.get(int(match[1]), 0), int(match[2]) + 1)
    layers = {key.split(".resblocks.")[1].split(".")[0] for key in weights if ".resblocks." in f".{key}"}
    return {
        "vision_config": {
            "model_type": "convnext",
            "hidden_sizes": [len(weights[f"visual.trunk.stages.{i}.blocks.0.gamma"]) for i in range(len(depths))],
            "depths": [depths[i] for i in range(len(depths))],
            "layer_norm_eps": 1e-6,
            "drop_path_rate": vision.get("timm_drop_path") or 0.0,
        },
        "text_config": {
            "hidden_size": width,
            "intermediate_size": weights[f"{prefix}transformer.resblocks.0.mlp.c_fc.bias"].shape[0],
            "num_attention_heads": text.get("heads", width // 64),
            "num_hidden_layers": len(layers),
            "projection_dim": weights[f"{prefix}text_projection"].shape[1],
            "max_position_embeddings": weights[f"{prefix}positional_embedding"].shape[0],
            "hidden_act": "quick_gelu" if model_config.get("quick_gelu") else "gelu",
            "vocab_size": vocab_size,
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,
        },
        "projection_type": "linear" if "visual.head.proj.weight" in weights else "mlp",
        "projection_dropout": vision.get("timm_drop", 0.0),
    }


def clip_parts(clip: str | os.PathLike | ConvNextCLIPModel | CLIPModel) -> tuple[dict[str, Any], StateDict]:
    """A CLIP in transformers' layout: the model, or a folder or Hub id of one.

    Returns:
        values of [`SEDConfig`] that follow from it, and its weights under SED's names.
    """
    if isinstance(clip, (str, os.PathLike)):
        model_type = PreTrainedConfig.get_config_dict(clip)[0].get("model_type")
        clip = load_convnext_clip(clip) if model_type == ConvNextCLIPConfig.model_type else load_clip(clip)
    config = clip.config.to_dict()
    values = {"vision_config": config["vision_config"], "text_config": config["text_config"]}
    if isinstance(clip, CLIPModel):
        values["clip_stem"] = config.get("clip_stem")
        values["vision_config"]["projection_dim"] = values["text_config"]["projection_dim"] = config["projection_dim"]
    weights = {}
    for key, tensor in clip.state_dict().items():
        if key == "logit_scale":
            continue
        if isinstance(clip, CLIPModel) and key.startswith(("text_model.", "text_projection.")):
            key = f"text_model.{key}"
        weights[key] = tensor
    return values, weights
