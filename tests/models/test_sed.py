"""SED: the shared checks, early rejection, chunks, memory, and what its configuration changes."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from tests.mixins.model import ModelTesterMixin
from tests.tiny import TOKENIZER, tiny_clip_config

TEXT = {**tiny_clip_config()["text_config"], "hidden_act": "gelu"}


class TestSED(ModelTesterMixin):
    name = "SED"
    wrong_values: ClassVar = {"rejection_top_k": "eight", "feature_fusion": "all", "kernel_sizes": 9}

    def config_values(self) -> dict[str, Any]:
        return {
            "vision_config": {
                "model_type": "convnext",
                "hidden_sizes": [8, 8, 16, 16],
                "depths": [1, 1, 2, 1],
                "layer_norm_eps": 1e-6,
                "drop_path_rate": 0.1,
            },
            "text_config": TEXT,
            "num_templates": 2,
            "image_size": 64,
            "projection_type": "mlp",
            "projection_dropout": 0.1,
            "hidden_size": 32,
            "decoder_dims": (32, 16, 16),
            "guidance_dims": (8, 4, 4),
            "window_pixels": 64,
            "window_stride": 32,
            "canvas_size": (96, 96),
        }

    def token_ids(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Token ids `[K, 2, L]`: every name twice."""
        return {key: ids.expand(-1, 2, -1) for key, ids in super().token_ids(names).items()}

    def test_legacy_end_token_is_repaired(self) -> None:
        config = self.config(text_config={**TEXT, "eos_token_id": 2})
        assert config.text_config.eos_token_id == TOKENIZER.eos_token_id
