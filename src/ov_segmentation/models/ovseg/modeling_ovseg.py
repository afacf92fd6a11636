"""OVSeg: masks from MaskFormer, classes from a CLIP that has been adapted to masked crops."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import interpolate
from transformers import CLIPConfig, CLIPModel
from transformers import initialization as init

from ...configuration_base import check_positive
from ...conversion_maskformer import load_backbone_weights
from ...layers.cosine_classifier import cosine_logits
from ...layers.learned_prompts import LearnedPrompt, LearnedPromptMixin, read_learned_prompt
from ...layers.mask_prompts import DeepPrompts, MaskPrompts
from ...layers.maskformer import MaskProposalNetwork, MaskProposals, init_mask_proposal_weights
from ...layers.sliding_window import encode_each, split_pictures
from ...losses import MaskClassificationCriterion, Prediction, sum_losses
from ...modeling_base import OpenVocabularySegmentationModel
from ...modeling_outputs import ImageState, OpenVocabularySegmentationOutput
from ...offloading import with_weights_at_hand
from .configuration_ovseg import OVSegConfig, check_ensemble_weight
from .masked_crops import MaskedCropsMixin


@dataclass
class OVSegImageState(ImageState):
    """Proposals and what CLIP sees in them; B counts views where a sliding window is used.

    Args:
        proposal_embeddings: `[B, N, D]`, not normalised.
        mask_logits: `[B, N, h, w]`.
        crop_features: `[B, N, D]` float32, L2-normalised; zero for invalid proposals. None without CLIP's part.
        valid: bool `[B, N]`: proposals with a pixel above the threshold.
        auxiliary: proposals of the layers before the last, for training.
    """

    proposal_embeddings: torch.Tensor | None = None
    mask_logits: torch.Tensor | None = None
    crop_features: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    auxiliary: list[MaskProposals] | None = None


class OVSegForOpenVocabularySegmentation(MaskedCropsMixin, LearnedPromptMixin, OpenVocabularySegmentationModel):
    """OVSeg (Liang et al., 2023); with `prompt_type="none"` SimBaseline (Xu et al., 2022).

    How many crops CLIP sees depends on the picture, which a graph cannot: compile and export with
    `ensemble_weight=None`, the proposals' own classification.

    `maps`: "valid_proposals" bool `[B, N]`, masks that are not empty, and "crop_features" `[B, N, D]`, what CLIP sees
    in them; neither with `ensemble_weight=None`.
    """

    config: OVSegConfig
    switches = frozenset({"ensemble_weight", "class_is_seen"})
    picture_switches = frozenset({"crop_batch_size", "ensemble_weight", "sliding_window"})
    sees_padding = True
    _no_split_modules = ["CLIPEncoderLayer", "SwinStage", "Bottleneck", "MaskFormerDetrDecoderLayer"]
    # CLIP's picture tower and the mask prompts see crops, not the loss: they have a training of their own
    trainable_parts = {
        "adapter": (r"^proposal_network\.(?!backbone\.)", "^no_object_embedding$"),
        "prompts": (r"\.query_embedding\.", "^no_object_embedding$", r"^text_prompt\."),
        "attention": (r"^proposal_network\..*\.[qv]_proj\.weight$",),
        "lora": (r"^proposal_network\..*\.[qv]_proj$",),
    }
    unread_parameters = (r"^clip\.(vision_model|visual_projection|logit_scale)", r"^visual_prompts\.")

    def __init__(self, config: OVSegConfig) -> None:
        super().__init__(config)
        self.clip = self.build_clip(config)
        self.proposal_network = MaskProposalNetwork(config.mask_config, config.clip_config.projection_dim)
        self.no_object_embedding = nn.Parameter(torch.zeros(1, config.clip_config.projection_dim))
        self.visual_prompts = self._build_visual_prompts()
        self.text_prompt = None
        if config.num_context_vectors:
            text_width = config.clip_config.text_config.hidden_size
            self.text_prompt = LearnedPrompt(config.num_context_vectors, text_width, config.dot_token_id)
        weights = {"mask": config.mask_weight, "dice": config.dice_weight}
        self.criterion = MaskClassificationCriterion(
            costs={"class": config.class_weight, **weights},
            weights={"ce": config.class_weight, **weights},
            mask_loss="focal",
            no_object_weight=config.no_object_weight,
            normalise_per_process=config.normalise_per_process,
        )
        self.post_init()
        self.freeze_pretrained()

    @classmethod
    def config_for_clip(cls, clip_config: CLIPConfig) -> dict[str, Any]:
        """Crops have the size that CLIP was trained with; prompts replace patches before at most three blocks."""
        vision = clip_config.vision_config
        return {"crop_size": vision.image_size, "prompt_depth": min(3, vision.num_hidden_layers)}

    @classmethod
    def from_clip(
        cls,
        clip: str | os.PathLike | CLIPModel,
        backbone: str | os.PathLike | None = None,
        text_prompt: str | os.PathLike | None = None,
        **config: Any,
    ) -> OVSegForOpenVocabularySegmentation:
        """An untrained model around a trained CLIP and, if given, a backbone trained on ImageNet.

        Args:
            clip: a Hub id or folder of a `CLIPModel`, or the model itself.
            backbone: see `conversion_maskformer.load_backbone_weights`.
            text_prompt: folder or Hub id of a model with a learned text prompt around the same CLIP (DeOP's first
                training stage learns one): SimBaseline's. It stands in place of templates.
            config: values for the configuration.
        """
        context = None
        if text_prompt is not None:
            context, config["dot_token_id"] = read_learned_prompt(text_prompt)
            config["num_context_vectors"] = len(context)
        model = super().from_clip(clip, **config)
        if context is not None:
            model.load_text_prompt(context)
        if backbone is not None:
            load_backbone_weights(model.proposal_network, backbone)
        return model

    def freeze_pretrained(self) -> None:
        """MaskFormer's part is trained here (section 3.1); CLIP and its prompts have a training of their own."""
        self.requires_grad_(True)
        self.clip.requires_grad_(False)
        for prompt in (self.visual_prompts, self.text_prompt):
            if prompt is not None:
                prompt.requires_grad_(False)
        self.proposal_network.backbone.freeze()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_mask_proposal_weights(module)
        if isinstance(module, (MaskPrompts, DeepPrompts)):
            init.normal_(module.embedding, std=0.02)
        elif isinstance(module, LearnedPrompt):
            init.normal_(module.context, std=0.02)
        elif module is self:
            init.normal_(self.no_object_embedding, std=self.config.clip_config.text_config.hidden_size**-0.5)

    # ------------------------------------------------------------------ picture side

    def _encode_image(
        self,
        pixel_values: torch.Tensor,
        *,
        for_training: bool,
        reshaped_input_sizes: torch.Tensor,
        crop_batch_size: int | None,
        ensemble_weight: float | None,
        sliding_window: bool = False,
        **unused: Any,
    ) -> OVSegImageState:
        config, state = self.config, OVSegImageState()
        check_ensemble_weight(ensemble_weight)
        check_positive(crop_batch_size=crop_batch_size)
        if sliding_window:
            canvas = (config.canvas_pixels, config.canvas_pixels)
            geometry = (canvas, config.window_pixels, config.window_stride, config.global_view)
            return encode_each(
                self._encode_image,
                split_pictures(pixel_values, reshaped_input_sizes),
                *geometry,
                for_training=for_training,
                crop_batch_size=crop_batch_size,
                ensemble_weight=ensemble_weight,
            )
        *auxiliary, last = self.proposal_network(pixel_values, all_layers=for_training)
        state.proposal_embeddings, state.mask_logits = last.embeddings, last.mask_logits
        if for_training:
            state.auxiliary = auxiliary
        if ensemble_weight is not None and not (for_training and self.training):
            sizes, padded = reshaped_input_sizes.tolist(), pixel_values.shape[-2:]
            masks = [
                self._binary_masks(logits, padded, size) for logits, size in zip(last.mask_logits, sizes, strict=True)
            ]
            state.crop_features, state.valid = self.encode_masks(pixel_values, masks, crop_batch_size)
        return state

    @torch.no_grad()
    @with_weights_at_hand
    def propose_masks(self, pixel_values: torch.Tensor, reshaped_input_sizes: torch.Tensor) -> list[torch.Tensor]:
        """Each picture's binary proposals, bool `[N, h, w]` at the size of the resized picture; some may be empty.

        Args:
            pixel_values: `[B, 3, H, W]` from the image processor.
            reshaped_input_sizes: `[B, 2]`, likewise.
        """
        pixel_values = pixel_values.to(self.device, self.dtype)
        (proposals,) = self.proposal_network(pixel_values)
        return [
            self._binary_masks(logits, pixel_values.shape[-2:], size)
            for logits, size in zip(proposals.mask_logits, reshaped_input_sizes.tolist(), strict=True)
        ]

    def _binary_masks(self, mask_logits: torch.Tensor, padded: torch.Size, size: list[int]) -> torch.Tensor:
        """Bool `[N, H, W]` at the size of the resized picture: sigmoid above the threshold."""
        logits = interpolate(mask_logits[None].float(), size=padded, mode="bilinear", align_corners=False)[0]
        threshold = torch.tensor(self.config.mask_threshold, dtype=torch.float64).logit().item()
        return logits[:, : size[0], : size[1]] > threshold

    # ------------------------------------------------------------------ classes

    def _segment(
        self,
        state: OVSegImageState,
        text_embeds: torch.Tensor,
        labels: torch.Tensor | None,
        *,
        sample_seeds: torch.Tensor | None,
        ensemble_weight: float | None,
        class_is_seen: Any,
        output_maps: bool,
        **options: Any,
    ) -> OpenVocabularySegmentationOutput:
        class_logits = self._proposal_logits(state.proposal_embeddings, text_embeds)
        outputs = OpenVocabularySegmentationOutput(
            class_queries_logits=class_logits, masks_queries_logits=state.mask_logits
        )
        if labels is not None:
            outputs.loss_dict = self._losses(state, class_logits, text_embeds, labels, sample_seeds)
            outputs.loss = sum_losses(outputs.loss_dict)
            if self.training:  # CLIP's view of the proposals is for predictions
                return outputs
        check_ensemble_weight(ensemble_weight)
        own = class_logits.softmax(dim=-1)[..., :-1]
        if ensemble_weight is None:
            scores = own
        else:
            scores = self._ensemble(own, state, text_embeds, ensemble_weight, class_is_seen)
        if self.config.demo_mode:
            best = scores.argmax(dim=1)
            picked = torch.zeros(scores.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, True)
            scores = scores * picked[..., None]
            outputs.mask_threshold = self.config.mask_threshold
        outputs.class_queries_scores = scores
        if output_maps and state.valid is not None:
            outputs.maps = {"valid_proposals": state.valid, "crop_features": state.crop_features}
        return outputs

    def _proposal_logits(self, embeddings: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """`[..., K+1]` float32 of embeddings `[..., D]`; "no object" is the last column."""
        return cosine_logits(embeddings, text_embeds, self.no_object_embedding, self.config.temperature)

    def _ensemble(
        self, own: torch.Tensor, state: OVSegImageState, text_embeds: torch.Tensor, weight: float, class_is_seen: Any
    ) -> torch.Tensor:
        """Geometric mean of the proposals' own probabilities and CLIP's; invalid proposals keep their own, raised."""
        if state.crop_features is None:
            raise ValueError(
                "ensemble_weight needs CLIP's view of the proposals, but encode_image was told ensemble_weight=None."
            )
        crops = (self.config.temperature * state.crop_features @ text_embeds.float().T).softmax(dim=-1)
        if weight <= 0:
            return crops * state.valid[..., None]
        crops = torch.where(state.valid[..., None], crops, 1.0)
        share = own.new_full((text_embeds.shape[0],), float(weight))
        if class_is_seen is not None:
            seen = torch.as_tensor(class_is_seen, device=own.device, dtype=torch.bool)
            if seen.shape != share.shape:
                raise ValueError(f"class_is_seen has {list(seen.shape)} values for {len(share)} classes.")
            share = torch.where(seen, 1 - share, share)
        return own ** (1 - share) * crops**share

    # ------------------------------------------------------------------ training of the proposals

    def _losses(
        self,
        state: OVSegImageState,
        class_logits: torch.Tensor,
        text_embeds: torch.Tensor,
        labels: torch.Tensor,
        sample_seeds: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        predictions = [Prediction("", class_logits, state.mask_logits)]
        for index, proposals in enumerate(state.auxiliary):
            logits = self._proposal_logits(proposals.embeddings, text_embeds)
            predictions.append(Prediction(f"_{index}", logits, proposals.mask_logits))
        return self.criterion(predictions, labels, self.draws(sample_seeds, len(labels)))


__all__ = ["OVSegForOpenVocabularySegmentation", "OVSegImageState"]
