"""Configuration of SAN."""

from __future__ import annotations

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CLIPConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from ...configuration_base import OpenVocabularySegmentationConfig

VIT_B_16 = {"vision_config": {"patch_size": 16, "image_size": 224}}


def evenly_spaced_fusion(num_feature_layers: int, side_num_layers: int) -> list[list[int]]:
    """Four fusions spread over CLIP's feature blocks, into the first side blocks: 9 -> 0-0, 3-1, 6-2, 9-3."""
    count = min(4, side_num_layers)
    return [[round(i * num_feature_layers / max(count - 1, 1)), i] for i in range(count)]


@strict
class SANConfig(OpenVocabularySegmentationConfig):
    """Configuration of [`SANForOpenVocabularySegmentation`]; the defaults are the released ViT-B/16 model.

    Layers are counted from 1; 0 is the state before the first block.

    Args:
        clip_config: CLIP, vision and text.
        num_queries: N, mask proposals.
        side_hidden_size, side_num_layers, side_num_attention_heads, side_mlp_ratio, side_patch_size: the side network.
        side_image_size: picture side that the side network's position embedding is stored for.
        side_layer_norm_eps: of the side network and of the fusion layers.
        num_feature_layers: CLIP blocks whose outputs may be fused into the side network.
        num_recognition_layers: the last CLIP blocks, in which attention biases steer the recognition. Feature and
            recognition blocks may overlap (paper, Table 5: CLIP run twice).
        fusion_map: pairs [CLIP layer, side layer]; empty: none. None: four, evenly spaced over the feature blocks.
        mask_embed_dim, mask_hidden_dim, mask_num_layers: width, hidden width and depth of the decoder's three MLPs.
        num_bias_heads: None: one attention bias per CLIP head; 1: one for all heads.
        num_bias_layers: 1: the same biases in every recognition block (released); `num_recognition_layers`: a set each.
        rescale_attention_bias: a learned scale and shift of all attention biases (released; not in the paper).
        decoupled_head: biases have a head of their own; False: the mask logits themselves are the biases of all heads.
        detach_clip_from_masks: what masks are made from gets no gradient from the recognition (two-stage training).
        recognition_attention: "cross": mask queries attend to the visual tokens; "masked": everything in one sequence
            under one mask. Equal results; "masked" is what the released models ran.
        clip_input_scale: size of CLIP's input relative to the side network's (paper, Table 8).
        train_clip_position_embedding: CLIP's position embedding is fine-tuned (paper, Table 9).
        train_clip: all of CLIP is trained, text included; for models that start from nothing.
        deep_supervision_layers: side layers whose outputs are supervised, the last one among them. None: the last two.
        class_weight, mask_weight, dice_weight: of the matching costs and of the losses.
        no_object_weight: class weight of "no object".
        num_points, oversample_ratio, importance_sample_ratio: point sampling of the mask losses.
        normalise_per_process: loss normaliser of each process on its own, as the original has it.
        window_pixels, window_stride, canvas_pixels, global_view: of the sliding window: side of a window, distance
            between windows, side of the square canvas they are cut from, whether the whole picture is one more view.
    """

    model_type = "san"
    sub_configs_defaults = {"clip_config": SubConfigSpec(config_class=CLIPConfig, init_kwargs=VIT_B_16)}

    clip_config: dict[str, Any] | PreTrainedConfig | None = None
    num_queries: int = 100
    side_hidden_size: int = 240
    side_num_layers: int = 8
    side_num_attention_heads: int = 6
    side_mlp_ratio: float | int = 4.0
    side_patch_size: int = 16
    side_image_size: int = 640
    side_layer_norm_eps: float = 1e-6
    num_feature_layers: int = 9
    num_recognition_layers: int = 3
    fusion_map: list[list[int] | tuple[int, int]] | tuple[list[int] | tuple[int, int], ...] | None = None
    mask_embed_dim: int = 256
    mask_hidden_dim: int = 256
    mask_num_layers: int = 3
    num_bias_heads: int | None = None
    num_bias_layers: int = 1
    rescale_attention_bias: bool = True
    decoupled_head: bool = True
    detach_clip_from_masks: bool = False
    recognition_attention: Literal["cross", "masked"] = "cross"
    clip_input_scale: float | int = 0.5
    train_clip_position_embedding: bool = True
    train_clip: bool = False
    deep_supervision_layers: list[int] | tuple[int, ...] | None = None
    class_weight: float | int = 2.0
    mask_weight: float | int = 5.0
    dice_weight: float | int = 5.0
    no_object_weight: float | int = 0.1
    num_points: int = 12544
    oversample_ratio: float | int = 3.0
    importance_sample_ratio: float | int = 0.75
    normalise_per_process: bool = False
    window_pixels: int = 640
    window_stride: int = 384
    canvas_pixels: int = 1024
    global_view: bool = True
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.fusion_map is None:
            self.fusion_map = evenly_spaced_fusion(self.num_feature_layers, self.side_num_layers)
        if self.deep_supervision_layers is None:
            self.deep_supervision_layers = list(range(max(1, self.side_num_layers - 1), self.side_num_layers + 1))
        super().__post_init__(**kwargs)

    def validate_layers(self) -> None:
        """Check that layer numbers exist (called by `strict` on construction)."""
        depth = self.clip_config.vision_config.num_hidden_layers
        for name in ("num_feature_layers", "num_recognition_layers"):
            if not 1 <= getattr(self, name) <= depth:
                raise ValueError(f"{name} is {getattr(self, name)}, but CLIP has {depth} blocks.")
        for pair in self.fusion_map:
            if len(pair) != 2 or not (0 <= pair[0] <= self.num_feature_layers and 0 <= pair[1] < self.side_num_layers):
                raise ValueError(
                    f"fusion_map holds {list(pair)}; a pair is [CLIP layer, side layer] with a CLIP layer of at most "
                    f"num_feature_layers ({self.num_feature_layers}) and a side layer below side_num_layers "
                    f"({self.side_num_layers})."
                )
        if len({pair[1] for pair in self.fusion_map}) < len(self.fusion_map):
            raise ValueError(f"fusion_map {self.fusion_map} fuses twice into the same side layer.")
        supervised = list(self.deep_supervision_layers)
        if not supervised or supervised != sorted(set(supervised)) or supervised[-1] != self.side_num_layers:
            raise ValueError(
                f"deep_supervision_layers {supervised} must rise and end with side_num_layers ({self.side_num_layers})."
            )
        if supervised[0] < 1:
            raise ValueError(f"deep_supervision_layers {supervised} are counted from 1.")

    def validate_attention(self) -> None:
        """Check heads and biases (called by `strict` on construction)."""
        if self.side_hidden_size % self.side_num_attention_heads:
            raise ValueError(
                f"side_hidden_size {self.side_hidden_size} is no multiple of side_num_attention_heads "
                f"{self.side_num_attention_heads}."
            )
        clip_heads = self.clip_config.vision_config.num_attention_heads
        if self.num_bias_heads not in (None, 1, clip_heads):
            raise ValueError(f"num_bias_heads must be None, 1 or CLIP's {clip_heads} heads, got {self.num_bias_heads}.")
        if self.num_bias_layers not in (1, self.num_recognition_layers):
            raise ValueError(
                f"num_bias_layers must be 1 or num_recognition_layers ({self.num_recognition_layers}), "
                f"got {self.num_bias_layers}."
            )
        if self.clip_input_scale <= 0:
            raise ValueError(f"clip_input_scale must be positive, got {self.clip_input_scale}.")

    @property
    def attention_bias_heads(self) -> int:
        """Heads that the decoder makes biases for."""
        return self.num_bias_heads or self.clip_config.vision_config.num_attention_heads


__all__ = ["SANConfig"]
