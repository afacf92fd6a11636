"""Configuration of SED."""

from __future__ import annotations

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, CLIPTextConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from ...configuration_base import OpenVocabularySegmentationConfig, check_positive, repair_legacy_token_ids

MAX_DECODER_LAYERS = 3
CHANNELS_PER_GROUP = 16


@strict
class SEDConfig(OpenVocabularySegmentationConfig):
    """Configuration of [`SEDForOpenVocabularySegmentation`]; the defaults are the released SED (B).

    Args:
        vision_config: `ConvNextConfig` (default: ConvNeXt-B), or `CLIPVisionConfig` for the plain encoder of the
            paper's Tables 3 and 4 (a dict needs `model_type`).
        text_config: `CLIPTextConfig`; its `projection_dim` is the width D of the shared embedding space.
        num_templates: P, prompts per class; each is a channel of the cost map.
        image_size: side of the square model input, or (height, width); multiples of the encoder's stride.
        projection_type: "linear" (B) or "mlp" (L): from encoder channels to D. A plain encoder has "linear".
        projection_dropout: of the MLP projection, in training (L: 0.1). Stochastic depth is
            `vision_config.drop_path_rate` (L: 0.1).
        hidden_size: channels of the embedded cost map.
        num_decoder_layers: 1 to 3; each doubles the resolution. The lists below may be longer.
        decoder_dims: channels after each decoder layer, multiples of 16.
        guidance_dims: channels of image guidance and of cost guidance in each decoder layer.
        kernel_sizes: of the depthwise convolution in each decoder layer, odd (the paper's study: 7, 9, 11).
        num_attention_heads: of the class attention.
        spatial_aggregation, class_aggregation: whether decoder layers have these two parts.
        feature_fusion: what decoder layers see beside the cost volume: "none", "features" (encoder feature maps),
            "cost" (the cost map, upsampled), or "features_and_cost". Plain encoders without skips: "none" or "cost".
        detach_image_guidance: no gradient from the guidance to the encoder ("gradient stop").
        skip_layers: of a plain encoder: the block (from 0) whose output guides each decoder layer, below the last.
            None: at three quarters, a half and a quarter of the depth.
        num_trainable_stages: stages of the encoder that are trained, counted from the last (Table 5): 0 freezes it, 1
            to 3 train the last ones and the projection, 4 trains all, the stem included. Stages of a plain encoder are
            quarters of its blocks.
        class_attention_pooling: side of the pooling before the class attention, 1 = none (published evaluation).
        train_class_attention_pooling: the same in training mode (published training: 2).
        rejection_top_k: category early rejection: before each decoder layer a picture keeps the union over its pixels
            of the k best classes. None: off.
        class_chunk_size: how many (picture, class) pairs go through a layer at a time; bounds memory, exact. None: all.
        crop_batch_size: pictures, or views, that the encoder takes at once; None: all.
        window_pixels, window_stride, canvas_size: of the sliding window: side of a window, distance between windows,
            and (height, width) of the canvas that they are cut from.
        global_view: whether the whole picture is one more view.
        num_training_classes: in training, a batch sees the classes in its labels and random others, so many in all: for
            vocabularies of hundreds of names on small machines. None: all classes, as in the original.
        ignore_as_negative: whether ignored pixels count as negatives of every class in the loss, as in the original.
        auxiliary_loss_weight: of the loss terms of the auxiliary heads; 0 leaves them out.
    """

    model_type = "sed"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="convnext",
            init_kwargs={
                "hidden_sizes": [128, 256, 512, 1024],
                "depths": [3, 3, 27, 3],
                "layer_norm_eps": 1e-6,
            },
        ),
        "text_config": SubConfigSpec(
            config_class=CLIPTextConfig,
            init_kwargs={
                "hidden_size": 640,
                "intermediate_size": 2560,
                "num_attention_heads": 10,
                "num_hidden_layers": 12,
                "projection_dim": 640,
                "hidden_act": "gelu",
                "bos_token_id": 49406,
                "eos_token_id": 49407,
            },
        ),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    num_templates: int = 80
    image_size: int | list[int] | tuple[int, ...] = 768
    projection_type: Literal["linear", "mlp"] = "linear"
    projection_dropout: float | int = 0.0
    hidden_size: int = 128
    num_decoder_layers: int = 3
    decoder_dims: list[int] | tuple[int, ...] = (64, 32, 16)
    guidance_dims: list[int] | tuple[int, ...] = (32, 16, 8)
    kernel_sizes: list[int] | tuple[int, ...] = (9, 9, 9)
    num_attention_heads: int = 4
    spatial_aggregation: bool = True
    class_aggregation: bool = True
    feature_fusion: Literal["none", "features", "cost", "features_and_cost"] = "features_and_cost"
    detach_image_guidance: bool = True
    skip_layers: list[int] | tuple[int, ...] | None = None
    num_trainable_stages: int = 4
    class_attention_pooling: int = 1
    train_class_attention_pooling: int = 2
    rejection_top_k: int | None = None
    class_chunk_size: int | None = 16
    crop_batch_size: int | None = 4
    window_pixels: int = 768
    window_stride: int = 512
    canvas_size: list[int] | tuple[int, ...] = (1280, 1280)
    global_view: bool = True
    num_training_classes: int | None = None
    ignore_as_negative: bool = True
    auxiliary_loss_weight: float | int = 1.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        repair_legacy_token_ids(self.text_config)
        if self.has_plain_encoder and self.skip_layers is None:
            depth = self.vision_config.num_hidden_layers
            self.skip_layers = [max(0, depth * share // 4 - 1) for share in (3, 2, 1)]

    @classmethod
    def sed_fast(cls, **kwargs: Any) -> SEDConfig:
        """The paper's "SED-fast": a smaller model input, and rejection. The paper states no size; 512 is our choice."""
        return cls(**{"image_size": 512, "rejection_top_k": 8, **kwargs})

    @property
    def has_plain_encoder(self) -> bool:
        """Whether the encoder is CLIP's ViT, not a ConvNeXt."""
        return self.vision_config.model_type == "clip_vision_model"

    @property
    def encoder_stride(self) -> int:
        """Input pixels per position of the cost map."""
        if self.has_plain_encoder:
            return self.vision_config.patch_size
        # every stage but the first halves the map
        return self.vision_config.patch_size * 2 ** (len(self.vision_config.hidden_sizes) - 1)

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the model input."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def fuses_features(self) -> bool:
        """Whether decoder layers see feature maps of the encoder."""
        return self.feature_fusion in ("features", "features_and_cost")

    @property
    def fuses_cost(self) -> bool:
        """Whether decoder layers see the upsampled cost map."""
        return self.feature_fusion in ("cost", "features_and_cost")

    def validate_encoder(self) -> None:
        """Check that encoder and input size fit (called by `strict` on construction)."""
        if self.vision_config.model_type not in ("convnext", "clip_vision_model"):
            raise ValueError(
                f"vision_config must be of type convnext or clip_vision_model, got {self.vision_config.model_type!r}."
            )
        height, width = self.input_size
        if height % self.encoder_stride or width % self.encoder_stride or min(height, width) <= 0:
            raise ValueError(f"image_size {self.image_size} must be a multiple of {self.encoder_stride}.")
        if not 0 <= self.num_trainable_stages <= 4:
            raise ValueError(f"num_trainable_stages must be 0 to 4, got {self.num_trainable_stages}.")
        if self.has_plain_encoder and self.projection_type != "linear":
            raise ValueError("CLIP's ViT has a linear projection: set projection_type='linear'.")
        if self.has_plain_encoder and self.vision_config.projection_dim != self.text_config.projection_dim:
            raise ValueError(
                f"vision_config.projection_dim {self.vision_config.projection_dim} and text_config.projection_dim "
                f"{self.text_config.projection_dim} must be equal."
            )

    def validate_decoder(self) -> None:
        """Check that the decoder's lists fit together (called by `strict` on construction)."""
        layers = self.num_decoder_layers
        if not 1 <= layers <= MAX_DECODER_LAYERS:
            raise ValueError(f"num_decoder_layers must be 1 to {MAX_DECODER_LAYERS}, got {layers}.")
        for name in ("decoder_dims", "guidance_dims", "kernel_sizes"):
            if len(getattr(self, name)) < layers:
                raise ValueError(f"{name} {getattr(self, name)} needs an entry for each of {layers} decoder layers.")
        if self.has_plain_encoder and self.fuses_features:
            blocks = self.vision_config.num_hidden_layers
            if len(self.skip_layers) < layers or not all(0 <= block < blocks - 1 for block in self.skip_layers):
                raise ValueError(
                    f"skip_layers {self.skip_layers} must name a block below the last of {blocks}, from 0, for each of "
                    f"{layers} decoder layers."
                )
        if any(size % CHANNELS_PER_GROUP for size in self.decoder_dims):
            raise ValueError(f"decoder_dims {self.decoder_dims} must be multiples of {CHANNELS_PER_GROUP}.")
        if any(size % 2 == 0 for size in self.kernel_sizes):
            raise ValueError(f"kernel_sizes {self.kernel_sizes} must be odd.")
        channels = [self.hidden_size, *self.decoder_dims][:layers]
        if any(size % self.num_attention_heads for size in channels):
            raise ValueError(f"num_attention_heads {self.num_attention_heads} must divide {channels}.")
        if any(guidance >= size for guidance, size in zip(self.guidance_dims, channels)):
            raise ValueError(f"guidance_dims {self.guidance_dims} must be below the layers' channels {channels}.")

    def validate_switches(self) -> None:
        """Check the inference switches' defaults (called by `strict` on construction)."""
        for name in ("class_attention_pooling", "train_class_attention_pooling"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 (1 = no pooling), got {getattr(self, name)}.")
        check_positive(
            rejection_top_k=self.rejection_top_k,
            class_chunk_size=self.class_chunk_size,
            crop_batch_size=self.crop_batch_size,
            num_training_classes=self.num_training_classes,
        )
