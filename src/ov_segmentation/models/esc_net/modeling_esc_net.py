"""ESC-Net: pseudo prompts from CLIP's correlation maps steer blocks of SAM, whose maps are fused with the texts'."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, SamModel
from transformers import initialization as init

from ...layers.clip_finetuning import set_trained_clip_parameters
from ...layers.configuration_dense_clip import settings_for_clip
from ...layers.correlation import correlation, strongest_classes
from ...layers.dense_clip import dense_clip_views
from ...layers.initialization import init_torch_defaults
from ...layers.linear_attention import ClassSums
from ...layers.model_views import make_model_views
from ...layers.projected_skip import ProjectedSkip
from ...layers.pseudo_prompts import PseudoPrompts
from ...layers.sam_blocks import PseudoPromptEncoder, init_prompt_encoder, load_sam_parts
from ...layers.upsampling import GuidedUpsampling, PreparedUpsampling
from ...losses_per_class import per_class_cross_entropy
from ...modeling_base import OpenVocabularySegmentationModel
from ...modeling_outputs import ImageState, OpenVocabularySegmentationOutput
from .blocks import ClassChunk, ESCNetBlock, chunk_bounds
from .configuration_esc_net import SAM_LAYER_NORM_EPS, ESCNetConfig

# logit of a rejected class: finite, because interpolating -inf gives NaN
REJECTED = -100.0
# SAM's image neck ends with a layer norm of this epsilon
NECK_EPS = 1e-6


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


class SAMNeck(nn.Module):
    """Image features in SAM's width, normalised as SAM's image encoder leaves them: `[R, D, h, w]` -> `[R, h * w, S]`.

    Args:
        in_channels: D.
        out_channels: S.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.projection = nn.Linear(in_channels, out_channels, bias=False)
        self.norm = nn.LayerNorm(out_channels, eps=NECK_EPS)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project and normalise every position."""
        return self.norm(self.projection(features.flatten(2).transpose(1, 2)))


class ESCNetForOpenVocabularySegmentation(OpenVocabularySegmentationModel):
    """ESC-Net ("Effective SAM Combination for Open-Vocabulary Semantic Segmentation", CVPR 2025), re-implemented."""

    config: ESCNetConfig
    switches = frozenset({"rejection_top_k", "max_classes", "class_chunk_size"})
    picture_switches = frozenset({"sliding_window", "crop_batch_size"})
    _no_split_modules = ["CLIPEncoderLayer", "SAMBlock", "GuidedSwinBlock", "TextClassAttention", "GuidedUpsampling"]

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
            # SAM's attention reads it there; its config is not one of a model
            config.sam_config.mask_decoder_config._attn_implementation = config._attn_implementation
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
        model = cls.from_clip(clip, **{**config, "sam_config": values})
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

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """transformers' own, without its warning that it finds no model of `sam_config`."""
        sam = self.config.sam_config
        before = sam._attn_implementation
        if isinstance(attn_implementation, str):
            sam._attn_implementation = attn_implementation
        try:
            super().set_attn_implementation(attn_implementation, *args, **kwargs)
        except ValueError:
            sam._attn_implementation = before
            raise

    # ------------------------------------------------------------------ picture side

    def _encode_image(
        self,
        pixel_values: torch.Tensor,
        *,
        for_training: bool,
        reshaped_input_sizes: torch.Tensor,
        sliding_window: bool,
        crop_batch_size: int | None,
        output_attentions: bool = False,
        **unused: Any,
    ) -> ESCNetImageState:
        config = self.config
        if sliding_window and for_training:
            raise ValueError("A loss is taken on whole pictures: pass sliding_window=False together with labels.")
        square = (config.image_size, config.image_size)
        views = make_model_views(pixel_values, reshaped_input_sizes, square, config.windows if sliding_window else None)
        dense = dense_clip_views(
            self.clip, views.pixel_values, config.skip_layers, config.dense_residual, crop_batch_size, output_attentions
        )
        return ESCNetImageState(
            dense_features=dense.features,
            sam_features=self.sam_neck(dense.features),
            skips=tuple(projection(blocks) for projection, blocks in zip(self.skips, dense.skips, strict=True)),
            attentions=dense.attentions or None,
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
        output_hidden_states: bool,
        output_maps: bool,
        **options: Any,
    ) -> OpenVocabularySegmentationOutput:
        self._check_request(rejection_top_k, max_classes, class_chunk_size)
        cost = correlation(state.dense_features, text_embeds[:, None])[:, :, 0]
        kept = kept_classes(cost, rejection_top_k, max_classes)
        guidance = F.relu(self.text_projection(text_embeds))
        sums = [block.classes.class_sums(guidance) for block in self.blocks]
        chunks = self._chunks(state, cost, self._tokens(text_embeds), kept, class_chunk_size)
        prepared = [
            stage.prepare(tuple(skip.shape[-2:]), skip) for stage, skip in zip(self.decoder, state.skips, strict=True)
        ]
        # classes wait for one another only where their maps are averaged
        groups = [list(chunks)] if self.config.refined_feature_aggregation == "mean" else ([chunk] for chunk in chunks)
        logits, records = [], []
        for group in groups:
            self._run_blocks(group, len(text_embeds), sums, output_hidden_states, output_maps)
            while group:
                chunk = group.pop(0)
                logits.append(self._decode(chunk, prepared))
                records.append(chunk.records)
        outputs = OpenVocabularySegmentationOutput(
            logits=by_class(logits, cost.shape[:2], kept, REJECTED), score_function="sigmoid", kept_classes=kept
        )
        recorded = {
            name: by_class([record[name] for record in records], cost.shape[:2], kept, 0.0) for name in records[0]
        }
        if output_hidden_states:
            outputs.hidden_states = tuple(recorded.pop(f"features_{i}") for i in range(len(self.blocks) + 1))
        if output_maps:
            outputs.maps = {"correlation": cost, **recorded}
        if labels is not None:
            sizes = state.reshaped_input_sizes
            loss = per_class_cross_entropy(outputs.logits, labels, sizes, self.config.ignore_as_negative)
            outputs.loss_dict = {"loss_sem_seg": loss}
            outputs.loss = loss
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
            features = self.cost_embedding(maps[:, None]).flatten(2).transpose(1, 2)
            queries = None if tokens is None else tokens[classes]
            yield ClassChunk(rows, used_rows, shares, features, state.sam_features[rows], maps, queries)

    def _run_blocks(
        self,
        chunks: list[ClassChunk],
        num_classes: int,
        sums: list[ClassSums],
        keep_states: bool,
        keep_maps: bool,
    ) -> None:
        """All blocks, in place, over chunks that advance together; `sums` are each block's class sums."""
        positions = None if self.prompt_encoder is None else self.prompt_encoder.position_embeddings()
        for chunk in chunks:
            if keep_states:
                chunk.records["features_0"] = chunk.features
        for index, (block, of_classes) in enumerate(zip(self.blocks, sums, strict=True), start=1):
            for chunk in chunks:
                prompts = block.refine(chunk, self.prompt_encoder, positions)
                if keep_maps and prompts is not None:
                    record_prompts(chunk, prompts, index)
            if self.config.refined_feature_aggregation == "mean":
                average_over_classes(chunks, num_classes)
            for chunk in chunks:
                block.fuse(chunk, of_classes)
                if keep_states:
                    chunk.records[f"features_{index}"] = chunk.features
                if keep_maps:
                    # our reading of Figure 6: how much of the class's features is where
                    grid = chunk.prompt_map.shape[1:]
                    chunk.records[f"activation_{index}"] = chunk.features.norm(dim=2).unflatten(1, grid)

    def _tokens(self, text_embeds: torch.Tensor) -> torch.Tensor | None:
        """Queries of the SAM blocks beside the prompts, `[K, T, S]`: SAM's output tokens, then the text."""
        tokens = []
        if self.output_tokens is not None:
            tokens.append(self.output_tokens.expand(len(text_embeds), -1, -1))
        if self.text_token is not None:
            tokens.append(self.text_token(text_embeds)[:, None])
        return torch.cat(tokens, dim=1) if tokens else None

    def _decode(self, chunk: ClassChunk, prepared: list[PreparedUpsampling]) -> torch.Tensor:
        """Logits `[n, 4h, 4w]`; `prepared` is what each stage makes of all rows."""
        maps = chunk.features.unflatten(1, tuple(chunk.prompt_map.shape[1:]))
        for stage, of_all in zip(self.decoder, prepared, strict=True):
            maps = stage(maps, chunk.counts, of_all.of_pictures(chunk.used_rows))
        return self.head(maps.permute(0, 3, 1, 2))[:, 0]

    def _check_request(self, rejection_top_k: int | None, max_classes: int | None, chunk_size: int | None) -> None:
        limits = {"rejection_top_k": rejection_top_k, "max_classes": max_classes, "class_chunk_size": chunk_size}
        for name, value in limits.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or None to switch it off, got {value}.")
        if self.training and rejection_top_k is not None:
            raise ValueError("Early rejection is for inference: pass rejection_top_k=None in training.")
        limited = rejection_top_k is not None or max_classes is not None
        if limited and self.config.refined_feature_aggregation == "mean":
            raise ValueError(
                "This model averages its maps over all classes: rejecting some would change the others. Pass "
                "rejection_top_k=None and max_classes=None."
            )


