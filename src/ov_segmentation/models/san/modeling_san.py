"""SAN: Side Adapter Network for Open-Vocabulary Semantic Segmentation (Xu et al., CVPR 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import interpolate, normalize
from transformers import CLIPConfig
from transformers import initialization as init

from ...layers.clip_vision import embed_patches, run_blocks
from ...layers.mlp import MLP
from ...layers.sliding_window import encode_each, split_pictures
from ...losses import MaskClassificationCriterion, Prediction, sum_losses
from ...modeling_base import OpenVocabularySegmentationModel
from ...modeling_outputs import ImageState, OpenVocabularySegmentationOutput
from .configuration_san import SANConfig
from .recognition import MaskRecognition, pool_bias
from .side_adapter import FusionLayer, ProposalDecoder, SideAdapterNetwork, SideBlock


@dataclass
class SANImageState(ImageState):
    """A picture batch after SAN's picture side: class logits are one product away.

    Args:
        masks_queries_logits: `[B, N, h, w]` on the side network's grid.
        mask_embeds: `[B, N, D]`, L2-normalised, in the space of the text embeddings, float32.
        auxiliary: (mask logits, mask embeddings) of the other supervised depths, in training.
    """

    masks_queries_logits: torch.Tensor | None = None
    mask_embeds: torch.Tensor | None = None
    auxiliary: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None = None


class SANForOpenVocabularySegmentation(OpenVocabularySegmentationModel):
    """Mask proposals of a side network, recognised by CLIP's last blocks under the side network's attention biases.

    On request: `hidden_states` are the side network's tokens `[B, N + h*w, C]` before its first block and after each;
    `attentions` the SLS tokens' weights `[B, heads, N, L + N]` in each recognition block (keys: CLIP's visual tokens,
    then the SLS tokens); `maps` holds "attention_bias" `[B, layers, heads, N, h, w]` on the side network's grid.
    """

    config: SANConfig
    _no_split_modules = ["SideBlock", "CLIPEncoderLayer"]
    picture_switches = frozenset({"sliding_window"})
    sees_padding = True
    trainable_parts = {
        "adapter": (r"^side_adapter\.", "^background_embedding$"),
        "prompts": (r"^side_adapter\.query_", "^background_embedding$"),
        "attention": (r"^clip\.vision_model\..*\.[qv]_proj\.weight$",),
        "lora": (r"^clip\.vision_model\..*\.[qv]_proj$",),
    }

    def __init__(self, config: SANConfig) -> None:
        super().__init__(config)
        self.clip = self.build_clip(config)
        self.side_adapter = SideAdapterNetwork(config)
        self.recognition = MaskRecognition()
        self.background_embedding = nn.Parameter(torch.empty(1, config.clip_config.projection_dim))
        self.criterion = MaskClassificationCriterion(
            costs={"class": config.class_weight, "mask": config.mask_weight, "dice": config.dice_weight},
            weights={"ce": config.class_weight, "mask": config.mask_weight, "dice": config.dice_weight},
            num_points=config.num_points,
            oversample_ratio=config.oversample_ratio,
            importance_sample_ratio=config.importance_sample_ratio,
            no_object_weight=config.no_object_weight,
            normalise_per_process=config.normalise_per_process,
        )
        self.post_init()
        self.freeze_pretrained()

    @classmethod
    def config_for_clip(cls, clip_config: CLIPConfig) -> dict[str, Any]:
        """Three quarters of CLIP's blocks give features, the rest recognises; patches of 14 see 0.7 of the picture."""
        vision = clip_config.vision_config
        features = max(1, vision.num_hidden_layers * 3 // 4)
        return {
            "num_feature_layers": features,
            "num_recognition_layers": max(1, vision.num_hidden_layers - features),
            "clip_input_scale": 0.7 if vision.patch_size == 14 else 0.5,
        }

    def freeze_pretrained(self) -> None:
        """CLIP is frozen, but for its position embedding (`train_clip_position_embedding`) or with `train_clip`."""
        self.clip.requires_grad_(self.config.train_clip)
        positions = self.clip.vision_model.embeddings.position_embedding
        positions.requires_grad_(self.config.train_clip or self.config.train_clip_position_embedding)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (SideAdapterNetwork, SideBlock, FusionLayer, ProposalDecoder, MLP)):
            module.init_weights()
        elif isinstance(module, SANForOpenVocabularySegmentation):
            init.normal_(module.background_embedding, std=module.background_embedding.shape[-1] ** -0.5)

    # ------------------------------------------------------------------ picture side

    def clip_input(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """CLIP's smaller version of `pixel_values` `[B, 3, H, W]`.

        The scale factor is passed, not a size: the sampling grid follows the factor where the size is rounded down, as
        in the original.
        """
        scale = float(self.config.clip_input_scale)
        height, width = pixel_values.shape[-2:]
        least = (self.config.side_patch_size, self.config.clip_config.vision_config.patch_size / scale)
        if min(height, width) < max(least):
            raise ValueError(
                f"pixel_values of {height} x {width} pixels are too small: {type(self).__name__} needs at least "
                f"{max(least):g} (one patch of the side network, and one of CLIP at clip_input_scale {scale:g})."
            )
        if scale == 1:
            return pixel_values
        shrunk = interpolate(pixel_values.float(), scale_factor=scale, mode="bilinear", align_corners=False)
        return shrunk.to(pixel_values.dtype)

    def _encode_image(
        self,
        pixel_values: torch.Tensor,
        *,
        for_training: bool,
        reshaped_input_sizes: torch.Tensor,
        sliding_window: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_maps: bool = False,
        **unused: Any,
    ) -> SANImageState:
        config = self.config
        state = SANImageState()
        if sliding_window:
            canvas = (config.canvas_pixels, config.canvas_pixels)
            geometry = (canvas, config.window_pixels, config.window_stride, config.global_view)
            return encode_each(
                self._encode_image,
                split_pictures(pixel_values, reshaped_input_sizes),
                *geometry,
                for_training=for_training,
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
                output_maps=output_maps,
            )
        tokens, clip_grid = embed_patches(self.clip.vision_model, self.clip_input(pixel_values))
        blocks = self.clip.vision_model.encoder.layers
        first = len(blocks) - config.num_recognition_layers
        last_needed = max([first, *(clip_layer for clip_layer, _ in config.fusion_map)])
        clip_states = run_blocks(blocks[:last_needed], tokens)
        supervised = list(config.deep_supervision_layers) if for_training else [config.side_num_layers]
        features, grid, hidden_states = self.side_adapter(pixel_values, clip_states, clip_grid, supervised)
        proposals = [self.side_adapter.decoder(depth, grid) for depth in features]
        # queries of all depths go through CLIP together: SLS tokens do not see each other
        bias = torch.cat([pool_bias(depth.attention_bias, clip_grid) for depth in proposals], dim=3)
        form = "cross" if output_attentions else config.recognition_attention
        vision = self.clip.vision_model
        sls, attentions = self.recognition(vision, clip_states[first], bias, config.num_recognition_layers, form)
        # float32: logits are a hundred times these, which half precision would blur
        embeds = normalize(self.clip.visual_projection(sls).float(), dim=-1).split(config.num_queries, dim=1)
        *auxiliary, (masks, embed) = zip((depth.mask_logits for depth in proposals), embeds, strict=True)
        state.masks_queries_logits, state.mask_embeds = masks, embed
        state.auxiliary = tuple(auxiliary) or None
        state.hidden_states = tuple(hidden_states) if output_hidden_states else None
        state.attentions = tuple(w[:, :, -config.num_queries :] for w in attentions) if output_attentions else None
        state.maps = {"attention_bias": proposals[-1].attention_bias} if output_maps else None
        return state

    # ------------------------------------------------------------------ classes

    def classifier(self, text_embeds: torch.Tensor) -> torch.Tensor:
        """Multiplied with mask embeddings: class embeddings `[K, D]` and "no object", scaled: float32 `[K+1, D]`."""
        rows = torch.cat([text_embeds.float(), self.background_embedding.to(text_embeds.device, torch.float32)])
        return self.clip.logit_scale.float().exp().to(rows.device) * normalize(rows, dim=-1)

    def _segment(
        self,
        state: SANImageState,
        text_embeds: torch.Tensor,
        labels: torch.Tensor | None,
        *,
        sample_seeds: torch.Tensor | None = None,
        **options: Any,
    ) -> OpenVocabularySegmentationOutput:
        class_logits = state.mask_embeds @ self.classifier(text_embeds).T
        outputs = OpenVocabularySegmentationOutput(
            class_queries_logits=class_logits,
            masks_queries_logits=state.masks_queries_logits,
            class_queries_scores=class_logits.float().softmax(dim=-1)[..., :-1],
        )
        if labels is not None:
            predictions = self.predictions(state, text_embeds)
            outputs.loss_dict = self.criterion(predictions, labels, self.draws(sample_seeds, len(labels)))
            outputs.loss = sum_losses(outputs.loss_dict)
        return outputs

    def predictions(self, state: SANImageState, text_embeds: torch.Tensor) -> list[Prediction]:
        """What the criterion takes: the output, then the auxiliary depths from shallow to deep ("_0", "_1", ...)."""
        classifier = self.classifier(text_embeds)
        depths = [(state.masks_queries_logits, state.mask_embeds), *(state.auxiliary or ())]
        return [
            Prediction("" if i == 0 else f"_{i - 1}", embeds @ classifier.T, masks)
            for i, (masks, embeds) in enumerate(depths)
        ]


__all__ = ["SANForOpenVocabularySegmentation", "SANImageState"]
