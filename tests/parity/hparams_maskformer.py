"""Parts that the fixtures of OVSeg, SimBaseline and DeOP share: MaskFormer and OpenAI's CLIP."""

from __future__ import annotations

from typing import Any

# bottlenecks per stage by the number in the backbone's name
RESNET_DEPTHS = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}


def backbone_config(backbone: dict[str, Any]) -> dict[str, Any]:
    """A Swin or a ResNet-c."""
    if "EMBED_DIM" in backbone:
        return {
            "model_type": "swin",
            "embed_dim": backbone["EMBED_DIM"],
            "depths": backbone["DEPTHS"],
            "num_heads": backbone["NUM_HEADS"],
            "window_size": backbone["WINDOW_SIZE"],
            "mlp_ratio": backbone["MLP_RATIO"],
            "qkv_bias": backbone["QKV_BIAS"],
            "patch_size": backbone["PATCH_SIZE"],
            "drop_path_rate": 0.0,
        }
    depths = backbone.get("blocks_per_stage", RESNET_DEPTHS[backbone["DEPTH"]])
    widths = backbone.get("bottleneck_widths", [backbone["WIDTH_PER_GROUP"] * 2**i for i in range(4)])
    channels = backbone.get("stage_out_channels", [backbone["RES2_OUT_CHANNELS"] * 2**i for i in range(4)])
    return {
        "model_type": "ov_resnet_c",
        "stem_channels": backbone["STEM_OUT_CHANNELS"],
        "depths": depths,
        "widths": widths,
        "out_channels": channels,
        "stride_in_1x1": backbone.get("STRIDE_IN_1X1", False),
        "stage3_dilation": backbone.get("RES4_DILATION", 1),
        "stage4_dilation": backbone.get("RES5_DILATION", 1),
        "stage4_multi_grid": backbone["RES5_MULTI_GRID"],
        "frozen_stages": backbone.get("FREEZE_AT", 2),
    }


def mask_config(backbone: dict[str, Any], head: dict[str, Any], former: dict[str, Any]) -> dict[str, Any]:
    """`MaskProposalConfig` values, without dropout, as the fixtures were run."""
    return {
        "backbone_config": backbone_config(backbone),
        "num_queries": former["NUM_OBJECT_QUERIES"],
        "hidden_size": former["HIDDEN_DIM"],
        "num_heads": former["NHEADS"],
        "feedforward_size": former["DIM_FEEDFORWARD"],
        "num_layers": former["DEC_LAYERS"],
        "dropout": 0.0,
        "pixel_decoder_size": head["CONVS_DIM"],
        "mask_size": head["MASK_DIM"],
        "embedding_hidden_size": head["EMBED_HIDDEN_DIM"],
        "embedding_layers": head["EMBED_LAYERS"],
    }


def openai_clip_config(
    *,
    embed_dim: int,
    image_size: int,
    patch_size: int,
    vision: tuple[int, int, int],
    text: tuple[int, int, int],
    vocab_size: int,
    context_length: int = 77,
) -> dict[str, Any]:
    """`CLIPConfig` values; `vision` and `text`: (width, layers, heads)."""

    def transformer(width: int, layers: int, heads: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "projection_dim": embed_dim,
            "hidden_act": "quick_gelu",
        }

    return {
        "projection_dim": embed_dim,
        "vision_config": {**transformer(*vision), "image_size": image_size, "patch_size": patch_size},
        "text_config": {
            **transformer(*text),
            "vocab_size": vocab_size,
            "max_position_embeddings": context_length,
            "pad_token_id": 0,
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,
        },
    }
