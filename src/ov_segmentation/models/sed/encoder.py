"""SED's picture encoder, stages of a ConvNeXt CLIP or blocks of a plain ViT, and what guides the decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ...layers.convnext_layers import run_convnext_stage
from ...layers.dense_clip import dense_clip_features
from ...layers.sliding_window import resize
from .configuration_sed import SEDConfig


class ProjectionMLP(nn.Module):
    """Projection of ConvNeXt-L's features into CLIP's space: Linear, GELU, dropout, Linear; hidden width 2 D."""

    def __init__(self, in_channels: int, projection_dim: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_channels, 2 * projection_dim)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(2 * projection_dim, projection_dim, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`[..., C]` -> `[..., D]`."""
        return self.fc2(self.dropout(F.gelu(self.fc1(features))))


class SEDEncoderMixin:
    """The part of the model that encodes pictures."""

    config: SEDConfig
    vision_model: nn.Module
    visual_projection: nn.Module
    image_guidance: nn.ModuleList

    @staticmethod
    def _make_projection(config: SEDConfig) -> nn.Module:
        projection_dim = config.text_config.projection_dim
        if config.has_plain_encoder:
            return nn.Linear(config.vision_config.hidden_size, projection_dim, bias=False)
        width = config.vision_config.hidden_sizes[-1]
        if config.projection_type == "linear":
            return nn.Linear(width, projection_dim, bias=False)
        return ProjectionMLP(width, projection_dim, config.projection_dropout)

    @staticmethod
    def _guidance_sources(config: SEDConfig) -> list[int]:
        """Channels of the encoder maps that guide the decoder layers, the coarsest first."""
        if not config.fuses_features:
            return []
        if config.has_plain_encoder:
            return [config.vision_config.hidden_size] * config.num_decoder_layers
        return list(config.vision_config.hidden_sizes[-2::-1])[: config.num_decoder_layers]

    def _freeze_encoder(self) -> None:
        trained = self.config.num_trainable_stages
        if trained == 4:
            return
        self.vision_model.requires_grad_(False)
        self.visual_projection.requires_grad_(trained > 0)
        if trained == 0:
            return
        if self.config.has_plain_encoder:
            blocks = self.vision_model.encoder.layers
            stages: Any = blocks[len(blocks) - len(blocks) * trained // 4 :]
            norm = self.vision_model.post_layernorm
        else:
            stages, norm = self.vision_model.encoder.stages[-trained:], self.vision_model.layernorm
        for part in (*stages, norm):
            part.requires_grad_(True)

    def _encode_views(
        self, views: torch.Tensor, keep_maps: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor], tuple[torch.Tensor, ...]]:
        """Dense features, image guidance and, with `keep_maps`, the encoder's maps of `views` `[R, 3, height, width]`;
        they are larger than all the rest of many views."""
        if self.config.has_plain_encoder:
            skip_layers = self.config.skip_layers if self.config.fuses_features else ()
            dense, sources, _ = dense_clip_features(self, views, skip_layers, residual="token")
            sizes = [(dense.shape[-2] << level, dense.shape[-1] << level) for level in range(1, len(sources) + 1)]
            return (
                dense,
                self._guide([resize(m, size) for m, size in zip(sources, sizes)]),
                sources if keep_maps else (),
            )
        maps = [self.vision_model.embeddings(views.contiguous(memory_format=torch.channels_last))]
        for stage in self.vision_model.encoder.stages:
            maps.append(self._run_stage(stage, maps[-1]))
        # every position of the last map is an image of its own for CLIP's head
        dense = self.visual_projection(self.vision_model.layernorm(maps[-1].permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return dense, self._guide(maps[-2:0:-1]), tuple(maps) if keep_maps else ()

    def _run_stage(self, stage: nn.Module, features: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return run_convnext_stage(stage, features)
        if not self.gradient_checkpointing:
            return stage(features)
        for part in (*stage.downsampling_layer, *stage.layers):
            features = self._gradient_checkpointing_func(part, features)
        return features

    def _guide(self, sources: list[torch.Tensor]) -> list[torch.Tensor]:
        if self.config.detach_image_guidance:
            sources = [source.detach() for source in sources]
        return [F.relu(conv(source)) for conv, source in zip(self.image_guidance, sources)]
