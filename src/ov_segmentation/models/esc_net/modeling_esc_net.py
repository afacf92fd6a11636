"""ESC-Net: pseudo prompts from CLIP's correlation maps steer blocks of SAM, whose maps are fused with the texts'."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, SamConfig, SamModel
from transformers import initialization as init

from ...layers.clip_finetuning import set_trained_clip_parameters
from ...layers.configuration_dense_clip import settings_for_clip
from ...layers.correlation import correlation
from ...layers.dense_views import encode_views
from ...layers.initialization import init_torch_defaults
from ...layers.labelled_classes import labelled_first
from ...layers.one_channel import one_channel
from ...layers.projected_skip import ProjectedSkip
from ...layers.sam_blocks import PseudoPromptEncoder, init_prompt_encoder, load_sam_parts
from ...layers.upsampling import GuidedUpsampling, PreparedUpsampling
from ...losses_per_class import add_per_class_loss
from ...modeling_base import OpenVocabularySegmentationModel
from ...modeling_outputs import ImageState, OpenVocabularySegmentationOutput
from ...precision import in_float32
from .blocks import ESCNetBlock, SAMNeck, run_blocks
from .chunks import ClassChunk, by_class, check_limits, chunk_bounds, kept_classes
from .configuration_esc_net import SAM_LAYER_NORM_EPS, ESCNetConfig

# logit of a rejected class: finite, because interpolating -inf gives NaN
REJECTED = -100.0


@dataclass
class ESCNetImageState(ImageState):
    """Encoded pictures; R rows: pictures, or B * V views (row b * V + v).

    Args:
        dense_features: `[R, D, h, w]`, CLIP's projected map, not normalised.
        sam_features: `[R, h * w, S]`, its projection into SAM's width.
        skips: two maps of the image tower for the decoder, `[R, S, 2h, 2w]` and `[R, S', 4h, 4w]`.
    """

    dense_features: torch.Tensor | None = None
    sam_features: torch.Tensor | None = None
    skips: tuple[torch.Tensor, ...] | None = None


class ESCNetForOpenVocabularySegmentation(OpenVocabularySegmentationModel):
    """ESC-Net ("Effective SAM Combination for Open-Vocabulary Semantic Segmentation", CVPR 2025), re-implemented.

    Which classes are rejected depends on values, which a graph cannot: compile and export with `rejection_top_k=None`
    and `max_classes=None`. With `class_chunk_size=None` an exported program takes any number of classes.

    On request: `hidden_states` are the features `[B, K, h*w, C]` before the first block and after each; `attentions`
    those `[B, heads, 1 + h*w, 1 + h*w]` of CLIP's blocks but the last; `maps` holds "correlation" and, of block i,
    "mask_prompt_i" and "activation_i" `[B, K, h, w]`, and "point_prompt_i" `[B, K, n, 3]`: x, y, and whether it is one.
    All but the correlation are 0 for classes that are rejected.
    """

    config: ESCNetConfig
    switches = frozenset({"rejection_top_k", "max_classes", "class_chunk_size"})
    picture_switches = frozenset({"sliding_window", "crop_batch_size"})
    # SAM's table of positions goes into sines: bfloat16 would move them
    _keep_in_fp32_modules_strict = ["logit_scale", "shared_embedding"]
    _no_split_modules = ["CLIPEncoderLayer", "SAMBlock", "GuidedSwinBlock", "TextClassAttention", "GuidedUpsampling"]
    trainable_parts = {
        "adapter": (r"^(?!clip\.|prompt_encoder\.|output_tokens$|blocks\.\d+\.sam\.)",),
        "prompts": (r"^prompt_encoder\.", "^output_tokens$", r"^text_token\."),
        "attention": (r"^clip\..*\.[qv]_proj\.weight$",),
        "lora": (r"^clip\..*\.[qv]_proj$",),
    }

    def __init__(self, config: ESCNetConfig) -> None:
        super().__init__(config)
        self.clip = self.build_clip(config)
        width, embed = config.clip_config.vision_config.hidden_size, config.clip_config.projection_dim
        hidden, sam_width, (first, second) = config.hidden_size, config.sam_hidden_size, config.decoder_sizes
        self.cost_embedding = nn.Conv2d(1, hidden, 7, padding=3)
        self.sam_neck = SAMNeck(embed, sam_width)
        self.text_projection = nn.Linear(embed, config.text_guidance_size)
        self.prompt_encoder, self.text_token, self.output_tokens = None, None, None
        if config.use_sam_blocks:
            self.prompt_encoder = PseudoPromptEncoder(config.sam_config, config.prompt_types, config.mask_prompt_scale)
            if config.text_prompt_token:
                self.text_token = nn.Linear(embed, sam_width)
            if config.sam_output_tokens:
                count = config.sam_config.mask_decoder_config.num_multimask_outputs + 2
                self.output_tokens = nn.Parameter(torch.empty(count, sam_width))
        self.blocks = nn.ModuleList(ESCNetBlock(config, index) for index in range(config.num_blocks))
        self.skips = nn.ModuleList(
            ProjectedSkip(width, None, channels, scale) for channels, scale in zip(config.skip_sizes, (2, 4))
        )
        self.decoder = nn.ModuleList(
            GuidedUpsampling(incoming, None, skip, 0, outgoing)
            for incoming, skip, outgoing in zip((hidden, first), config.skip_sizes, (first, second), strict=True)
        )
        self.head = nn.Conv2d(second, 1, 3, padding=1)
        self.post_init()
        self.freeze_pretrained()

    # ------------------------------------------------------------------ weights

    @classmethod
    def config_for_clip(cls, clip_config: CLIPConfig) -> dict[str, Any]:
        """See `settings_for_clip`."""
        return settings_for_clip(clip_config)

    @classmethod
    def from_clip_and_sam(
        cls, clip: str | os.PathLike | CLIPModel, sam: str | os.PathLike | SamModel, **config: Any
    ) -> ESCNetForOpenVocabularySegmentation:
        """An untrained model around a trained CLIP and SAM: what training starts from.

        `from_clip` gives one whose SAM blocks are random (Table 2).

        Args:
            clip: a Hub id or folder of a `CLIPModel`, or the model itself.
            sam: a Hub id or folder of a `SamModel`, or the model itself; only its prompt encoder and the two-way blocks
                of its mask decoder are used.
            config: values for the configuration; `sam_config` comes from `sam`.

        Raises:
            ValueError: a configuration without SAM blocks.
        """
        if not config.get("use_sam_blocks", True):
            raise ValueError("use_sam_blocks=False leaves no place for SAM's weights: use from_clip.")
        if not isinstance(sam, SamModel):
            sam = SamModel.from_pretrained(sam)
        values = {name: getattr(sam.config, name).to_dict() for name in sam.config.sub_configs}
        values["mask_decoder_config"]["layer_norm_eps"] = SAM_LAYER_NORM_EPS
        model = cls.from_clip(clip, **{**config, "sam_config": SamConfig(**values)})
        model.load_sam(sam)
        return model

    def load_sam(self, sam: SamModel) -> None:
        """Copy the weights of a SAM of the same width into prompt encoder and blocks."""
        blocks = [block.sam.block for block in self.blocks]
        indices = self.config.sam_block_indices
        load_sam_parts(sam, self.prompt_encoder.encoder, blocks, indices, self.output_tokens)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_torch_defaults(module)
        init_prompt_encoder(module)
        if module is self and self.output_tokens is not None:
            init.normal_(self.output_tokens)

    @property
    def unread_parameters(self) -> tuple[str, ...]:
        """Points and boxes are chosen, not computed: only a mask has a gradient towards the map it was made from."""
        unread = [r"^clip\.logit_scale$"]
        if self.prompt_encoder is not None:
            unread += [rf"^prompt_encoder\.{re.escape(name)}\." for name in self.prompt_encoder.unused_parts()]
            unread += [] if "masks" in self.config.prompt_types else [r"^blocks\.\d+\.prompt_map\."]
        return tuple(unread)

    def freeze_pretrained(self) -> None:
        """Train CLIP as `config.clip_finetune` says, SAM's parts if `config.sam_finetune`, and everything else."""
        config = self.config
        self.requires_grad_(True)
        set_trained_clip_parameters(self.clip, config.clip_finetune, config.clip_stem is not None)
        if not config.use_sam_blocks:
            return
        for part in (self.prompt_encoder, *(block.sam for block in self.blocks)):
            part.requires_grad_(config.sam_finetune)
        if self.output_tokens is not None:
            self.output_tokens.requires_grad_(config.sam_finetune)
        self.prompt_encoder.freeze_unused()
        # points and boxes are chosen, not computed: only a mask has a gradient towards the map it was made from
        for block in self.blocks[1:]:
            block.prompt_map.requires_grad_("masks" in config.prompt_types)

    # ------------------------------------------------------------------ picture side

    def _encode_image(self, pixel_values: torch.Tensor, **inputs: Any) -> ESCNetImageState:
        views = encode_views(self.clip, self.config, pixel_values, **inputs)
        features, skips, attentions = views.dense
        return ESCNetImageState(
            dense_features=features,
            sam_features=self.sam_neck(features),
            skips=tuple(projection(blocks) for projection, blocks in zip(self.skips, skips, strict=True)),
            attentions=attentions or None,
            view_boxes=views.boxes,
            canvas_size=views.canvas_size,
        )

    # ------------------------------------------------------------------ classes

    def _segment(
        self,
        state: ESCNetImageState,
        text_embeds: torch.Tensor,
        labels: torch.Tensor | None,
        *,
        rejection_top_k: int | None,
        max_classes: int | None,
        class_chunk_size: int | None,
        sample_seeds: torch.Tensor | None,
        output_hidden_states: bool,
        output_maps: bool,
        **options: Any,
    ) -> OpenVocabularySegmentationOutput:
        averages = self.config.refined_feature_aggregation == "mean"
        limits = {"rejection_top_k": rejection_top_k, "max_classes": max_classes, "class_chunk_size": class_chunk_size}
        check_limits(self.training, averages, limits)
        cost = correlation(state.dense_features, text_embeds[:, None])[:, :, 0]
        order = None
        if self.training and labels is not None and max_classes is not None:
            order = labelled_first(labels, text_embeds.shape[0], self.draws(sample_seeds, len(labels)))
        kept = kept_classes(cost, rejection_top_k, max_classes, order)
        text = text_embeds.to(self.dtype)
        guidance = F.relu(self.text_projection(text))
        sums = [block.classes.class_sums(guidance) for block in self.blocks]
        chunks = self._chunks(state, cost, self._tokens(text), kept, class_chunk_size)
        prepared = [
            stage.prepare(tuple(skip.shape[-2:]), skip) for stage, skip in zip(self.decoder, state.skips, strict=True)
        ]
        # classes wait for one another only where their maps are averaged
        groups = [list(chunks)] if averages else ([chunk] for chunk in chunks)
        records: list[dict[str, torch.Tensor]] = []

        def segmented() -> Iterator[torch.Tensor]:
            averaged = text_embeds.shape[0] if averages else None
            for group in groups:
                run_blocks(self.blocks, group, sums, self.prompt_encoder, averaged, output_hidden_states, output_maps)
                while group:
                    chunk = group.pop(0)
                    records.append(chunk.records)
                    yield self._decode(chunk, prepared)

        outputs = OpenVocabularySegmentationOutput(
            logits=by_class(segmented(), cost.shape[:2], kept, REJECTED), score_function="sigmoid", kept_classes=kept
        )
        recorded = {
            name: by_class([record[name] for record in records], cost.shape[:2], kept, 0.0) for name in records[0]
        }
        if output_hidden_states:
            outputs.hidden_states = tuple(recorded.pop(f"features_{i}") for i in range(len(self.blocks) + 1))
        if output_maps:
            outputs.maps = {"correlation": cost, **recorded}
        if labels is not None:
            add_per_class_loss(outputs, labels, state.reshaped_input_sizes, self.config.ignore_as_negative)
        return outputs

    def _chunks(
        self,
        state: ESCNetImageState,
        cost: torch.Tensor,
        tokens: torch.Tensor | None,
        kept: torch.Tensor | None,
        chunk_size: int | None,
    ) -> Iterator[ClassChunk]:
        """The pairs that are kept, row by row, with embedded correlation and the `tokens` `[K, T, S]` of the class."""
        num_rows, num_classes = cost.shape[:2]
        if kept is None:
            counts = [num_classes] * num_rows
            pairs = torch.arange(num_rows * num_classes, device=cost.device)
        else:
            counts = kept.sum(dim=1).tolist()
            pairs = kept.flatten().nonzero()[:, 0]
        for part, used_rows, shares in chunk_bounds(counts, chunk_size):
            rows, classes = pairs[part] // num_classes, pairs[part] % num_classes
            maps = cost[rows, classes]
            features = in_float32(self.cost_embedding, maps[:, None], rounded=True).flatten(2).transpose(1, 2)
            queries = None if tokens is None else tokens[classes]
            yield ClassChunk(rows, used_rows, shares, features, state.sam_features[rows], maps, queries)

    def _tokens(self, text_embeds: torch.Tensor) -> torch.Tensor | None:
        """Queries of the SAM blocks beside the prompts, `[K, T, S]`: SAM's output tokens, then the text."""
        tokens = []
        if self.output_tokens is not None:
            tokens.append(self.output_tokens.expand(text_embeds.shape[0], -1, -1))
        if self.text_token is not None:
            tokens.append(self.text_token(text_embeds)[:, None])
        return torch.cat(tokens, dim=1) if tokens else None

    def _decode(self, chunk: ClassChunk, prepared: list[PreparedUpsampling]) -> torch.Tensor:
        """Logits `[n, 4h, 4w]`; `prepared` is what each stage makes of all rows."""
        maps = chunk.features.unflatten(1, chunk.grid)
        for stage, of_all in zip(self.decoder, prepared, strict=True):
            maps = stage(maps, chunk.counts, of_all.of_pictures(chunk.used_rows))
        return one_channel(self.head, maps)


__all__ = ["ESCNetForOpenVocabularySegmentation", "ESCNetImageState"]
