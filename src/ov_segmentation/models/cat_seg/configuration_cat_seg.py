"""Configuration of CAT-Seg."""

from __future__ import annotations

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CLIPConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from ...configuration_base import OpenVocabularySegmentationConfig

VIT_B_16 = {"vision_config": {"patch_size": 16, "image_size": 224}}


@strict
class CATSegConfig(OpenVocabularySegmentationConfig):
    """Configuration of [`CATSegForOpenVocabularySegmentation`]; the defaults are the released ViT-B/16 model at 384.

    Args:
        clip_config: CLIP, vision and text.
        image_size: side of the square that CLIP sees; a multiple of its patch size.
        pad_multiple: pads the picture to multiples of this before it is made square, and so stretches the result a
            little. 32 as in the original, which published weights expect; None keeps the geometry. Whole pictures only.
        num_templates: P, prompts per class; each is a channel of the cost map.
        skip_layers: blocks (from 0) of the image tower whose outputs guide the two decoder stages.
        dense_residual: what the dense last block adds to every token: "cls", the class token's input (released), or
            "token", its own.
        hidden_size: channels per class.
        num_aggregation_layers: pairs of spatial and class aggregation.
        num_attention_heads: heads of both.
        window_size: of the spatial aggregation, in positions; shifted windows are moved by half of it.
        appearance_guidance_size: channels of the projected dense map that guides the spatial aggregation.
        text_guidance_size: channels of the projected text embedding that guides the class aggregation.
        skip_upsampled_sizes: channels of the two skips after their transposed convolutions (x 2 and x 4).
        skip_sizes: channels of the two skips as the decoder sees them.
        decoder_sizes: channels of the two decoder stages, which are normalised in groups of 16.
        padding_length: the class aggregation sees at least this many classes; learned padding fills up.
        max_classes: classes that are aggregated per picture or view, those with the highest cosine anywhere; the others
            are rejected. None: all.
        class_attention_pooling: average pooling in front of the class aggregation; 1: none (published evaluation).
        train_class_attention_pooling: the same in training mode.
        class_chunk_size: (picture, class) pairs that run at once, in every per-class stage; the result does not depend
            on it. None: all.
        crop_batch_size: views that the image tower takes at once; None: all.
        window_pixels, window_stride, canvas_pixels, global_view: of the sliding window: side of a window, distance
            between windows, side of the square canvas they are cut from, whether the whole picture is one more view.
        clip_finetune: trained parameters of CLIP: "attention" (weights of all query and value projections; released),
            "blocks" (all transformer blocks), "all", or "none".
        ignore_as_negative: ignored pixels are negatives of every class, as in the original; False leaves them out.
    """

    model_type = "cat_seg"
    sub_configs_defaults = {"clip_config": SubConfigSpec(config_class=CLIPConfig, init_kwargs=VIT_B_16)}

    clip_config: dict[str, Any] | PreTrainedConfig | None = None
    image_size: int = 384
    pad_multiple: int | None = None
    num_templates: int = 1
    skip_layers: list[int] | tuple[int, int] = (3, 7)
    dense_residual: Literal["cls", "token"] = "cls"
    hidden_size: int = 128
    num_aggregation_layers: int = 2
    num_attention_heads: int = 4
    window_size: int = 12
    appearance_guidance_size: int = 128
    text_guidance_size: int = 128
    skip_upsampled_sizes: list[int] | tuple[int, int] = (256, 128)
    skip_sizes: list[int] | tuple[int, int] = (32, 16)
    decoder_sizes: list[int] | tuple[int, int] = (64, 32)
    padding_length: int = 256
    max_classes: int | None = 256
    class_attention_pooling: int = 1
    train_class_attention_pooling: int = 2
    class_chunk_size: int | None = 64
    crop_batch_size: int | None = 5
    window_pixels: int = 384
    window_stride: int = 256
    canvas_pixels: int = 640
    global_view: bool = True
    clip_finetune: Literal["attention", "blocks", "all", "none"] = "attention"
    ignore_as_negative: bool = True
    initializer_range: float = 0.02

    @property
    def grid_size(self) -> int:
        """Positions along a side of CLIP's map."""
        return self.image_size // self.clip_config.vision_config.patch_size

    def validate_geometry(self) -> None:
        """Check picture, patches and windows (called by `strict` on construction)."""
        patch = self.clip_config.vision_config.patch_size
        if self.image_size % patch:
            raise ValueError(f"image_size {self.image_size} is no multiple of CLIP's patch size {patch}.")
        if self.grid_size > self.window_size and self.grid_size % self.window_size:
            raise ValueError(
                f"window_size {self.window_size} does not divide the {self.grid_size} positions of image_size "
                f"{self.image_size}."
            )
        if not 0 < self.window_stride <= self.window_pixels <= self.canvas_pixels:
            raise ValueError(
                f"Windows need 0 < window_stride <= window_pixels <= canvas_pixels, got {self.window_stride}, "
                f"{self.window_pixels}, {self.canvas_pixels}."
            )

    def validate_widths(self) -> None:
        """Check layers, heads and channels (called by `strict` on construction)."""
        depth = self.clip_config.vision_config.num_hidden_layers
        if len(self.skip_layers) != 2 or not all(0 <= layer < depth - 1 for layer in self.skip_layers):
            raise ValueError(
                f"skip_layers {list(self.skip_layers)} must name two blocks below the last of CLIP's {depth}, from 0."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}."
            )
        for name in ("skip_upsampled_sizes", "skip_sizes", "decoder_sizes"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"{name} {list(getattr(self, name))} must hold two numbers, one per decoder stage.")
        if any(size < 16 or size % (size // 16) for size in self.decoder_sizes):
            raise ValueError(f"decoder_sizes {list(self.decoder_sizes)} must divide into groups of about 16 channels.")
        widths = (self.hidden_size, self.decoder_sizes[0])
        if any(skip >= width for skip, width in zip(self.skip_sizes, widths, strict=True)):
            raise ValueError(f"skip_sizes {list(self.skip_sizes)} must be smaller than the features' {list(widths)}.")

    def validate_limits(self) -> None:
        """Check counts (called by `strict` on construction)."""
        for name in ("class_attention_pooling", "train_class_attention_pooling"):
            if not 1 <= getattr(self, name) <= self.grid_size:
                raise ValueError(f"{name} must be 1 (none) to {self.grid_size}, got {getattr(self, name)}.")
        for name in ("max_classes", "class_chunk_size", "crop_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or None for no limit, got {value}.")


__all__ = ["CATSegConfig"]
