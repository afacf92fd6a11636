"""Configuration of OVSeg and SimBaseline."""

from __future__ import annotations

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CLIPConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from ...configuration_base import OpenVocabularySegmentationConfig, check_positive
from ...layers.configuration_maskformer import MaskProposalConfig

VIT_L_14 = {
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768},
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 768,
    },
}
SWIN_B = {
    "backbone_config": {
        "model_type": "swin",
        "embed_dim": 128,
        "depths": [2, 2, 18, 2],
        "num_heads": [4, 8, 16, 32],
        "window_size": 12,
        "drop_path_rate": 0.3,
    }
}


@strict
class OVSegConfig(OpenVocabularySegmentationConfig):
    """Configuration of [`OVSegForOpenVocabularySegmentation`]; the defaults are the released Swin-B + ViT-L/14 model.

    Args:
        clip_config: CLIP, vision and text.
        mask_config: `MaskProposalConfig`: the MaskFormer that proposes masks.
        image_mean, image_std: normalisation of `pixel_values`; the model turns them into CLIP's own for the crops.
        temperature: factor of all cosine similarities.
        mask_threshold: probability above which a pixel belongs to a proposal's crop.
        mask_expand_ratio: size of a crop relative to the proposal's tight box.
        mask_fill: colour of the pixels outside the mask: "mean" (CLIP's), "zero" (black) or "none" (crops without
            mask, paper's appendix A.1).
        crop_size: side of the crops that CLIP sees, in pixels.
        crop_batch_size: crops that go through CLIP at once; None: all.
        prompt_type: "mask" (paper, section 3.3), "deep" (deep visual prompts, Table 7) or "none".
        prompt_depth: how many blocks get prompts.
        num_deep_prompts: tokens per block with `prompt_type="deep"`.
        num_context_vectors: learned context vectors of the text prompt, in place of templates (SimBaseline); 0: none.
        dot_token_id: token of the full stop that ends a learned prompt.
        ensemble_weight: CLIP's share in the geometric ensemble with the proposals' own classification (paper, section
            3.1); 0: CLIP alone; None: the proposals' own alone, no crop is made.
        class_is_seen: `[K]` bools: seen classes take the ensemble with the shares exchanged (SimBaseline); None: all
            are unseen.
        demo_mode: each class keeps its best proposal alone, masks are binary (the original's demo).
        class_weight, mask_weight, dice_weight: of the matching costs and of the losses.
        no_object_weight: class weight of "no object".
        normalise_per_process: loss normaliser of each process on its own, as the original has it.
        window_pixels, window_stride, canvas_pixels, global_view: of the sliding window: side of a window, distance
            between windows, side of the square canvas they are cut from, whether the whole picture is one more view.
    """

    model_type = "ovseg"
    sub_configs_defaults = {
        "clip_config": SubConfigSpec(config_class=CLIPConfig, init_kwargs=VIT_L_14),
        "mask_config": SubConfigSpec(config_class=MaskProposalConfig, init_kwargs=SWIN_B),
    }

    clip_config: dict[str, Any] | PreTrainedConfig | None = None
    mask_config: dict[str, Any] | PreTrainedConfig | None = None
    image_mean: list[float] | tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: list[float] | tuple[float, ...] = (0.229, 0.224, 0.225)
    temperature: float | int = 100.0
    mask_threshold: float = 0.4
    mask_expand_ratio: float | int = 1.0
    mask_fill: Literal["mean", "zero", "none"] = "mean"
    crop_size: int = 224
    crop_batch_size: int | None = 32
    prompt_type: Literal["mask", "deep", "none"] = "mask"
    prompt_depth: int = 3
    num_deep_prompts: int = 10
    num_context_vectors: int = 0
    dot_token_id: int = 269
    ensemble_weight: float | int | None = 0.7
    class_is_seen: list[bool] | None = None
    demo_mode: bool = False
    class_weight: float | int = 1.0
    mask_weight: float | int = 20.0
    dice_weight: float | int = 1.0
    no_object_weight: float | int = 0.1
    normalise_per_process: bool = False
    window_pixels: int = 640
    window_stride: int = 384
    canvas_pixels: int = 1024
    global_view: bool = True
    initializer_range: float = 0.02

    def validate_prompts(self) -> None:
        """Check prompts and crops (called by `strict` on construction)."""
        vision = self.clip_config.vision_config
        if self.prompt_type != "none" and not 1 <= self.prompt_depth <= vision.num_hidden_layers:
            raise ValueError(
                f"prompt_depth must lie between 1 and CLIP's {vision.num_hidden_layers} blocks, got "
                f"{self.prompt_depth}."
            )
        if self.prompt_type == "deep" and self.num_deep_prompts < 1:
            raise ValueError(f"num_deep_prompts must be at least 1, got {self.num_deep_prompts}.")
        if self.crop_size < 1 or self.crop_size % vision.patch_size:
            raise ValueError(f"crop_size {self.crop_size} is no multiple of CLIP's patch size {vision.patch_size}.")
        longest = self.clip_config.text_config.max_position_embeddings - 4  # start, a token of the name, dot, end
        if not 0 <= self.num_context_vectors <= longest:
            raise ValueError(
                f"num_context_vectors must lie between 0 and {longest}, got {self.num_context_vectors}: the prompt "
                f"has to fit CLIP's text tower."
            )

    def validate_ensemble(self) -> None:
        """Check thresholds and shares (called by `strict` on construction)."""
        if not 0 <= self.mask_threshold < 1:
            raise ValueError(f"mask_threshold is a probability, got {self.mask_threshold}.")
        if self.mask_expand_ratio <= 0:
            raise ValueError(f"mask_expand_ratio must be positive, got {self.mask_expand_ratio}.")
        check_positive(crop_batch_size=self.crop_batch_size)
        check_ensemble_weight(self.ensemble_weight)


def check_ensemble_weight(weight: float | int | None) -> None:
    """CLIP's share lies in [0, 1]; None stands for the proposals' own classes alone."""
    if weight is not None and not 0 <= weight <= 1:
        raise ValueError(f"ensemble_weight is CLIP's share, between 0 and 1, or None for no CLIP; got {weight}.")


__all__ = ["OVSegConfig"]
