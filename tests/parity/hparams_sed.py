"""SED: from a fixture's `hparams.json` to our configuration and image processor."""

from __future__ import annotations

from typing import Any

from ov_segmentation.models.sed.configuration_sed import SEDConfig
from ov_segmentation.models.sed.image_processing_sed import SEDImageProcessor


def _square(sizes: list[int]) -> int:
    if sizes[0] != sizes[1]:
        raise ValueError(f"SEDConfig pools squares, got {sizes}.")
    return sizes[0]


def build(hparams: dict[str, Any]) -> tuple[SEDConfig, SEDImageProcessor]:
    """The tiny model of a fixture, and its evaluation preprocessing."""
    image, trunk, projection, text, head = (
        hparams[name] for name in ("image", "visual_trunk", "visual_head", "text", "SEM_SEG_HEAD")
    )
    if head["decoder_corr_guidance_dims"] != [hparams["num_templates_P"], *head["DECODER_GUIDANCE_PROJ_DIMS"][:-1]]:
        raise ValueError("SEDConfig has one list for the channels of image and cost guidance.")
    config = SEDConfig(
        vision_config={
            "model_type": "convnext",
            "hidden_sizes": trunk["dims"],
            "depths": trunk["depths"],
            "patch_size": trunk["patch"],
            "layer_norm_eps": trunk["layer_norm_eps"],
            "drop_path_rate": projection["timm_drop_path"] or 0.0,
        },
        text_config={
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text["mlp_ratio"]),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "projection_dim": text["embed_dim"],
            "layer_norm_eps": text["layer_norm_eps"],
            "hidden_act": text["act"].split(" ")[0],
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "bos_token_id": text["sot_token_id"],
            "eos_token_id": text["eot_token_id"],
            "pad_token_id": text["pad_token_id"],
        },
        num_templates=hparams["num_templates_P"],
        image_size=image["clip_resolution"]["value"],
        projection_type=projection["timm_proj"],
        projection_dropout=projection["timm_drop"],
        hidden_size=head["HIDDEN_DIMS"],
        num_decoder_layers=len(head["DECODER_DIMS"]),
        decoder_dims=head["DECODER_DIMS"],
        guidance_dims=head["DECODER_GUIDANCE_PROJ_DIMS"],
        kernel_sizes=head["KERNEL_SIZE"],
        num_attention_heads=head["NUM_HEADS"],
        class_attention_pooling=_square(head["POOLING_SIZES_eval"]),
        train_class_attention_pooling=_square(head["POOLING_SIZES_train"]),
    )
    resize = image["test_resize"]
    image_processor = SEDImageProcessor(
        size={"shortest_edge": resize["min_size_test"], "longest_edge": resize["max_size_test"]},
        ignore_index=head["IGNORE_VALUE"],
    )
    return config, image_processor
