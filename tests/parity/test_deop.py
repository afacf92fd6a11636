"""DeOP against the original: every recorded tensor from recorded inputs, and everything end to end."""

from __future__ import annotations

import copy
import functools
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn.functional import interpolate, normalize

from ov_segmentation.layers import fused_convolution
from ov_segmentation.layers.severance import token_masks
from ov_segmentation.losses import Prediction, masks_from_labels, sum_losses
from ov_segmentation.modeling_outputs import OpenVocabularySegmentationOutput
from ov_segmentation.models.deop.convert_deop import convert, map_keys
from ov_segmentation.models.deop.severed_clip import severed_clip_tokens
from ov_segmentation.models.deop.stage_losses import fill_outside, region_features

from .common import Case, Comparison, assert_close, check_recorded, each_case, each_recorded_tensor

# an error of 1e-7 in a unit feature is one of 1e-5 in a logit, since the temperature is 100
MAPS, CLASS_LOGITS, SCORES, NORMALISED, PROBABILITIES = 1e-4, 1e-3, 5e-5, 1e-6, 1e-4
LOSSES, GRADIENTS = 1e-4, 1e-4
STAGES = {"train": "segmentation", "proposal_train": "proposals"}


class DeOPCase(Case):
    """A DeOP fixture, its model, and the stages between recorded tensors."""

    def __init__(self, folder: Path) -> None:
        super().__init__("deop", folder)
        self.model = convert(self.checkpoint, self.config).eval()
        self.network = self.model.proposal_network

    # ---------------------------------------------------------------- pictures and proposals

    @functools.cached_property
    def batch(self) -> dict[str, torch.Tensor]:
        return self.image_processor(images=self.inputs["image_uint8_rgb"].numpy(), return_tensors="pt")

    def resized(self) -> torch.Tensor:
        plain = self.image_processor(
            images=self.inputs["image_uint8_rgb"].numpy(), do_rescale=False, do_normalize=False, return_tensors="pt"
        )
        height, width = plain["reshaped_input_sizes"][0].tolist()
        return plain["pixel_values"][0, :, :height, :width]

    @functools.cached_property
    def features(self) -> list[torch.Tensor]:
        with torch.no_grad():
            return self.network.backbone(self.expected["pre.normalized_padded"])

    def lateral(self, stride: int) -> torch.Tensor:
        level = {4: 2, 8: 3, 16: 4}[stride]
        return self.network.pixel_decoder.fpn.layers[4 - level].proj(self.expected[f"backbone.res{level}"])

    def pyramid(self, stride: int) -> torch.Tensor:
        fpn = self.network.pixel_decoder.fpn
        if stride == 32:
            return fpn.stem(self.expected["backbone.res5"])
        level = {4: 2, 8: 3, 16: 4}[stride]
        above = self.expected[f"pixel_decoder.out_stride{2 * stride}"].clone()
        return fpn.layers[4 - level](above, self.expected[f"backbone.res{level}"])

    def queries(self) -> torch.Tensor:
        return torch.stack(self.network.query_decoder(self.expected["backbone.res5"]))

    def sine(self, decoder: torch.nn.Module, like: torch.Tensor) -> torch.Tensor:
        return decoder.position_embedding(like.shape, like.device, like.dtype)

    def masks(self, layer: int) -> torch.Tensor:
        embeddings = self.expected["proposal.mask_embeddings_all_layers"][layer]
        return torch.einsum("bnc,bchw->bnhw", embeddings, self.expected["pixel_decoder.mask_features"])

    # ---------------------------------------------------------------- CLIP

    def clip_map(self, kind: str | None = None, normalised: bool = False) -> torch.Tensor:
        """`[B, gh, gw, C]` from recorded pixels and mask logits; `kind`: another severance of the last block."""
        kinds = None if kind is None else ["none"] * (len(self.config.severance_of_blocks()) - 1) + [kind]
        inputs = self.expected["pre.normalized_padded"], self.expected["proposal.mask_logits"]
        found = self.model.clip_map(*inputs) if normalised else self.model.patch_features(*inputs, kinds)
        return found.permute(0, 2, 3, 1)

    @functools.cached_property
    def clip_steps(self) -> dict[str, torch.Tensor]:
        """Tokens of CLIP's pass and what its severed block does, under the fixture's names."""
        vision, steps = self.model.clip.vision_model, {}
        block = vision.encoder.layers[self.config.severed_layers[0]]

        def before_norm(module, inputs) -> None:
            steps["tokens_before_ln_pre"] = inputs[0]

        def severed(module, inputs, output) -> None:
            steps["severed_attention_output"] = output

        handles = [vision.pre_layrnorm.register_forward_pre_hook(before_norm)]
        handles.append(block.self_attn.out_proj.register_forward_hook(severed))
        grid = tuple(self.expected["cal.masks_for_pooling"].shape[-2:])
        masks = self.model._on_grid(self.expected["proposal.mask_logits"], grid).sigmoid()
        with torch.no_grad():
            states, _, leading = severed_clip_tokens(
                vision, self.model.visual_prompts, self.config, self.expected["pre.normalized_padded"], masks
            )
        for handle in handles:
            handle.remove()
        steps["severance_query_mask_probs"] = token_masks(masks, leading)
        steps["severance_patch_gain"] = token_masks(masks, leading).sum(dim=1)
        steps |= {f"block_input_{i}": state for i, state in enumerate(states[:-1])}
        return {**steps, "last_block_output": states[-1]}

    # ---------------------------------------------------------------- anchors

    @functools.cached_property
    def anchor_steps(self) -> dict[str, torch.Tensor]:
        """What the heatmap decoder does with recorded features and masks, under the fixture's names."""
        decoder, steps = self.model.heatmap_decoder, {}
        layer = decoder.heatmap_layer

        def keep(name: str):
            def hook(module, inputs, output) -> None:
                steps[name] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [
            part.register_forward_hook(keep(f"decoder_layer_{i}_output")) for i, part in enumerate(decoder.layers)
        ]
        handles.append(layer.self_attn.register_forward_hook(keep("out_layer_self_attention")))
        handles.append(layer.self_attn_layer_norm.register_forward_hook(keep("out_layer_queries")))
        handles.append(layer.register_forward_hook(keep("softmax")))
        features = self.expected["clip.feature_map_l2"].permute(0, 3, 1, 2)
        with torch.no_grad():
            heatmaps, embeddings = decoder(features, self.expected["cal.masks_for_pooling"])
        for handle in handles:
            handle.remove()
        grid = features.shape[-2:]
        steps["heatmap_softmax_per_head"] = steps.pop("softmax").unflatten(-1, grid)
        steps["heatmap_masked_per_head"] = heatmaps.unflatten(-1, grid)
        steps["heatmap_masked_head_mean"] = heatmaps.mean(dim=1).unflatten(-1, grid)
        return {**steps, "pooled_segment_embeddings": embeddings}

    # ---------------------------------------------------------------- text, scores

    def text(self) -> torch.Tensor:
        return self.model.encode_vocabulary(self.inputs["class_token_ids"][:, None])

    def class_logits(self) -> torch.Tensor:
        return self.model.class_logits(
            self.expected["cal.segment_embeddings_l2"], self.expected["text.class_features_l2"]
        )

    @functools.lru_cache  # noqa: B019 - cases live as long as the tests
    def outputs(self, attention: str = "sdpa") -> OpenVocabularySegmentationOutput:
        """From the source picture and the token ids, through the public interface."""
        self.model.set_attn_implementation(attention)
        try:
            with torch.no_grad():
                return self.model(**self.batch, input_ids=self.inputs["class_token_ids"][:, None])
        finally:
            self.model.set_attn_implementation("sdpa")

    def from_recorded(self) -> OpenVocabularySegmentationOutput:
        """The outputs that recorded logits make."""
        return OpenVocabularySegmentationOutput(
            class_queries_logits=self.expected["cls.logits"],
            masks_queries_logits=self.expected["proposal.mask_logits"],
            class_queries_scores=self.expected["cls.probabilities"][..., :-1],
            **{name: self.batch[name] for name in ("original_sizes", "reshaped_input_sizes", "padded_sizes")},
        )

    def scores(self, outputs: OpenVocabularySegmentationOutput, size: str) -> torch.Tensor:
        targets = self.batch["original_sizes" if size == "final" else "reshaped_input_sizes"]
        (result,) = self.image_processor.post_process_semantic_segmentation(
            outputs, target_sizes=targets.tolist(), return_segmentation_scores=True
        )
        return result.segmentation_scores

    def mask_probabilities(self) -> torch.Tensor:
        masks = self.expected["proposal.mask_logits"]
        size = self.expected["pre.normalized_padded"].shape[-2:]
        height, width = self.batch["reshaped_input_sizes"][0].tolist()
        return interpolate(masks, size=size, mode="bilinear", align_corners=False).sigmoid()[0, :, :height, :width]

    # ---------------------------------------------------------------- training

    @property
    def labels(self) -> torch.Tensor:
        labels = self.inputs["train_target_segmentation"].clone()
        labels[labels == 255] = -100
        return labels

    @functools.lru_cache  # noqa: B019
    def training(self, kind: str) -> tuple[OpenVocabularySegmentationOutput, dict[str, torch.Tensor]]:
        """Outputs and gradients of a training step; the third stage ("train") or the second ("proposal_train")."""
        model, stage = self.model, self.config.training_stage
        batch = self.image_processor(
            images=list(self.inputs["train_images_uint8_rgb_chw"].numpy()), do_resize=False, return_tensors="pt"
        )
        model.config.training_stage = STAGES[kind]
        model.freeze_pretrained()
        model.zero_grad()
        model.train()  # dropout is 0 in the fixtures' configuration
        try:
            outputs = model(**batch, input_ids=self.inputs["class_token_ids"][:, None], labels=self.labels)
            outputs.loss.backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        finally:
            model.config.training_stage = stage
            model.freeze_pretrained()
            model.zero_grad()
            model.eval()
        return outputs, gradients

    def raw_loss(self, kind: str, name: str) -> torch.Tensor:
        config, criterion = self.config, self.model.criterion
        weights = {"loss_ce": config.focal_weight, "loss_decoder_dice": config.dice_weight}
        if kind == "proposal_train":
            weights = {f"loss_{term}": weight for term, weight in criterion.weights.items()}
        losses, _ = self.training(kind)
        return (losses.loss_dict[name] / weights[re.sub(r"_\d+$", "", name)]).reshape(1)

    def gradient(self, name: str) -> torch.Tensor:
        """Under the original's name; packed projections are put together again."""
        targets = map_keys([name], self.config)[name]
        return torch.cat([self.training("train")[1].get(t, self.zeros(t)) for t in targets])

    def zeros(self, name: str) -> torch.Tensor:
        """The gradient of a parameter that takes no part."""
        return torch.zeros_like(dict(self.model.named_parameters())[name])

    def matches(self, picture: int) -> tuple[torch.Tensor, torch.Tensor]:
        expected = self.expected
        prediction = Prediction("", expected["proposal_train.class_logits"], expected["proposal_train.mask_logits"])
        return self.model.criterion.match(prediction, masks_from_labels(self.labels), None)[picture]


