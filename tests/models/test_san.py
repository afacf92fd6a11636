"""SAN: the shared checks, and what its configuration changes."""

from __future__ import annotations

from typing import Any, ClassVar

from tests.mixins.model import ModelTesterMixin
from tests.mixins.pipeline import PipelineTesterMixin
from tests.tiny import tiny_clip_config


class TestSAN(ModelTesterMixin, PipelineTesterMixin):
    name = "SAN"
    wrong_values: ClassVar = {"num_queries": "many", "decoupled_head": "no", "recognition_attention": "sideways"}

    def config_values(self) -> dict[str, Any]:
        return {
            "clip_config": tiny_clip_config(),
            "num_queries": 5,
            "side_hidden_size": 24,
            "side_num_layers": 5,
            "side_num_attention_heads": 3,
            "side_mlp_ratio": 2,
            "side_patch_size": 8,
            "side_image_size": 64,
            "num_feature_layers": 3,
            "num_recognition_layers": 1,
            "mask_embed_dim": 8,
            "mask_hidden_dim": 12,
            "num_points": 64,
            "window_pixels": 32,
            "window_stride": 32,
            "canvas_pixels": 64,
        }
