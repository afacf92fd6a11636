"""MaskFormer as a proposal network: class-agnostic masks, each with an embedding in CLIP's space.

Source: Cheng et al., "Per-Pixel Classification is Not All You Need" (2021), section 3.4; the embedding head in place of
the class predictor is that of SimBaseline (Xu et al., 2022, section 3.2) and OVSeg (Liang et al., 2023, section 3.1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import conv2d
from transformers import PreTrainedConfig, SwinConfig
from transformers import initialization as init
from transformers.models.maskformer.configuration_maskformer import MaskFormerDetrConfig
from transformers.models.maskformer.modeling_maskformer import (
    MaskFormerDetrDecoderLayer,
    MaskFormerPixelDecoder,
)

from .attention import read_attention_from
from .configuration_maskformer import MaskProposalConfig, ResNetCConfig
from .mlp import MLP
from .resnet_c import ConvNorm, FrozenBatchNorm, ResNetC
from .sine_positions import SinePositionEmbedding
from .swin_backbone import SwinBackbone


class MaskProposals(NamedTuple):
    """Proposals of one decoder layer: `embeddings` `[B, N, D]`, not normalised, and `mask_logits` `[B, N, h, w]`."""

    embeddings: torch.Tensor
    mask_logits: torch.Tensor


def build_backbone(config: PreTrainedConfig) -> SwinBackbone | ResNetC:
    """The backbone of a configuration."""
    if isinstance(config, SwinConfig):
        return SwinBackbone(config)
    if isinstance(config, ResNetCConfig):
        return ResNetC(config)
    raise ValueError(f"backbone_config must be of model type 'swin' or 'ov_resnet_c', got {config.model_type!r}.")


class QueryDecoder(nn.Module):
    """Transformer decoder over the coarsest feature map; queries start at zero."""

    def __init__(self, config: MaskProposalConfig, channels: int) -> None:
        super().__init__()
        size = config.hidden_size
        layer_config = MaskFormerDetrConfig(
            d_model=size,
            decoder_layers=config.num_layers,
            decoder_attention_heads=config.num_heads,
            decoder_ffn_dim=config.feedforward_size,
            dropout=config.dropout,
            attention_dropout=config.dropout,
            activation_dropout=config.dropout,
        )
        self.position_embedding = SinePositionEmbedding(num_position_features=size // 2, normalize=True)
        self.input_projection = nn.Conv2d(channels, size, kernel_size=1) if channels != size else nn.Identity()
        self.query_embedding = nn.Embedding(config.num_queries, size)
        self.layers = nn.ModuleList(MaskFormerDetrDecoderLayer(layer_config) for _ in range(config.num_layers))
        self.layernorm = nn.LayerNorm(size)
        read_attention_from(config, self.layers)

    def forward(self, features: torch.Tensor) -> list[torch.Tensor]:
        """`[B, C, h, w]` to the queries `[B, N, hidden]` after each layer.

        The one final norm is applied to every layer's output, while the next layer is fed what it normalises.
        """
        features = self.input_projection(features)
        positions = self.position_embedding(features.shape, features.device, features.dtype)
        keys, positions = features.flatten(2).transpose(1, 2), positions.flatten(2).transpose(1, 2)
        query_positions = self.query_embedding.weight.expand(len(features), -1, -1)
        hidden, outputs = torch.zeros_like(query_positions), []
        for layer in self.layers:
            hidden = layer(hidden, None, positions, query_positions, keys)
            outputs.append(self.layernorm(hidden))
        return outputs


class ChannelsFirstGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`, which with channels last loses two digits. The convolutions around it may have them so."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """`[B, C, h, w]` -> `[B, C, h, w]`."""
        return super().forward(maps.contiguous())


class MaskProposalNetwork(nn.Module):
    """Backbone, pixel decoder, query decoder and the two heads."""

    def __init__(self, config: MaskProposalConfig, embedding_size: int) -> None:
        super().__init__()
        self.backbone = build_backbone(config.backbone_config)
        channels = self.backbone.channels
        self.pixel_decoder = MaskFormerPixelDecoder(
            in_features=channels[-1],
            lateral_widths=channels[:-1],
            feature_size=config.pixel_decoder_size,
            mask_feature_size=config.mask_size,
        )
        for module in self.pixel_decoder.modules():
            if type(module) is nn.GroupNorm:
                module.__class__ = ChannelsFirstGroupNorm
        self.query_decoder = QueryDecoder(config, channels[-1])
        self.mask_head = MLP(config.hidden_size, config.hidden_size, config.mask_size, num_layers=3)
        self.embedding_head = MLP(
            config.hidden_size, config.embedding_hidden_size, embedding_size, config.embedding_layers
        )

    def forward(self, pixel_values: torch.Tensor, all_layers: bool = False) -> list[MaskProposals]:
        """Proposals of the last layer (a list of one), or of every layer, first layer first, for deep supervision."""
        features = self.backbone(pixel_values)
        queries = self.query_decoder(features[-1])
        pixels = self.pixel_decoder.fpn(features)[-1]
        projection, states = self.pixel_decoder.mask_projection, queries[-1]
        if not (all_layers or torch.is_grad_enabled()) and states.shape[1] < projection.out_channels:
            masks = masks_in_one_convolution(projection, pixels, self.mask_head(states))
            return [MaskProposals(self.embedding_head(states), masks)]
        mask_features = projection(pixels)
        return [
            MaskProposals(
                self.embedding_head(states), torch.einsum("bnc,bchw->bnhw", self.mask_head(states), mask_features)
            )
            for states in (queries if all_layers else queries[-1:])
        ]


def masks_in_one_convolution(projection: nn.Conv2d, pixels: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """The products of queries with a convolution's result, as a convolution with a kernel per query.

    Both are linear. Half of the multiply-adds, where there are half as many queries as the convolution has channels.

    Args:
        projection: the convolution.
        pixels: `[B, C_in, h, w]`, what it takes.
        queries: `[B, N, C]`.

    Returns:
        `[B, N, h, w]`, equal to `einsum("bnc,bchw->bnhw", queries, projection(pixels))` but for rounding.
    """
    kernels = torch.einsum("bnc,cikl->bnikl", queries, projection.weight)
    biases = queries @ projection.bias
    # pictures one by one: each has its own kernels
    masks = [
        conv2d(picture[None], kernel, bias, padding=projection.padding)
        for picture, kernel, bias in zip(pixels, kernels, biases, strict=True)
    ]
    return torch.cat(masks) if len(masks) > 1 else masks[0]


@torch.no_grad()
def init_mask_proposal_weights(module: nn.Module) -> None:
    """Initial weights of one submodule, as in MaskFormer: He's normal for ResNet-c, Caffe2's Xavier for the pixel
    decoder and the input projection, Xavier for the transformer, N(0, 1) for the queries, PyTorch's defaults for the
    heads. Swin initialises itself."""
    if isinstance(module, FrozenBatchNorm):
        module.reset()
    elif isinstance(module, ConvNorm):
        init.kaiming_normal_(module.conv.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, MaskFormerPixelDecoder):
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                _init_convolution(part)
    elif isinstance(module, QueryDecoder):
        if isinstance(module.input_projection, nn.Conv2d):
            _init_convolution(module.input_projection)
        init.normal_(module.query_embedding.weight)
        for name, part in module.layers.named_modules():
            if isinstance(part, nn.Linear):
                # the originals keep queries, keys and values in one matrix, which makes Xavier's bound smaller
                packed = name.endswith(("q_proj", "k_proj", "v_proj"))
                init.xavier_uniform_(part.weight, gain=0.5**0.5 if packed else 1.0)
                init.zeros_(part.bias)
    elif isinstance(module, MLP):
        module.init_weights()


def _init_convolution(convolution: nn.Conv2d) -> None:
    init.kaiming_uniform_(convolution.weight, a=1)
    if convolution.bias is not None:
        init.zeros_(convolution.bias)
