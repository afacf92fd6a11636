"""Configuration of DeOP."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CLIPConfig, PreTrainedConfig
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
        heatmap_layers: ordinary decoder layers before the heatmap layer (K of table 5).
        heatmap_heads: heatmaps per query, each of which pools its share of the channels (equation 3 has 1).
        heatmap_attention_heads, heatmap_feedforward_size, heatmap_dropout: of the anchor decoder.
        temperature: factor of all cosine similarities.
        training_stage: "segmentation" trains anchors and prompts (the third stage), "proposals" MaskFormer (the
            second).
        train_text_prompt: the context vectors are trained in the third stage too.
        focal_weight, dice_weight: of the third stage's losses.
        map_scale: s in sigmoid(s * o - s), which turns the fused map o into probabilities for the losses.
        ignore_as_no_object: ignored pixels are positives of "no object", as in the original; False leaves them out.
        proposal_class_weight, proposal_mask_weight, proposal_dice_weight, no_object_weight: of the second stage's
            losses; its matching ignores classes.
        normalise_per_process: loss normaliser of each process on its own, as the original has it.
    """

    model_type = "deop"
    sub_configs_defaults = {
        "clip_config": SubConfigSpec(config_class=CLIPConfig, init_kwargs=VIT_B_16),
        "mask_config": SubConfigSpec(config_class=MaskProposalConfig, init_kwargs=RESNET_101C),
    }

    clip_config: dict[str, Any] | PreTrainedConfig | None = None
    mask_config: dict[str, Any] | PreTrainedConfig | None = None
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
    heatmap_layers: int = 1
    heatmap_heads: int = 8
    heatmap_attention_heads: int = 8
    heatmap_feedforward_size: int = 1024
    heatmap_dropout: float | int = 0.1
    temperature: float | int = 100.0
    training_stage: Literal["segmentation", "proposals"] = "segmentation"
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

    def severance_of_blocks(self) -> list[str]:
        """What each of CLIP's blocks does: "none" or a kind of severance."""
        depth = self.clip_config.vision_config.num_hidden_layers
        kinds = [self.severance] * len(self.severed_layers) if isinstance(self.severance, str) else self.severance
        chosen = {layer % depth: kind for layer, kind in zip(self.severed_layers, kinds, strict=True)}
        return [chosen.get(block, "none") for block in range(depth)]
