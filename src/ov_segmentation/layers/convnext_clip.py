"""A ConvNeXt CLIP of transformers' parts: `ConvNextModel` and `CLIPTextModelWithProjection` with a common space.

It is what SED is built on (the original: OpenCLIP's ConvNeXt, Liu et al., "A ConvNet for the 2020s", 2022).
"""

import math
import os
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    ConvNextConfig,
    ConvNextModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .sub_models import build_sub_model


@strict
class ConvNextCLIPConfig(PreTrainedConfig):
    """Configuration of [`ConvNextCLIPModel`].

    Args:
        vision_config: a `ConvNextConfig`; its `layer_norm_eps` has to be OpenCLIP's 1e-6 (not transformers' default).
        text_config: a `CLIPTextConfig`; its `projection_dim` is the width of the common space.
        logit_scale_init_value: logarithm of the initial temperature factor.
    """

    model_type = "ov_convnext_clip"
    sub_configs_defaults = {"vision_config": ConvNextConfig, "text_config": CLIPTextConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    logit_scale_init_value: float = math.log(14.3)
    initializer_range: float = 0.02

    def validate_norm(self) -> None:
        """Check the pooled norm's epsilon (called by `strict` on construction)."""
        eps = self.vision_config.layer_norm_eps
        if eps != 1e-6:
            raise ValueError(f"vision_config.layer_norm_eps is {eps}: CLIP's ConvNeXt needs 1e-6.")


class ConvNextCLIPModel(PreTrainedModel):
    """Picture and text towers of a ConvNeXt CLIP, with the feature functions of `CLIPModel`."""

    config_class = ConvNextCLIPConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: ConvNextCLIPConfig) -> None:
        super().__init__(config)
        self.vision_model = build_sub_model(ConvNextModel, config.vision_config)
        self.text_model = build_sub_model(CLIPTextModelWithProjection, config.text_config)
        width, projection_dim = config.vision_config.hidden_sizes[-1], config.text_config.projection_dim
        self.visual_projection = nn.Linear(width, projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ConvNextCLIPModel):
            init.normal_(module.visual_projection.weight, std=module.visual_projection.in_features**-0.5)
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)

    def get_image_features(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """`pooler_output` [B, D]: projection of the normalised mean of `last_hidden_state`, the last map."""
        outputs = self.vision_model(pixel_values)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state, pooler_output=self.visual_projection(outputs.pooler_output)
        )

    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """`pooler_output` [B, D]: projected text embedding at the first end token."""
        outputs = self.text_model(input_ids, attention_mask)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state, pooler_output=outputs.text_embeds
        )

    def forward(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [B, T] of B pictures and T texts."""
        images = nn.functional.normalize(self.get_image_features(pixel_values).pooler_output, dim=-1)
        texts = nn.functional.normalize(self.get_text_features(input_ids, attention_mask).pooler_output, dim=-1)
        return self.logit_scale.exp() * images @ texts.T


def load_convnext_clip(path: str | os.PathLike, **kwargs: Any) -> ConvNextCLIPModel:
    """Load a ConvNeXt CLIP folder written by `examples/train_clip.py`; SED's `from_clip` takes its parts.

    Args:
        path: the folder.
        kwargs: passed to `from_pretrained`.
    """
    return ConvNextCLIPModel.from_pretrained(path, **kwargs)
