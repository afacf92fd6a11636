"""OVSeg and SimBaseline: from a fixture's `hparams.json` to our configuration and image processor."""

from __future__ import annotations

from typing import Any

from ov_segmentation.models.ovseg.configuration_ovseg import OVSegConfig
from ov_segmentation.models.ovseg.image_processing_ovseg import OVSegImageProcessor

from .hparams_maskformer import mask_config, openai_clip_config

# the models of these fixtures end their learned prompts with the full stop of CLIP's byte pairs
DOT_TOKEN_ID = 269


def build(hparams: dict[str, Any]) -> tuple[OVSegConfig, OVSegImageProcessor]:
    """The tiny model of a fixture, and its evaluation preprocessing."""
    return _build_simbaseline(hparams) if "nprompt" in hparams else _build_ovseg(hparams)


def _build_ovseg(hparams: dict[str, Any]) -> tuple[OVSegConfig, OVSegImageProcessor]:
    clip, adapter, image = hparams["clip"], hparams["clip_adapter"], hparams["image"]
    config = OVSegConfig(
        clip_config=openai_clip_config(
            embed_dim=clip["embed_dim"],
            image_size=clip["image_resolution"],
            patch_size=clip["vision_patch_size"],
            vision=(clip["vision_width"], clip["vision_layers"], clip["vision_heads"]),
            text=(clip["transformer_width"], clip["transformer_layers"], clip["transformer_heads"]),
            vocab_size=clip["vocab_size"],
            context_length=clip["context_length"],
        ),
        mask_config=mask_config(hparams["backbone"], hparams["sem_seg_head"], hparams["mask_former"]),
        image_mean=[value / 255 for value in image["PIXEL_MEAN"]],
        image_std=[value / 255 for value in image["PIXEL_STD"]],
        mask_threshold=adapter["MASK_THR"],
        mask_expand_ratio=adapter["MASK_EXPAND_RATIO"],
        crop_size=clip["crop_size"],
        prompt_type="mask" if adapter["MASK_PROMPT_FWD"] else "none",
        prompt_depth=clip["MASK_PROMPT_DEPTH"],
        ensemble_weight=adapter["CLIP_ENSEMBLE_WEIGHT"] if adapter["CLIP_ENSEMBLE"] else None,
    )
    image_processor = OVSegImageProcessor(
        size={"shortest_edge": image["MIN_SIZE_TEST"], "longest_edge": image["MAX_SIZE_TEST"]},
        image_mean=config.image_mean,
        image_std=config.image_std,
        pad_multiple=image["SIZE_DIVISIBILITY"],
    )
    return config, image_processor


def _build_simbaseline(hparams: dict[str, Any]) -> tuple[OVSegConfig, OVSegImageProcessor]:
    backbone = {
        "DEPTH": 50,
        "STEM_OUT_CHANNELS": hparams["stem"],
        "RES2_OUT_CHANNELS": hparams["res2"],
        "WIDTH_PER_GROUP": hparams["width"],
        "RES5_MULTI_GRID": [1, 2, 4],
    }
    head = {
        "EMBED_HIDDEN_DIM": hparams["embh"],
        "EMBED_LAYERS": 2,
        "CONVS_DIM": hparams["convs"],
        "MASK_DIM": hparams["mask"],
    }
    former = {
        "HIDDEN_DIM": hparams["hid"],
        "NUM_OBJECT_QUERIES": hparams["queries"],
        "NHEADS": hparams["nh"],
        "DIM_FEEDFORWARD": hparams["mffn"],
        "DEC_LAYERS": hparams["dec"],
    }
    config = OVSegConfig(
        clip_config=openai_clip_config(
            embed_dim=hparams["embed"],
            image_size=hparams["res"],
            patch_size=hparams["patch_size"],
            vision=(hparams["vw"], hparams["vl"], hparams["vh"]),
            text=(hparams["tw"], hparams["tl"], hparams["th"]),
            vocab_size=hparams["vocab"],
        ),
        mask_config=mask_config(backbone, head, former),
        image_mean=[value / 255 for value in hparams["pixel_mean"]],
        image_std=[value / 255 for value in hparams["pixel_std"]],
        mask_threshold=hparams["mask_thr"],
        mask_expand_ratio=hparams["mask_expand_ratio"],
        crop_size=hparams["region_size"],
        prompt_type="none",
        num_context_vectors=hparams["nprompt"],
        dot_token_id=DOT_TOKEN_ID,
        ensemble_weight=hparams["clip_ensemble_weight"],
        class_is_seen=[bool(flag) for flag in hparams["trainable"]],
    )
    image_processor = OVSegImageProcessor(
        size={"shortest_edge": hparams["min_test"], "longest_edge": hparams["max_test"]},
        image_mean=config.image_mean,
        image_std=config.image_std,
        pad_multiple=hparams["size_divisibility"],
    )
    return config, image_processor
