"""Regions as training samples, and what the recipes of DeOP's first stage need: crops, SGD, a constant warm-up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ov_segmentation import Vocabulary
from ov_segmentation.data.augmentation import RandomResizedCrop
from ov_segmentation.data.datasets import load_segmentation_data
from ov_segmentation.data.labelled_pictures import LabelledPicture
from ov_segmentation.data.regions import RegionPictures
from ov_segmentation.models.deop.configuration_deop import DeOPConfig
from ov_segmentation.models.deop.modeling_deop import DeOPForOpenVocabularySegmentation
from ov_segmentation.strict_mapping import from_mapping
from ov_segmentation.training.loop import train
from ov_segmentation.training.optimization import build_optimizer, learning_rate_factor, parameter_settings
from ov_segmentation.training.recipe import OptimizerRecipe, Recipe, ScheduleRecipe, load_recipe
from ov_segmentation.training.trainable import select_trainable
from tests.training_runs import NAMES, TOWER, tiny_recipe, write_pictures

RECIPES = Path(__file__).resolve().parent.parent / "examples" / "recipes"
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
    "num_queries": 4,
    "hidden_size": 16,
    "num_heads": 2,
    "feedforward_size": 16,
    "num_layers": 2,
    "pixel_decoder_size": 64,
    "mask_size": 8,
    "embedding_hidden_size": 8,
}


class Pictures:
    """Label maps in place of a split."""

    class Rows:
        column_names = ("image", "annotation")

    rows = Rows()

    def __init__(self, *label_maps: list[list[int]]) -> None:
        self.label_maps = [np.array(one, dtype=np.int32) for one in label_maps]
        self.data = type("Data", (), {"vocabulary": Vocabulary(["a", "b", "c"])})

    def __len__(self) -> int:
        return len(self.label_maps)

    def __getitem__(self, index: int) -> LabelledPicture:
        label_map = self.label_maps[index]
        pixels = np.stack([label_map + 100] * 3, axis=-1).astype(np.uint8)
        return LabelledPicture(Image.fromarray(pixels), label_map)


def test_regions_are_tight_boxes_of_one_class() -> None:
    pictures = Pictures([[0, 0, -100], [1, 0, 1], [-100, 1, 1]])
    regions = RegionPictures(pictures, 5)
    assert len(regions) == 2
    (first, first_map), (second, second_map) = regions[0], regions[1]
    assert first.size == (2, 2)
    assert first_map.tolist() == [[0, 0], [-100, 0]]
    assert second.size == (3, 2)
    assert second_map.tolist() == [[1, -100, 1], [-100, 1, 1]]
    assert np.asarray(second)[..., 0].tolist() == [[101, 100, 101], [0, 101, 101]]


def test_each_class_gives_its_share() -> None:
    pictures = Pictures(*([[[0, 1]]] * 6), [[2, 0]])
    regions = RegionPictures(pictures, 4, seed=3)
    labels = [label for _, label in regions.regions]
    assert [labels.count(label) for label in range(3)] == [4, 4, 1]
    assert regions.regions == RegionPictures(pictures, 4, seed=3).regions
    assert regions.regions != RegionPictures(pictures, 4, seed=4).regions
    with pytest.raises(ValueError, match="at least 1"):
        RegionPictures(pictures, 0)
    with pytest.raises(ValueError, match="no regions"):
        RegionPictures(Pictures([[-100]]), 1)


def test_crops_have_the_size_asked_for_and_hold_a_label() -> None:
    generator = np.random.default_rng(0)
    label_map = np.full((40, 60), -100, dtype=np.int32)
    label_map[:8, :8] = 1
    crop = RandomResizedCrop(16, 24, scale=(0.05, 0.3))
    for _ in range(50):
        image, labels = crop(Image.new("RGB", (60, 40)), label_map, generator)
        assert image.size == (24, 16)
        assert labels.shape == (16, 24)
    windows = [RandomResizedCrop(8, 8, scale=(0.01, 0.05), keep_label=False)] * 20
    assert any((one(Image.new("RGB", (60, 40)), label_map, generator)[1] < 0).all() for one in windows)


def test_constant_warmup() -> None:
    recipe = ScheduleRecipe("cosine", warmup_steps=10, warmup_factor=0.005)
    assert [learning_rate_factor(recipe, step, 100) for step in (0, 9)] == [0.005, 0.005]
    assert learning_rate_factor(recipe, 10, 100) == learning_rate_factor(ScheduleRecipe("cosine"), 10, 100)


def test_sgd_steps_as_the_formula_says() -> None:
    layer = nn.Linear(2, 1, bias=False)
    nn.init.ones_(layer.weight)
    optimizer = build_optimizer(layer, OptimizerRecipe(lr=0.1, name="sgd", momentum=0.9, weight_decay=0.5))
    weight, velocity = 1.0, 0.0
    for _ in range(3):
        layer.weight.grad = torch.full_like(layer.weight, 2.0)
        optimizer.step()
        velocity = 0.9 * velocity + 2.0 + 0.5 * weight
        weight -= 0.1 * velocity
        torch.testing.assert_close(layer.weight.detach(), torch.full((1, 2), weight))


# ---------------------------------------------------------------------- DeOP's recipes

STAGES = {"stage1": "prompt", "stage2": "proposals", "stage3": "segmentation"}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("deop_*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_deop(path: Path) -> None:
    """They load, their optimizer groups fit what the stage trains, and decay what the sheet says."""
    recipe = load_recipe(path)
    assert recipe.model.config["training_stage"] == next(
        (v for k, v in STAGES.items() if k in path.stem), "segmentation"
    )
    small = {}
    if "scenes" in path.stem:
        first = "deop_scenes_small_stage1" if "small" in path.stem else "deop_scenes_stage1"
        small = load_recipe(RECIPES / f"{first}.yaml").model.config
    with torch.device("meta"):
        values = {k: v for k, v in recipe.model.config.items() if k != "backbone"}  # from_clip's
        model = DeOPForOpenVocabularySegmentation(DeOPConfig(**{**small, **values}))
    select_trainable(model, recipe.model.trainable)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    settings = parameter_settings(trained, recipe.optimizer)
    if "coco156" not in path.stem:
        return
    numbers = {"prompt": 8_192, "segmentation": 7_713_792}
    if recipe.model.config["training_stage"] in numbers:
        assert sum(p.numel() for p in trained.values()) == numbers[recipe.model.config["training_stage"]]
    for name, (lr, decay) in settings.items():
        module = model.get_submodule(name.rpartition(".")[0])
        normed = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.Embedding))
        if recipe.model.config["training_stage"] != "prompt":
            assert decay == (0.0 if normed else 1e-4), name
        assert lr == recipe.optimizer.lr * (0.1 if ".backbone." in name else 1), name


def stage(pictures: Path, model: dict[str, Any], **changes: Any) -> Recipe:
    recipe = tiny_recipe(pictures, steps=2, batch_size=2, accumulation=1, num_workers=0, evaluation={"interval": 2})
    recipe["evaluation"] = {"interval": 2, "max_samples": 1}
    recipe["processor"] |= {"templates": "{}"}  # the prompt is learned
    recipe |= {"model": model, "optimizer": {"lr": 1e-2}, **changes}
    return from_mapping(Recipe, recipe)


def test_three_stages_pass_one_checkpoint_on(tmp_path: Path) -> None:
    """Prompt, proposals and anchors through the real loop; each stage changes its own part alone."""
    data = write_pictures(tmp_path / "pictures")
    text = {**TOWER, "max_position_embeddings": 32}
    config = {
        "training_stage": "prompt",
        "clip_config": {
            "projection_dim": 8,
            "vision_config": {**TOWER, "image_size": 32, "patch_size": 8},
            "text_config": text,
        },
        "mask_config": MASK_FORMER,
        "visual_prompt_layers": [1],
        "visual_prompt_image_size": 32,
        "num_context_vectors": 2,
        "temperature": 5.0,  # 100 saturates the softmax of random embeddings of 8 numbers
        "dot_token_id": 5,
        "heatmap_attention_heads": 2,
        "heatmap_heads": 2,
        "heatmap_feedforward_size": 8,
    }
    regions = {"name": str(data), "eval_split": None, "class_names": NAMES, "ignore_index": 255, "regions_per_class": 4}
    prompt = stage(
        data,
        {"model_type": "deop", "config": config},
        data=regions,
        optimizer={"name": "sgd", "lr": 1.0},
        augmentation=[{"name": "random_resized_crop", "height": 32, "width": 32}],
    )
    train(prompt, tmp_path / "prompt")
    models = {"prompt": DeOPForOpenVocabularySegmentation.from_pretrained(tmp_path / "prompt/model").state_dict()}
    for name, source in (("proposals", "prompt"), ("segmentation", "proposals")):
        changes = {"from_pretrained": str(tmp_path / source / "model"), "config": {"training_stage": name}}
        train(stage(data, changes, processor={}), tmp_path / name)
        loaded = DeOPForOpenVocabularySegmentation.from_pretrained(tmp_path / name / "model")
        assert loaded.config.training_stage == name
        models[name] = loaded.state_dict()
    for before, after, parts in (
        ("prompt", "proposals", {"proposal_network", "no_object_embedding"}),
        ("proposals", "segmentation", {"heatmap_decoder", "visual_prompts", "text_prompt", "no_object_embedding"}),
    ):
        old, new = models[before], models[after]
        assert {key.split(".")[0] for key in old if not torch.equal(old[key], new[key])} == parts


def test_regions_of_a_real_data_set(tmp_path: Path) -> None:
    data = load_segmentation_data(write_pictures(tmp_path), class_names=NAMES, ignore_index=255)
    regions = RegionPictures(data.split("train"), 2)
    assert len(regions) == 6
    for number in range(6):
        image, label_map = regions[number]
        assert label_map.shape == image.size[::-1]
        assert set(np.unique(label_map)) <= {-100, regions.regions[number][1]}
