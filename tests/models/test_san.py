"""SAN: the shared checks, and what its configuration changes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn

from ov_segmentation import conversion_cli
from ov_segmentation.losses import sum_losses
from ov_segmentation.models.san.configuration_san import SANConfig
from ov_segmentation.models.san.convert_san import DEFAULT_TOKENIZER, VARIANTS, map_keys
from ov_segmentation.models.san.modeling_san import SANForOpenVocabularySegmentation
from ov_segmentation.profiling import count_model
from tests.mixins.conversion import ConversionTesterMixin
from tests.mixins.model import FromCLIPTesterMixin, ModelTesterMixin
from tests.tiny import TOKENIZER, tiny_clip_config

FIXTURES = Path(__file__).parent.parent / "fixtures" / "san"
SMALL_SIDE = {
    "num_queries": 5,
    "side_hidden_size": 24,
    "side_num_layers": 5,
    "side_num_attention_heads": 3,
    "side_mlp_ratio": 2,
    "side_patch_size": 8,
    "side_image_size": 64,
    "mask_embed_dim": 8,
    "mask_hidden_dim": 12,
    "num_points": 64,
    "window_pixels": 32,
    "window_stride": 32,
    "canvas_pixels": 64,
}


class TestSAN(ModelTesterMixin, FromCLIPTesterMixin):
    name = "SAN"
    wrong_values: ClassVar = {"num_queries": "many", "decoupled_head": "no", "recognition_attention": "sideways"}
    clip_values: ClassVar = SMALL_SIDE

    def config_values(self) -> dict[str, Any]:
        return {
            "clip_config": tiny_clip_config(),
            "num_feature_layers": 2,
            "num_recognition_layers": 2,
            **SMALL_SIDE,
        }

    # ------------------------------------------------------------------ the paper's studies

    @pytest.mark.parametrize(
        "changes",
        [
            {"fusion_map": []},
            {"fusion_map": [[0, 0], [2, 3]]},
            {"num_feature_layers": 4},  # twice-forward: 4 + 2 blocks of 4
            {"num_recognition_layers": 3},
            {"decoupled_head": False},
            {"clip_input_scale": 1.0},
            {"clip_input_scale": 0.25},
            {"rescale_attention_bias": False},
            {"num_bias_heads": 1},
            {"num_bias_layers": 2},
        ],
        ids=str,
    )
    def test_study_changes_the_output(self, changes: dict[str, Any]) -> None:
        model, changed = self.model(), self.model(**changes)
        # the same weights wherever both have them
        shared = model.state_dict()
        own = changed.state_dict()
        changed.load_state_dict({k: v for k, v in shared.items() if k in own and v.shape == own[k].shape}, strict=False)
        found, expected = self.run(changed), self.run(model)
        assert not torch.allclose(found["class_queries_logits"], expected["class_queries_logits"], atol=1e-5)
        assert all(value.isfinite().all() for value in found.values())

    def test_no_fusion_has_no_fusion_weights(self) -> None:
        assert not [name for name in self.model(fusion_map=[]).state_dict() if "fusion" in name]

    def test_single_head_has_one_bias_for_all(self) -> None:
        model = self.model(decoupled_head=False, rescale_attention_bias=False)
        assert not [name for name in model.state_dict() if "bias_mlp" in name]
        with torch.no_grad():
            outputs = model(**self.pictures(), text_embeds=self.text(model), output_maps=True)
        torch.testing.assert_close(outputs.maps["attention_bias"][:, 0, 0], outputs.masks_queries_logits)

    @pytest.mark.parametrize("decoupled_head", [True, False])
    def test_two_stage_training_keeps_recognition_out_of_the_masks(self, decoupled_head: bool) -> None:
        """The class loss alone reaches no weight that masks are made from, but for CLIP's positions."""
        reached = {}
        for detached in (False, True):
            model = self.model(detach_clip_from_masks=detached, decoupled_head=decoupled_head).train()
            losses = model(**self.training_inputs(model)).loss_dict
            sum_losses({k: v for k, v in losses.items() if k.startswith("loss_ce")}).backward()
            reached[detached] = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        masks = {"side_adapter.decoder.query_mlp", "side_adapter.blocks", "side_adapter.query_embedding"}
        assert all(any(name.startswith(prefix) for name in reached[False]) for prefix in masks)
        assert not [name for name in reached[True] if any(name.startswith(prefix) for prefix in masks)]
        own = "side_adapter.decoder.bias_mlp" if decoupled_head else "side_adapter.decoder.bias_scaling"
        assert any(name.startswith(own) for name in reached[True])
        assert "background_embedding" in reached[True]

    def test_trained_set(self) -> None:
        def trained(**changes: Any) -> set[str]:
            return {name for name, p in self.model(**changes).named_parameters() if p.requires_grad}

        positions = "clip.vision_model.embeddings.position_embedding.weight"
        default = trained()
        assert {name for name in default if name.startswith("clip.")} == {positions}
        assert trained(train_clip_position_embedding=False) == default - {positions}
        everything = {name for name, _ in self.model().named_parameters()}
        assert trained(train_clip=True) == everything
        assert self.model(train_clip=True).trains_text

    def test_supervised_depths(self) -> None:
        for layers, suffixes in (([5], [""]), ([4, 5], ["", "_0"]), ([2, 3, 5], ["", "_0", "_1"])):
            model = self.model(deep_supervision_layers=layers).train()
            losses = model(**self.training_inputs(model)).loss_dict
            assert set(losses) == {f"loss_{term}{suffix}" for term in ("ce", "mask", "dice") for suffix in suffixes}

    @pytest.mark.parametrize(
        "changes", [{}, {"num_bias_layers": 2}, {"num_bias_heads": 1}, {"num_recognition_layers": 4}]
    )
    def test_both_forms_of_recognition_agree(self, changes: dict[str, Any]) -> None:
        cross, masked = (self.model(recognition_attention=form, **changes) for form in ("cross", "masked"))
        for model in (cross, masked):  # biases of a size that matters
            nn.init.constant_(model.side_adapter.decoder.bias_scaling.weight, 30.0)
        with torch.no_grad():
            difference = self.run(cross)["class_queries_logits"] - self.run(masked)["class_queries_logits"]
        assert difference.abs().max() < 1e-4
        plain = self.model(**changes)
        nn.init.zeros_(plain.side_adapter.decoder.bias_scaling.weight)
        assert not torch.allclose(self.run(plain)["class_queries_logits"], self.run(cross)["class_queries_logits"])

    # ------------------------------------------------------------------ work and records

    def test_inference_does_no_work_for_training(self) -> None:
        model = self.model()
        calls, tokens = [], []
        model.side_adapter.decoder.register_forward_hook(lambda *_: calls.append(1))
        model.clip.vision_model.encoder.layers[-1].mlp.register_forward_hook(lambda m, x, y: tokens.append(y.shape[1]))
        self.run(model)
        assert len(calls) == 1
        assert tokens == [model.config.num_queries]  # the last block's class and visual tokens are not needed
        model(**self.training_inputs(model, batch=1))
        assert len(calls) == 3

    def test_blocks_that_nothing_reads_do_not_run(self) -> None:
        model = self.model(num_recognition_layers=1, num_feature_layers=1, fusion_map=[[1, 0]])
        runs = []
        for i, block in enumerate(model.clip.vision_model.encoder.layers):
            block.register_forward_hook(lambda *_, i=i: runs.append(i))
        self.run(model)
        assert runs == [0, 1, 2]  # the fourth one runs as recognition

    def test_records(self) -> None:
        model = self.model()
        model.set_attn_implementation("eager")
        config, batch = model.config, self.pictures(2)
        records = {"output_hidden_states": True, "output_attentions": True, "output_maps": True}
        with torch.no_grad():
            outputs = model(**batch, text_embeds=self.text(model), **records)
            state = model.encode_image(**batch, **records)
            later = model(image_state=state, text_embeds=self.text(model), **records)
            plain = model(**batch, text_embeds=self.text(model))
        assert len(outputs.hidden_states) == config.side_num_layers + 1
        assert outputs.hidden_states[0].shape == (2, config.num_queries + 64, config.side_hidden_size)
        assert len(outputs.attentions) == config.num_recognition_layers
        weights = outputs.attentions[0]
        assert weights.shape == (2, 4, config.num_queries, 16 + config.num_queries)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert not weights[:, :, 0, 17:].any()  # a query sees no other query
        assert outputs.maps["attention_bias"].shape == (2, 1, 4, config.num_queries, 8, 8)
        torch.testing.assert_close(later.attentions, outputs.attentions)
        assert plain.hidden_states is plain.attentions is plain.maps is None
        with pytest.raises(ValueError, match="encode_image"):
            model(image_state=model.encode_image(**batch), text_embeds=self.text(model), output_maps=True)
        model.set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match="eager"):
            model(**batch, text_embeds=self.text(model), output_attentions=True)

    def test_smallest_pictures(self) -> None:
        model = self.model()
        with torch.no_grad():
            outputs = model(**self.pictures(size=(16, 16)), text_embeds=self.text(model))
        assert outputs.masks_queries_logits.shape[-2:] == (2, 2)
        with pytest.raises(ValueError, match="at least 16"):
            model(**self.pictures(size=(15, 64)), text_embeds=self.text(model))

    def test_wide_pictures_with_the_stored_number_of_tokens(self) -> None:
        """The original compares numbers of tokens: 4 x 16 takes the stored 8 x 8 as it is."""
        side = self.model().side_adapter
        stored = side.position_embedding
        assert torch.equal(side.positions((4, 16))[:, -64:], stored)
        assert not torch.equal(side.positions((4, 17))[:, -68:-4], stored)

    def test_a_picture_alone_scores_no_object_in_the_last_column(self) -> None:
        model = self.model()
        with torch.no_grad():
            outputs = model(**self.pictures(), text_embeds=self.text(model))
        expected = outputs.class_queries_logits.softmax(-1)[..., :-1]
        torch.testing.assert_close(outputs.class_queries_scores, expected)

    def test_initialisation(self) -> None:
        """Sheet, section 6.3."""
        values = {"side_hidden_size": 96, "mask_hidden_dim": 64, "clip_config": tiny_clip_config(hidden_size=64)}
        model = self.model(**values)
        side = model.side_adapter
        for weight in (
            side.query_embedding,
            side.query_position_embedding,
            side.position_embedding,
            side.blocks[0].fc1.weight,
        ):
            assert weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert side.blocks[0].qkv.weight.abs().max() <= 2.0  # truncated at +-2, as timm's
        assert not side.blocks[0].qkv.bias.any()
        fusion = side.fusion_layers["0"].proj
        assert fusion.weight.abs().max().item() == pytest.approx((6 / 2 / 64) ** 0.5, rel=0.05)
        assert not fusion.bias.any()
        for linear in (side.decoder.query_mlp.layers[0], side.decoder.bias_mlp.layers[1]):
            assert linear.weight.abs().max().item() == pytest.approx(linear.in_features**-0.5, rel=0.05)
        assert side.decoder.bias_scaling.weight.abs().item() <= 1
        assert model.background_embedding.std().item() == pytest.approx(0.25, rel=0.5)

    # ------------------------------------------------------------------ bad configurations

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_recognition_layers": 5}, "CLIP has 4 blocks"),
            ({"fusion_map": [[3, 0]]}, "num_feature_layers"),
            ({"fusion_map": [[0, 5]]}, "side_num_layers"),
            ({"fusion_map": [[0, 1], [1, 1]]}, "twice"),
            ({"deep_supervision_layers": [1, 2]}, "deep_supervision_layers"),
            ({"side_num_attention_heads": 5}, "no multiple"),
            ({"num_bias_heads": 3}, "num_bias_heads"),
            ({"num_bias_layers": 3}, "num_bias_layers"),
            ({"clip_input_scale": 0}, "clip_input_scale"),
        ],
        ids=str,
    )
    def test_impossible_configurations(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(StrictDataclassClassValidationError, match=message):
            self.config(**changes)


@pytest.mark.parametrize(("variant", "trained"), [("san_vit_b_16", 8_370_866), ("san_vit_large_14", 9_321_650)])
def test_released_sizes(variant: str, trained: int) -> None:
    """Trainable parameters of the released logs: their number, and all their names and shapes."""
    config = VARIANTS[variant]()
    with torch.device("meta"):
        model = SANForOpenVocabularySegmentation(config)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in parameters.values()) == trained
    published = json.loads((FIXTURES / f"optimizer_groups_{variant}.json").read_text())
    targets = map_keys(published, config)
    assert {target[0] for target in targets.values()} == set(parameters)
    for source, (target,) in targets.items():
        assert parameters[target].numel() == torch.Size(published[source]["shape"]).numel(), source


