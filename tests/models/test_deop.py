"""DeOP: the shared checks, what its configuration changes, proposals of any kind, and the model without training."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import CLIPConfig, CLIPImageProcessor, CLIPProcessor, SamConfig, SamModel, pipeline

from ov_segmentation import AutoModelForOpenVocabularySegmentation, conversion_cli
from ov_segmentation.checkpoint_report import examine
from ov_segmentation.conversion import ConversionError
from ov_segmentation.layers.sam_masks import FAR_OUTSIDE
from ov_segmentation.layers.severance import severed_block
from ov_segmentation.models.deop import convert_deop
from ov_segmentation.models.deop.configuration_deop import DeOPConfig
from ov_segmentation.models.deop.convert_deop import VARIANTS
from ov_segmentation.models.deop.image_processing_deop import DeOPImageProcessor
from ov_segmentation.models.deop.modeling_deop import DeOPForOpenVocabularySegmentation
from ov_segmentation.models.deop.plain_clip import TRAINING_FREE
from ov_segmentation.models.deop.processing_deop import DeOPProcessor
from ov_segmentation.models.deop.severed_clip import VisualPrompts, severed_clip_tokens
from ov_segmentation.pipeline import TASK
from tests.mixins.conversion import FIXTURES, ConversionTesterMixin
from tests.mixins.model import FromCLIPTesterMixin, ModelTesterMixin
from tests.mixins.pipeline import NAMES, PipelineTesterMixin, block_pictures
from tests.tiny import TOKENIZER, tiny_clip_config

DOT = TOKENIZER.convert_tokens_to_ids(".</w>")
MASK_FORMER = {
    "backbone_config": {
        "model_type": "ov_resnet_c",
        "stem_channels": 8,
        "depths": [1, 1, 1, 1],
        "widths": [4, 4, 8, 8],
        "out_channels": [8, 8, 16, 16],
        "stage4_multi_grid": [1],
        "frozen_stages": 0,
    },
    "num_queries": 5,
    "hidden_size": 32,
    "num_heads": 4,
    "feedforward_size": 32,
    "num_layers": 2,
    "dropout": 0.0,
    "pixel_decoder_size": 64,
    "mask_size": 16,
    "embedding_hidden_size": 24,
}
SMALL = {
    "mask_config": MASK_FORMER,
    "visual_prompt_layers": [1, 2],
    "visual_prompt_image_size": 48,
    "num_context_vectors": 4,
    "dot_token_id": DOT,
    "heatmap_heads": 4,
    "heatmap_attention_heads": 4,
    "heatmap_feedforward_size": 24,
    "heatmap_dropout": 0.0,
    "window_pixels": 64,
    "window_stride": 64,
    "canvas_pixels": 128,
}
WITHOUT_MASKFORMER = {"proposals": "none", "severance": "identity", "pooling": "mask"}
SAM = {
    "vision_config": {
        "hidden_size": 32,
        "output_channels": 16,
        "num_pos_feats": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
        "window_size": 2,
        "global_attn_indexes": [0],
        "mlp_dim": 32,
    },
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
    "mask_decoder_config": {
        "hidden_size": 16,
        "mlp_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "attention_downsample_rate": 2,
        "iou_head_depth": 2,
        "iou_head_hidden_dim": 16,
    },
}
# a random SAM predicts no good masks; these filters let some through
LENIENT = {
    "sam_points_per_side": 4,
    "sam_points_per_batch": 6,
    "sam_score_threshold": -1e3,
    "sam_stability_threshold": 0.0,
    "sam_box_overlap": 0.99,
}


class TestDeOP(ModelTesterMixin, FromCLIPTesterMixin, PipelineTesterMixin):
    name = "DeOP"
    has_hidden_states = False
    wrong_values: ClassVar = {"severance": "total", "heatmap_layers": "one", "ignore_as_no_object": "no"}
    clip_values: ClassVar = SMALL

    def config_values(self) -> dict[str, Any]:
        return {"clip_config": tiny_clip_config(), **SMALL}

    @classmethod
    def templates(cls) -> list[str] | None:
        return None  # the model adds its learned context

    # parts of the released weights that nothing reads
    unused: ClassVar = (
        "heatmap_decoder.layernorm.",
        "heatmap_decoder.heatmap_layer.value_projection.",
    )

    def test_a_step_trains_exactly_what_is_trained(self) -> None:
        model = self.model().train()
        gradients = self.gradients(model)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert set(gradients) == {name for name in trained if not name.startswith(self.unused)}
        assert all(value.isfinite().all() for value in gradients.values())

    # ------------------------------------------------------------------ options

    @pytest.mark.parametrize(
        "changes",
        [
            {"severance": "identity"},
            {"severance": "mask_guided"},
            {"severance": "none"},
            {"severance": "identity", "severance_alpha": 0.4},
            {"severance_residual_scale": 0.2},
            {"severed_layers": [1, -1], "severance": ["mask_guided", "identity"]},
            {"severed_layers": []},
            {"visual_prompts": "prepended", "num_prepended_prompts": 3},
            {"visual_prompts": "none"},
            {"visual_prompt_layers": []},
            {"num_context_vectors": 0},
            {"heatmap_layers": 0},
            {"heatmap_layers": 3},
            {"heatmap_heads": 1},
            {"heatmap_decoder": "convolution"},
            {"heatmap_decoder": "convolution", "heatmap_layers": 0, "heatmap_heads": 1, "heatmap_kernel_size": 1},
            {"pooling": "mask"},
            {"severance": "identity", "pooling": "mask", "visual_prompts": "none"},
        ],
        ids=str,
    )
    def test_every_option_changes_the_result_and_trains(self, changes: dict[str, Any]) -> None:
        model = self.model(**changes)
        assert not torch.equal(self.run(model)["class_queries_logits"], self.run(self.model())["class_queries_logits"])
        gradients = self.gradients(model.train())
        assert gradients
        assert all(value.isfinite().all() for value in gradients.values())

    def test_alpha_blends_attention_and_severed_values(self) -> None:
        """Equation 2: alpha 0 is ordinary attention, and the attention half of the block is linear in alpha."""
        layer = self.model().clip.vision_model.encoder.layers[0]
        tokens = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
        halves = []
        layer.layer_norm2.register_forward_pre_hook(lambda module, inputs: halves.append(inputs[0]))
        with torch.no_grad():
            for alpha in (0.0, 0.25, 1.0):
                severed_block(layer, tokens, "identity", alpha=alpha)
            ordinary = layer(tokens, None)
            torch.testing.assert_close(severed_block(layer, tokens, "identity", alpha=0.0), ordinary)
        torch.testing.assert_close(halves[1], 0.75 * halves[0] + 0.25 * halves[2])
        attention = layer.self_attn
        own = attention.out_proj(attention.v_proj(layer.layer_norm1(tokens)))
        torch.testing.assert_close(halves[2], tokens + own)
        with torch.no_grad():
            severed_block(layer, tokens, "identity", residual_scale=0.2)
        torch.testing.assert_close(halves[-1], 0.2 * tokens + own)

    def test_prepended_prompts_stand_between_class_token_and_patches(self) -> None:
        """Table 7: they take part in every block, have no position, and are no part of the map."""
        model = self.model(visual_prompts="prepended", num_prepended_prompts=3)
        prompts, vision = model.visual_prompts, model.clip.vision_model
        arguments = (model.config, self.pictures(2)["pixel_values"], torch.rand(2, 5, 8, 8))
        with torch.no_grad():
            (first, *_), grid, leading = severed_clip_tokens(vision, prompts, *arguments)
            plain = VisualPrompts(self.config(visual_prompts="none"))
            (expected, *_), _, _ = severed_clip_tokens(vision, plain, *arguments)
            assert (grid, leading) == ((8, 8), 4)
            torch.testing.assert_close(first[:, :1], expected[:, :1])
            torch.testing.assert_close(first[:, 1:4], vision.pre_layrnorm(prompts.tokens).expand(2, -1, -1))
            torch.testing.assert_close(first[:, 4:], expected[:, 1:])
            assert model.clip_map(arguments[1], torch.zeros(2, 5, 8, 8)).shape == (2, 16, 8, 8)

    def test_severed_patches_do_not_see_each_other(self) -> None:
        """With every block severed and no masks in it, a patch's feature depends on its own pixels alone."""
        config = {"severance": "identity", "pooling": "mask", "visual_prompts": "none"}
        model = self.model(**config, severed_layers=[0, 1, 2, 3])
        seen = self.model(**config)
        pictures = self.pictures()["pixel_values"]
        changed = pictures.clone()
        changed[..., :8, :8] += 1
        masks = torch.zeros(1, 2, 16, 16)
        with torch.no_grad():
            for one, isolated in ((model, True), (seen, False)):
                difference = (one.clip_map(pictures, masks) - one.clip_map(changed, masks)).abs().amax(dim=1)[0]
                assert difference[0, 0] > 1e-3
                assert (difference.flatten()[1:].max() == 0) == isolated

    def test_stages_train_their_parts(self) -> None:
        trained = {
            stage: {n.split(".")[0] for n, p in self.model(training_stage=stage).named_parameters() if p.requires_grad}
            for stage in ("prompt", "proposals", "segmentation")
        }
        assert trained == {
            "prompt": {"text_prompt"},
            "proposals": {"proposal_network", "no_object_embedding"},
            "segmentation": {"text_prompt", "visual_prompts", "heatmap_decoder", "no_object_embedding"},
        }
        assert not self.model(train_text_prompt=False).trains_text

    @pytest.mark.parametrize("stage", ["prompt", "proposals"])
    def test_earlier_stages_train(self, stage: str) -> None:
        model = self.model(training_stage=stage).train()
        inputs = self.training_inputs(model)
        if stage == "prompt":
            inputs["labels"][0, inputs["labels"][0] != 1] = -100
            inputs["labels"][1, inputs["labels"][1] != 2] = -100
        outputs = model(**inputs)
        outputs.loss.backward()
        assert set(outputs.loss_dict) >= ({"loss_cls"} if stage == "prompt" else {"loss_ce", "loss_ce_0", "loss_mask"})
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name

    def test_resnet_starts_from_imagenet(self, tmp_path: Path) -> None:
        """The option is OVSeg's, whose tests look at the names."""
        backbone = self.model().proposal_network.backbone.state_dict()
        theirs = {f"stem.conv{i + 1}.weight": backbone[f"stem.{i}.conv.weight"] for i in range(3)}
        torch.save(theirs, tmp_path / "less.pth")
        with pytest.raises(ConversionError, match=r"stages\.0\.0\.conv1"):
            DeOPForOpenVocabularySegmentation.from_clip(self.clip(), backbone=tmp_path / "less.pth", **SMALL)

    def test_regions_hold_one_class(self) -> None:
        model = self.model(training_stage="prompt").train()
        inputs = self.training_inputs(model)
        with pytest.raises(ValueError, match=r"pictures \[0, 1\] hold several"):
            model(**inputs)
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
        loss = model(**inputs).loss
        loss.backward()
        assert loss == 0

    def test_ignored_pixels_may_be_left_out(self) -> None:
        """As released they are examples of "no object"; without, what is predicted there has no influence."""
        losses = {}
        for as_no_object in (True, False):
            model = self.model(ignore_as_no_object=as_no_object).train()
            inputs = self.training_inputs(model)
            inputs["labels"][:] = -100
            losses[as_no_object] = model(**inputs).loss_dict["loss_ce"].item()
        assert losses[True] > 0
        assert losses[False] == 0

    def test_initialisation(self) -> None:
        """Sheet, sections 3 to 5."""
        clip = {**tiny_clip_config(hidden_size=64), "projection_dim": 64}
        model = self.model(clip_config=clip, visual_prompt_image_size=128, num_context_vectors=64)
        decoder = model.heatmap_decoder
        packed = (6 / (4 * 64)) ** 0.5
        for linear in (decoder.layers[0].self_attn.q_proj, decoder.heatmap_layer.key_projection):
            assert linear.weight.abs().max().item() == pytest.approx(packed, rel=0.05)
            assert not linear.bias.any()
        out = decoder.layers[0].encoder_attn.o_proj
        assert out.weight.abs().max().item() == pytest.approx(64**-0.5, rel=0.05)
        assert not out.bias.any()
        assert decoder.layers[0].mlp.fc1.bias.any()
        assert decoder.query_embedding.weight.std().item() == pytest.approx(1, rel=0.15)
        assert model.visual_prompts.input_table.embedding.std().item() == pytest.approx(64**-0.5, rel=0.1)
        assert model.text_prompt.context.std().item() == pytest.approx(0.02, rel=0.1)
        assert model.no_object_embedding.std().item() == pytest.approx(64**-0.5, rel=0.4)

    def test_convolutional_heatmaps(self) -> None:
        """Equation 4: one softmax map per head and proposal, times the mask, and each head pools its channels."""
        model = self.model(heatmap_decoder="convolution", heatmap_layers=2, heatmap_kernel_size=5)
        decoder = model.heatmap_decoder
        assert [tuple(layer.weight.shape) for layer in decoder.layers] == [
            (24, 16, 5, 5),
            (24, 24, 5, 5),
            (4 * 5, 24, 5, 5),
        ]
        features = torch.nn.functional.normalize(torch.randn(2, 16, 6, 7), dim=1)
        masks = torch.rand(2, 5, 6, 7)
        with torch.no_grad():
            full = decoder(features, torch.ones_like(masks))
            masked = decoder(features, masks)
        assert full.heatmaps.shape == (2, 4, 5, 42)
        torch.testing.assert_close(full.heatmaps.sum(dim=-1), torch.ones(2, 4, 5))
        torch.testing.assert_close(masked.heatmaps, full.heatmaps * masks.flatten(2)[:, None])
        pooled = torch.einsum("bhnl,bhcl->bnhc", masked.heatmaps, features.flatten(2).unflatten(1, (4, 4))).flatten(2)
        torch.testing.assert_close(masked.embeddings, pooled)
        assert torch.allclose(decoder.layers[0].bias.abs().max(), torch.tensor((16 * 25) ** -0.5), rtol=0.2)

    # ------------------------------------------------------------------ any proposals

    def own_masks(self, number: int, size: tuple[int, int]) -> torch.Tensor:
        """Vertical stripes, bool `[1, N, *size]`."""
        columns = torch.arange(size[1]) * number // size[1]
        return (columns == torch.arange(number)[:, None]).expand(1, size[0], -1, -1).transpose(1, 2).contiguous()

    @pytest.mark.parametrize("severance", ["identity", "mask_gain", "mask_guided"])
    def test_masks_of_the_caller(self, severance: str) -> None:
        model = self.model(pooling="mask", severance=severance)
        inputs = {**self.pictures(), "text_embeds": self.text(model)}
        with torch.no_grad():
            sizes = [(64, 64), (16, 16), (200, 24)]
            found = [model(**inputs, proposals=self.own_masks(4, size)) for size in sizes]
            logits = torch.where(self.own_masks(4, (64, 64)), -FAR_OUTSIDE, FAR_OUTSIDE)
            assert torch.equal(model(**inputs, proposals=logits).class_queries_logits, found[0].class_queries_logits)
        for outputs in found:
            assert outputs.class_queries_logits.shape == (1, 4, 4)
            torch.testing.assert_close(outputs.class_queries_logits, found[0].class_queries_logits, atol=2, rtol=0.1)

    def test_masks_are_pooled_where_they_are(self) -> None:
        """Against means by hand: stripes of two columns of patches each, whatever their resolution."""
        model = self.model(pooling="mask", severance="identity")
        with torch.no_grad():
            text = self.text(model)
            clip_map = model.clip_map(self.pictures()["pixel_values"], torch.zeros(1, 4, 8, 8))[0]
            means = torch.stack([clip_map[:, :, 2 * i : 2 * i + 2].mean(dim=(1, 2)) for i in range(4)])
            expected = model.class_logits(means, text)
            for size in ((8, 8), (16, 32), (64, 64)):
                found = model(**self.pictures(), text_embeds=text, proposals=self.own_masks(4, size))
                torch.testing.assert_close(found.class_queries_logits[0], expected, atol=1e-3, rtol=1e-4)

    @pytest.mark.parametrize("pooling", ["mask", "heatmap"])
    @pytest.mark.parametrize("severance", ["identity", "mask_gain", "mask_guided"])
    def test_an_empty_mask_has_logits_in_float16(self, severance: str, pooling: str) -> None:
        """There its probabilities round to 0, and so would what they pool."""
        model = self.model(pooling=pooling, severance=severance)
        masks = self.own_masks(model.config.num_queries, (64, 64))
        masks[:, 1] = False
        inputs = {**self.pictures(), "text_embeds": self.text(model), "proposals": masks}
        with torch.no_grad():
            expected, found = model(**inputs), model.half()(**inputs)
        torch.testing.assert_close(found.class_queries_logits, expected.class_queries_logits, atol=0.5, rtol=0)

    @pytest.mark.parametrize("severance", ["identity", "mask_gain", "mask_guided"])
    def test_zero_proposals(self, severance: str) -> None:
        model = self.model(pooling="mask", severance=severance)
        with torch.no_grad():
            outputs = model(**self.pictures(), text_embeds=self.text(model), proposals=torch.zeros(1, 0, 9, 9).bool())
        assert not outputs.class_queries_scores.any()
        (result,) = DeOPImageProcessor().post_process_semantic_segmentation(
            outputs, target_sizes=[(30, 40)], return_confidence=True
        )
        assert not result.segmentation.any()
        assert not result.confidence.any()
        (result,) = DeOPImageProcessor().post_process_semantic_segmentation(
            outputs, target_sizes=[(30, 40)], threshold=0.0
        )
        assert (result == -1).all()

    @pytest.mark.parametrize(
        ("masks", "message"),
        [
            (torch.zeros(5, 8, 8), r"\[B, N, h, w\]"),
            (torch.zeros(2, 5, 8, 8), r"got \[2, 5, 8, 8\]"),
            (torch.zeros(1, 5, 0, 8), r"got \[1, 5, 0, 8\]"),
            (torch.zeros(1, 5, 8, 8, dtype=torch.long), "bool masks or floating-point"),
            (torch.full((1, 5, 8, 8), float("nan")), "NaN"),
            (torch.zeros(1, 3, 8, 8), "anchor query"),
            ("sam", "proposals='maskformer'"),
            ("watershed", "proposals='watershed'"),
        ],
        ids=["dimensions", "batch", "empty", "integers", "NaN", "number", "no SAM", "unknown"],
    )
    def test_refuses_proposals_that_cannot_be_used(self, masks: Any, message: str) -> None:
        model = self.model()
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            model(**self.pictures(), text_embeds=self.text(model), proposals=masks)

    def test_patches_of_a_trained_model(self) -> None:
        model = self.model(severance="identity")
        with torch.no_grad():
            outputs = model(**self.pictures(2), text_embeds=self.text(model), proposals="none")
        assert outputs.logits.shape == (2, 3, 8, 8)
        with pytest.raises(ValueError, match="there is no loss"):
            self.model(**WITHOUT_MASKFORMER)(**self.training_inputs(self.model(**WITHOUT_MASKFORMER)))

    # ------------------------------------------------------------------ bad input

    def test_smallest_pictures(self) -> None:
        model = self.model()
        with torch.no_grad():
            outputs = model(**self.pictures(size=(8, 8)), text_embeds=self.text(model))
        assert all(value.isfinite().all() for value in self.predictions(outputs).values())
        with pytest.raises(ValueError, match="one patch of 8"):
            model(**self.pictures(size=(7, 64)), text_embeds=self.text(model))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"severed_layers": [4]}, "severed_layers"),
            ({"severed_layers": [3, -1]}, "different blocks"),
            ({"severance": ["identity", "none"]}, "2 values for 1"),
            ({"severance_alpha": 1.5}, "between 0 and 1"),
            ({"heatmap_heads": 3}, "heatmap_heads 3"),
            ({"heatmap_attention_heads": 5}, "heatmap_attention_heads 5"),
            ({"heatmap_decoder": "convolution", "heatmap_kernel_size": 4}, "odd"),
            ({"heatmap_layers": -1}, "negative"),
            ({"proposals": "none"}, "pooling"),
            ({**WITHOUT_MASKFORMER, "severance": "mask_gain"}, "needs proposals"),
            ({**WITHOUT_MASKFORMER, "proposals": "sam"}, "from_clip_and_sam"),
            ({**WITHOUT_MASKFORMER, "training_stage": "proposals"}, "trains MaskFormer"),
            ({"visual_prompt_layers": [1, 4]}, "CLIP's 4 blocks"),
            ({"visual_prompt_layers": [1, 1]}, "different ones"),
            ({"dot_token_id": 100_000}, "dot_token_id"),
            ({"num_context_vectors": -1}, "negative"),
            ({"num_context_vectors": 0, "training_stage": "prompt"}, "context vectors"),
        ],
        ids=str,
    )
    def test_impossible_configurations(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(StrictDataclassClassValidationError, match=message):
            self.config(**changes)


def test_released_sizes() -> None:
    with torch.device("meta"):
        model = DeOPForOpenVocabularySegmentation(VARIANTS["coco156_r101c_vitb16"]())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 7_713_792
    assert sum(p.numel() for p in model.parameters()) == 218_401_729


def vit_l_14_336() -> dict[str, Any]:
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision |= {"patch_size": 14, "image_size": 336, "projection_dim": 768}
    large = {"projection_dim": 768, "vision_config": vision, "text_config": {"hidden_size": 768, "projection_dim": 768}}
    large["text_config"] |= {"num_attention_heads": 12, "intermediate_size": 3072}
    return large


def test_patches_of_14_pixels() -> None:
    """ViT-L/14: the grid is what fits, tables have 27 x 27 positions for 384 pixels; what is left over is dropped."""
    clip = tiny_clip_config(patch_size=14, image_size=56)
    torch.manual_seed(0)
    model = DeOPForOpenVocabularySegmentation(DeOPConfig(clip_config=clip, **SMALL)).eval()
    inputs = {"pixel_values": torch.randn(1, 3, 64, 96), "text_embeds": torch.randn(3, 16)}
    with torch.no_grad():
        outputs = model(**inputs, output_maps=True)
    assert outputs.maps["clip_map"].shape == (1, 16, 64 // 14, 96 // 14)
    assert outputs.maps["heatmaps"].shape == (1, 4, 5, 64 // 14, 96 // 14)
    with torch.device("meta"):
        model = DeOPForOpenVocabularySegmentation(DeOPConfig(clip_config=vit_l_14_336()))
    assert model.visual_prompts.input_table.embedding.shape == (27 * 27 + 1, 1024)
    assert model.heatmap_decoder.query_embedding.weight.shape == (100, 768)
    assert model.config.severance_of_blocks().index("mask_gain") == 23


@pytest.mark.slow
def test_vit_l_14_336_at_full_size() -> None:
    """A picture of 480 x 640 as its processor would give it: 512 x 704 pixels, of which 36 x 50 patches fit."""
    torch.manual_seed(0)
    model = DeOPForOpenVocabularySegmentation(DeOPConfig(clip_config=vit_l_14_336())).eval()
    inputs = DeOPImageProcessor()(images=np.zeros((480, 640, 3), np.uint8), return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (512, 704)
    with torch.no_grad():
        outputs = model(**inputs, text_embeds=torch.randn(20, 768), output_maps=True)
    assert outputs.maps["heatmaps"].shape == (1, 8, 100, 512 // 14, 704 // 14)
    assert outputs.class_queries_scores.shape == (1, 100, 20)
    assert outputs.class_queries_scores.isfinite().all()
    (label_map,) = DeOPImageProcessor().post_process_semantic_segmentation(outputs, target_sizes=[(480, 640)])
    assert label_map.shape == (480, 640)


class TestPlainCLIP(ModelTesterMixin):
    """DeOP without training: `proposals="none"`."""

    name = "DeOP"
    has_hidden_states = False
    wrong_values: ClassVar = {"proposals": 3}

    def config_values(self) -> dict[str, Any]:
        return {
            "clip_config": tiny_clip_config(),
            "mask_config": MASK_FORMER,
            "proposals": "none",
            **TRAINING_FREE,
            **{key: SMALL[key] for key in ("window_pixels", "window_stride", "canvas_pixels")},
        }

    # nothing is trained here; training_inputs cannot be used
    test_a_step_trains_exactly_what_is_trained = None
    test_the_loss_depends_on_the_seeds_only = None
    test_a_picture_without_labels_has_a_loss = None
    test_a_loss_is_taken_on_whole_pictures = None
    test_labels_change_no_prediction = None
    test_transformers_trainer = None
    test_transformers_trainer_with_pictures_of_different_sizes = None
    test_activation_checkpointing_changes_no_gradient = None
    test_frozen_parameters_stay_frozen_after_loading = None
    test_config_refuses_wrong_types = None
    test_can_be_built_without_memory = None
    test_bfloat16_survives_saving = None

    def test_maps_cover_the_picture_alone(self) -> None:
        """Padding changes nothing: the map is that of the picture without it."""
        model = self.model()
        whole = self.pictures(size=(64, 80))
        padded = {**whole, "padded_sizes": torch.tensor([[64, 96]])}
        for name in ("pixel_values", "pixel_mask"):
            padded[name] = torch.nn.functional.pad(whole[name], (0, 16, 0, 0))
        text = self.text(model)
        with torch.no_grad():
            expected = model(**self.pictures(size=(64, 80)), text_embeds=text).logits
            found = model(**padded, text_embeds=text).logits
        assert (expected.shape[-2:], found.shape[-2:]) == ((8, 10), (8, 12))
        stretched = torch.nn.functional.interpolate(whole["pixel_values"], (64, 96), mode="bilinear")
        with torch.no_grad():
            torch.testing.assert_close(found, model(pixel_values=stretched, text_embeds=text).logits)

    def test_logits_are_cosines(self) -> None:
        model = self.model()
        text = self.text(model)
        with torch.no_grad():
            outputs = model(**self.pictures(), text_embeds=text, output_maps=True)
        assert outputs.score_function == "softmax"
        expected = 100 * torch.einsum("bdhw,kd->bkhw", outputs.maps["clip_map"], text)
        torch.testing.assert_close(outputs.logits, expected)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP as the Hub has it: model, tokenizer, image processor; the legacy end token too."""
    folder = tmp_path_factory.mktemp("clip")
    clip = FromCLIPTesterMixin().clip()
    torch.manual_seed(3)
    with torch.no_grad():  # features that differ from patch to patch
        for parameter in clip.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    clip.config.text_config.eos_token_id = 2
    clip.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, TOKENIZER).save_pretrained(folder)
    return folder


def test_auto_class_takes_a_plain_clip(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="plain CLIP") as caught:
        model = AutoModelForOpenVocabularySegmentation.from_pretrained(clip_folder)
    assert len([one for one in caught if "plain CLIP" in str(one.message)]) == 1
    assert type(model) is DeOPForOpenVocabularySegmentation
    assert not model.training
    assert model.config.clip_config.text_config.eos_token_id == TOKENIZER.eos_token_id
    assert model.config.severance_of_blocks() == ["none", "none", "none", "identity"]
    inputs = {"pixel_values": torch.randn(1, 3, 64, 64), "text_embeds": torch.randn(3, 16)}
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = AutoModelForOpenVocabularySegmentation.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_auto_class_builds_around_a_plain_clip_configuration() -> None:
    model = AutoModelForOpenVocabularySegmentation.from_config(CLIPConfig.from_dict(tiny_clip_config()))
    assert model.config.proposals == "none"
    assert not model.no_object_embedding.any()


def test_auto_class_passes_options_on(clip_folder: Path) -> None:
    load = AutoModelForOpenVocabularySegmentation.from_pretrained
    with pytest.warns(UserWarning, match="plain CLIP"):
        model = load(clip_folder, dtype=torch.bfloat16, attn_implementation="eager", severance_residual_scale=1.0)
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert model.config.severance_residual_scale == 1.0
    with pytest.raises(TypeError, match="no_such_option"):
        load(clip_folder, no_such_option=1)
    with pytest.raises(ValueError, match="device_map"):
        load(clip_folder, device_map="cpu")


def test_pipeline_takes_a_plain_clip(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="plain CLIP") as caught:
        segment = pipeline(TASK, model=str(clip_folder), device="cpu")
    assert len([one for one in caught if "plain CLIP" in str(one.message)]) == 1
    processor = segment.processor
    assert type(processor) is DeOPProcessor
    assert len(processor.prompt_templates) == 14
    assert list(processor.image_processor.image_mean) == list(CLIPImageProcessor().image_mean)
    assert processor.image_processor.size["shortest_edge"] == 64
    (picture,) = block_pictures((50, 91))
    found = segment(picture, NAMES, output_type="map")
    assert found["segmentation"].shape == (50, 91)
    assert len(np.unique(found["segmentation"])) > 1
    batch = segment([picture, *block_pictures((91, 50), (64, 64))], NAMES, output_type="map", batch_size=2)
    assert (batch[0]["segmentation"] != found["segmentation"]).mean() <= 1e-3
    segment.save_pretrained(tmp_path)
    again = pipeline(TASK, model=str(tmp_path), device="cpu")
    assert (again(picture, NAMES, output_type="map")["segmentation"] == found["segmentation"]).all()


def test_processor_from_clip(clip_folder: Path) -> None:
    processor = DeOPProcessor.from_clip(clip_folder)
    assert processor(text=["road", "sky"], return_tensors="pt")["input_ids"].shape[:2] == (2, 14)
    trained = TestDeOP().model()
    assert trained.processor_for_clip(CLIPProcessor.from_pretrained(clip_folder)) is None


def test_without_network_the_default_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="couldn't connect"):
        pipeline(TASK, model_kwargs={"cache_dir": str(tmp_path)})


# ---------------------------------------------------------------------- Segment Anything


@pytest.fixture(scope="module")
def sam_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sam")
    torch.manual_seed(0)
    sam = SamModel(SamConfig(**SAM))
    with torch.no_grad():
        for parameter in sam.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 2 * parameter[0].numel() ** -0.5)
    sam.save_pretrained(folder)
    return folder


def test_from_clip_and_sam(clip_folder: Path, sam_folder: Path, tmp_path: Path) -> None:
    model = DeOPForOpenVocabularySegmentation.from_clip_and_sam(clip_folder, sam_folder, **LENIENT).eval()
    for name, value in SamModel.from_pretrained(sam_folder).state_dict().items():
        assert torch.equal(model.sam.state_dict()[name], value), name
    processor = DeOPProcessor.from_clip(clip_folder)
    pictures = block_pictures((50, 91), (91, 50))
    inputs = processor(images=pictures, text=NAMES, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs, output_maps=True)
    count = outputs.masks_queries_logits.shape[1]
    assert count >= 2
    assert outputs.class_queries_scores.shape == (2, count, len(NAMES))
    height, width = inputs["pixel_values"].shape[-2:]
    assert outputs.masks_queries_logits.shape[-2:] == (height // 4, width // 4)
    assert ((outputs.masks_queries_logits > 0).sum(dim=1) <= 1).all()  # exclusive
    maps = processor.post_process_semantic_segmentation(outputs, target_sizes=inputs["original_sizes"])
    assert [tuple(one.shape) for one in maps] == [(50, 91), (91, 50)]
    model.save_pretrained(tmp_path)
    again = AutoModelForOpenVocabularySegmentation.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).class_queries_scores, outputs.class_queries_scores)


def test_sam_in_bfloat16(clip_folder: Path, sam_folder: Path) -> None:
    model = DeOPForOpenVocabularySegmentation.from_clip_and_sam(clip_folder, sam_folder, **LENIENT).eval()
    model = model.to(torch.bfloat16)
    processor = DeOPProcessor.from_clip(clip_folder)
    inputs = processor(images=block_pictures((50, 91)), text=NAMES, return_tensors="pt").to(torch.bfloat16)
    with torch.no_grad():
        outputs = model(**inputs)
    assert outputs.masks_queries_logits.dtype == torch.bfloat16
    assert outputs.masks_queries_logits.shape[1] >= 2
    (labels,) = processor.post_process_semantic_segmentation(outputs, target_sizes=inputs["original_sizes"])
    assert labels.shape == (50, 91)
    assert set(labels.unique().tolist()) <= set(range(len(NAMES)))


def test_frozen_sam_runs_without_gradients(clip_folder: Path, sam_folder: Path) -> None:
    model = DeOPForOpenVocabularySegmentation.from_clip_and_sam(clip_folder, sam_folder, **LENIENT).train()
    inputs = {"pixel_values": torch.randn(1, 3, 64, 64), "text_embeds": torch.randn(3, 16)}
    seen = []
    model.sam.mask_decoder.iou_prediction_head.register_forward_hook(lambda *call: seen.append(torch.is_grad_enabled()))
    model(**inputs)
    assert seen and not any(seen)
    seen.clear()
    model.sam.requires_grad_(True)
    model(**inputs)
    assert seen and all(seen)


def test_strict_filters_leave_no_proposals(clip_folder: Path, sam_folder: Path) -> None:
    values = {**LENIENT, "sam_score_threshold": 1e9}
    model = DeOPForOpenVocabularySegmentation.from_clip_and_sam(clip_folder, sam_folder, **values).eval()
    with torch.no_grad():
        outputs = model(pixel_values=torch.randn(1, 3, 64, 64), text_embeds=torch.randn(3, 16))
    assert outputs.class_queries_scores.shape == (1, 1, 3)
    assert not outputs.class_queries_scores.any()


class TestDeOPConversion(ConversionTesterMixin):
    method = "deop"
    case = "deop/case_a"
    manifests = (
        "deop",
        ("coco156_r101c_vitb16", "voc15_r101c_vitb16", "stage2_proposal_coco156", "stage1_prompt_coco156"),
    )
    partial_variants = ("stage2_proposal_coco156", "stage1_prompt_coco156")

    def released(self, variant: str) -> dict[str, torch.Tensor]:
        """Every key of a file of the authors', with its shape; the values take no memory."""
        keys = json.loads((FIXTURES / self.method / f"keys_full_{variant}.json").read_text())
        return {key: torch.zeros(()).expand(shape) for key, (shape, _) in keys.items()}

    @pytest.mark.parametrize("variant", ["coco156_r101c_vitb16", "stage2_proposal_coco156", "stage1_prompt_coco156"])
    def test_the_release_is_found_by_its_keys(self, tmp_path: Path, variant: str) -> None:
        file = self.saved(self.released(variant), tmp_path / "model_final.pth")
        assert conversion_cli.find_variant(convert_deop, file) == variant

    def test_the_report_names_one_variant(self, tmp_path: Path) -> None:
        file = self.saved(self.released("coco156_r101c_vitb16"), tmp_path / "model_final.pth")
        assert [fact for fact in examine(file).facts if fact[0] == "variant"] == [("variant", "coco156_r101c_vitb16")]

    @pytest.mark.parametrize(
        ("variant", "lost"),
        [("coco156_r101c_vitb16", "query_embedding.weight"), ("stage2_proposal_coco156", "sem_seg_head")],
    )
    def test_what_a_stage_trains_must_be_whole(self, tmp_path: Path, variant: str, lost: str) -> None:
        kept = {key: value for key, value in self.released(variant).items() if not key.startswith(lost)}
        file = self.saved(kept, tmp_path / "damaged.pth")
        with torch.device("meta"), pytest.raises(ConversionError, match="unset"):
            convert_deop.convert(file, convert_deop.VARIANTS[variant]())

    def test_what_later_stages_train_is_said_to_be_missing(self, tmp_path: Path) -> None:
        file = self.saved(self.released("stage2_proposal_coco156"), tmp_path / "stage2.pth")
        with torch.device("meta"), pytest.warns(UserWarning, match="nothing of heatmap_decoder, visual_prompts: left"):
            convert_deop.convert(file, convert_deop.VARIANTS["stage2_proposal_coco156"]())
