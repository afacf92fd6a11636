"""The CLIP stem, the ConvNeXt CLIP and their contrastive training on scenes, at tiny sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from ov_segmentation.data.scene_captions import build_scene_tokenizer
from ov_segmentation.layers.clip_stem import (
    CLIPModelWithStem,
    CLIPStem,
    CLIPStemConfig,
    init_clip_stem_weights,
    install_clip_stem,
    load_clip,
    split_clip_config,
)
from ov_segmentation.layers.convnext_clip import ConvNextCLIPConfig, load_convnext_clip
from ov_segmentation.training.contrastive import ContrastiveRecipe, build_clip, contrastive_loss, train_clip

ROOT = Path(__file__).parents[1]
TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 16
}  # fmt: skip
VIT = {
    "projection_dim": 16,
    "text_config": TEXT,
    "vision_config": {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "projection_dim": 16, "image_size": 32, "patch_size": 8,
    },
    "clip_stem": {"hidden_sizes": [8, 16, 16], "depths": [1, 0, 0], "num_groups": 4},
}  # fmt: skip
CONVNEXT = {
    "text_config": TEXT,
    "vision_config": {
        "patch_size": 2, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_norm_eps": 1e-6,
        "layer_scale_init_value": 1.0,
    },
}  # fmt: skip


def tiny_recipe(architecture="vit", **overrides):
    return ContrastiveRecipe(
        architecture=architecture,
        model=VIT if architecture == "vit" else CONVNEXT,
        crop_size=32,
        steps=10,
        batch_size=24,
        learning_rate=5e-3,
        warmup_steps=2,
        eval_scenes=128,
        crops={"num_blocks": 2, "hard_share": 0.0},
        **overrides,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    figures = train_clip(tiny_recipe(eval_every=5), folder, seed=0, progress_bar=False)
    return folder, figures


class TestStem:
    @pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 40), (37, 33)])
    def test_grid(self, height, width):
        stem = CLIPStem(CLIPStemConfig(hidden_sizes=(8, 16, 24), depths=(1, 1, 0)))
        assert stem(torch.zeros(2, 3, height, width)).shape == (2, 24, height // 8, width // 8)

    def test_interpolated_positions(self):
        model = build_clip(tiny_recipe(), build_scene_tokenizer()).eval()
        outputs = model.vision_model(torch.rand(2, 3, 48, 64), interpolate_pos_encoding=True)
        assert outputs.last_hidden_state.shape == (2, 1 + 6 * 8, 16)

    def test_initialisation(self):
        """All weights are set, by the stem's own range, and a fresh draw differs from the first."""
        model = build_clip(tiny_recipe(), build_scene_tokenizer())
        stem = model.vision_model.embeddings.patch_embedding
        convs = [module for module in stem.modules() if isinstance(module, torch.nn.Conv2d)]
        before = [conv.weight.detach().clone() for conv in convs]
        assert all(weight.std().item() == pytest.approx(0.02, rel=0.15) for weight in before)
        init_clip_stem_weights(stem)
        assert not any(torch.equal(conv.weight, weight) for conv, weight in zip(convs, before, strict=True))
        assert all(conv.weight.std().item() == pytest.approx(0.02, rel=0.15) for conv in convs)
        wide = CLIPStem(CLIPStemConfig(hidden_sizes=(8, 16), depths=(1, 1), initializer_range=0.5))
        assert wide.stages[0].weight.std().item() == pytest.approx(0.5, rel=0.15)

    def test_scale_of_the_weights_is_irrelevant(self):
        stem = CLIPStem(CLIPStemConfig(hidden_sizes=(8, 16), depths=(1, 1), initializer_range=0.5))
        picture = torch.rand(1, 3, 16, 16)
        expected = stem(picture)
        with torch.no_grad():
            for module in stem.modules():
                if isinstance(module, torch.nn.Conv2d):
                    module.weight *= 3
        assert torch.allclose(stem(picture), expected, atol=1e-4)

    def test_errors_name_both_sides(self):
        clip = CLIPModel(CLIPConfig(**{k: v for k, v in VIT.items() if k != "clip_stem"}))
        with pytest.raises(ValueError, match=r"stride 4 \(CLIP's is 8\)"):
            install_clip_stem(clip, {"hidden_sizes": [8, 16], "depths": [1, 1]})
        with pytest.raises(StrictDataclassError, match="same, non-zero number"):
            CLIPStemConfig(hidden_sizes=(8, 16), depths=(1,))
        with pytest.raises(StrictDataclassError, match="num_groups"):
            CLIPStemConfig(hidden_sizes=(9, 16, 32))
        with pytest.raises(StrictDataclassError, match="1e-6"):
            ConvNextCLIPConfig(vision_config={"layer_norm_eps": 1e-12})

    def test_dtype_follows_the_stem(self):
        model = build_clip(tiny_recipe(), build_scene_tokenizer()).to(torch.bfloat16)
        assert model.vision_model(torch.rand(1, 3, 32, 32)).last_hidden_state.dtype == torch.bfloat16


class TestLoss:
    def test_matches_its_formula(self):
        torch.manual_seed(0)
        images, texts = torch.randn(4, 8), torch.randn(4, 8)
        fits = torch.eye(4, dtype=torch.bool)
        fits[0, 2] = True
        scale = torch.tensor(1.5)
        got = contrastive_loss(images, texts, scale, fits)
        images = torch.nn.functional.normalize(images, dim=-1)
        texts = torch.nn.functional.normalize(texts, dim=-1)
        total = 0.0
        logits = (scale.exp() * images @ texts.T).exp()
        for i in range(4):
            row = sum(logits[i, j] for j in range(4) if i == j or not fits[i, j])
            column = sum(logits[j, i] for j in range(4) if i == j or not fits[j, i])
            total -= (logits[i, i] / row).log() + (logits[i, i] / column).log()
        assert got.item() == pytest.approx((total / 8).item(), rel=1e-5)