def test_from_clip_finds_the_released_settings() -> None:
    for variant, make_config in VARIANTS.items():
        released = make_config()
        values = SANForOpenVocabularySegmentation.config_for_clip(released.clip_config)
        found = SANConfig(clip_config=released.clip_config, weights_license="mit", **values)
        assert found.to_diff_dict() == released.to_diff_dict(), variant


def test_multiply_adds() -> None:
    """The paper's 64.3 G at 640 x 640 are those of the masked form, which the released models run.

    The cross form leaves out the last block's work on CLIP's own 401 tokens, which nothing reads; with it, both agree.
    Of the paper's Table 8 we know no other row.
    """
    counts = {
        form: count_model(SANForOpenVocabularySegmentation, SANConfig(recognition_attention=form), (640, 640), 171)
        for form in ("masked", "cross")
    }
    assert counts["masked"] == pytest.approx(64.3e9, rel=0.05)
    tokens, width = 401, 768
    left_out = tokens * 10 * width**2 + 2 * tokens**2 * width  # query and output projections, MLP; attention
    assert counts["cross"] < counts["masked"]
    assert counts["cross"] + left_out == pytest.approx(64.3e9, rel=0.05)


class TestSANConversion(ConversionTesterMixin):
    method = "san"
    case = "san/case_a"
    manifests = ("san", ("san_vit_b_16", "san_vit_large_14"))

    def test_the_release_is_found_by_its_shapes(self, tmp_path: Path) -> None:
        rules = importlib.import_module("ov_segmentation.models.san.convert_san")
        for variant in VARIANTS:
            keys = json.loads((FIXTURES / f"keys_full_{variant}.json").read_text())
            weights = {key: torch.zeros(()).expand(shape) for key, (shape, _) in keys.items()}
            assert conversion_cli.find_variant(rules, self.saved(weights, tmp_path / "release.pth")) == variant

    def test_a_checkpoint_of_no_release_is_told_why(self, tmp_path: Path) -> None:
        rules = importlib.import_module("ov_segmentation.models.san.convert_san")
        file = self.saved({"strange.weight": torch.zeros(2)}, tmp_path / "strange.pth")
        with pytest.raises(ValueError, match="fits none of the releases") as caught:
            conversion_cli.find_variant(rules, file)
        message = str(caught.value)
        assert [f"{name}: 1 of 1 keys" in message for name in VARIANTS] == [True, True]
        assert message.count("Unknown keys: strange.weight") == 2

    def test_a_folder_of_the_two_files_of_openai_is_a_tokenizer(self, tmp_path: Path) -> None:
        (tmp_path / "vocab.json").write_text(json.dumps(TOKENIZER.get_vocab()))
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
        (tmp_path / "README.md").write_text("whose they are")
        read = conversion_cli._tokenizer(str(tmp_path), DEFAULT_TOKENIZER)
        assert type(read) is type(TOKENIZER)
        assert read("a road")["input_ids"] == TOKENIZER("a road")["input_ids"]

    def test_a_folder_without_a_tokenizer_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "vocab.txt").write_text("road")
        with pytest.raises(ValueError, match=r"There is no tokenizer in .*merges\.txt"):
            conversion_cli._tokenizer(str(tmp_path), DEFAULT_TOKENIZER)

    def test_a_clip_checkpoint_is_refused(self) -> None:
        with pytest.raises(ValueError, match="clip_checkpoint"):
            self.rules.convert(self.checkpoint, self.config(), self.checkpoint)


def test_the_script_says_what_is_wrong_without_a_traceback(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    script = [sys.executable, str(root / "conversion" / "convert_san.py"), "--checkpoint", "nowhere.pth", "--output"]
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    done = subprocess.run([*script, str(tmp_path)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "There is no checkpoint nowhere.pth." in done.stderr and "Traceback" not in done.stderr
