"""DeOP: all proposals classified from one pass of CLIP with severed patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import interpolate, normalize
from transformers import initialization as init

from ...layers.heatmaps import HeatmapDecoder, pool_by_masks
from ...layers.initialization import init_torch_defaults
from ...layers.learned_prompts import LearnedPrompt
from ...layers.maskformer import MaskProposalNetwork, MaskProposals, init_mask_proposal_weights
from ...losses import MaskClassificationCriterion, Prediction, global_mean_of_processes, sum_losses
from ...modeling_base import OpenVocabularySegmentationModel
from ...modeling_outputs import ImageState, OpenVocabularySegmentationOutput
from .configuration_deop import DeOPConfig
from .severed_clip import PromptTable, VisualPrompts, severed_clip_tokens

# the original clamps probabilities before the logarithm of its focal loss
FOCAL_ALPHA, FOCAL_GAMMA, FOCAL_EPSILON = 0.25, 2.0, 1e-4


@dataclass
class DeOPImageState(ImageState):
    """Proposals and their embeddings in CLIP's space.

    Args:
        mask_logits: `[B, N, h, w]`.
        segment_embeds: `[B, N, D]`, L2-normalised; None while the proposals are trained.
        proposals: of all decoder layers, while the proposals are trained.
    """

    mask_logits: torch.Tensor | None = None
    segment_embeds: torch.Tensor | None = None
    proposals: list[MaskProposals] | None = None


class DeOPForOpenVocabularySegmentation(OpenVocabularySegmentationModel):
    """DeOP (Han et al., 2023). `maps`: "heatmaps" `[B, heads, N, gh, gw]` and "clip_map" `[B, D, gh, gw]`."""

    config: DeOPConfig
    _no_split_modules = ["CLIPEncoderLayer", "Bottleneck", "SwinStage", "MaskFormerDetrDecoderLayer"]

    def __init__(self, config: DeOPConfig) -> None:
        super().__init__(config)
        size = config.clip_config.projection_dim
        self.clip = self.build_clip(config)
        self.proposal_network = MaskProposalNetwork(config.mask_config, size)
        self.visual_prompts = VisualPrompts(config)
        self.no_object_embedding = nn.Parameter(torch.zeros(1, size))
        self.text_prompt = None
        if config.num_context_vectors:
            text_width = config.clip_config.text_config.hidden_size
            self.text_prompt = LearnedPrompt(config.num_context_vectors, text_width, config.dot_token_id)
        self.heatmap_decoder = None
        if config.pooling == "heatmap":
            self.heatmap_decoder = HeatmapDecoder(
                size,
                config.mask_config.num_queries,
                config.heatmap_layers,
                config.heatmap_attention_heads,
                config.heatmap_heads,
                config.heatmap_feedforward_size,
                config.heatmap_dropout,
                config._attn_implementation,
            )
        # the matching of the second stage ignores classes
        self.criterion = MaskClassificationCriterion(
            costs={"class": 0.0, "mask": config.proposal_mask_weight, "dice": config.proposal_dice_weight},
            weights={
                "ce": config.proposal_class_weight,
                "mask": config.proposal_mask_weight,
                "dice": config.proposal_dice_weight,
            },
            mask_loss="focal",
            no_object_weight=config.no_object_weight,
            normalise_per_process=config.normalise_per_process,
        )
        self.post_init()
        self.freeze_pretrained()

    def freeze_pretrained(self) -> None:
        """CLIP is always frozen; `training_stage` says what of the rest is trained."""
        segmentation = self.config.training_stage == "segmentation"
        self.requires_grad_(segmentation)
        self.clip.requires_grad_(False)
        self.proposal_network.requires_grad_(not segmentation)
        self.no_object_embedding.requires_grad_(True)
        if not segmentation:
            self.proposal_network.backbone.freeze()
        if self.text_prompt is not None:
            self.text_prompt.requires_grad_(segmentation and self.config.train_text_prompt)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_mask_proposal_weights(module)
        if isinstance(module, PromptTable):
            init.normal_(module.embedding, std=module.embedding.shape[-1] ** -0.5)
        elif isinstance(module, VisualPrompts) and module.tokens is not None:
            init.normal_(module.tokens, std=module.tokens.shape[-1] ** -0.5)
        elif isinstance(module, LearnedPrompt):
            init.normal_(module.context, std=0.02)
        elif isinstance(module, HeatmapDecoder):
            self._init_heatmap_decoder(module)
        elif module is self:
            init.normal_(self.no_object_embedding, std=self.no_object_embedding.shape[-1] ** -0.5)

    @staticmethod
    def _init_heatmap_decoder(decoder: HeatmapDecoder) -> None:
        """The framework's defaults, as in the original: Xavier for attention, PyTorch's own for the rest."""
        init.normal_(decoder.query_embedding.weight)
        for name, part in decoder.named_modules():
            if isinstance(part, nn.Linear) and ("attn" in name or "_projection" in name):
                init.xavier_uniform_(part.weight)
                init.zeros_(part.bias)
            elif isinstance(part, nn.Linear):
                init_torch_defaults(part)

    # ------------------------------------------------------------------ text side

    def _text_parameters(self) -> list[nn.Parameter]:
        own = [] if self.text_prompt is None else [self.text_prompt.context]
        return super()._text_parameters() + own

    def _text_features(self, input_ids: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        if self.text_prompt is None:
            return super()._text_features(input_ids, ends)
        return self.text_prompt.encode(*self.text_tower, input_ids, ends)

    # ------------------------------------------------------------------ picture side

    def _encode_image(
        self, pixel_values: torch.Tensor, *, for_training: bool, output_maps: bool = False, **unused: Any
    ) -> DeOPImageState:
        if for_training and self.config.training_stage == "proposals":
            proposals = self.proposal_network(pixel_values, all_layers=True)
            return DeOPImageState(mask_logits=proposals[-1].mask_logits, proposals=proposals)
        (proposals,) = self.proposal_network(pixel_values)
        features = self.clip_map(pixel_values, proposals.mask_logits)
        masks = on_grid(proposals.mask_logits.sigmoid(), features.shape[-2:])
        state = DeOPImageState(mask_logits=proposals.mask_logits)
        if self.heatmap_decoder is None:
            embeds, heatmaps = pool_by_masks(features.flatten(2).transpose(1, 2), masks.flatten(2)), masks[:, None]
        else:
            anchors = self.heatmap_decoder(features, masks)
            embeds, heatmaps = anchors.embeddings, anchors.heatmaps.unflatten(-1, features.shape[-2:])
        state.segment_embeds = normalize(embeds, dim=-1)
        state.maps = {"heatmaps": heatmaps, "clip_map": features} if output_maps else None
        return state

    def clip_map(
        self, pixel_values: torch.Tensor, mask_logits: torch.Tensor, kinds: list[str] | None = None
    ) -> torch.Tensor:
        """CLIP's L2-normalised feature of each patch, `[B, D, gh, gw]`.

        Args:
            mask_logits: `[B, N, h, w]` of the proposals, at any resolution.
            kinds: what each of CLIP's blocks does; None: as the config says.
        """
        vision = self.clip.vision_model
        patch_size = vision.config.patch_size
        grid = (pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size)
        masks = on_grid(mask_logits, grid).sigmoid()
        states, grid, leading = severed_clip_tokens(
            vision, self.visual_prompts, self.config, pixel_values, masks, kinds
        )
        patches = self.clip.visual_projection(vision.post_layernorm(states[-1][:, leading:]))
        return normalize(patches, dim=-1).transpose(1, 2).unflatten(2, grid)

    # ------------------------------------------------------------------ classes and losses

    def class_logits(self, embeddings: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """`[B, N, K+1]` of embeddings `[B, N, D]`; "no object" is the last column."""
        classifier = torch.cat([text_embeds, self.no_object_embedding.to(text_embeds.dtype)])
        return self.config.temperature * normalize(embeddings, dim=-1) @ normalize(classifier, dim=-1).T

    def _segment(
        self,
        state: DeOPImageState,
        text_embeds: torch.Tensor,
        labels: torch.Tensor | None,
        *,
        sample_seeds: torch.Tensor | None = None,
        **options: Any,
    ) -> OpenVocabularySegmentationOutput:
        embeddings = state.segment_embeds if state.proposals is None else state.proposals[-1].embeddings
        class_logits = self.class_logits(embeddings, text_embeds)
        outputs = OpenVocabularySegmentationOutput(
            class_queries_logits=class_logits,
            masks_queries_logits=state.mask_logits,
            class_queries_scores=class_logits.float().softmax(dim=-1)[..., :-1],
        )
        if labels is not None:
            labels = labels.to(self.device)
            if state.proposals is None:
                outputs.loss_dict = self._map_losses(class_logits, state.mask_logits, labels)
            else:
                predictions = self.predictions(state, text_embeds)
                outputs.loss_dict = self.criterion(predictions, labels, self.draws(sample_seeds, len(labels)))
            outputs.loss = sum_losses(outputs.loss_dict)
        return outputs

    def predictions(self, state: DeOPImageState, text_embeds: torch.Tensor) -> list[Prediction]:
        """What the second stage's criterion takes: the last decoder layer, then the others from the first on."""
        *auxiliary, last = state.proposals
        return [
            Prediction(suffix, self.class_logits(p.embeddings, text_embeds), p.mask_logits)
            for suffix, p in [("", last), *((f"_{i}", p) for i, p in enumerate(auxiliary))]
        ]

    def _map_losses(
        self, class_logits: torch.Tensor, mask_logits: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Focal and dice losses on the map that all proposals make together (the third stage)."""
        size = labels.shape[-2:]
        masks = interpolate(mask_logits.float(), size=size, mode="bilinear", align_corners=False).sigmoid()
        fused = torch.einsum("bnk,bnhw->bkhw", class_logits.float().softmax(dim=-1), masks)
        scale = self.config.map_scale
        probability = (scale * fused - scale).sigmoid()
        no_object = class_logits.shape[-1] - 1
        known = labels >= 0
        wanted = torch.where(known, labels, no_object)
        target = torch.zeros_like(probability).scatter_(1, wanted[:, None], 1.0)
        counted = torch.ones_like(known) if self.config.ignore_as_no_object else known
        hit = probability * target + (1 - probability) * (1 - target)
        share = FOCAL_ALPHA * target + (1 - FOCAL_ALPHA) * (1 - target)
        focal = -share * (1 - hit) ** FOCAL_GAMMA * hit.clamp(FOCAL_EPSILON, 1 - FOCAL_EPSILON).log()
        focal = (focal * counted[:, None]).sum()
        count = global_mean_of_processes(counted.sum().float() * target.shape[1]).clamp(min=1)
        classes, classes_target = probability[:, :-1], target[:, :-1]
        if not self.config.ignore_as_no_object:
            classes = classes * known[:, None]
        overlap = 2 * (classes * classes_target).sum(dim=(1, 2, 3)) + 1
        dice = 1 - overlap / (classes.sum(dim=(1, 2, 3)) + classes_target.sum(dim=(1, 2, 3)) + 1)
        return {
            "loss_ce": self.config.focal_weight * focal / count,
            "loss_decoder_dice": self.config.dice_weight * dice.mean(),
        }


def on_grid(masks: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Bilinear resize of `[B, N, h, w]` to CLIP's patch grid."""
    return interpolate(masks.float(), size=tuple(grid), mode="bilinear", align_corners=False).to(masks.dtype)


__all__ = ["DeOPForOpenVocabularySegmentation", "DeOPImageState"]
