"""DeOP: all proposals classified from one pass of CLIP with severed patches."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel
from transformers import initialization as init

from ...conversion_maskformer import load_backbone_weights
from ...layers.correlation import correlation
from ...layers.cosine_classifier import cosine_logits
from ...layers.heatmaps import ConvolutionalHeatmapDecoder, HeatmapDecoder, init_heatmap_weights, pool_by_masks
from ...layers.learned_prompts import LearnedPrompt, LearnedPromptMixin
from ...layers.maskformer import MaskProposalNetwork, MaskProposals, init_mask_proposal_weights
from ...layers.picture_stretching import stretch_pictures
from ...layers.sam_vision_attention import replace_sam_attention
from ...layers.sliding_window import encode_each, split_pictures, view_boxes
from ...layers.sub_models import build_sub_model
from ...losses import MaskClassificationCriterion, sum_losses
from ...modeling_base import OpenVocabularySegmentationModel
from ...modeling_outputs import ImageState, OpenVocabularySegmentationOutput
from .configuration_deop import DeOPConfig
from .plain_clip import TrainingFreeMixin
from .proposals import given_proposals, sam_proposals
from .severed_clip import PromptTable, SeveredClipMixin, VisualPrompts
from .stage_losses import fused_map_losses
from .training_stages import TrainingStagesMixin


@dataclass
class DeOPImageState(ImageState):
    """Proposals and their embeddings in CLIP's space.

    Args:
        mask_logits: `[B, N, h, w]`; None without proposals.
        segment_embeds: `[B, N, D]` float32, L2-normalised; None while the proposals are trained.
        valid: bool `[B, N]`: which proposals are there; None: all.
        clip_map: `[B, D, gh, gw]`, L2-normalised, where patches are classified.
        all_proposals: of all decoder layers, while the proposals are trained.
        pixel_values: while the text prompt is trained.
    """

    mask_logits: torch.Tensor | None = None
    segment_embeds: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    clip_map: torch.Tensor | None = None
    all_proposals: list[MaskProposals] | None = None
    pixel_values: torch.Tensor | None = None


class DeOPForOpenVocabularySegmentation(
    SeveredClipMixin, TrainingFreeMixin, TrainingStagesMixin, LearnedPromptMixin, OpenVocabularySegmentationModel
):
    """DeOP (Han et al., 2023). `maps`: "heatmaps" `[B, heads, N, gh, gw]` and "clip_map" `[B, D, gh, gw]`.

    With `proposals="none"` the outputs are `logits` `[B, K, gh, gw]`, 100 x the cosine of each patch, to be softmaxed.

    Switches: `sliding_window`, and `proposals`: another way than the configuration's, "none", or masks of your own over
    `pixel_values`, of any resolution: `[B, N, h, w]`, bool or float logits.
    """

    config: DeOPConfig
    picture_switches = frozenset({"proposals", "sliding_window"})
    sees_padding = True
    _no_split_modules = ["CLIPEncoderLayer", "Bottleneck", "SwinStage", "MaskFormerDetrDecoderLayer"]

    def __init__(self, config: DeOPConfig) -> None:
        super().__init__(config)
        size = config.clip_config.projection_dim
        self.clip = self.build_clip(config)
        self.proposal_network = self.sam = None
        if config.proposals == "maskformer":
            self.proposal_network = MaskProposalNetwork(config.mask_config, size)
        elif config.proposals == "sam":
            from transformers import SamModel

            self.sam = build_sub_model(SamModel, config.sam_config)
            replace_sam_attention(self.sam)
        self.visual_prompts = VisualPrompts(config)
        self.no_object_embedding = nn.Parameter(torch.zeros(1, size))
        self.text_prompt = None
        if config.num_context_vectors:
            text_width = config.clip_config.text_config.hidden_size
            self.text_prompt = LearnedPrompt(config.num_context_vectors, text_width, config.dot_token_id)
        self.heatmap_decoder = self._build_heatmap_decoder() if config.pooling == "heatmap" else None
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

    def _build_heatmap_decoder(self) -> HeatmapDecoder | ConvolutionalHeatmapDecoder:
        config, size = self.config, self.config.clip_config.projection_dim
        if config.heatmap_decoder == "convolution":
            return ConvolutionalHeatmapDecoder(
                size,
                config.num_queries,
                config.heatmap_layers,
                config.heatmap_heads,
                config.heatmap_feedforward_size,
                config.heatmap_kernel_size,
                config.heatmap_dropout,
            )
        return HeatmapDecoder(
            size,
            config.num_queries,
            config.heatmap_layers,
            config.heatmap_attention_heads,
            config.heatmap_heads,
            config.heatmap_feedforward_size,
            config.heatmap_dropout,
            config,
        )

    @classmethod
    def config_for_clip(cls, clip_config: CLIPConfig) -> dict[str, Any]:
        """The released prompt layers, as far as CLIP has them."""
        depth = clip_config.vision_config.num_hidden_layers
        return {"visual_prompt_layers": [layer for layer in DeOPConfig.visual_prompt_layers if layer < depth]}

    @classmethod
    def from_clip(
        cls, clip: str | os.PathLike | CLIPModel, backbone: str | os.PathLike | None = None, **config: Any
    ) -> DeOPForOpenVocabularySegmentation:
        """An untrained model around a trained CLIP and, if given, a backbone trained on ImageNet.

        Args:
            clip: a Hub id or folder of a `CLIPModel`, or the model itself.
            backbone: see `conversion_maskformer.load_backbone_weights`.
            config: values for the configuration.
        """
        model = super().from_clip(clip, **config)
        if backbone is not None:
            load_backbone_weights(model.proposal_network, backbone)
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_mask_proposal_weights(module)
        init_heatmap_weights(module)
        if isinstance(module, PromptTable):
            init.normal_(module.embedding, std=module.embedding.shape[-1] ** -0.5)
        elif isinstance(module, VisualPrompts) and module.tokens is not None:
            init.normal_(module.tokens, std=module.tokens.shape[-1] ** -0.5)
        elif isinstance(module, LearnedPrompt):
            init.normal_(module.context, std=0.02)
        elif module is self:
            # zero without training: a cosine of 0, below that of any class that is there
            trained = self.proposal_network is not None
            std = self.no_object_embedding.shape[-1] ** -0.5 if trained else 0.0
            init.normal_(self.no_object_embedding, std=std)

    # ------------------------------------------------------------------ picture side

    @property
    def encodes_alone(self) -> bool:
        """False with SAM: pictures have different numbers of masks."""
        return self.sam is None

    def _encode_image(
        self,
        pixel_values: torch.Tensor,
        *,
        for_training: bool,
        reshaped_input_sizes: torch.Tensor,
        proposals: str | torch.Tensor = "maskformer",
        sliding_window: bool = False,
        output_maps: bool = False,
        **unused: Any,
    ) -> DeOPImageState:
        config, patch_size = self.config, self.config.clip_config.vision_config.patch_size
        if min(pixel_values.shape[-2:]) < patch_size:
            raise ValueError(
                f"pixel_values of {pixel_values.shape[-2]} x {pixel_values.shape[-1]} pixels are too small: CLIP needs "
                f"at least one patch of {patch_size}."
            )
        if for_training and config.training_stage == "prompt":
            return DeOPImageState(pixel_values=pixel_values)
        if for_training and config.training_stage == "proposals":
            layers = self.proposal_network(pixel_values, all_layers=True)
            return DeOPImageState(mask_logits=layers[-1].mask_logits, all_proposals=layers)
        state = DeOPImageState()
        if sliding_window:
            canvas = (config.canvas_pixels, config.canvas_pixels)
            geometry = (canvas, config.window_pixels, config.window_stride, config.global_view)
            return self._encode_views(pixel_values, reshaped_input_sizes, geometry, proposals, output_maps)
        if isinstance(proposals, str) and proposals == "none":
            return self._classify_patches(state, pixel_values, reshaped_input_sizes, output_maps)
        state.mask_logits, state.valid = self._propose(pixel_values, reshaped_input_sizes, proposals)
        features = self.clip_map(pixel_values, state.mask_logits)
        # float32: of an empty mask float16 has nothing but zeros, whose mean has no direction
        masks = self._on_grid(state.mask_logits.float().sigmoid(), features.shape[-2:])
        if self.heatmap_decoder is None:
            embeds, heatmaps = pool_by_masks(features.flatten(2).transpose(1, 2), masks.flatten(2)), masks[:, None]
        else:
            if masks.shape[1] != config.num_queries:
                raise ValueError(
                    f"{masks.shape[1]} proposals, but this model has learned one anchor query for each of MaskFormer's "
                    f'{config.num_queries} (pooling="heatmap"); other masks need a model with pooling="mask".'
                )
            anchors = self.heatmap_decoder(features, masks)
            embeds, heatmaps = anchors.embeddings, anchors.heatmaps.unflatten(-1, features.shape[-2:])
        state.segment_embeds = normalize(embeds, dim=-1)
        state.maps = {"heatmaps": heatmaps, "clip_map": features} if output_maps else None
        return state

    def _encode_views(
        self,
        pixel_values: torch.Tensor,
        sizes: torch.Tensor,
        geometry: tuple[tuple[int, int], int, int, bool],
        proposals: str | torch.Tensor,
        output_maps: bool,
    ) -> DeOPImageState:
        """The sliding window's views; given `proposals` have a row for each of them."""
        of_views = itertools.repeat(proposals)
        if isinstance(proposals, torch.Tensor):
            views = len(view_boxes(*geometry))
            rows = len(pixel_values) * views
            if len(proposals) != rows:
                raise ValueError(
                    f"proposals must be masks [{rows}, N, h, w], a row for each of {len(pixel_values)} picture(s) x "
                    f"{views} views; got {list(proposals.shape)}."
                )
            of_views = iter(proposals.split(1))
        return encode_each(
            lambda view, **options: self._encode_image(view, proposals=next(of_views), **options),
            split_pictures(pixel_values, sizes),
            *geometry,
            for_training=False,
            output_maps=output_maps,
        )

    def _classify_patches(
        self, state: DeOPImageState, pixel_values: torch.Tensor, sizes: torch.Tensor, output_maps: bool
    ) -> DeOPImageState:
        """Without proposals: CLIP's map of the picture alone, stretched to whole patches, so that the map covers it."""
        patch_size = self.config.clip_config.vision_config.patch_size
        size = tuple(side // patch_size * patch_size for side in pixel_values.shape[-2:])
        state.clip_map = self.clip_map(stretch_pictures(pixel_values, sizes, size), None)
        state.maps = {"clip_map": state.clip_map} if output_maps else None
        return state

    def _propose(
        self, pixel_values: torch.Tensor, sizes: torch.Tensor, proposals: str | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mask logits `[B, N, h, w]` over `pixel_values`, and which of them are there."""
        if isinstance(proposals, torch.Tensor):
            return given_proposals(proposals, pixel_values)
        if proposals == "maskformer" and self.proposal_network is not None:
            return self.proposal_network(pixel_values)[-1].mask_logits, None
        if proposals == "sam" and self.sam is not None:
            return sam_proposals(self.sam, self.config, pixel_values, sizes)
        raise ValueError(
            f"proposals={proposals!r}: this model was made with proposals={self.config.proposals!r}. Give that, "
            f'"none", or a tensor of masks [B, N, h, w].'
        )

    # ------------------------------------------------------------------ classes and losses

    def class_logits(self, embeddings: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """`[B, N, K+1]` float32 of embeddings `[B, N, D]`; "no object" is the last column."""
        return cosine_logits(embeddings, text_embeds, self.no_object_embedding, self.config.temperature)

    def _segment(
        self,
        state: DeOPImageState,
        text_embeds: torch.Tensor,
        labels: torch.Tensor | None,
        *,
        sample_seeds: torch.Tensor | None = None,
        **options: Any,
    ) -> OpenVocabularySegmentationOutput:
        if state.pixel_values is not None:
            return self._classify_regions(state.pixel_values, text_embeds, labels)
        if state.clip_map is not None:
            if labels is not None:
                raise ValueError('proposals="none" is a model without training: there is no loss. Leave labels out.')
            logits = self.config.temperature * correlation(state.clip_map, text_embeds[:, None])[:, :, 0]
            return OpenVocabularySegmentationOutput(logits=logits, score_function="softmax")
        layers = state.all_proposals
        class_logits = self.class_logits(state.segment_embeds if layers is None else layers[-1].embeddings, text_embeds)
        scores = class_logits.float().softmax(dim=-1)[..., :-1]
        outputs = OpenVocabularySegmentationOutput(
            class_queries_logits=class_logits,
            masks_queries_logits=state.mask_logits,
            class_queries_scores=scores if state.valid is None else scores * state.valid[..., None],
        )
        if labels is not None:
            if layers is None:
                outputs.loss_dict = fused_map_losses(self.config, class_logits, state.mask_logits, labels)
            else:
                predictions = self.predictions(state, text_embeds)
                outputs.loss_dict = self.criterion(predictions, labels, self.draws(sample_seeds, len(labels)))
            outputs.loss = sum_losses(outputs.loss_dict)
        return outputs


__all__ = ["DeOPForOpenVocabularySegmentation", "DeOPImageState"]
