"""ESC-Net: the shared checks, blocks against formulas, chunks, rejection, SAM's parts, what its configuration changes."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch.nn import functional as F
from transformers import SamConfig, SamModel

from ov_segmentation.models.esc_net.configuration_esc_net import ESCNetConfig
from ov_segmentation.models.esc_net.image_processing_esc_net import ESCNetImageProcessor
from ov_segmentation.models.esc_net.modeling_esc_net import REJECTED, ESCNetForOpenVocabularySegmentation
from tests.mixins.model import FromCLIPTesterMixin, ModelTesterMixin
from tests.mixins.pipeline import PipelineTesterMixin
from tests.tiny import tiny_clip_config, tiny_pictures

SAM = {
    "vision_config": {
        "hidden_size": 16,
        "output_channels": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "global_attn_indexes": [0],
        "image_size": 64,
        "patch_size": 8,
        "num_pos_feats": 16,
    },
    "prompt_encoder_config": {"hidden_size": 32, "mask_input_channels": 8, "image_size": 64, "patch_size": 8},
    "mask_decoder_config": {
        "hidden_size": 32,
        "mlp_dim": 48,
        "num_attention_heads": 4,
        "iou_head_hidden_dim": 16,
        "layer_norm_eps": 1e-5,
    },
}
SMALL = {
    "image_size": 64,
    "hidden_size": 32,
    "window_size": 4,
    "text_guidance_size": 8,
    "skip_sizes": (8, 4),
    "decoder_sizes": (32, 16),
    "sam_block_indices": (0, 1),
    "window_pixels": 48,
    "window_stride": 32,
    "canvas_pixels": 80,
}
TABLE_3 = [("points",), ("boxes",), ("points", "boxes"), ("points", "masks"), ("boxes", "masks")]
TABLE_3 += [("points", "boxes", "masks")]


def tiny_sam(seed: int = 2) -> SamModel:
    torch.manual_seed(seed)
    return SamModel(SamConfig.from_dict(SAM)).eval()


class TestESCNet(ModelTesterMixin, FromCLIPTesterMixin, PipelineTesterMixin):
    name = "ESCNet"
    wrong_values: ClassVar = {"num_objects": "five", "sam_block_indices": 4, "refined_feature_aggregation": "max"}
    clip_values: ClassVar = {**SMALL, "sam_config": SAM}

    def config_values(self) -> dict[str, Any]:
        return {"clip_config": tiny_clip_config(), "skip_layers": (0, 2), "sam_config": SAM, **SMALL}
