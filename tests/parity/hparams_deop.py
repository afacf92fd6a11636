"""DeOP: from a fixture's `hparams.json` to our configuration and image processor."""

from __future__ import annotations

from typing import Any

from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ov_segmentation.models.deop.configuration_deop import DeOPConfig
from ov_segmentation.models.deop.image_processing_deop import DeOPImageProcessor

from .hparams_maskformer import mask_config, openai_clip_config

# of the full stop in OpenAI's vocabulary; cut-down fixtures name their own
DOT_TOKEN_ID = 269


def build(hparams: dict[str, Any]) -> tuple[DeOPConfig, DeOPImageProcessor]:
    """The tiny model of a fixture, and its evaluation preprocessing."""
    if "original_config" not in hparams:
        return build_prompt_stage(hparams)
    clip, original, cal = hparams["clip"], hparams["original_config"], hparams["cal_decoder"]
    former = original["MASK_FORMER"]
    severance = "mask_gain"
    if original["MASKSELFATTN"]:
        severance = "mask_guided" if original["MASKSELFATTNSOFTMAX"] else "identity"
    config = DeOPConfig(
        clip_config=openai_clip_config(
            embed_dim=clip["embed_dim"],
            image_size=clip["image_resolution_of_positional_embedding"],
            patch_size=clip["patch_size"],
            vision=(clip["vision_width"], clip["vision_layers"], clip["vision_heads"]),
            text=(clip["text_width"], clip["text_layers"], clip["text_heads"]),
            vocab_size=clip["vocab_size"],
            context_length=clip["context_length"],
        ),
        mask_config=mask_config(original["RESNETS"], original["SEM_SEG_HEAD"], former),
        severed_layers=original["LAYERMASKVIT"],
        severance=severance,
        visual_prompts="added" if original["LEARN_POSITION"] else "none",
        visual_prompt_layers=original["POSITION_LAYERS"],
        visual_prompt_image_size=original["LEARNPOSITIONRES"],
        num_context_vectors=original["PROMPT_SHAPE"][0],
        dot_token_id=hparams.get("dot_token_id", DOT_TOKEN_ID),
        heatmap_layers=original["NUM_DECODER_LAYER"],
        heatmap_heads=cal["heads"],
        heatmap_attention_heads=cal["heads"],
        heatmap_feedforward_size=cal["dim_feedforward"],
        heatmap_dropout=0.0,
        map_scale=original["OUTPUT_SIG"],
        focal_weight=former["DECODER_CE_WEIGHT"],
        dice_weight=former["DECODER_DICE_WEIGHT"],
        proposal_mask_weight=former["MASK_WEIGHT"],
        proposal_dice_weight=former["DICE_WEIGHT"],
        no_object_weight=former["NO_OBJECT_WEIGHT"],
    )
    image, image_processor = original["INPUT"], DeOPImageProcessor
    return config, image_processor(
        size={"shortest_edge": image["MIN_SIZE_TEST"], "longest_edge": image["MAX_SIZE_TEST"]},
        image_mean=[value / 255 for value in original["PIXEL_MEAN"]],
        image_std=[value / 255 for value in original["PIXEL_STD"]],
        pad_multiple=former["SIZE_DIVISIBILITY"],
    )


def build_prompt_stage(hparams: dict[str, Any]) -> tuple[DeOPConfig, DeOPImageProcessor]:
    """The model of the first stage, which is CLIP and a text prompt, and the preprocessing of its region crops."""
    config = DeOPConfig(
        clip_config=openai_clip_config(
            embed_dim=hparams["embed"],
            image_size=hparams["res"],
            patch_size=hparams["patch_size"],
            vision=(hparams["vw"], hparams["vl"], hparams["vh"]),
            text=(hparams["tw"], hparams["tl"], hparams["th"]),
            vocab_size=hparams["vocab"],
        ),
        proposals="none",
        severance="none",
        pooling="mask",
        visual_prompts="none",
        num_context_vectors=hparams["nprompt"],
        dot_token_id=DOT_TOKEN_ID,
        training_stage="prompt",
    )
    return config, DeOPImageProcessor(
        do_resize=False, image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD, pad_multiple=None
    )
