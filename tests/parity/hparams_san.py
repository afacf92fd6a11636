"""SAN: from a fixture's `hparams.json` to our configuration and image processor."""

from __future__ import annotations

from typing import Any

from ov_segmentation.models.san.configuration_san import SANConfig
from ov_segmentation.models.san.image_processing_san import SANImageProcessor

from .hparams import bare_names


def build(hparams: dict[str, Any]) -> tuple[SANConfig, SANImageProcessor]:
    """The tiny model of a fixture, and its evaluation preprocessing."""
    values = bare_names(hparams)
    vision, text, side, decoder = (values[k] for k in ("clip_vision", "clip_text", "side_network", "mask_decoder"))
    training = values["training"]
    embed_dim = vision["projection_dim"]
    vocab_size = text["vocab_size"]
    clip_config = {
        "projection_dim": embed_dim,
        "vision_config": {
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision["mlp_ratio"]),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["heads"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "projection_dim": embed_dim,
            "layer_norm_eps": vision["layer_norm_eps"],
            "hidden_act": vision["activation"],
        },
        "text_config": {
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text["mlp_ratio"]),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "projection_dim": embed_dim,
            "layer_norm_eps": text["layer_norm_eps"],
            "hidden_act": text["activation"],
            "vocab_size": vocab_size,
            "max_position_embeddings": text["context_length"],
            "pad_token_id": 0,
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,
        },
    }
    weights, costs = training["loss_weights"], training["matcher_costs"]
    if [costs[k] for k in ("class", "mask", "dice")] != [weights[f"loss_{k}"] for k in ("ce", "mask", "dice")]:
        raise ValueError("SANConfig has one set of weights for matching costs and losses.")
    heads = decoder["attention_bias_heads"]
    config = SANConfig(
        clip_config=clip_config,
        num_queries=side["num_queries"],
        side_hidden_size=side["width"],
        side_num_layers=side["depth"],
        side_num_attention_heads=side["heads"],
        side_mlp_ratio=side["mlp_ratio"],
        side_patch_size=side["patch_size"],
        side_image_size=side["image_size"],
        side_layer_norm_eps=side["layer_norm_eps"],
        num_feature_layers=values["feature_extraction_layers"],
        num_recognition_layers=values["recognition_layers"],
        fusion_map=[[int(layer) for layer in pair.split("->")] for pair in values["fusion_map"]],
        mask_embed_dim=decoder["embed_channels"],
        mask_hidden_dim=decoder["mlp_channels"],
        mask_num_layers=decoder["mlp_layers"],
        num_bias_heads=None if heads == vision["heads"] else heads,
        num_bias_layers=decoder["attention_bias_layers"],
        rescale_attention_bias=decoder["rescale_attention_bias"],
        clip_input_scale=values["clip_scale_factor"],
        deep_supervision_layers=side["deep_supervision_layers"],
        class_weight=weights["loss_ce"],
        mask_weight=weights["loss_mask"],
        dice_weight=weights["loss_dice"],
        no_object_weight=training["no_object_weight"],
        num_points=training["num_points"],
        oversample_ratio=training["oversample_ratio"],
        importance_sample_ratio=training["importance_sample_ratio"],
    )
    image_processor = SANImageProcessor(
        size={"shortest_edge": values["resize_short_side"], "longest_edge": values["resize_max_side"]},
        pad_multiple=values["pad_to_multiple_of"],
        ignore_index=training["ignore_label"],
    )
    return config, image_processor