CLIP_STEPS = r"tokens_before_ln_pre|block_input_\d+|last_block_output|severance_\w+|severed_attention_output"
ANCHOR_STEPS = (
    r"decoder_layer_\d+_output|out_layer_\w+|heatmap_(softmax|masked)_(per_head|head_mean)|pooled_segment_embeddings"
)
SEVERANCE = {"gps_identity": "identity", "mps": "mask_guided", "no_severance": "none"}
COMPARISONS = [
    Comparison("pre.resized_image_uint8", lambda c, m: c.resized(), 0),
    Comparison("pre.normalized_padded", lambda c, m: c.batch["pixel_values"], NORMALISED),
    Comparison(r"backbone\.res(\d)", lambda c, m: c.features[int(m[1]) - 2], MAPS),
    Comparison(r"pixel_decoder\.lateral_stride(\d+)", lambda c, m: c.lateral(int(m[1])), MAPS),
    Comparison(r"pixel_decoder\.out_stride(\d+)", lambda c, m: c.pyramid(int(m[1])), MAPS),
    Comparison(
        "pixel_decoder.mask_features",
        lambda c, m: c.network.pixel_decoder.mask_projection(c.expected["pixel_decoder.out_stride4"]),
        MAPS,
    ),
    Comparison(
        "proposal.sine_position",
        lambda c, m: c.sine(c.network.query_decoder, torch.zeros_like(c.expected[m[0]])),
        MAPS,
    ),
    Comparison("proposal.query_states_all_layers", lambda c, m: c.queries(), MAPS),
    Comparison(
        "proposal.mask_embeddings_all_layers",
        lambda c, m: c.network.mask_head(c.expected["proposal.query_states_all_layers"]),
        MAPS,
    ),
    Comparison(
        "proposal.class_embed_head_all_layers",
        lambda c, m: c.network.embedding_head(c.expected["proposal.query_states_all_layers"]),
        MAPS,
    ),
    Comparison("proposal.mask_logits", lambda c, m: c.masks(-1), MAPS),
    Comparison(r"proposal\.aux_mask_logits_(\d)", lambda c, m: c.masks(int(m[1])), MAPS),
    Comparison(rf"clip\.({CLIP_STEPS})", lambda c, m: c.clip_steps[m[1]], MAPS),
    Comparison("clip.feature_map", lambda c, m: c.clip_map(), MAPS),
    Comparison("clip.feature_map_l2", lambda c, m: c.clip_map(normalised=True), MAPS),
    Comparison(r"alt\.feature_map_(gps_identity|mps|no_severance)", lambda c, m: c.clip_map(SEVERANCE[m[1]]), MAPS),
    Comparison(
        "cal.masks_for_pooling",
        lambda c, m: c.model._on_grid(c.expected["proposal.mask_logits"].sigmoid(), c.expected[m[0]].shape[-2:]),
        NORMALISED,
    ),
    Comparison(
        "cal.sine_position",
        lambda c, m: c.sine(c.model.heatmap_decoder, torch.zeros_like(c.expected[m[0]])),
        MAPS,
    ),
    Comparison(
        "cal.heatmap_logits_per_head",
        # what the softmax leaves of logits: their differences
        lambda c, m: (
            c.anchor_steps["heatmap_softmax_per_head"].log()
            + c.expected[m[0]].flatten(-2).logsumexp(dim=-1)[..., None, None]
        ),
        MAPS,
    ),
    Comparison(rf"cal\.({ANCHOR_STEPS})", lambda c, m: c.anchor_steps[m[1]], MAPS),
    Comparison(
        "cal.segment_embeddings_l2",
        lambda c, m: normalize(c.expected["cal.pooled_segment_embeddings"], dim=-1),
        NORMALISED,
    ),
    Comparison("text.class_features_l2", lambda c, m: c.text(), MAPS),
    Comparison(
        "text.with_no_object_last",
        lambda c, m: torch.cat([c.text(), normalize(c.model.no_object_embedding, dim=-1)]),
        MAPS,
    ),
    Comparison("cls.logits", lambda c, m: c.class_logits(), CLASS_LOGITS),
    Comparison("cls.probabilities", lambda c, m: c.expected["cls.logits"].softmax(dim=-1), NORMALISED),
    Comparison("post.mask_probabilities_cropped", lambda c, m: c.mask_probabilities(), NORMALISED),
    Comparison("post.scores_at_resized_size", lambda c, m: c.scores(c.from_recorded(), "resized"), SCORES),
    Comparison("final.semantic_scores", lambda c, m: c.scores(c.from_recorded(), "final"), SCORES),
    Comparison("final.argmax", lambda c, m: c.scores(c.outputs(), "final").argmax(dim=0), 0),
    Comparison(
        r"(train|proposal_train)\.class_logits", lambda c, m: c.training(m[1])[0].class_queries_logits, CLASS_LOGITS
    ),
    # from the picture on, up to 16 large: see test_proposals_end_to_end
    Comparison(r"(train|proposal_train)\.mask_logits", lambda c, m: c.training(m[1])[0].masks_queries_logits, 3e-4),
    Comparison(r"(train|proposal_train)\.raw_(loss_\w+)", lambda c, m: c.raw_loss(m[1], m[2]), LOSSES, relative=True),
    Comparison(
        r"train\.weighted_(loss_\w+)", lambda c, m: c.training("train")[0].loss_dict[m[1]].reshape(1), LOSSES, True
    ),
    Comparison(
        r"train\.total_loss", lambda c, m: sum_losses(c.training("train")[0].loss_dict).reshape(1), LOSSES, True
    ),
    Comparison(r"train\.grad\.(.+)", lambda c, m: c.gradient(m[1]), GRADIENTS, relative=True),
    Comparison(r"proposal_train\.matched_queries_image(\d)", lambda c, m: c.matches(int(m[1]))[0], 0),
    Comparison(r"proposal_train\.matched_targets_image(\d)", lambda c, m: c.matches(int(m[1]))[1], 0),
]