class TestTraining:
    def test_loss_falls(self, trained):
        lines = [json.loads(line) for line in (trained[0] / "train_log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [5, 10]
        assert lines[1]["loss"] < lines[0]["loss"] - 0.05
        assert lines[1]["things_c_own_chance"] == pytest.approx(1 / 22)
        assert lines[1]["all_chance"] == pytest.approx(1 / 150)
        assert {f"things_{tier}_{kind}" for tier in "abc" for kind in ("all", "own")} <= set(lines[1])

    def test_seed_decides_the_weights(self, trained, tmp_path):
        train_clip(tiny_recipe(eval_every=5), tmp_path / "same", seed=0, progress_bar=False)
        train_clip(tiny_recipe(eval_every=5), tmp_path / "other", seed=1, progress_bar=False)
        weights = [load_clip(folder).state_dict() for folder in (trained[0], tmp_path / "same", tmp_path / "other")]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
        assert not all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])

    def test_folder_holds_all_a_method_needs(self, trained, tmp_path):
        folder = trained[0]
        model, info = CLIPModelWithStem.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert model.config.text_config.eos_token_id == tokenizer.eos_token_id
        assert CLIPImageProcessorPil.from_pretrained(folder).size["height"] == 32
        clip_config, clip_stem = split_clip_config(model.config)
        clip = CLIPModel._from_config(clip_config)
        install_clip_stem(clip, clip_stem)
        clip.load_state_dict(model.state_dict())
        picture = torch.rand(1, 3, 32, 32)
        expected = model.get_image_features(pixel_values=picture).pooler_output
        found = clip.eval().get_image_features(pixel_values=picture).pooler_output
        assert torch.allclose(found, expected, atol=1e-5)
        assert model.config._attn_implementation == "sdpa"
        model.save_pretrained(tmp_path)
        again = load_clip(tmp_path).state_dict()
        assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())

    def test_load_clip_reads_a_plain_clip(self, tmp_path):
        plain = CLIPModel(CLIPConfig(**{k: v for k, v in VIT.items() if k != "clip_stem"}))
        plain.save_pretrained(tmp_path)
        loaded = load_clip(tmp_path)
        assert split_clip_config(loaded.config)[1] is None
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in plain.state_dict().items())

    def test_a_run_can_start_from_another(self, trained):
        model = build_clip(tiny_recipe(init_from=str(trained[0])), build_scene_tokenizer())
        earlier = load_clip(trained[0]).state_dict()
        assert all(torch.equal(value, earlier[key]) for key, value in model.state_dict().items())

    def test_convnext(self, tmp_path):
        figures = train_clip(tiny_recipe("convnext", autocast="bfloat16"), tmp_path, seed=0, progress_bar=False)
        assert figures["step"] == 10
        fresh = build_clip(tiny_recipe("convnext"), build_scene_tokenizer())
        assert fresh.visual_projection.weight.std().item() == pytest.approx(0.25, rel=0.2)
        assert fresh.vision_model.encoder.stages[0].layers[0].layer_scale_parameter.tolist() == [1.0] * 8
        model = load_convnext_clip(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        picture = torch.rand(2, 3, 48, 48)
        features = model.get_image_features(picture)
        assert features.last_hidden_state.shape == (2, 16, 3, 3)
        normed = model.vision_model.layernorm(features.last_hidden_state.mean((-2, -1)))
        assert torch.allclose(model.visual_projection(normed), features.pooler_output, atol=1e-6)
        texts = tokenizer(["a red ring", "a photo of a blue plain star."], padding=True, return_tensors="pt")
        assert model(picture, **texts).shape == (2, 2)
        model.save_pretrained(tmp_path / "again")
        again = load_convnext_clip(tmp_path / "again").state_dict()
        assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())


class TestRecipes:
    @pytest.mark.parametrize("name", ["clip_vit_scenes", "clip_convnext_scenes"])
    def test_shipped_recipes_build(self, name):
        recipe = ContrastiveRecipe.from_yaml(ROOT / "examples" / "recipes" / f"{name}.yaml")
        model = build_clip(recipe, build_scene_tokenizer()).eval()
        pictures = torch.zeros(1, 3, recipe.crop_size, recipe.crop_size)
        assert model.get_image_features(pixel_values=pictures).pooler_output.shape == (1, 128)

    def test_errors(self, tmp_path):
        (tmp_path / "recipe.yaml").write_text("architecture: vit\nmodel: {}\nlerning_rate: 1\n")
        with pytest.raises(ValueError, match="lerning_rate"):
            ContrastiveRecipe.from_yaml(tmp_path / "recipe.yaml")
        with pytest.raises(ValueError, match="'c'"):
            tiny_recipe(tiers=("a", "c"))

    def test_command_line(self, tmp_path):
        import yaml

        recipe = tmp_path / "recipe.yaml"
        values = {"architecture": "vit", "model": VIT, "crop_size": 32, "batch_size": 8, "eval_scenes": 128}
        recipe.write_text(yaml.safe_dump({**values, "crops": {"num_blocks": 1}}))
        script = [sys.executable, str(ROOT / "examples" / "train_clip.py"), "--recipe", str(recipe)]
        run = subprocess.run(
            [*script, "--output", str(tmp_path / "out"), "--steps", "2"], capture_output=True, text=True, cwd=ROOT
        )
        assert run.returncode == 0, run.stderr
        assert json.loads(run.stdout)["step"] == 2
        assert load_clip(tmp_path / "out").config.clip_stem["hidden_sizes"] == [8, 16, 16]
