"""CAT-Seg: from a fixture's `hparams.json` to our configuration and image processor."""

from __future__ import annotations

from typing import Any

from ov_segmentation.models.cat_seg.configuration_cat_seg import CATSegConfig
from ov_segmentation.models.cat_seg.image_processing_cat_seg import CATSegImageProcessor


def _value(entry: Any) -> Any:
    """The run's value, where it stands beside the published one."""
    return entry["value"] if isinstance(entry, dict) else entry


def _transformer(values: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": values["width"],
        "intermediate_size": values["width"] * values.get("mlp_ratio", 4),
        "num_hidden_layers": values["layers"],
        "num_attention_heads": values["heads"],
        "hidden_act": values["act"],
        "layer_norm_eps": values["layer_norm_eps"],
        "projection_dim": values["embed_dim"],
    }


def build(hparams: dict[str, Any]) -> tuple[CATSegConfig, CATSegImageProcessor]:
    """The tiny model of a fixture, and its evaluation preprocessing."""
    image, vision, text, head = (hparams[k] for k in ("image", "clip_vision", "clip_text", "SEM_SEG_HEAD"))
    sliding, resize = hparams["sliding_window"], image["test_resize"]
    (height, width), (canvas_height, canvas_width) = _value(image["clip_resolution"]), sliding["out_res"]
    if height != width or canvas_height != canvas_width:
        raise ValueError("CATSegConfig has square inputs and canvases.")
    clip_config = {
        "projection_dim": vision["embed_dim"],
        "vision_config": {
            **_transformer(vision),
            "image_size": vision["pretrain_resolution"],
            "patch_size": vision["patch_size"],
        },
        "text_config": {
            **_transformer(text),
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "bos_token_id": text["sot_token_id"],
            "eos_token_id": text["eot_token_id"],
            "pad_token_id": text["pad_token_id"],
        },
    }
    pooling, train_pooling = head["POOLING_SIZES_eval"], head["POOLING_SIZES_train"]
    config = CATSegConfig(
        clip_config=clip_config,
        image_size=height,
        pad_multiple=image["size_divisibility"],
        num_templates=hparams["num_templates_P"],
        skip_layers=_value(vision["guidance_block_indices_zero_based"]),
        hidden_size=head["HIDDEN_DIMS"],
        num_aggregation_layers=head["NUM_LAYERS"],
        num_attention_heads=head["NUM_HEADS"],
        window_size=head["WINDOW_SIZES"],
        appearance_guidance_size=head["APPEARANCE_GUIDANCE_PROJ_DIM"],
        text_guidance_size=head["TEXT_GUIDANCE_PROJ_DIM"],
        skip_upsampled_sizes=head["DECODER_GUIDANCE_DIMS"],
        skip_sizes=head["DECODER_GUIDANCE_PROJ_DIMS"],
        decoder_sizes=head["DECODER_DIMS"],
        padding_length=_value(head["pad_len"]),
        max_classes=_value(head["pad_len"]),
        class_attention_pooling=pooling[0],
        train_class_attention_pooling=train_pooling[0],
        window_pixels=sliding["kernel"],
        window_stride=sliding["stride"],
        canvas_pixels=canvas_height,
    )
    image_processor = CATSegImageProcessor(
        size={"shortest_edge": resize["min_size_test"], "longest_edge": resize["max_size_test"]},
        ignore_index=head["IGNORE_VALUE"],
    )
    return config, image_processor