class PromptCase(Case):
    """The first stage's fixture."""

    def __init__(self, folder: Path) -> None:
        super().__init__("deop", folder)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The checkpoint is of an earlier training stage")
            self.model = convert(self.checkpoint, self.config).eval()

    @property
    def labels(self) -> torch.Tensor:
        return torch.where(self.inputs["mask"] > 0, self.inputs["category"][:, None, None], -100)

    @functools.cached_property
    def pixel_values(self) -> torch.Tensor:
        pictures = list(self.inputs["image_uint8_rgb_chw"].numpy())
        return self.image_processor(images=pictures, return_tensors="pt")["pixel_values"]

    def text(self) -> torch.Tensor:
        return self.model.encode_vocabulary(self.inputs["class_token_ids"][:, None])

    @functools.cached_property
    def loss(self) -> torch.Tensor:
        """Of a training step, whose gradient stays."""
        self.model.zero_grad()
        self.model.train()
        ids = self.inputs["class_token_ids"][:, None]
        loss = self.model(pixel_values=self.pixel_values, input_ids=ids, labels=self.labels).loss
        loss.backward()
        self.model.eval()
        return loss.reshape(1)

    def gradient(self) -> torch.Tensor:
        assert self.loss.requires_grad
        trained = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        assert set(trained) == {"text_prompt.context"}
        return trained["text_prompt.context"]


