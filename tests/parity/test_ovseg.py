"""OVSeg against the original: every recorded tensor from recorded inputs, and everything end to end."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import interpolate, normalize

from ov_segmentation.layers.clip_vision import clip_position_embedding
from ov_segmentation.layers.mask_crops import CropGrid, cropped_masks, mask_boxes, masked_crops
from ov_segmentation.layers.mask_prompts import condense_masks, encode_crops
from ov_segmentation.losses import Prediction, masks_from_labels, sum_losses
from ov_segmentation.modeling_outputs import OpenVocabularySegmentationOutput
from ov_segmentation.models.ovseg.convert_ovseg import convert, map_keys
from ov_segmentation.models.ovseg.modeling_ovseg import OVSegImageState

from .common import Case, Comparison, assert_close, check_recorded, each_case, each_recorded_tensor

MAPS, MASK_LOGITS, CROPS, CROP_LOGITS, SCORES, NORMALISED, TEXT = 1e-4, 1e-4, 1e-4, 1e-3, 5e-5, 1e-6, 1e-5
# an error of 1e-7 in a unit feature is one of 1e-5 in a logit, since the temperature is 100
PROBABILITIES, LOSSES, GRADIENTS = 1e-4, 1e-4, 1e-4


class OVSegCase(Case):
    """An OVSeg fixture, its model, and the stages between recorded tensors."""

    def __init__(self, folder: Path) -> None:
        super().__init__("ovseg", folder)
        self.model = convert(self.checkpoint, self.config).eval()
        self.network = self.model.proposal_network

    # ---------------------------------------------------------------- pictures and proposals

    @functools.cached_property
    def batch(self) -> dict[str, torch.Tensor]:
        return self.image_processor(images=self.inputs["image_rgb_uint8"].numpy(), return_tensors="pt")

    @property
    def image_size(self) -> tuple[int, int]:
        return tuple(self.inputs["image_rgb_uint8"].shape[:2])

    @property
    def resized_size(self) -> tuple[int, int]:
        return tuple(self.inputs["image_resized_rgb_uint8"].shape[:2])

    def features(self) -> list[torch.Tensor]:
        return [self.expected[f"backbone_res{level}"] for level in (2, 3, 4, 5)]

    @functools.cached_property
    def backbone_steps(self) -> dict[str, torch.Tensor]:
        """Outputs of the backbone's blocks on the recorded picture, under the fixture's names."""
        steps: dict[str, torch.Tensor] = {}

        def keep(name: str):
            def hook(module, inputs, output) -> None:
                steps[name] = (output[0] if isinstance(output, tuple) else output).detach()

            return hook

        backbone, handles = self.network.backbone, []
        if hasattr(backbone, "stem"):
            handles += [backbone.pool.register_forward_hook(keep("resnet_stem_output"))]
            for level, stage in enumerate(backbone.stages, start=2):
                for j, block in enumerate(stage):
                    handles.append(block.register_forward_hook(keep(f"resnet_res{level}_block{j}_output")))
        else:
            handles.append(backbone.model.swin.embeddings.register_forward_hook(keep("swin_patch_embedding")))
            for i, stage in enumerate(backbone.model.swin.encoder.layers):
                for j, block in enumerate(stage.blocks):
                    handles.append(block.register_forward_hook(keep(f"swin_stage{i}_block{j}_output")))
        with torch.no_grad():
            for level, features in enumerate(backbone(self.expected["pixel_values_padded"]), start=2):
                steps[f"backbone_res{level}"] = features
        for handle in handles:
            handle.remove()
        return steps

    def backbone_step(self, name: str) -> torch.Tensor:
        step = self.backbone_steps[name]
        if name == "swin_patch_embedding" and step.ndim == 3:
            batch, channels, height, width = self.expected[name].shape
            step = step.transpose(1, 2).reshape(batch, channels, height, width)
        return step

    def pyramid(self, kind: str, level: int) -> torch.Tensor:
        """A lateral ("adapter") or an output ("layer") of the pixel decoder, from recorded maps."""
        fpn = self.network.pixel_decoder.fpn
        if level == 4:
            return fpn.stem(self.expected["backbone_res5"])
        layer, left = fpn.layers[3 - level], self.expected[f"backbone_res{level + 1}"]
        if kind == "adapter":
            return layer.proj(left)
        return layer(self.expected[f"pixel_decoder_layer_{level + 1}_output"].clone(), left)

    @functools.cached_property
    def decoder_steps(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """States after each decoder layer, before and after the final norm."""
        decoder, before = self.network.query_decoder, []
        handles = [layer.register_forward_hook(lambda m, i, o: before.append(o)) for layer in decoder.layers]
        with torch.no_grad():
            after = decoder(self.expected["backbone_res5"])
        for handle in handles:
            handle.remove()
        return before, after

    def position_embedding(self) -> torch.Tensor:
        memory = self.expected["decoder_input_projected"]
        return self.network.query_decoder.position_embedding(memory.shape, memory.device, memory.dtype)

    def last_states(self) -> torch.Tensor:
        return self.expected["decoder_states_all_layers"]

    # ---------------------------------------------------------------- crops

    @property
    def valid(self) -> torch.Tensor:
        return self.expected["valid_proposals"].bool()

    @functools.cached_property
    def masks(self) -> torch.Tensor:
        """Binary masks of the valid proposals, from the recorded probabilities."""
        return (self.expected["mask_probabilities"] > self.config.mask_threshold)[self.valid]

    @functools.cached_property
    def clip_picture(self) -> torch.Tensor:
        height, width = self.resized_size
        return self.model._clip_pixels(self.expected["pixel_values_padded"])[0, :, :height, :width]

    @functools.lru_cache  # noqa: B019 - cases live as long as the tests
    def crops(self, expand_ratio: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Boxes, crops and their masks."""
        boxes, size = mask_boxes(self.masks, expand_ratio), self.config.crop_size
        grid = CropGrid.of(boxes, size)
        return boxes, masked_crops(self.clip_picture, self.masks, grid), cropped_masks(self.masks, grid)

    def unnormalised_first(self) -> torch.Tensor:
        clip = self.hparams["clip"]
        mean, std = (255 * torch.tensor(clip[f"pixel_{name}"])[:, None, None] for name in ("mean", "std"))
        return self.crops()[1][:1] * std + mean

    @functools.cached_property
    def clip_steps(self) -> dict[str, torch.Tensor]:
        """Tokens of CLIP on the first two crops, under the fixture's names."""
        steps: dict[str, torch.Tensor] = {}
        vision = self.model.clip.vision_model

        def hook(index: int):
            def keep(module, inputs, output) -> None:
                steps[f"clip_block{index}_input_first2"], steps[f"clip_block{index}_output_first2"] = inputs[0], output

            return keep

        def before_norm(module, inputs) -> None:
            steps["clip_tokens_before_ln_pre_first2"] = inputs[0]

        handles = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(vision.encoder.layers)]
        handles.append(vision.pre_layrnorm.register_forward_pre_hook(before_norm))
        crops, masks = self.expected["crops_normalized_first2"], self.expected["crop_masks_224"][:2].bool()
        with torch.enable_grad():  # without a gradient the last block computes its class token alone
            encode_crops(vision, torch.nn.Identity(), crops, masks, self.model.visual_prompts)
        patches = vision.embeddings.patch_embedding(crops).flatten(2).transpose(1, 2)
        steps["clip_patch_embedding_before_prompt_first2"] = patches
        for handle in handles:
            handle.remove()
        return steps

    @functools.lru_cache  # noqa: B019
    def features_of_crops(self, projected: bool, prompts: bool = True) -> torch.Tensor:
        """Class tokens of all crops."""
        vision, projection = self.model.clip.vision_model, self.model.clip.visual_projection
        with torch.no_grad():
            return encode_crops(
                vision,
                projection if projected else torch.nn.Identity(),
                self.crops()[1],
                self.expected["crop_masks_224"].bool(),
                self.model.visual_prompts if prompts else None,
            )

    def crop_logits(self, features: torch.Tensor) -> torch.Tensor:
        return self.config.temperature * normalize(features, dim=-1) @ self.expected["text_features_with_no_object"].T

    # ---------------------------------------------------------------- text, scores

    @property
    def text(self) -> torch.Tensor:
        return self.expected["text_features_ensembled"]

    def prompt_features(self) -> torch.Tensor:
        ids = self.inputs["token_ids"]
        ends = (ids == self.config.clip_config.text_config.eos_token_id).int().argmax(-1)
        features = self.model._text_features(ids.flatten(0, 1), ends.flatten())
        return features.unflatten(0, ids.shape[:2])

    def encoded(self, name: str) -> torch.Tensor:
        return self.model.encode_vocabulary(self.inputs[name].transpose(0, 1).contiguous())

    def classifier(self) -> torch.Tensor:
        return torch.cat([self.text, normalize(self.model.no_object_embedding, dim=-1)])

    def state(self) -> OVSegImageState:
        """The picture side from recorded tensors."""
        features = torch.zeros(1, len(self.valid), self.model.embedding_size)
        features[0, self.valid] = self.expected["clip_image_features"]
        return OVSegImageState(
            proposal_embeddings=self.expected["proposal_embeddings_all_layers"][-1],
            mask_logits=self.expected["mask_logits"],
            crop_features=features,
            valid=self.valid[None],
        )

    def segment(self, ensemble_weight: float | None) -> OpenVocabularySegmentationOutput:
        return self.model._segment(
            self.state(),
            self.text,
            None,
            sample_seeds=None,
            ensemble_weight=ensemble_weight,
            class_is_seen=None,
            output_maps=False,
        )

    @functools.lru_cache  # noqa: B019
    def scores(
        self,
        size: str = "image",
        ensemble_weight: float | str | None = "config",
        demo: bool = False,
        prompts: bool = True,
    ) -> torch.Tensor:
        """Final scores from the picture, through the public interface."""
        model, config = self.model, self.model.config
        kept = (config.demo_mode, config.mask_threshold, model.visual_prompts)
        if demo:
            config.demo_mode, config.mask_threshold = True, self.hparams["demo"]["MASK_THR"]
            ensemble_weight = self.hparams["demo"]["CLIP_ENSEMBLE_WEIGHT"]
        if not prompts:
            model.visual_prompts = None
        try:
            with torch.no_grad():
                outputs = model(**self.batch, text_embeds=self.text, ensemble_weight=ensemble_weight)
        finally:
            config.demo_mode, config.mask_threshold, model.visual_prompts = kept
        target = self.image_size if size == "image" else self.resized_size
        (result,) = self.image_processor.post_process_semantic_segmentation(
            outputs, target_sizes=[target], return_segmentation_scores=True
        )
        return result.segmentation_scores

    # ---------------------------------------------------------------- training

    @functools.cached_property
    def training(self) -> OpenVocabularySegmentationOutput:
        """One forward pass in training mode; dropout and drop path are 0 in the fixtures."""
        labels = self.inputs["train_target_segmentation"].clone()
        labels[labels == 255] = -100
        pictures = list(self.inputs["train_images_rgb_uint8"].numpy())
        batch = self.image_processor(images=pictures, do_resize=False, return_tensors="pt")
        self.model.zero_grad()
        self.model.train()
        outputs = self.model(**batch, text_embeds=self.text, labels=labels)
        outputs.loss.backward()
        self.model.eval()
        return outputs

    @functools.cached_property
    def matches(self) -> list:
        labels = self.inputs["train_target_segmentation"].clone()
        labels[labels == 255] = -100
        outputs = self.training
        prediction = Prediction("", outputs.class_queries_logits.detach(), outputs.masks_queries_logits.detach())
        return self.model.criterion.match(prediction, masks_from_labels(labels), None)

    def loss(self, kind: str, suffix: str, weighted: bool) -> torch.Tensor:
        value = self.training.loss_dict[f"loss_{kind}{suffix}"]
        return (value if weighted else value / self.model.criterion.weights[kind]).reshape(1)


