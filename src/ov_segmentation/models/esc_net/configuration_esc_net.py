"""Configuration of ESC-Net."""

from __future__ import annotations

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, SamConfig
from transformers.configuration_utils import SubConfigSpec

from ...configuration_base import check_positive
from ...layers.configuration_dense_clip import DenseCLIPConfig
from ...layers.kmeans import MAX_CLUSTERS

PROMPT_TYPES = ("points", "boxes", "masks")
# two-way blocks of every published SAM
SAM_DEPTH = 2
# original SAM has torch's default in its two-way blocks, transformers' configuration another
SAM_LAYER_NORM_EPS = 1e-5


@strict
class ESCNetConfig(DenseCLIPConfig):
    """Configuration of [`ESCNetForOpenVocabularySegmentation`]; the defaults are the ViT-B/16 model.

    No code of the authors is public. The paper says: N = 4 blocks, N_o = 5 objects, points and masks as prompts, CLIP
    ViT-L/14 at 336 pixels, skips at a third and two thirds of the image tower, a decoder of two stages, one template,
    the learning rates. Every other default is a decision of ours, which follows CAT-Seg where it could.

    Arguments that are not here, CLIP's among them, are those of `layers.configuration_dense_clip.DenseCLIPConfig`.

    Args:
        sam_config: `SamConfig`; its mask decoder gives the width and heads of the SAM blocks. What it says about
            pictures follows `image_size`. (Layer norms have epsilon 1e-5, as in the original SAM; decision.)
        use_sam_blocks: False: no SAM blocks and no prompts, as in the paper's Table 2; the projected image features
            themselves guide the fusion (decision).
        sam_block_indices: for each of the N blocks, the two-way block of SAM's decoder whose weights it starts from;
            0 treats its queries as SAM's first block does. (N = 4: paper; 0, 1, 0, 1: decision.)
        sam_output_tokens: SAM's own output tokens are queries too (decision: no).
        text_prompt_token: the projected text embedding of the class is one more prompt token (decision, after Eq. 2;
            Table 3 is without).
        prompt_types: of "points", "boxes", "masks" (paper: points and masks; Table 3: other combinations).
        num_objects: regions per class and picture, N_o (paper: 5).
        prompt_temperature: of the softmax over positions of the standardised map (decision).
        prompt_threshold: pixels of at least this share of the highest probability belong to the class; in (0, 1]
            (decision, as the paper's alpha is not given).
        kmeans_iterations: of the clustering into regions (decision).
        mask_prompt_scale: logit of a mask prompt's pixel of probability 1 (decision).
        refined_feature_aggregation: what guides the fusion of a class: "per_class", its own refined map (decision), or
            "mean", that of all classes.
        rejection_top_k: classes that are nowhere among the k with the highest cosine are rejected before the first
            block, which leaves the others unchanged. None: off. Needs "per_class".
        train_max_classes: classes per picture that are trained on: those of its labels, and others drawn at random,
            with the logits that they would have among all. None: all (paper).
        sam_finetune: whether SAM's parts are trained (paper).
    """

    model_type = "esc_net"
    sub_configs_defaults = {
        **DenseCLIPConfig.sub_configs_defaults,
        "sam_config": SubConfigSpec(
            config_class=SamConfig, init_kwargs={"mask_decoder_config": {"layer_norm_eps": SAM_LAYER_NORM_EPS}}
        ),
    }

    sam_config: dict[str, Any] | PreTrainedConfig | None = None
    use_sam_blocks: bool = True
    sam_block_indices: list[int] | tuple[int, ...] = (0, 1, 0, 1)
    sam_output_tokens: bool = False
    text_prompt_token: bool = True
    prompt_types: list[str] | tuple[str, ...] = ("points", "masks")
    num_objects: int = 5
    prompt_temperature: float | int = 1.0
    prompt_threshold: float | int = 0.5
    kmeans_iterations: int = 10
    mask_prompt_scale: float | int = 10.0
    refined_feature_aggregation: Literal["per_class", "mean"] = "per_class"
    rejection_top_k: int | None = None
    train_max_classes: int | None = None
    sam_finetune: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        prompts, patch = self.sam_config.prompt_encoder_config, self.clip_config.vision_config.patch_size
        prompts.image_size, prompts.patch_size = self.image_size, patch
        prompts.image_embedding_size = self.image_size // patch

    @property
    def num_blocks(self) -> int:
        """N."""
        return len(self.sam_block_indices)

    @property
    def sam_hidden_size(self) -> int:
        """Width of the SAM blocks."""
        return self.sam_config.mask_decoder_config.hidden_size

    def validate_sam(self) -> None:
        """Check SAM's parts (called by `strict` on construction)."""
        sam = self.sam_config
        widths = {
            "mask_decoder_config.hidden_size": sam.mask_decoder_config.hidden_size,
            "prompt_encoder_config.hidden_size": sam.prompt_encoder_config.hidden_size,
            "twice vision_config.num_pos_feats": 2 * sam.vision_config.num_pos_feats,
        }
        if len(set(widths.values())) > 1:
            listed = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise ValueError(f"The widths of sam_config must be equal: {listed}.")
        if not self.sam_block_indices or not all(0 <= index < SAM_DEPTH for index in self.sam_block_indices):
            raise ValueError(
                f"sam_block_indices {list(self.sam_block_indices)} must hold a 0 or 1 for each block, SAM's decoder "
                f"has {SAM_DEPTH} of them."
            )

    def validate_prompts(self) -> None:
        """Check the pseudo prompts (called by `strict` on construction)."""
        types = list(self.prompt_types)
        if not types or len(set(types)) < len(types) or not set(types) <= set(PROMPT_TYPES):
            raise ValueError(
                f"prompt_types {types} must be one or more of {', '.join(PROMPT_TYPES)}. No prompts and no SAM: "
                f"use_sam_blocks=False."
            )
        if types == ["masks"] and not (self.text_prompt_token or self.sam_output_tokens):
            raise ValueError("SAM needs a token: add points or boxes, or set text_prompt_token or sam_output_tokens.")
        if not 0 < self.prompt_threshold <= 1:
            raise ValueError(f"prompt_threshold must be above 0 and at most 1, got {self.prompt_threshold}.")
        if self.prompt_temperature <= 0:
            raise ValueError(f"prompt_temperature must be positive, got {self.prompt_temperature}.")
        for name, lowest in (("num_objects", 1), ("kmeans_iterations", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {getattr(self, name)}.")
        if self.num_objects > MAX_CLUSTERS:
            raise ValueError(f"num_objects must be at most {MAX_CLUSTERS}, got {self.num_objects}.")

    def validate_rejection(self) -> None:
        """Check early rejection (called by `strict` on construction)."""
        check_positive(rejection_top_k=self.rejection_top_k, train_max_classes=self.train_max_classes)
        limits = (self.rejection_top_k, self.max_classes, self.train_max_classes)
        if self.refined_feature_aggregation == "mean" and any(limit is not None for limit in limits):
            raise ValueError(
                "With refined_feature_aggregation='mean' a class depends on all others: rejection_top_k, max_classes "
                "and train_max_classes must be None."
            )


__all__ = ["ESCNetConfig"]