PROMPT_COMPARISONS = [
    Comparison("masked_normalized_images", lambda c, m: fill_outside(c.pixel_values, c.labels), NORMALISED),
    Comparison(
        "image_features_raw", lambda c, m: region_features(c.model.clip, c.expected["masked_normalized_images"]), MAPS
    ),
    Comparison("text_features_l2", lambda c, m: c.text(), MAPS),
    Comparison(
        "logits",
        lambda c, m: c.config.temperature * normalize(c.expected["image_features_raw"], dim=-1) @ c.text().T,
        CLASS_LOGITS,
    ),
    Comparison("loss_cls", lambda c, m: c.loss, LOSSES, relative=True),
    Comparison("grad.prefix_prompt", lambda c, m: c.gradient(), GRADIENTS, relative=True),
]


@each_recorded_tensor("deop", "case")
def test_recorded_tensor(folder: Path, name: str) -> None:
    check_recorded(DeOPCase.load(folder), name, COMPARISONS, {})


@each_recorded_tensor("deop", "prompt")
def test_recorded_tensor_of_the_first_stage(folder: Path, name: str) -> None:
    check_recorded(PromptCase.load(folder), name, PROMPT_COMPARISONS, {})


@each_case("deop", "case")
def test_picture_to_scores(folder: Path) -> None:
    """Everything from the source picture and the token ids, through the public interface."""
    case = DeOPCase.load(folder)
    outputs = case.outputs()
    assert_close(outputs.class_queries_logits, case.expected["cls.logits"], CLASS_LOGITS)
    assert_close(outputs.class_queries_scores, case.expected["cls.probabilities"][..., :-1], PROBABILITIES)
    for size, name in (("final", "final.semantic_scores"), ("resized", "post.scores_at_resized_size")):
        assert_close(case.scores(outputs, size), case.expected[name], SCORES)


