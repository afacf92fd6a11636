"""What each of DeOP's three training stages trains, the text prompt, the proposals, anchors with all prompts; and on
what."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...losses import Prediction, sum_losses
from ...modeling_outputs import OpenVocabularySegmentationOutput
from .configuration_deop import DeOPConfig
from .stage_losses import fill_outside, region_features, region_losses

if TYPE_CHECKING:
    from .modeling_deop import DeOPImageState


class TrainingStagesMixin:
    """The part of the model that knows about `training_stage`."""

    config: DeOPConfig
    _parts_of_stages = {
        "prompt": {"prompts": (r"^text_prompt\.",)},
        "proposals": {
            "adapter": (r"^proposal_network\.(?!backbone\.)", "^no_object_embedding$"),
            "prompts": (r"^proposal_network\.query_decoder\.query_embedding\.", "^no_object_embedding$"),
            "attention": (r"^proposal_network\..*\.[qv]_proj\.weight$",),
            "lora": (r"^proposal_network\..*\.[qv]_proj$",),
        },
        "segmentation": {
            "adapter": (r"^heatmap_decoder\.", r"^visual_prompts\.", "^no_object_embedding$"),
            "prompts": (r"^visual_prompts\.", r"^text_prompt\.", r"^heatmap_decoder\.query_", "^no_object_embedding$"),
            "attention": (r"^clip\.vision_model\..*\.[qv]_proj\.weight$",),
            "lora": (r"^clip\.vision_model\..*\.[qv]_proj$",),
        },
    }

    def freeze_pretrained(self) -> None:
        """CLIP and SAM are always frozen; `training_stage` says what of the rest is trained."""
        stage = self.config.training_stage
        self.requires_grad_(stage == "segmentation")
        for part in (self.clip, self.sam, self.proposal_network):
            if part is not None:
                part.requires_grad_(False)
        self.no_object_embedding.requires_grad_(stage != "prompt" and self.config.proposals != "none")
        if stage == "proposals":
            self.proposal_network.requires_grad_(True)
            self.proposal_network.backbone.freeze()
        if self.text_prompt is not None:
            own = stage == "segmentation" and self.config.train_text_prompt
            self.text_prompt.requires_grad_(own or stage == "prompt")

    @property
    def trainable_parts(self) -> dict[str, tuple[str, ...]]:
        """Those of the configured stage."""
        return self._parts_of_stages[self.config.training_stage]

    @property
    def unread_parameters(self) -> tuple[str, ...]:
        """What plays no role in the configured stage; severed blocks compare no queries with keys."""
        stage = self.config.training_stage
        if stage == "prompt":
            return (r"^(?!clip\.|text_prompt\.)", r"^clip\.logit_scale$")
        if stage == "proposals":
            return (r"^clip\.(vision_model|visual_projection|logit_scale)", "^(visual_prompts|heatmap_decoder|sam)")
        severed = enumerate(self.config.severance_of_blocks())
        blocks = "|".join(str(index) for index, kind in severed if kind != "none" and self.config.severance_alpha == 1)
        released = (r"\.embedding_head\.", r"\.value_projection\.", r"^heatmap_decoder\.layernorm\.")
        whole = (r"^clip\.logit_scale$", r"^sam\.", *released)
        return (*whole, rf"^clip\.vision_model\.encoder\.layers\.({blocks})\.self_attn\.[qk]_proj") if blocks else whole

    def _classify_regions(
        self, pixel_values: torch.Tensor, text_embeds: torch.Tensor, labels: torch.Tensor
    ) -> OpenVocabularySegmentationOutput:
        """The first training stage: each picture shows one region, the pixels with a label."""
        features = region_features(self.clip, fill_outside(pixel_values, labels))
        losses = region_losses(self.config, features, text_embeds, labels)
        return OpenVocabularySegmentationOutput(loss=sum_losses(losses), loss_dict=losses)

    def predictions(self, state: DeOPImageState, text_embeds: torch.Tensor) -> list[Prediction]:
        """What the second stage's criterion takes: the last decoder layer, then the others from the first on."""
        *auxiliary, last = state.all_proposals
        return [
            Prediction(suffix, self.class_logits(p.embeddings, text_embeds), p.mask_logits)
            for suffix, p in [("", last), *((f"_{i}", p) for i, p in enumerate(auxiliary))]
        ]