def kept_classes(cost: torch.Tensor, top_k: int | None, max_classes: int | None) -> torch.Tensor | None:
    """Classes `[R, K]` bool that are segmented, by their cosines `[R, K, h, w]`; None: all.

    Args:
        top_k: a class has to be among the k with the highest cosine at some position of its row.
        max_classes: it has to be among so many with the highest cosine anywhere.
    """
    num_classes = cost.shape[1]
    kept = None
    if top_k is not None:
        best = cost.flatten(2).topk(min(top_k, num_classes), dim=1, sorted=False).indices
        kept = torch.zeros(cost.shape[:2], dtype=torch.bool, device=cost.device).scatter(1, best.flatten(1), True)
    if max_classes is not None and max_classes < num_classes:
        strongest = torch.zeros(cost.shape[:2], dtype=torch.bool, device=cost.device)
        strongest = strongest.scatter(1, strongest_classes(cost[:, :, None], max_classes), True)
        kept = strongest if kept is None else kept & strongest
    return kept


def by_class(
    parts: list[torch.Tensor], shape: tuple[int, int], kept: torch.Tensor | None, missing: float
) -> torch.Tensor:
    """Values `[n, ...]` of the pairs that are `kept` `[R, K]` (None: all) -> `[R, K, ...]`, `missing` elsewhere."""
    values = torch.cat(parts)
    if kept is None:
        return values.unflatten(0, tuple(shape))
    return values.new_full((*shape, *values.shape[1:]), missing).index_put((kept,), values)


def average_over_classes(chunks: list[ClassChunk], num_classes: int) -> None:
    """Replace each class's refined map by the mean over all `num_classes` of its row; the chunks hold them all."""
    first = chunks[0].refined
    num_rows = chunks[-1].used_rows.stop
    means = first.new_zeros(num_rows, *first.shape[1:])
    for chunk in chunks:
        means = means.index_add(0, chunk.rows, chunk.refined / num_classes)
    for chunk in chunks:
        chunk.refined = means[chunk.rows]


def record_prompts(chunk: ClassChunk, prompts: PseudoPrompts, index: int) -> None:
    """Keep the prompts of block `index`: masks `[n, h, w]`; points `[n, objects, 3]`: x, y, and whether it is one."""
    chunk.records[f"mask_prompt_{index}"] = prompts.masks
    valid = prompts.valid[..., None].to(prompts.points.dtype)
    chunk.records[f"point_prompt_{index}"] = torch.cat([prompts.points, valid], dim=-1)


__all__ = ["ESCNetForOpenVocabularySegmentation", "ESCNetImageState"]