@each_case("deop", "case")
def test_proposals_end_to_end(folder: Path) -> None:
    """Stage by stage they are exact (above). From the picture on, rounding grows through some fifty layers: with the
    attention written out, as the original has it, they agree to 1e-4; torch's fused kernel sums in another order."""
    case, expected = DeOPCase.load(folder), DeOPCase.load(folder).expected["proposal.mask_logits"]
    assert_close(case.outputs("eager").masks_queries_logits, expected, 1e-4)
    assert_close(case.outputs("sdpa").masks_queries_logits, expected, 2e-5 * expected.abs().max().item())


@each_case("deop", "case")
@torch.no_grad()
def test_proposals_with_fused_convolutions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What float32 leaves open is the distance between the recording and the same network in float64; the fast path,
    which pictures of this size do not take by themselves, is no farther away."""
    case = DeOPCase.load(folder)
    network, pictures = case.model.proposal_network, case.batch["pixel_values"]
    exact = copy.deepcopy(network).double()(pictures.double())[-1].mask_logits
    monkeypatch.setattr(fused_convolution, "LEAST_ELEMENTS", 1)
    fused = network(pictures)[-1].mask_logits
    recorded = case.expected["proposal.mask_logits"].double()
    assert (fused - exact).abs().max() <= (recorded - exact).abs().max()


@each_case("deop", "case")
@pytest.mark.parametrize("stage", ["train", "proposal_train"])
def test_what_a_stage_trains(folder: Path, stage: str) -> None:
    case = DeOPCase.load(folder)
    _, gradients = case.training(stage)
    parts = {name.split(".")[0] for name in gradients}
    expected = {"heatmap_decoder", "visual_prompts", "text_prompt"} if stage == "train" else {"proposal_network"}
    assert parts == {*expected, "no_object_embedding"}
