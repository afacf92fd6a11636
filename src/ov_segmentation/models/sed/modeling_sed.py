"""SED: cosines of hierarchical ConvNeXt CLIP features with every prompt, fused gradually into one map per class."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPVisionModel, ConvNextModel
from transformers import initialization as init

from ...configuration_base import check_fields, check_positive
from ...conversion import load_converted
from ...layers.clip_stem import install_clip_stem
from ...layers.convnext_clip import ConvNextCLIPModel
from ...layers.correlation import correlation
from ...layers.initialization import init_torch_defaults
from ...layers.linear_attention import pooling_side
from ...layers.picture_stretching import stretch_pictures
from ...layers.pieces import joined, row_slices
from ...layers.sliding_window import each_view, resize, split_pictures, view_batches, view_boxes
from ...layers.sub_models import build_sub_model
from ...losses_per_class import per_class_cross_entropy
from ...modeling_base import OpenVocabularySegmentationModel
from ...modeling_outputs import ImageState, OpenVocabularySegmentationOutput
from .blocks import LargeKernelBlock
from .configuration_sed import SEDConfig
from .decoder import REJECTED, SEDDecoder
from .encoder import SEDEncoderMixin
from .foundations import clip_parts, find_open_clip, read_open_clip

# what no CLIP holds
DECODER_PREFIXES = ("image_guidance.", "decoder.")


@dataclass
class SEDImageState(ImageState):
    """Encoded pictures; R rows: pictures, or B * V views (row b * V + v).

    Args:
        dense_features: `[R, D, h, w]`, the projected last map, not normalised.
        image_guidance: of each decoder layer, `[R, G, 2h, 2w]`, `[R, G', 4h, 4w]`, ...; None without feature fusion.
    """

    dense_features: torch.Tensor | None = None
    image_guidance: tuple[torch.Tensor, ...] | None = None


class SEDForOpenVocabularySegmentation(SEDEncoderMixin, OpenVocabularySegmentationModel):
    """SED (Xie et al., "SED: A Simple Encoder-Decoder for Open-Vocabulary Semantic Segmentation", CVPR 2024).

    Early rejection depends on values, which a graph cannot: compile and export with `rejection_top_k=None`. With
    `class_chunk_size=None` an exported program takes any number of classes.

    On request: `hidden_states` are the encoder's maps `[B, C, h, w]`, the largest first (of the plain encoder those of
    `skip_layers`); `maps` holds "cost_map" `[B, K, P, h, w]` and "auxiliary_logits_0", ... `[B, K, h, w]`, those of the
    decoder's earlier heads.
    """

    config: SEDConfig
    config_class = SEDConfig
    keeps_prompts = True
    switches = frozenset({"rejection_top_k", "class_attention_pooling", "class_chunk_size"})
    picture_switches = frozenset({"sliding_window", "crop_batch_size"})
    _no_split_modules = ["ConvNextLayer", "CLIPEncoderLayer", "SEDDecoderLayer"]
    # a ConvNeXt has no attention; its blocks are linear layers but for one convolution
    trainable_parts = {
        "adapter": (r"^decoder\.", r"^image_guidance\."),
        "attention": (r"^vision_model\.encoder\..*\.[qv]_proj\.weight$",),
        "lora": (r"^vision_model\.encoder\..*\.([qv]_proj|pwconv[12])$",),
    }

    def __init__(self, config: SEDConfig) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        if not config.has_plain_encoder:
            # transformers refuses any other for a model without attention
            config.vision_config._attn_implementation = "eager"
        vision_class = CLIPVisionModel if config.has_plain_encoder else ConvNextModel
        self.vision_model = build_sub_model(vision_class, config.vision_config)
        install_clip_stem(self, config.clip_stem)
        self.visual_projection = self._make_projection(config)
        self.text_model = build_sub_model(CLIPTextModelWithProjection, config.text_config)
        self.image_guidance = nn.ModuleList(
            nn.Conv2d(channels, guidance, 3, padding=1)
            for channels, guidance in zip(self._guidance_sources(config), config.guidance_dims)
        )
        self.decoder = SEDDecoder(config)
        self.post_init()
        self.freeze_pretrained()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_torch_defaults(module)
        if isinstance(module, LargeKernelBlock):
            init.ones_(module.layer_scale_parameter)

    @property
    def text_tower(self) -> tuple[nn.Module, nn.Module]:
        """The text transformer and its projection."""
        return self.text_model.text_model, self.text_model.text_projection

    @property
    def unread_parameters(self) -> tuple[str, ...]:
        """The value path of the plain encoder's last block goes round its queries and keys."""
        if not self.config.has_plain_encoder:
            return ()
        last = self.config.vision_config.num_hidden_layers - 1
        return (rf"^vision_model\.encoder\.layers\.{last}\.self_attn\.[qk]_proj",)

    def freeze_pretrained(self) -> None:
        """Freeze the text tower, and of the encoder what `config.num_trainable_stages` leaves out."""
        self.requires_grad_(True)
        self.text_model.requires_grad_(False)
        self._freeze_encoder()
        if self.config.has_plain_encoder:
            # the value path of the last block goes round them
            for unused in ("q_proj", "k_proj"):
                getattr(self.vision_model.encoder.layers[-1].self_attn, unused).requires_grad_(False)

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """Set it for the parts that have attention: a ConvNeXt has none and would refuse."""
        if isinstance(attn_implementation, str) and not self.config.has_plain_encoder:
            attn_implementation = {"": attn_implementation, "text_config": attn_implementation}
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    @classmethod
    def from_clip(
        cls, clip: str | os.PathLike | ConvNextCLIPModel | CLIPModel, **config: Any
    ) -> SEDForOpenVocabularySegmentation:
        """An untrained model around a trained CLIP: what training starts from.

        Args:
            clip: a folder or Hub id in OpenCLIP's layout with a ConvNeXt (LAION's), a folder of a `ConvNextCLIPModel`
                or, for the plain encoder, of a `CLIPModel`; or one of these models itself.
            config: values for the configuration; `vision_config` and `text_config` are merged into what CLIP says.

        Returns:
            The model in float32, frozen as SED trains it.

        Raises:
            ConversionError: damaged or missing weights, or an OpenCLIP model without ConvNeXt.
            ValueError: a value for a field that the configuration does not have.
        """
        if isinstance(clip, (str, os.PathLike)) and find_open_clip(clip) is not None:
            values, weights = read_open_clip(clip)
        else:
            values, weights = clip_parts(clip)
        tower = {"model_type": values["vision_config"]["model_type"], **config.get("vision_config", {})}
        check_fields(cls.config_class, {**config, "vision_config": tower})
        for name in ("vision_config", "text_config"):
            values[name] = {**values[name], **config.pop(name, {})}
        model = cls(cls.config_class(**{**values, **config}))
        decoder = [key for key in model.state_dict() if key.startswith(DECODER_PREFIXES)]
        load_converted(model, {**{key: model.state_dict()[key] for key in decoder}, **weights})
        # torch's default may be another dtype
        return model.float()

    # ------------------------------------------------------------------ picture side

    def _encode_image(
        self,
        pixel_values: torch.Tensor,
        *,
        reshaped_input_sizes: torch.Tensor,
        sliding_window: bool,
        crop_batch_size: int | None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        **unused: Any,
    ) -> SEDImageState:
        if output_attentions:
            raise ValueError("SED has no attention weights to give: its class attention is linear. See output_maps.")
        check_positive(crop_batch_size=crop_batch_size)
        config = self.config
        boxes, canvas_size = None, None
        if not sliding_window:
            inputs = stretch_pictures(pixel_values, reshaped_input_sizes, config.input_size)
            batches: Iterable[torch.Tensor] = inputs.split(crop_batch_size or len(inputs))
        else:
            canvas_size = (config.canvas_size[0], config.canvas_size[1])
            windows = (config.window_pixels, config.window_stride, config.global_view)
            boxes = view_boxes(canvas_size, *windows)
            views = each_view(split_pictures(pixel_values, reshaped_input_sizes), canvas_size, *windows)
            batches = (resize(some, config.input_size) for some in view_batches(views, crop_batch_size))
        parts = [self._encode_views(some, output_hidden_states) for some in batches]
        dense = torch.cat([dense for dense, _, _ in parts])
        guidance = tuple(torch.cat(maps) for maps in zip(*(maps for _, maps, _ in parts), strict=True))
        state = SEDImageState(
            dense_features=dense, image_guidance=guidance or None, view_boxes=boxes, canvas_size=canvas_size
        )
        if output_hidden_states:
            state.hidden_states = tuple(torch.cat(maps) for maps in zip(*(maps for _, _, maps in parts), strict=True))
        return state

    # ------------------------------------------------------------------ classes

    def _segment(
        self,
        state: SEDImageState,
        text_embeds: torch.Tensor,
        labels: torch.Tensor | None,
        *,
        rejection_top_k: int | None,
        class_attention_pooling: int | None,
        class_chunk_size: int | None,
        sample_seeds: torch.Tensor | None,
        output_maps: bool,
        **options: Any,
    ) -> OpenVocabularySegmentationOutput:
        self._check_request(text_embeds, rejection_top_k, class_chunk_size)
        pooling = pooling_side(class_attention_pooling, state.dense_features.shape[-2:])
        num_classes, chosen = text_embeds.shape[0], None
        if labels is not None and self.training and (self.config.num_training_classes or num_classes) < num_classes:
            chosen = self._training_classes(labels, num_classes, sample_seeds)
            text_embeds = text_embeds[chosen]
        wants_auxiliary = output_maps or (labels is not None and self.config.auxiliary_loss_weight != 0)
        kept, of_heads = [], []

        def decoded() -> Iterator[torch.Tensor]:
            for rows in row_slices(len(state.dense_features), text_embeds.shape[0], class_chunk_size):
                found = self.decoder(
                    state.dense_features[rows],
                    [guidance[rows] for guidance in state.image_guidance or ()],
                    text_embeds,
                    rejection_top_k,
                    pooling,
                    class_chunk_size,
                    wants_auxiliary,
                )
                kept.append(found.kept_classes)
                of_heads.append(found.auxiliary)
                yield found.logits

        logits = joined(decoded(), len(state.dense_features))
        outputs = OpenVocabularySegmentationOutput(logits=logits, score_function="sigmoid")
        auxiliary = [torch.cat(logits) for logits in zip(*of_heads, strict=True)]
        if rejection_top_k is not None:
            outputs.kept_classes = torch.cat(kept)
        if output_maps:
            cost = correlation(state.dense_features, text_embeds)
            outputs.maps = {"cost_map": cost} | {f"auxiliary_logits_{i}": maps for i, maps in enumerate(auxiliary)}
        if labels is not None:
            if chosen is not None:
                labels = _renumbered(labels, chosen, num_classes)
            outputs.loss_dict = self._losses(outputs.logits, auxiliary, labels, state.reshaped_input_sizes)
            outputs.loss = torch.stack(list(outputs.loss_dict.values())).sum()
        if chosen is not None:
            shape = (len(outputs.logits), num_classes, *outputs.logits.shape[2:])
            outputs.logits = outputs.logits.new_full(shape, REJECTED).index_copy(1, chosen, outputs.logits)
            outputs.kept_classes = chosen.new_zeros(shape[:2], dtype=torch.bool).index_fill(1, chosen, True)
        return outputs

    def _training_classes(
        self, labels: torch.Tensor, num_classes: int, sample_seeds: torch.Tensor | None
    ) -> torch.Tensor:
        """Indices, ascending, of the classes that a training batch sees: those in its labels and random others."""
        draws = self.draws(sample_seeds, len(labels))
        rank = sum(draws.uniform("classes", picture, (num_classes,)) for picture in range(len(labels))).to(
            labels.device
        )
        present = labels[labels >= 0].unique()
        rank[present] += len(labels)
        return rank.topk(max(self.config.num_training_classes, len(present))).indices.sort().values

    def _losses(
        self, logits: torch.Tensor, auxiliary: list[torch.Tensor], labels: torch.Tensor, sizes: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The terms `loss_sem_seg_0` (the last head), `_1`, ... (auxiliary heads, the earliest first), weighted."""
        terms = {}
        for index, of_head in enumerate([logits, *auxiliary]):
            weight = self.config.auxiliary_loss_weight if index else 1.0
            loss = per_class_cross_entropy(of_head, labels, sizes, self.config.ignore_as_negative)
            terms[f"loss_sem_seg_{index}"] = weight * loss
        return terms

    def _check_request(
        self,
        text_embeds: torch.Tensor,
        top_k: int | None,
        chunk_size: int | None,
    ) -> None:
        if text_embeds.shape[1] != self.config.num_templates:
            raise ValueError(
                f"This checkpoint was made for {self.config.num_templates} prompts per class, text_embeds has "
                f"{text_embeds.shape[1]}: use its own processor, or as many prompt templates."
            )
        check_positive(rejection_top_k=top_k, class_chunk_size=chunk_size)
        if self.training and top_k is not None:
            raise ValueError("Category early rejection is for inference: pass rejection_top_k=None in training.")


def _renumbered(labels: torch.Tensor, chosen: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Labels as indices into `chosen`, which holds all classes that occur; negative labels stay."""
    numbers = torch.zeros(num_classes, dtype=labels.dtype, device=labels.device)
    numbers[chosen] = torch.arange(len(chosen), dtype=labels.dtype, device=labels.device)
    return torch.where(labels < 0, labels, numbers[labels.clamp(min=0)])
