"""Configuration of DeOP."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CLIPConfig, PreTrainedConfig, SamConfig
from transformers.configuration_utils import SubConfigSpec

from ...configuration_base import OpenVocabularySegmentationConfig
from ...layers.configuration_maskformer import MaskProposalConfig

VIT_B_16 = {"vision_config": {"patch_size": 16, "image_size": 224}}
RESNET_101C = {"backbone_config": {"model_type": "ov_resnet_c", "frozen_stages": 0}}

Severance = Literal["none", "identity", "mask_gain", "mask_guided"]


@strict
class DeOPConfig(OpenVocabularySegmentationConfig):
    """Configuration of [`DeOPForOpenVocabularySegmentation`]; the defaults are the released R101c + ViT-B/16 model.

    CLIP's blocks are counted from 0.

    Args:
        clip_config: CLIP, vision and text.
        mask_config: `MaskProposalConfig`: the MaskFormer that proposes masks.
        sam_config: `SamConfig`, for `proposals="sam"`.
        proposals: where masks come from: "maskformer" (released), "sam" (Segment Anything on a grid of points, as in
            the demo) or "none": every patch is classified, and the outputs are those of the per-class family.
        image_mean, image_std: normalisation of `pixel_values`, which SAM's input is made from.
        sam_points_per_side, sam_points_per_batch, sam_score_threshold, sam_stability_threshold, sam_stability_offset,
            sam_box_overlap, sam_mask_overlap, sam_max_masks, sam_exclusive: see `layers.sam_masks.SamOptions`.
        severed_layers: CLIP's blocks in which patches are severed; negative numbers count from the end.
        severance: what takes the place of attention there (paper, section 3.2): "identity" (general severance),
            "mask_guided", "mask_gain" (released) or "none"; one for all severed blocks or a list of one for each.
        severance_alpha: share of the severed values, the rest is ordinary attention (equation 2).
        severance_residual_scale: factor on the residual of the severed blocks' attention half (0.2 in the demo and in
            the paper's ablations).
        visual_prompts: "added": learned position tables added to all tokens (released), "prepended": learned tokens
            behind the class token, "none".
        visual_prompt_layers: blocks that add a table of their own, beside that of the input.
        visual_prompt_image_size: picture side that the tables' grid stands for.
        num_prepended_prompts: learned tokens with `visual_prompts="prepended"`.
        num_context_vectors: learned context vectors of the text prompt; 0: none (use templates).
        dot_token_id: token of the full stop that ends a learned prompt.
        pooling: "heatmap": learned classification anchors (section 3.3); "mask": means over the masks (the baseline).
        heatmap_decoder: "query": anchor queries (released); "convolution": equation 4, in a layout of ours, see
            `layers.heatmaps.ConvolutionalHeatmapDecoder`.
        heatmap_layers: ordinary decoder layers before the heatmap layer (K of table 5), or convolutions before the
            last one.
        heatmap_heads: heatmaps per query, each of which pools its share of the channels (equation 3 has 1).
        heatmap_attention_heads, heatmap_feedforward_size, heatmap_dropout: of the anchor decoder; the second is also
            the number of channels between convolutions.
        heatmap_kernel_size: of the convolutions, odd.
        temperature: factor of all cosine similarities.
        training_stage: "prompt" trains the context vectors on crops of regions (the first stage; `labels` hold one
            class per picture, all else is ignored), "proposals" MaskFormer (the second), "segmentation" anchors and
            prompts (the third).
        train_text_prompt: the context vectors are trained in the third stage too.
        focal_weight, dice_weight: of the third stage's losses.
        map_scale: s in sigmoid(s * o - s), which turns the fused map o into probabilities for the losses.
        ignore_as_no_object: ignored pixels are positives of "no object", as in the original; False leaves them out.
        proposal_class_weight, proposal_mask_weight, proposal_dice_weight, no_object_weight: of the second stage's
            losses; its matching ignores classes.
        normalise_per_process: loss normaliser of each process on its own, as the original has it.
        window_pixels, window_stride, canvas_pixels, global_view: of the sliding window: side of a window, distance
            between windows, side of the square canvas they are cut from, whether the whole picture is one more view.
    """

    model_type = "deop"
    sub_configs_defaults = {
        "clip_config": SubConfigSpec(config_class=CLIPConfig, init_kwargs=VIT_B_16),
        "mask_config": SubConfigSpec(config_class=MaskProposalConfig, init_kwargs=RESNET_101C),
        "sam_config": SubConfigSpec(config_class=SamConfig, optional=True),
    }

    clip_config: dict[str, Any] | PreTrainedConfig | None = None
    mask_config: dict[str, Any] | PreTrainedConfig | None = None
    sam_config: dict[str, Any] | PreTrainedConfig | None = None
    proposals: Literal["maskformer", "sam", "none"] = "maskformer"
    image_mean: list[float] | tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: list[float] | tuple[float, ...] = (0.229, 0.224, 0.225)
    sam_points_per_side: int = 32
    sam_points_per_batch: int = 64
    sam_score_threshold: float | int = 0.88
    sam_stability_threshold: float | int = 0.95
    sam_stability_offset: float | int = 1.0
    sam_box_overlap: float | int = 0.7
    sam_mask_overlap: float | int = 1.0
    sam_max_masks: int | None = None
    sam_exclusive: bool = True
    severed_layers: list[int] | tuple[int, ...] = (-1,)
    severance: Severance | list[Severance] = "mask_gain"
    severance_alpha: float | int = 1.0
    severance_residual_scale: float | int = 1.0
    visual_prompts: Literal["added", "prepended", "none"] = "added"
    visual_prompt_layers: list[int] | tuple[int, ...] = (1, 2, 3, 4, 5)
    visual_prompt_image_size: int = 384
    num_prepended_prompts: int = 5
    num_context_vectors: int = 16
    dot_token_id: int = 269
    pooling: Literal["heatmap", "mask"] = "heatmap"
    heatmap_decoder: Literal["query", "convolution"] = "query"
    heatmap_layers: int = 1
    heatmap_heads: int = 8
    heatmap_attention_heads: int = 8
    heatmap_feedforward_size: int = 1024
    heatmap_dropout: float | int = 0.1
    heatmap_kernel_size: int = 3
    temperature: float | int = 100.0
    training_stage: Literal["segmentation", "proposals", "prompt"] = "segmentation"
    train_text_prompt: bool = True
    focal_weight: float | int = 2.0
    dice_weight: float | int = 0.8
    map_scale: float | int = 3.0
    ignore_as_no_object: bool = True
    proposal_class_weight: float | int = 1.0
    proposal_mask_weight: float | int = 20.0
    proposal_dice_weight: float | int = 1.0
    no_object_weight: float | int = 0.1
    normalise_per_process: bool = False
    initializer_range: float = 0.02
    window_pixels: int = 512
    window_stride: int = 256
    canvas_pixels: int = 1024
    global_view: bool = True

    @property
    def num_queries(self) -> int:
        """N of MaskFormer's proposals."""
        return self.mask_config.num_queries

    def validate_proposals(self) -> None:
        """Check that there are proposals for what needs them (called by `strict` on construction)."""
        if self.proposals == "sam" and self.sam_config is None:
            raise ValueError('proposals="sam" needs sam_config; from_clip_and_sam(clip, sam) fills it in.')
        if self.proposals != "maskformer" and self.pooling == "heatmap":
            raise ValueError(
                f'pooling="heatmap" has one anchor query per query of MaskFormer: proposals="{self.proposals}" needs '
                f'pooling="mask".'
            )
        if self.proposals == "none" and set(self.severance_of_blocks()) - {"none", "identity"}:
            raise ValueError(f'severance {self.severance!r} needs proposals; with proposals="none" take "identity".')
        if self.training_stage == "proposals" and self.proposals != "maskformer":
            raise ValueError('training_stage="proposals" trains MaskFormer: it needs proposals="maskformer".')

    def validate_prompts(self) -> None:
        """Check the learned prompts (called by `strict` on construction)."""
        depth = self.clip_config.vision_config.num_hidden_layers
        layers = list(self.visual_prompt_layers) if self.visual_prompts == "added" else []
        if len(set(layers)) < len(layers) or any(not 0 <= layer < depth for layer in layers):
            raise ValueError(f"visual_prompt_layers {layers} must name different ones of CLIP's {depth} blocks.")
        vocab_size = self.clip_config.text_config.vocab_size
        if self.num_context_vectors and not 0 <= self.dot_token_id < vocab_size:
            raise ValueError(
                f"dot_token_id {self.dot_token_id} is not among the {vocab_size} tokens: it is the id of the full stop "
                f"that ends a learned prompt."
            )
        if self.num_context_vectors < 0:
            raise ValueError(f"num_context_vectors cannot be negative, got {self.num_context_vectors}.")
        if self.training_stage == "prompt" and not self.num_context_vectors:
            raise ValueError('training_stage="prompt" trains context vectors: num_context_vectors must not be 0.')

    def validate_severance(self) -> None:
        """Check the severed blocks (called by `strict` on construction)."""
        depth = self.clip_config.vision_config.num_hidden_layers
        layers = [layer % depth for layer in self.severed_layers if -depth <= layer < depth]
        if len(layers) < len(self.severed_layers) or len(set(layers)) < len(layers):
            raise ValueError(f"severed_layers {list(self.severed_layers)} must name different blocks of the {depth}.")
        if not isinstance(self.severance, str) and len(self.severance) != len(self.severed_layers):
            raise ValueError(
                f"severance has {len(self.severance)} values for {len(self.severed_layers)} severed_layers."
            )
        if not 0 <= self.severance_alpha <= 1:
            raise ValueError(f"severance_alpha must lie between 0 and 1, got {self.severance_alpha}.")

    def validate_heatmaps(self) -> None:
        """Check the anchor decoder (called by `strict` on construction)."""
        size = self.clip_config.projection_dim
        for name in ("heatmap_heads", "heatmap_attention_heads"):
            if size % getattr(self, name):
                raise ValueError(f"{name} {getattr(self, name)} does not divide CLIP's embedding size {size}.")

        if self.heatmap_layers < 0:
            raise ValueError(f"heatmap_layers cannot be negative, got {self.heatmap_layers}.")
        if self.heatmap_kernel_size < 1 or self.heatmap_kernel_size % 2 == 0:
            raise ValueError(f"heatmap_kernel_size must be odd and positive, got {self.heatmap_kernel_size}.")

    def severance_of_blocks(self) -> list[str]:
        """What each of CLIP's blocks does: "none" or a kind of severance."""
        depth = self.clip_config.vision_config.num_hidden_layers
        kinds = [self.severance] * len(self.severed_layers) if isinstance(self.severance, str) else self.severance
        chosen = {layer % depth: kind for layer, kind in zip(self.severed_layers, kinds, strict=True)}
        return [chosen.get(block, "none") for block in range(depth)]
