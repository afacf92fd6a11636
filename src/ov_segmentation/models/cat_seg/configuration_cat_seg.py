"""Configuration of CAT-Seg."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict

from ...layers.configuration_dense_clip import DenseCLIPConfig


@strict
class CATSegConfig(DenseCLIPConfig):
    """Configuration of [`CATSegForOpenVocabularySegmentation`]; the defaults are the released ViT-B/16 model at 384.

    Arguments that are not here, CLIP's among them, are those of `layers.configuration_dense_clip.DenseCLIPConfig`.

    Args:
        pad_multiple: pads the picture to multiples of this before it is made square, and so stretches the result a
            little. 32 as in the original, which published weights expect; None keeps the geometry. Whole pictures only.
        num_templates: P, prompts per class; each is a channel of the cost map.
        num_aggregation_layers: pairs of spatial and class aggregation.
        appearance_guidance_size: channels of the projected dense map that guides the spatial aggregation.
        skip_upsampled_sizes: channels of the two skips after their transposed convolutions (x 2 and x 4).
        padding_length: the class aggregation sees at least this many classes; learned padding fills up.
        max_classes: see `DenseCLIPConfig`; published: 256.
        class_attention_pooling: average pooling in front of the class aggregation; 1: none (published evaluation).
        train_class_attention_pooling: the same in training mode (published training: 2).
        ignore_as_negative: ignored pixels are negatives of every class, as in the original; False leaves them out.
    """

    model_type = "cat_seg"

    pad_multiple: int | None = None
    num_templates: int = 1
    num_aggregation_layers: int = 2
    appearance_guidance_size: int = 128
    skip_upsampled_sizes: list[int] | tuple[int, int] = (256, 128)
    padding_length: int = 256
    max_classes: int | None = 256
    class_attention_pooling: int = 1
    train_class_attention_pooling: int = 2
    ignore_as_negative: bool = True

    def validate_skips(self) -> None:
        """Check the skips' widths (called by `strict` on construction)."""
        if len(self.skip_upsampled_sizes) != 2:
            raise ValueError(
                f"skip_upsampled_sizes {list(self.skip_upsampled_sizes)} must hold two numbers, one per decoder stage."
            )
        widths = (self.hidden_size, self.decoder_sizes[0])
        if any(skip >= width for skip, width in zip(self.skip_sizes, widths)):
            raise ValueError(f"skip_sizes {list(self.skip_sizes)} must be smaller than the features' {list(widths)}.")

    def validate_pooling(self) -> None:
        """Check the pooling (called by `strict` on construction)."""
        for name in ("class_attention_pooling", "train_class_attention_pooling"):
            if not 1 <= getattr(self, name) <= self.grid_size:
                raise ValueError(f"{name} must be 1 (none) to {self.grid_size}, got {getattr(self, name)}.")


__all__ = ["CATSegConfig"]