FIRST2 = r"clip_(block\d+_(input|output)|tokens_before_ln_pre|patch_embedding_before_prompt)_first2"
COMPARISONS = [
    Comparison("pixel_values_padded", lambda c, m: c.batch["pixel_values"], NORMALISED),
    Comparison(r"swin_.*|resnet_.*|backbone_res[2-5]", lambda c, m: c.backbone_step(m[0]), MAPS),
    Comparison(r"pixel_decoder_(adapter|layer)_(\d)_output", lambda c, m: c.pyramid(m[1], int(m[2])), MAPS),
    Comparison(
        "mask_features",
        lambda c, m: c.network.pixel_decoder.mask_projection(c.expected["pixel_decoder_layer_1_output"]),
        MAPS,
    ),
    Comparison(
        "decoder_input_projected",
        lambda c, m: c.network.query_decoder.input_projection(c.expected["backbone_res5"]),
        MAPS,
    ),
    Comparison("decoder_position_embedding", lambda c, m: c.position_embedding(), MAPS),
    Comparison(r"decoder_layer_(\d+)_output_before_final_norm", lambda c, m: c.decoder_steps[0][int(m[1])], MAPS),
    Comparison("decoder_states_all_layers", lambda c, m: torch.stack(c.decoder_steps[1]), MAPS),
    Comparison("mask_embeddings_all_layers", lambda c, m: c.network.mask_head(c.last_states()), MAPS),
    Comparison("proposal_embeddings_all_layers", lambda c, m: c.network.embedding_head(c.last_states()), MAPS),
    Comparison(
        "mask_logits",
        lambda c, m: torch.einsum(
            "bnc,bchw->bnhw", c.expected["mask_embeddings_all_layers"][-1], c.expected["mask_features"]
        ),
        MASK_LOGITS,
    ),
    Comparison(
        "mask_logits_resized_image",
        lambda c, m: interpolate(
            c.expected["mask_logits"],
            size=c.expected["pixel_values_padded"].shape[-2:],
            mode="bilinear",
            align_corners=False,
        )[0, :, : c.resized_size[0], : c.resized_size[1]],
        MAPS,
    ),
    Comparison("mask_probabilities", lambda c, m: c.expected["mask_logits_resized_image"].sigmoid(), NORMALISED),
    Comparison(
        "valid_proposals",
        lambda c, m: (
            c.model._binary_masks(
                c.expected["mask_logits"][0], c.expected["pixel_values_padded"].shape[-2:], list(c.resized_size)
            )
            .flatten(1)
            .any(1)
            .float()
        ),
        0,
    ),
    Comparison("crop_boxes_xyxy", lambda c, m: c.crops()[0].float(), 0),
    Comparison("crop_masks_224", lambda c, m: c.crops()[2].to(torch.uint8), 0),
    Comparison("crop_masks_224_expand_ratio_1_3", lambda c, m: c.crops(1.3)[2].to(torch.uint8), 0),
    Comparison("crops_normalized_first2", lambda c, m: c.crops()[1][:2], CROPS),
    Comparison("crops_normalized_every_8th_pixel", lambda c, m: c.crops()[1][..., ::8, ::8], CROPS),
    Comparison("crops_expand_ratio_1_3_every_8th_pixel", lambda c, m: c.crops(1.3)[1][..., ::8, ::8], CROPS),
    Comparison("crops_unnormalized_first1", lambda c, m: c.unnormalised_first(), 255 * CROPS),
    Comparison(
        "crop_patch_mask_condensed",
        lambda c, m: condense_masks(
            c.expected["crop_masks_224"].bool(), c.config.clip_config.vision_config.patch_size
        ).float(),
        0,
    ),
    Comparison(FIRST2, lambda c, m: c.clip_steps[m[0]], MAPS),
    Comparison("clip_cls_token_after_ln_post", lambda c, m: c.features_of_crops(projected=False), MAPS),
    Comparison("clip_image_features_unnormalized", lambda c, m: c.features_of_crops(projected=True), MAPS),
    Comparison(
        "clip_image_features",
        lambda c, m: normalize(c.expected["clip_image_features_unnormalized"], dim=-1),
        NORMALISED,
    ),
    Comparison(
        "clip_crop_logits_with_no_object", lambda c, m: c.crop_logits(c.features_of_crops(projected=True)), CROP_LOGITS
    ),
    Comparison(
        "clip_crop_logits_with_no_object_without_mask_prompts",
        lambda c, m: c.crop_logits(c.features_of_crops(projected=True, prompts=False)),
        CROP_LOGITS,
    ),
    Comparison(
        "clip_crop_probabilities",
        lambda c, m: (c.config.temperature * c.expected["clip_image_features"] @ c.text.T).softmax(-1),
        PROBABILITIES,
    ),
    Comparison("text_features_ensembled", lambda c, m: c.encoded("token_ids"), TEXT),
    Comparison("text_features_per_template_unnormalized", lambda c, m: c.prompt_features(), MAPS),
    Comparison("text_features_with_no_object", lambda c, m: c.classifier(), TEXT),
    Comparison("demo_text_feature_others", lambda c, m: c.encoded("token_ids_others"), TEXT),
    Comparison(
        "proposal_class_logits",
        lambda c, m: c.model._proposal_logits(c.expected["proposal_embeddings_all_layers"][-1], c.text)[0],
        CROP_LOGITS,
    ),
    Comparison(
        "proposal_class_probabilities_without_no_object",
        lambda c, m: c.expected["proposal_class_logits"].softmax(-1)[:, :-1],
        NORMALISED,
    ),
    Comparison(
        "fused_class_scores",
        lambda c, m: c.segment(c.config.ensemble_weight).class_queries_scores[0],
        PROBABILITIES,
    ),
    Comparison("semantic_scores_resized_image", lambda c, m: c.scores("resized"), SCORES),
    Comparison("semantic_scores", lambda c, m: c.scores(), SCORES),
    Comparison("semantic_scores_clip_only", lambda c, m: c.scores(ensemble_weight=0.0), SCORES),
    Comparison("semantic_scores_maskformer_only", lambda c, m: c.scores(ensemble_weight=None), SCORES),
    Comparison("semantic_scores_without_mask_prompts", lambda c, m: c.scores(prompts=False), SCORES),
    Comparison("demo_semantic_scores", lambda c, m: c.scores(demo=True), SCORES),
    Comparison(r"train_matched_query_indices_image(\d)", lambda c, m: c.matches[int(m[1])].queries, 0),
    Comparison(r"train_matched_target_indices_image(\d)", lambda c, m: c.matches[int(m[1])].targets, 0),
    Comparison(
        r"train_(raw|weighted)_loss_(ce|mask|dice)(_\d+)?",
        lambda c, m: c.loss(m[2], m[3] or "", m[1] == "weighted"),
        LOSSES,
    ),
    Comparison("train_total_loss", lambda c, m: sum_losses(c.training.loss_dict).reshape(1), LOSSES, relative=True),
]
EXCUSED = {
    "crop_patch_mask_mean": "ours keeps only whether it is above 0 (crop_patch_mask_condensed, compared)",
    "demo_semantic_scores_single_class": "the original's demo adds the word 'others' to a single name and ignores its "
    "pick; ours segments with the names it is given, and background= says which of them do not count",
    "semantic_prediction": "the argmax of semantic_scores, whose smallest gap (1.5e-6) is below float32 agreement",
}


