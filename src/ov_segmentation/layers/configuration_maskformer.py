"""Configurations of MaskFormer's proposal network and of ResNet-c, without the weight of their models' imports."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

NUM_STAGES = 4


@strict
class ResNetCConfig(PreTrainedConfig):
    """Configuration of `ResNetC`; the defaults are ResNet-101c as MaskFormer uses it.

    Args:
        stem_channels: channels of the third stem convolution; the first two have half as many.
        depths: bottlenecks per stage.
        widths: channels of the 3x3 convolutions, per stage.
        out_channels: channels of the stage outputs.
        stride_in_1x1: the stride sits in the first 1x1 convolution instead of the 3x3.
        stage3_dilation, stage4_dilation: dilation of the last two stages; above 1 the stage keeps its resolution.
        stage4_multi_grid: factors on the dilation of the last stage's bottlenecks.
        frozen_stages: 0: nothing, 1: the stem, 2: the stem and the first stage, and so on.
    """

    model_type = "ov_resnet_c"

    stem_channels: int = 128
    depths: list[int] | tuple[int, ...] = (3, 4, 23, 3)
    widths: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    out_channels: list[int] | tuple[int, ...] = (256, 512, 1024, 2048)
    stride_in_1x1: bool = False
    stage3_dilation: int = 1
    stage4_dilation: int = 1
    stage4_multi_grid: list[int] | tuple[int, ...] = (1, 2, 4)
    frozen_stages: int = 2

    def validate_architecture(self) -> None:
        """Four values per stage list, and one multi-grid factor per bottleneck of the last stage."""
        for name in ("depths", "widths", "out_channels"):
            if len(getattr(self, name)) != NUM_STAGES:
                raise ValueError(f"{name} needs {NUM_STAGES} values, one per stage, got {list(getattr(self, name))}.")
        if len(self.stage4_multi_grid) != self.depths[-1]:
            raise ValueError(
                f"stage4_multi_grid needs one factor for each of the {self.depths[-1]} bottlenecks of the last stage, "
                f"got {list(self.stage4_multi_grid)}."
            )


@strict
class MaskProposalConfig(PreTrainedConfig):
    """Configuration of `MaskProposalNetwork`; the defaults are those of OVSeg, SimBaseline and DeOP.

    Args:
        backbone_config: `SwinConfig` or `ResNetCConfig`, or a dict with the `model_type` of one of them.
        num_queries: N.
        hidden_size, num_heads, feedforward_size, num_layers, dropout: of the transformer decoder.
        pixel_decoder_size, mask_size: channels of the feature pyramid and of the mask embeddings.
        embedding_hidden_size, embedding_layers: the MLP that maps a query to CLIP's space.
    """

    model_type = "ov_mask_proposal"
    sub_configs_defaults = {"backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="swin")}

    backbone_config: dict | PreTrainedConfig | None = None
    num_queries: int = 100
    hidden_size: int = 256
    num_heads: int = 8
    feedforward_size: int = 2048
    num_layers: int = 6
    dropout: float | int = 0.1
    pixel_decoder_size: int = 256
    mask_size: int = 256
    embedding_hidden_size: int = 1024
    embedding_layers: int = 2


# a backbone_config dict finds its class through AutoConfig
AutoConfig.register(ResNetCConfig.model_type, ResNetCConfig, exist_ok=True)
