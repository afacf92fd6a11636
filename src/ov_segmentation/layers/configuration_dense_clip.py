"""What the configurations of CAT-Seg and ESC-Net share: dense CLIP features, windowed aggregation, the decoder."""

from __future__ import annotations

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CLIPConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from ..configuration_base import OpenVocabularySegmentationConfig, check_positive
from .sliding_window import Windows

VIT_B_16 = {"vision_config": {"patch_size": 16, "image_size": 224}}
# positions along a side in the published models
PUBLISHED_GRID = 24


@strict
class DenseCLIPConfig(OpenVocabularySegmentationConfig):
    """Base of the configurations of methods on dense features of CLIP's ViT; the defaults are ViT-B/16's at 384 pixels.

    Args:
        clip_config: CLIP, vision and text.
        image_size: side of the square that CLIP sees; a multiple of its patch size.
        skip_layers: blocks (from 0) of the image tower whose outputs guide the two decoder stages.
        dense_residual: what the dense last block adds to every token: "cls", the class token's input (CAT-Seg's
            release), or "token", its own.
        hidden_size: channels per class.
        num_attention_heads: heads of the spatial and of the class aggregation.
        window_size: of the spatial aggregation, in positions; shifted windows are moved by half of it.
        text_guidance_size: channels of the projected text embedding that the class aggregation sees.
        skip_sizes: channels of the two skips as the decoder sees them.
        decoder_sizes: channels of the two decoder stages, of which 16 each make a group of the norms.
        max_classes: classes that are segmented per picture or view, those with the highest cosine anywhere; the others
            are rejected. None: all.
        class_chunk_size: (picture, class) pairs that run at once, in every per-class stage; the result does not depend
            on it. None: all.
        crop_batch_size: views that the image tower takes at once; None: all.
        window_pixels, window_stride, canvas_pixels, global_view: of the sliding window: side of a window, distance
            between windows, side of the square canvas they are cut from, whether the whole picture is one more view.
        clip_finetune: trained parameters of CLIP: "attention" (weights of all query and value projections; published),
            "blocks" (all transformer blocks), "all", or "none".
        ignore_as_negative: ignored pixels are negatives of every class; False leaves them out.
    """

    sub_configs_defaults = {"clip_config": SubConfigSpec(config_class=CLIPConfig, init_kwargs=VIT_B_16)}

    clip_config: dict[str, Any] | PreTrainedConfig | None = None
    image_size: int = 384
    skip_layers: list[int] | tuple[int, int] = (3, 7)
    dense_residual: Literal["cls", "token"] = "cls"
    hidden_size: int = 128
    num_attention_heads: int = 4
    window_size: int = 12
    text_guidance_size: int = 128
    skip_sizes: list[int] | tuple[int, int] = (32, 16)
    decoder_sizes: list[int] | tuple[int, int] = (64, 32)
    max_classes: int | None = None
    class_chunk_size: int | None = 64
    crop_batch_size: int | None = 5
    window_pixels: int = 384
    window_stride: int = 256
    canvas_pixels: int = 640
    global_view: bool = True
    clip_finetune: Literal["attention", "blocks", "all", "none"] = "attention"
    ignore_as_negative: bool = False
    initializer_range: float = 0.02

    @property
    def grid_size(self) -> int:
        """Positions along a side of CLIP's map."""
        return self.image_size // self.clip_config.vision_config.patch_size

    @property
    def windows(self) -> Windows:
        """Of the sliding window."""
        canvas_size = (self.canvas_pixels, self.canvas_pixels)
        return Windows(self.window_pixels, self.window_stride, canvas_size, self.global_view)

    def validate_geometry(self) -> None:
        """Check picture, patches and aggregation (called by `strict` on construction)."""
        patch = self.clip_config.vision_config.patch_size
        if self.image_size % patch:
            raise ValueError(f"image_size {self.image_size} is no multiple of CLIP's patch size {patch}.")
        if self.grid_size > self.window_size and self.grid_size % self.window_size:
            raise ValueError(
                f"window_size {self.window_size} does not divide the {self.grid_size} positions of image_size "
                f"{self.image_size}."
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
        for name in ("skip_sizes", "decoder_sizes"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"{name} {list(getattr(self, name))} must hold two numbers, one per decoder stage.")
        if any(size < 16 or size % (size // 16) for size in self.decoder_sizes):
            raise ValueError(f"decoder_sizes {list(self.decoder_sizes)} must divide into groups of about 16 channels.")

    def validate_limits(self) -> None:
        """Check counts (called by `strict` on construction)."""
        check_positive(
            max_classes=self.max_classes, class_chunk_size=self.class_chunk_size, crop_batch_size=self.crop_batch_size
        )


def settings_for_clip(clip_config: CLIPConfig) -> dict[str, Any]:
    """Configuration values that follow from CLIP's size: skips at a third and two thirds of the tower, pictures of
    24 x 24 patches."""
    vision = clip_config.vision_config
    below_last = vision.num_hidden_layers - 2
    skips = tuple(max(0, min(part * vision.num_hidden_layers // 3 - 1, below_last)) for part in (1, 2))
    return {"skip_layers": skips, "image_size": PUBLISHED_GRID * vision.patch_size}