@each_recorded_tensor("ovseg")
def test_recorded_tensor(folder: Path, name: str) -> None:
    check_recorded(OVSegCase.load(folder), name, COMPARISONS, EXCUSED)


@each_case("ovseg")
def test_prediction_agrees_where_scores_are_apart(folder: Path) -> None:
    case = OVSegCase.load(folder)
    best, second = case.expected["semantic_scores"].topk(2, dim=0).values
    clear = best - second > 2 * SCORES
    assert clear.float().mean() > 0.99
    assert torch.equal(case.scores().argmax(0)[clear], case.expected["semantic_prediction"][clear])


@each_case("ovseg")
def test_resized_picture_is_exact(folder: Path) -> None:
    case = OVSegCase.load(folder)
    plain = case.image_processor(
        images=case.inputs["image_rgb_uint8"].numpy(), do_rescale=False, do_normalize=False, return_tensors="pt"
    )
    height, width = case.resized_size
    found = plain["pixel_values"][0, :, :height, :width].permute(1, 2, 0).to(torch.uint8)
    assert torch.equal(found, case.inputs["image_resized_rgb_uint8"])


@each_case("ovseg")
def test_gradient_norms_and_frozen_parts(folder: Path) -> None:
    case = OVSegCase.load(folder)
    recorded = json.loads((folder / "train_grad_norms.json").read_text())
    norms = recorded["grad_norms"]
    _ = case.training
    gradients = {name: p.grad for name, p in case.model.named_parameters() if p.requires_grad}
    covered = set()
    for source, targets in map_keys(norms, case.config).items():
        assert isinstance(targets, list), f"{source} is trained by the original and dropped by us: {targets}"
        covered |= set(targets)
        squares = [0.0 if gradients[t] is None else gradients[t].double().square().sum().item() for t in targets]
        found = torch.tensor([sum(squares)]).sqrt()
        if source.endswith("decoder.layers.0.self_attn.in_proj_weight"):
            # queries start at zero and are equal there: the gradient is rounding, which the order of sums decides
            assert_close(found, torch.tensor([norms[source]]), 3e-6)
        else:
            assert_close(found, torch.tensor([norms[source]]), GRADIENTS, relative=True)
    assert covered == set(gradients)


@each_case("ovseg")
def test_adapted_clip_checkpoint_replaces_clip(folder: Path) -> None:
    adapted = folder / "clip_ft_mpt_checkpoint.pt"
    if not adapted.exists():
        pytest.skip("this fixture has no CLIP adaptation checkpoint")
    case = OVSegCase.load(folder)
    joined = convert(case.checkpoint, case.config, adapted)
    expected = case.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in joined.state_dict().items())


@each_case("ovseg")
def test_position_embedding_is_the_native_one(folder: Path) -> None:
    case = OVSegCase.load(folder)
    vision = case.model.clip.vision_model
    side = case.config.crop_size // vision.config.patch_size
    assert torch.equal(clip_position_embedding(vision, (side, side))[0], vision.embeddings.position_embedding.weight)


def test_second_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("VOC variant with two prompt learners")):
        map_keys(["_region_clip_adapter.clip_model.logit_scale"], None)
