"""SAN against the original: every recorded tensor from recorded inputs, and everything end to end."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ov_segmentation.layers.clip_vision import clip_position_embedding, embed_patches, run_blocks
from ov_segmentation.losses import MaskClassificationCriterion, Match, masks_from_labels, sum_losses
from ov_segmentation.modeling_outputs import OpenVocabularySegmentationOutput
from ov_segmentation.models.san.convert_san import convert, map_keys
from ov_segmentation.models.san.modeling_san import SANForOpenVocabularySegmentation, SANImageState
from ov_segmentation.models.san.recognition import cross_attention_bias, masked_attention_bias, pool_bias
from ov_segmentation.models.san.side_adapter import Proposals, SideFeatures

from .common import Case, Comparison, assert_close, check_recorded, each_case, each_recorded_tensor

FORMS = {"masked_self_attention": "masked", "cross_attention": "cross"}
TOKENS, LOGITS, SCORES, NORMALISED = 1e-4, 3e-4, 5e-5, 1e-6


class RecordedDraws:
    """The random points that the original drew."""

    def __init__(self, case: SANCase) -> None:
        self.case = case

    def uniform(self, name: str, picture: int, shape: tuple[int, ...]) -> torch.Tensor:
        """The recorded points, by the name that our criterion gives the draw."""
        kind, _, number = name.partition("_")
        depth = f"aux_{number}" if number else "main"
        recorded = self.case.inputs
        if kind == "matcher":
            points = recorded[f"train/random/{depth}/matcher_points_image_{picture}"]
        else:
            file = {"candidates": "loss_candidate_points", "extra": "loss_extra_random_points"}[kind]
            counts = [len(match.queries) for match in self.case.matches(depth)]
            points = recorded[f"train/random/{depth}/{file}"].split(counts)[picture]
        assert points.shape == shape
        return points


class RecordedPointsCriterion(MaskClassificationCriterion):
    """The criterion at the points where the original took its losses."""

    case: SANCase

    def uncertain_points(self, mask_logits: torch.Tensor, suffix: str, counts: list[int], draws) -> torch.Tensor:
        return self.case.expected[f"train/{depth_of(suffix)}/loss_points_used"]


def depth_of(suffix: str) -> str:
    """Our suffix of a supervised depth -> the fixture's name."""
    return f"aux{suffix}" if suffix else "main"


