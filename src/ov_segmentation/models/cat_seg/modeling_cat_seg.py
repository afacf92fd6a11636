"""CAT-Seg: dense CLIP features, their cosines with every class, aggregated over positions and over classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig
from transformers import initialization as init

from ...configuration_base import check_positive
from ...layers.clip_finetuning import set_trained_clip_parameters
from ...layers.configuration_dense_clip import settings_for_clip
from ...layers.correlation import correlation, strongest_classes
from ...layers.dense_views import encode_views
from ...layers.guided_swin import GuidedSwinPair
from ...layers.initialization import init_torch_defaults
from ...layers.labelled_classes import labelled_first
from ...layers.linear_attention import ClassAttention, ClassSums, add_pooled, pool_positions, pooling_side, repeated
from ...layers.one_channel import one_channel
from ...layers.pieces import joined, row_slices
from ...layers.projected_skip import ProjectedSkip
from ...layers.upsampling import GuidedUpsampling, PreparedUpsampling
from ...losses_per_class import add_per_class_loss
from ...modeling_base import OpenVocabularySegmentationModel
from ...modeling_outputs import ImageState, OpenVocabularySegmentationOutput
from ...precision import in_float32
from .configuration_cat_seg import CATSegConfig

# logit of a class that was not aggregated: finite, because interpolating -inf gives NaN
REJECTED = -100.0


@dataclass
class CATSegImageState(ImageState):
    """Encoded pictures; R rows: pictures, or B * V views (row b * V + v).

    Args:
        dense_features: `[R, D, h, w]`, CLIP's projected map, not normalised.
        appearance_guidance: `[R, 1, h * w, A]`, its projection that guides the spatial aggregation.
        skips: two maps of the image tower for the decoder, `[R, S, 2h, 2w]` and `[R, S', 4h, 4w]`.
    """

    dense_features: torch.Tensor | None = None
    appearance_guidance: torch.Tensor | None = None
    skips: tuple[torch.Tensor, ...] | None = None


class ClassChunk(NamedTuple):
    """Some classes of R rows on their way through the aggregation.

    Args:
        features: `[R, T, h * w, C]`.
        text: their projected text embeddings `[R, T, G]`.
    """

    features: torch.Tensor
    text: torch.Tensor

    @property
    def counts(self) -> list[int]:
        """Of each row, the number of classes."""
        rows, num_classes = self.text.shape[:2]
        return [num_classes] * rows


class CostAggregationLayer(nn.Module):
    """Spatial aggregation of each class, then class aggregation at each position.

    The class aggregation sees at least `padding_length` classes: a learned token fills up. Being the same at every
    position and in every place, it is computed once and its sums are multiplied (exact; the original repeats it).
    """

    def __init__(self, config: CATSegConfig) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.padding_length = config.padding_length
        self.spatial = GuidedSwinPair(config, hidden, config.appearance_guidance_size, heads, config.window_size)
        self.classes = ClassAttention(hidden, heads, config.text_guidance_size)
        self.padding_token = nn.Parameter(torch.zeros(hidden))
        self.padding_guidance = nn.Parameter(torch.zeros(config.text_guidance_size))

    def padding_sums(self, num_classes: int, num_positions: int) -> ClassSums:
        """What the padding adds to the sums of `num_classes` classes, at each of `num_positions`."""
        one = self.classes.class_sums(self.padding_token[None, None], [1], self.padding_guidance[None])
        missing = max(0, self.padding_length - num_classes)
        return ClassSums(*(part.repeat(1, num_positions, 1, 1) for part in repeated(one, missing)))

    def forward(
        self, chunks: list[ClassChunk], appearance: torch.Tensor, grid: tuple[int, int], pooling: int
    ) -> list[ClassChunk]:
        """Aggregate all classes of R rows, in place in the list; the result does not depend on the chunks.

        Args:
            chunks: all classes of the rows.
            appearance: `[R, 1, h * w, A]`.
            grid: (h, w).
            pooling: average pooling in front of the class aggregation.

        Returns:
            The list. It is another one than the caller's if accelerate has hooked the layer.
        """
        num_classes = sum(chunk.features.shape[1] for chunk in chunks)
        sums = self.padding_sums(num_classes, (grid[0] // pooling) * (grid[1] // pooling))
        for i, (features, text) in enumerate(chunks):
            features = self.spatial(features, appearance, grid)
            chunks[i] = ClassChunk(features, text)
            tokens = pool_positions(features.flatten(0, 1).unflatten(1, grid), pooling)
            sums = self.classes.class_sums(tokens, chunks[i].counts, text.flatten(0, 1)) + sums
        for i, (features, text) in enumerate(chunks):
            maps = features.flatten(0, 1).unflatten(1, grid)
            tokens = self.classes(pool_positions(maps, pooling), chunks[i].counts, sums, text.flatten(0, 1))
            chunks[i] = ClassChunk(add_pooled(maps, tokens, pooling).view(features.shape), text)
        return chunks


class CATSegForOpenVocabularySegmentation(OpenVocabularySegmentationModel):
    """CAT-Seg (Cho et al., CVPR 2024): one logit map per class from aggregated image-text cosines.

    With `class_chunk_size=None` and `max_classes=None` an exported program takes any number of classes.

    On request: `hidden_states` are the features `[B, K, h*w, C]` before the first aggregation layer and after each, of
    the classes kept where `max_classes` leaves some out; `attentions` those `[B, heads, 1 + h*w, 1 + h*w]` of CLIP's
    blocks but the last; `maps` holds "correlation" `[B, K, h, w]`, the mean cosine of a class's prompts.
    """

    config: CATSegConfig
    keeps_prompts = True
    switches = frozenset({"max_classes", "class_attention_pooling", "class_chunk_size"})
    picture_switches = frozenset({"sliding_window", "crop_batch_size"})
    _no_split_modules = ["CLIPEncoderLayer", "GuidedSwinBlock", "ClassAttention", "GuidedUpsampling"]
    trainable_parts = {
        "adapter": (r"^(?!clip\.)",),
        "attention": (r"^clip\..*\.[qv]_proj\.weight$",),
        "lora": (r"^clip\..*\.[qv]_proj$",),
    }
    unread_parameters = (r"^clip\.logit_scale$",)

    def __init__(self, config: CATSegConfig) -> None:
        super().__init__(config)
        self.clip = self.build_clip(config)
        width, embed = config.clip_config.vision_config.hidden_size, config.clip_config.projection_dim
        hidden, (first, second) = config.hidden_size, config.decoder_sizes
        self.cost_embedding = nn.Conv2d(config.num_templates, hidden, 7, padding=3)
        self.appearance_projection = nn.Conv2d(embed, config.appearance_guidance_size, 3, padding=1)
        self.text_projection = nn.Linear(embed, config.text_guidance_size)
        self.skips = nn.ModuleList(
            ProjectedSkip(width, upsampled, skip, scale)
            for upsampled, skip, scale in zip(config.skip_upsampled_sizes, config.skip_sizes, (2, 4), strict=True)
        )
        self.layers = nn.ModuleList(CostAggregationLayer(config) for _ in range(config.num_aggregation_layers))
        self.decoder = nn.ModuleList(
            GuidedUpsampling(incoming, incoming - skip, skip, 0, outgoing)
            for incoming, skip, outgoing in zip((hidden, first), config.skip_sizes, (first, second), strict=True)
        )
        self.head = nn.Conv2d(second, 1, 3, padding=1)
        self.post_init()
        self.freeze_pretrained()

    @classmethod
    def config_for_clip(cls, clip_config: CLIPConfig) -> dict[str, Any]:
        """See `settings_for_clip`."""
        return settings_for_clip(clip_config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_torch_defaults(module)
        if isinstance(module, CostAggregationLayer):
            init.zeros_(module.padding_token)
            init.zeros_(module.padding_guidance)

    def freeze_pretrained(self) -> None:
        """Train CLIP as `config.clip_finetune` says, and everything else."""
        self.requires_grad_(True)
        set_trained_clip_parameters(self.clip, self.config.clip_finetune, self.config.clip_stem is not None)

    # ------------------------------------------------------------------ picture side

    def _encode_image(self, pixel_values: torch.Tensor, **inputs: Any) -> CATSegImageState:
        views = encode_views(self.clip, self.config, pixel_values, pad_multiple=self.config.pad_multiple, **inputs)
        features, skips, attentions = views.dense
        return CATSegImageState(
            dense_features=features,
            appearance_guidance=F.relu(self.appearance_projection(features)).flatten(2).transpose(1, 2)[:, None],
            skips=tuple(project(blocks) for project, blocks in zip(self.skips, skips, strict=True)),
            view_boxes=views.boxes,
            canvas_size=views.canvas_size,
            attentions=attentions or None,
        )

    # ------------------------------------------------------------------ classes

    def _segment(
        self,
        state: CATSegImageState,
        text_embeds: torch.Tensor,
        labels: torch.Tensor | None,
        *,
        max_classes: int | None,
        class_attention_pooling: int | None,
        class_chunk_size: int | None,
        sample_seeds: torch.Tensor | None,
        output_hidden_states: bool,
        output_maps: bool,
        **options: Any,
    ) -> OpenVocabularySegmentationOutput:
        self._check_request(text_embeds, max_classes, class_chunk_size)
        pooling = pooling_side(class_attention_pooling, state.dense_features.shape[-2:])
        cost = correlation(state.dense_features, text_embeds)
        text = F.relu(self.text_projection(F.normalize(text_embeds.mean(dim=1), dim=-1).to(self.dtype)))
        kept = None
        if max_classes is not None and max_classes < text_embeds.shape[0]:
            scores = cost
            if self.training and labels is not None:  # a labelled class that is left out would have nothing to learn by
                order = labelled_first(labels, text_embeds.shape[0], self.draws(sample_seeds, len(labels)))
                scores = order[:, :, None, None, None]
            kept = strongest_classes(scores, max_classes)
        states: list[list[torch.Tensor]] = []

        def aggregated() -> Iterator[torch.Tensor]:
            num_classes = text.shape[0] if kept is None else max_classes
            for rows in row_slices(cost.shape[0], num_classes, class_chunk_size):
                row_cost, row_text = cost[rows], text.expand(cost[rows].shape[0], -1, -1)
                if kept is not None:
                    row_cost = row_cost.gather(1, kept[rows][:, :, None, None, None].expand(-1, -1, *cost.shape[2:]))
                    row_text = row_text.gather(1, kept[rows][:, :, None].expand(-1, -1, row_text.shape[-1]))
                chunks = self._embed(row_cost, row_text, class_chunk_size)
                logits, of_layers = self._aggregate(chunks, state, rows, pooling, output_hidden_states)
                states.append(of_layers)
                yield logits

        used = joined(aggregated(), cost.shape[0])
        outputs = OpenVocabularySegmentationOutput(logits=used, score_function="sigmoid")
        if kept is not None:
            every = used.new_full((used.shape[0], text.shape[0], *used.shape[-2:]), REJECTED)
            outputs.logits = every.scatter_(1, kept[:, :, None, None].expand_as(used), used)
            outputs.kept_classes = kept.new_zeros(kept.shape[0], text.shape[0], dtype=torch.bool).scatter(1, kept, True)
        if output_hidden_states:
            outputs.hidden_states = tuple(torch.cat(maps) for maps in zip(*states, strict=True))
        if output_maps:
            outputs.maps = {"correlation": cost.mean(dim=2)}
        if labels is not None:
            add_per_class_loss(outputs, labels, state.reshaped_input_sizes, self.config.ignore_as_negative)
        return outputs

    def _embed(self, cost: torch.Tensor, text: torch.Tensor, chunk_size: int | None) -> list[ClassChunk]:
        """Chunks of embedded cosines `[R, T, P, h, w]` with their projected texts `[R, T, G]`."""
        rows, parts = cost.shape[0], [(cost, text)]
        if chunk_size is not None:
            at_once = max(1, chunk_size // rows)
            parts = zip(cost.split(at_once, dim=1), text.split(at_once, dim=1), strict=True)
        chunks = []
        for some_cost, some_text in parts:
            maps = in_float32(self.cost_embedding, some_cost.flatten(0, 1), rounded=True)
            chunks.append(ClassChunk(maps.flatten(2).transpose(1, 2).unflatten(0, (rows, -1)), some_text))
        return chunks

    def _aggregate(
        self, chunks: list[ClassChunk], state: CATSegImageState, rows: slice, pooling: int, keep_states: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits `[R, T, 4h, 4w]` of all chunks of some rows; with `keep_states`, also the features `[R, T, h * w, C]`
        before and after each layer."""
        grid, appearance = tuple(state.dense_features.shape[-2:]), state.appearance_guidance[rows]
        states = []
        for layer in (None, *self.layers):
            if layer is not None:
                chunks = layer(chunks, appearance, grid, pooling)
            if keep_states:
                states.append(torch.cat([chunk.features for chunk in chunks], dim=1))
        prepared = [
            stage.prepare(tuple(skip.shape[-2:]), skip[rows])
            for stage, skip in zip(self.decoder, state.skips, strict=True)
        ]
        logits = []
        while chunks:
            logits.append(self._decode(chunks.pop(0).features, prepared, grid))
        return torch.cat(logits, dim=1), states

    def _decode(
        self, features: torch.Tensor, prepared: list[PreparedUpsampling], grid: tuple[int, int]
    ) -> torch.Tensor:
        rows, num_classes = features.shape[:2]
        maps = features.flatten(0, 1).unflatten(1, grid)
        for stage, of_pictures in zip(self.decoder, prepared, strict=True):
            maps = stage(maps, [num_classes] * rows, of_pictures)
        return one_channel(self.head, maps).view(rows, num_classes, *maps.shape[1:3])

    def _check_request(self, text_embeds: torch.Tensor, max_classes: int | None, chunk_size: int | None) -> None:
        if text_embeds.shape[1] != self.config.num_templates:
            raise ValueError(
                f"This checkpoint was made for {self.config.num_templates} prompt(s) per class, text_embeds has "
                f"{text_embeds.shape[1]}: use its own processor, or as many prompt templates."
            )
        check_positive(max_classes=max_classes, class_chunk_size=chunk_size)


__all__ = ["CATSegForOpenVocabularySegmentation", "CATSegImageState"]