class SANCase(Case):
    """A SAN fixture, its model, and the stages between recorded tensors."""

    def __init__(self, folder: Path) -> None:
        super().__init__("san", folder)
        self.model = convert(self.checkpoint, self.config).eval()
        self.vision = self.model.clip.vision_model
        self.grid = tuple(self.hparams["side_grid_hw"])
        self.clip_grid = tuple(self.hparams["clip_grid_hw"])
        self.first_recognition = (
            self.config.clip_config.vision_config.num_hidden_layers - self.config.num_recognition_layers
        )

    def encode(self, pixel_values: torch.Tensor, form: str, for_training: bool = False) -> SANImageState:
        """The picture side in one of the two recognition forms."""
        config = self.model.config
        before, config.recognition_attention = config.recognition_attention, form
        try:
            return self.model._encode_image(pixel_values, for_training=for_training, reshaped_input_sizes=None)
        finally:
            config.recognition_attention = before

    # ---------------------------------------------------------------- text and CLIP

    def text(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.encode_vocabulary(input_ids, torch.ones_like(input_ids))

    def per_template(self) -> torch.Tensor:
        ids = self.inputs["token_ids"]
        return self.text(ids.flatten(0, 1)[:, None]).unflatten(0, ids.shape[:2])

    def clip_tokens(self, layer: int) -> torch.Tensor:
        """The recorded tokens of a CLIP layer, class token first."""
        maps, token = (
            self.expected[f"clip/layer_{layer:02d}_feature_map"],
            self.expected[f"clip/layer_{layer:02d}_cls_token"],
        )
        return torch.cat([token, maps.flatten(2).transpose(1, 2)], dim=1)

    def recorded_clip_layers(self) -> list[int]:
        return sorted(int(name[11:13]) for name in self.expected if re.fullmatch(r"clip/layer_\d\d_feature_map", name))

    def computed_clip_tokens(self, layer: int) -> torch.Tensor:
        """A CLIP layer, from the nearest recorded one below."""
        if layer == 0:
            return embed_patches(self.vision, self.expected["pre/clip_input"])[0]
        start = max(i for i in self.recorded_clip_layers() if i < layer)
        return run_blocks(self.vision.encoder.layers[start:layer], self.clip_tokens(start))[-1]

    def clip_map(self, layer: int) -> torch.Tensor:
        return self.computed_clip_tokens(layer)[:, 1:].transpose(1, 2).unflatten(2, self.clip_grid)

    # ---------------------------------------------------------------- side network

    @property
    def side(self) -> torch.nn.Module:
        return self.model.side_adapter

    def fuse(self, layer: int, tokens: torch.Tensor) -> torch.Tensor:
        clip = {clip_layer: self.clip_tokens(clip_layer) for clip_layer, _ in self.config.fusion_map}
        return self.side.fuse(layer, tokens, self.grid, clip, self.clip_grid)

    def tokens_before_fusion(self, layer: int) -> torch.Tensor:
        if layer:
            return self.expected[f"side/block_{layer}_output_before_fusion"]
        tokens = torch.cat([self.side.query_embedding, self.expected["side/patch_tokens"]], dim=1)
        return tokens + self.side.positions(self.grid)

    def block_input(self, block: int) -> torch.Tensor:
        tokens = self.fuse(block - 1, self.tokens_before_fusion(block - 1))
        return tokens + self.side.positions(self.grid) if block > 1 else tokens

    def fused_visual(self, number: int) -> torch.Tensor:
        layer = self.config.fusion_map[number][1]
        return self.fuse(layer, self.tokens_before_fusion(layer))[:, self.config.num_queries :]

    def projected(self, number: int) -> torch.Tensor:
        clip_layer, side_layer = self.config.fusion_map[number]
        return self.side.fusion_layers[str(side_layer)].project(self.clip_tokens(clip_layer)[:, 1:], self.clip_grid)

    def output_tokens(self, which: str) -> torch.Tensor:
        layer = self.config.deep_supervision_layers[-1 if which == "final" else -2]
        return self.fuse(layer, self.tokens_before_fusion(layer))

    def queries(self, which: str) -> torch.Tensor:
        return self.output_tokens(which)[:, : self.config.num_queries]

    def visual_map(self, which: str) -> torch.Tensor:
        return self.output_tokens(which)[:, self.config.num_queries :].transpose(1, 2).unflatten(2, self.grid)

    def recorded_features(self) -> SideFeatures:
        visual = self.expected["side/final_visual_map"].flatten(2).transpose(1, 2)
        return SideFeatures(self.expected["side/final_query_tokens"], visual)

    def decoder_map(self, mlp: torch.nn.Module) -> torch.Tensor:
        return mlp(self.recorded_features().visual).transpose(1, 2).unflatten(2, self.grid)

    def proposals(self) -> Proposals:
        return self.side.decoder(self.recorded_features(), self.grid)

    # ---------------------------------------------------------------- recognition

    def pooled_bias(self) -> torch.Tensor:
        """The recorded bias on CLIP's grid, `[1, heads, N, L]`."""
        bias = self.expected["side/attention_bias"]
        split = (self.config.num_bias_layers, self.config.attention_bias_heads)
        return pool_bias(bias.unflatten(1, split), self.clip_grid)[:, 0]

    def recognition_state(self, block: int, form: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Recorded SLS and CLIP tokens before a recognition block."""
        if block == 0:
            tokens = self.clip_tokens(self.first_recognition)
            return tokens[:, :1].expand(-1, self.config.num_queries, -1), tokens
        tokens = self.expected[f"rec/masked_self_attention/cls_and_visual_tokens_after_block_{block - 1}"]
        return self.expected[f"rec/{form}/sls_tokens_after_block_{block - 1}"], tokens

    def recognised(self, form: str, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """SLS and CLIP tokens after a recognition block."""
        sls, tokens = self.recognition_state(block, form)
        layer, bias = self.vision.encoder.layers[self.first_recognition + block], self.pooled_bias()
        heads = self.vision.config.num_attention_heads
        bias = bias.expand(-1, heads, -1, -1)
        if form == "cross_attention":
            return self.model.recognition.cross_block(sls, tokens, cross_attention_bias(bias), layer, False)[:2]
        hidden = layer(torch.cat([sls, tokens], dim=1), masked_attention_bias(bias))
        return hidden[:, : self.config.num_queries], hidden[:, self.config.num_queries :]

    def mask_embedding(self, form: str) -> torch.Tensor:
        sls = self.expected[f"rec/{form}/sls_tokens_after_block_{self.config.num_recognition_layers - 1}"]
        projected = self.model.clip.visual_projection(self.vision.post_layernorm(sls))
        return torch.nn.functional.normalize(projected, dim=-1)

    def segment(self, form: str) -> OpenVocabularySegmentationOutput:
        """The class side, from recorded mask embeddings and class embeddings."""
        state = SANImageState(
            masks_queries_logits=self.expected["side/mask_logits_low_res"],
            mask_embeds=self.expected[f"rec/{form}/mask_embedding"],
        )
        return self.set_sizes(self.model._segment(state, self.expected["text/embedding_per_class"], None))

    def set_sizes(self, outputs: OpenVocabularySegmentationOutput) -> OpenVocabularySegmentationOutput:
        """Give outputs the sizes of the fixture's picture."""
        outputs.original_sizes = torch.tensor([self.hparams["image_hw"]])
        outputs.reshaped_input_sizes = torch.tensor([self.hparams["resized_hw"]])
        outputs.padded_sizes = torch.tensor([self.hparams["padded_hw"]])
        return outputs

    def scores(self, outputs: OpenVocabularySegmentationOutput) -> list[torch.Tensor]:
        sizes = [tuple(size) for size in outputs.original_sizes.tolist()]
        results = self.image_processor.post_process_semantic_segmentation(
            outputs, target_sizes=sizes, return_segmentation_scores=True
        )
        return [result.segmentation_scores for result in results]

    def mask_logits_at_picture_size(self) -> torch.Tensor:
        """Through the scores: with one class per query, of weight 1, the scores are the masks' probabilities.

        Resizing is linear, so the logits are shrunk to where the sigmoid can be inverted exactly.
        """
        masks = self.expected["side/mask_logits_low_res"]
        largest = masks.abs().max()
        outputs = self.segment("cross_attention")
        outputs.masks_queries_logits = masks / largest
        outputs.class_queries_scores = torch.eye(masks.shape[1])[None]
        return (self.scores(outputs)[0].double().logit() * largest).float()

    @functools.cached_property
    def batch_scores(self) -> list[torch.Tensor]:
        pictures = [self.inputs["image"].numpy(), self.inputs["batch/image_1"].numpy()]
        batch = self.image_processor(images=pictures, return_tensors="pt")
        return self.scores(self.model(**batch, text_embeds=self.expected["text/embedding_per_class"]))

    # ---------------------------------------------------------------- training

    def matches(self, depth: str) -> list[Match]:
        names = ("queries", "targets")
        return [
            Match(*(self.expected[f"train/{depth}/matched_{name}_image_{i}"] for name in names))
            for i in range(len(self.inputs["train/images"]))
        ]

    @functools.cached_property
    def train_batch(self) -> dict[str, torch.Tensor]:
        """The training pictures as they are: no resize, no padding."""
        return self.image_processor(
            images=list(self.inputs["train/images"].permute(0, 2, 3, 1).numpy()),
            segmentation_maps=[labels.numpy() for labels in self.inputs["train/segmentation"]],
            do_resize=False,
            do_pad=False,
            return_tensors="pt",
        )

    @functools.cached_property
    def training(self) -> dict[str, torch.Tensor]:
        """Predictions, weighted losses and gradients of the training pictures."""
        self.model.zero_grad()
        with torch.enable_grad():
            state = self.encode(self.train_batch["pixel_values"], "masked", for_training=True)
            predictions = self.model.predictions(state, self.expected["text/embedding_per_class"])
            criterion = RecordedPointsCriterion(**vars(self.model.criterion))
            criterion.case = self
            matches = {prediction.suffix: self.matches(depth_of(prediction.suffix)) for prediction in predictions}
            losses = criterion(predictions, self.train_batch["labels"], RecordedDraws(self), matches)
            total = sum_losses(losses)
            total.backward()
        result = {**losses, "loss_total": total}
        for prediction in predictions:
            depth = depth_of(prediction.suffix)
            result[f"{depth}/pred_class_logits"] = prediction.class_logits
            result[f"{depth}/pred_mask_logits"] = prediction.mask_logits
        parameters = dict(self.model.named_parameters())
        for source, target in self.key_map.items():
            if not isinstance(target, str) and parameters[target[0]].grad is not None:
                result[f"grad/{source}"] = torch.cat([parameters[name].grad for name in target])
        self.model.zero_grad()
        return {name: value.detach() for name, value in result.items()}

    @functools.cached_property
    def key_map(self) -> dict[str, list[str] | str]:
        return map_keys(torch.load(self.checkpoint, weights_only=True)["model"], self.config)

    def gradient(self, key: str) -> torch.Tensor:
        return self.training[f"grad/{key}"].reshape(self.expected[f"train/grad/{key}"].shape)

    def unweighted(self, term: str) -> torch.Tensor:
        weight = self.hparams["training"]["loss_weights"][re.match(r"loss_[a-z]+", term)[0]]
        return self.training[term] / weight

    def rematched(self, depth: str, picture: int) -> Match:
        """The Hungarian matching, from recorded logits and points."""
        prediction = self.recorded_prediction(depth)
        targets = masks_from_labels(self.train_batch["labels"])
        return self.model.criterion.match(prediction, targets, RecordedDraws(self))[picture]

    def recorded_prediction(self, depth: str):
        from ov_segmentation.losses import Prediction

        logits = (self.expected[f"train/{depth}/pred_{kind}_logits"] for kind in ("class", "mask"))
        return Prediction(depth.removeprefix("main").removeprefix("aux"), *logits)

    def points(self, depth: str) -> torch.Tensor:
        prediction, matches = self.recorded_prediction(depth), self.matches(depth)
        logits = torch.cat([row[match.queries] for row, match in zip(prediction.mask_logits, matches, strict=True)])
        counts = [len(match.queries) for match in matches]
        return self.model.criterion.uncertain_points(logits, prediction.suffix, counts, RecordedDraws(self))


COMPARISONS = [
    Comparison("text/embedding_per_template", lambda c, m: c.per_template(), 1e-5),
    Comparison("text/embedding_per_class", lambda c, m: c.text(c.inputs["token_ids"].transpose(0, 1)), 1e-5),
    Comparison(
        "text/classifier_unit_with_background",
        lambda c, m: c.model.classifier(c.expected["text/embedding_per_class"]) / c.model.clip.logit_scale.exp(),
        1e-6,
    ),
    Comparison("text/classifier_scaled", lambda c, m: c.model.classifier(c.expected["text/embedding_per_class"]), 1e-4),
    Comparison(
        "pre/side_input",
        lambda c, m: c.image_processor(images=c.inputs["image"].numpy(), return_tensors="pt")["pixel_values"],
        NORMALISED,
    ),
    Comparison("pre/clip_input", lambda c, m: c.model.clip_input(c.expected["pre/side_input"]), NORMALISED),
    Comparison("clip/positional_embedding_resized", lambda c, m: clip_position_embedding(c.vision, c.clip_grid), 1e-6),
    Comparison(r"clip/layer_(\d+)_cls_token", lambda c, m: c.computed_clip_tokens(int(m[1]))[:, :1], TOKENS),
    Comparison(r"clip/layer_(\d+)_feature_map", lambda c, m: c.clip_map(int(m[1])), TOKENS),
    Comparison(
        "side/patch_tokens",
        lambda c, m: c.side.patch_embedding(c.expected["pre/side_input"]).flatten(2).transpose(1, 2),
        TOKENS,
    ),
    Comparison(r"side/block_(\d+)_input", lambda c, m: c.block_input(int(m[1])), TOKENS),
    Comparison(
        r"side/block_(\d+)_output_before_fusion",
        lambda c, m: c.side.blocks[int(m[1]) - 1](c.expected[f"side/block_{m[1]}_input"]),
        TOKENS,
    ),
    Comparison(r"side/fusion_layer_(\d+)_projected_clip_map", lambda c, m: c.projected(int(m[1])), TOKENS),
    Comparison(r"side/fusion_layer_(\d+)_visual_tokens_after", lambda c, m: c.fused_visual(int(m[1])), TOKENS),
    Comparison(r"side/(final|aux)_query_tokens", lambda c, m: c.queries(m[1]), TOKENS),
    Comparison(r"side/(final|aux)_visual_map", lambda c, m: c.visual_map(m[1]), TOKENS),
    Comparison("side/decoder_query", lambda c, m: c.side.decoder.query_mlp(c.recorded_features().queries), TOKENS),
    Comparison("side/decoder_pixel", lambda c, m: c.decoder_map(c.side.decoder.pixel_mlp), TOKENS),
    Comparison("side/decoder_attn", lambda c, m: c.decoder_map(c.side.decoder.bias_mlp), TOKENS),
    Comparison("side/mask_logits_low_res", lambda c, m: c.proposals().mask_logits, TOKENS),
    Comparison("side/attention_bias", lambda c, m: c.proposals().attention_bias.flatten(1, 2), TOKENS),
    Comparison("rec/cross_attention/attention_bias_matrix", lambda c, m: c.pooled_bias()[0], TOKENS),
    Comparison(
        "rec/masked_self_attention/attention_bias_matrix",
        lambda c, m: masked_attention_bias(c.pooled_bias().expand(-1, c.vision.config.num_attention_heads, -1, -1))[0],
        TOKENS,
    ),
    Comparison(r"rec/(\w+)/sls_tokens_after_block_(\d+)", lambda c, m: c.recognised(m[1], int(m[2]))[0], TOKENS),
    Comparison(
        r"rec/(\w+)/cls_and_visual_tokens_after_block_(\d+)", lambda c, m: c.recognised(m[1], int(m[2]))[1], TOKENS
    ),
    Comparison(r"rec/(\w+)/mask_embedding", lambda c, m: c.mask_embedding(m[1]), TOKENS),
    Comparison(r"rec/(\w+)/class_logits", lambda c, m: c.segment(m[1]).class_queries_logits, LOGITS),
    Comparison(
        "final/class_probabilities", lambda c, m: c.segment("masked_self_attention").class_queries_scores, SCORES
    ),
    Comparison("final/mask_logits_image_size", lambda c, m: c.mask_logits_at_picture_size(), TOKENS),
    Comparison(r"final/(\w+)/sem_seg_scores", lambda c, m: c.scores(c.segment(m[1]))[0], SCORES),
    Comparison(r"batch/sem_seg_scores_image_(\d+)", lambda c, m: c.batch_scores[int(m[1])], SCORES),
    Comparison(r"train/(main|aux_\d+)/pred_class_logits", lambda c, m: c.training[f"{m[1]}/pred_class_logits"], LOGITS),
    Comparison(r"train/(main|aux_\d+)/pred_mask_logits", lambda c, m: c.training[f"{m[1]}/pred_mask_logits"], TOKENS),
    Comparison(
        r"train/(main|aux_\d+)/matched_queries_image_(\d+)", lambda c, m: c.rematched(m[1], int(m[2])).queries, 0
    ),
    Comparison(
        r"train/(main|aux_\d+)/matched_targets_image_(\d+)", lambda c, m: c.rematched(m[1], int(m[2])).targets, 0
    ),
    Comparison(r"train/(main|aux_\d+)/loss_points_used", lambda c, m: c.points(m[1]), 0),
    Comparison(r"train/loss_weighted/(\w+)", lambda c, m: c.training[m[1]], 1e-5, relative=True),
    Comparison(r"train/loss_unweighted/(\w+)", lambda c, m: c.unweighted(m[1]), 1e-5, relative=True),
    Comparison("train/loss_total", lambda c, m: c.training["loss_total"], 1e-5, relative=True),
    Comparison(r"train/grad/(.+)", lambda c, m: c.gradient(m[1]), 1e-4, relative=True),
]
EXCUSED = {
    r"final/\w+/sem_seg_scores_if_resized_last": "a setting of the original that no release uses; we do not offer it"
}


@each_recorded_tensor("san")
@torch.no_grad()
def test_recorded_tensor(folder: Path, name: str) -> None:
    check_recorded(SANCase.load(folder), name, COMPARISONS, EXCUSED)


@each_case("san")
def test_resize_is_exact(folder: Path) -> None:
    case = SANCase.load(folder)
    for name in ("image", "batch/image_1"):
        batch = case.image_processor(
            images=case.inputs[name].numpy(), do_rescale=False, do_normalize=False, do_pad=False, return_tensors="np"
        )
        resized = case.inputs[f"{name}_resized"].numpy()
        np.testing.assert_array_equal(batch["pixel_values"][0], resized.transpose(2, 0, 1).astype(np.float32))


@each_case("san")
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_end_to_end(folder: Path, form: str) -> None:
    case = SANCase.load(folder)
    ids = case.inputs["token_ids"].transpose(0, 1)
    batch = case.image_processor(images=case.inputs["image"].numpy(), return_tensors="pt")
    state = case.encode(batch["pixel_values"], FORMS[form])
    for name in ("original_sizes", "reshaped_input_sizes", "padded_sizes"):
        setattr(state, name, batch[name])
    outputs = case.model(image_state=state, input_ids=ids, attention_mask=torch.ones_like(ids))
    assert_close(outputs.masks_queries_logits, case.expected["side/mask_logits_low_res"], TOKENS)
    assert_close(state.mask_embeds, case.expected[f"rec/{form}/mask_embedding"], TOKENS)
    assert_close(outputs.class_queries_logits, case.expected[f"rec/{form}/class_logits"], LOGITS)
    assert_close(case.scores(outputs)[0], case.expected[f"final/{form}/sem_seg_scores"], SCORES)


@each_case("san")
def test_the_two_forms_of_recognition_agree(folder: Path) -> None:
    case = SANCase.load(folder)
    with torch.no_grad():
        states = [case.encode(case.expected["pre/side_input"], form) for form in ("cross", "masked")]
        cross, masked = (
            case.model(image_state=s, text_embeds=case.expected["text/embedding_per_class"]) for s in states
        )
    assert_close(cross.class_queries_logits, masked.class_queries_logits, 1e-4)
    for outputs in (cross, masked):
        case.set_sizes(outputs)
    assert_close(case.scores(cross)[0], case.scores(masked)[0], 1e-5)


@each_case("san")
def test_gradient_norms_of_everything_that_is_trained(folder: Path) -> None:
    case = SANCase.load(folder)
    recorded = json.loads((folder / "train_grad_norms.json").read_text())
    found = {name.removeprefix("grad/"): value for name, value in case.training.items() if name.startswith("grad/")}
    assert set(found) == set(recorded)
    for name, norm in recorded.items():
        assert abs(found[name].norm().item() - norm) <= max(1e-4 * norm, 1e-6), name


@each_case("san")
def test_hungarian_losses_with_recorded_draws(folder: Path) -> None:
    """The whole criterion, matching and choice of points included."""
    case = SANCase.load(folder)
    with torch.no_grad():
        state = case.encode(case.train_batch["pixel_values"], "cross", for_training=True)
        predictions = case.model.predictions(state, case.expected["text/embedding_per_class"])
        losses = case.model.criterion(predictions, case.train_batch["labels"], RecordedDraws(case))
    for name, value in losses.items():
        assert_close(value, case.expected[f"train/loss_weighted/{name}"], 1e-4, relative=True)


def test_an_unknown_tensor_fails() -> None:
    with pytest.raises(AssertionError, match="no comparison"):
        check_recorded(None, "side/something_else", COMPARISONS, EXCUSED)


def test_every_loaded_class_is_the_public_one() -> None:
    import ov_segmentation

    assert ov_segmentation.SANForOpenVocabularySegmentation is SANForOpenVocabularySegmentation
