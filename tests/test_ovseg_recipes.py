"""The recipes of OVSeg and SimBaseline: what they train, what decays, their numbers, and a step of each in small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from examples.train import main as train
from ov_segmentation import AutoModelForOpenVocabularySegmentation
from ov_segmentation.models.ovseg.convert_ovseg import VARIANTS
from ov_segmentation.models.ovseg.modeling_ovseg import OVSegForOpenVocabularySegmentation
from ov_segmentation.training.adaptation_recipe import load_adaptation_recipe
from ov_segmentation.training.mask_adaptation import MaskAdaptation
from ov_segmentation.training.optimization import parameter_settings
from ov_segmentation.training.recipe import load_recipe
from tests.models.test_ovseg import RESNET as TINY_RESNET
from tests.models.test_ovseg import SMALL
from tests.training_runs import NAMES, TOWER, write_pictures

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
SWIN, RESNET = "ovseg_swinbase_vitL14_ft_mpt", "ovseg_R101c_vitB16_ft_mpt"


def released(variant: str) -> OVSegForOpenVocabularySegmentation:
    with torch.device("meta"):
        return OVSegForOpenVocabularySegmentation(VARIANTS[variant]())


def decayed(module: torch.nn.Module, optimizer: Any) -> dict[str, bool]:
    """Trained parameter -> whether it decays."""
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    return {name: decay > 0 for name, (_, decay) in parameter_settings(names, optimizer).items()}


@pytest.mark.parametrize(("name", "variant"), [("ft_vit_l", SWIN), ("ft_vit_b", RESNET), ("mpt_vit_l", SWIN)])
def test_shipped_adaptation_recipes(name: str, variant: str) -> None:
    found = load_adaptation_recipe(RECIPES / f"ovseg_clip_{name}.yaml")
    assert found.steps * found.batch_size == pytest.approx(5 * 442_117, rel=0.01)
    model = released(variant)
    prompts = model.visual_prompts if found.prompts.use == "trained" else None
    module = MaskAdaptation(model.clip, prompts, found.train_clip, found.prompts.use == "trained")
    decays, shapes = decayed(module, found.optimizer), dict(module.named_parameters())
    if prompts is None:  # one-dimensional parameters and the temperature do not decay
        assert all(decay == (shapes[name].ndim > 1) for name, decay in decays.items())
    else:
        assert decays == {"clip.logit_scale": False, "visual_prompts.embedding": False}


@pytest.mark.parametrize(
    ("name", "variant"),
    [("ovseg_swin_b_coco", SWIN), ("ovseg_r101c_coco", RESNET), ("simbaseline_r101c_coco156", "simbaseline_coco156")],
)
def test_shipped_recipes(name: str, variant: str) -> None:
    """Norms, queries and tables of relative positions do not decay; biases and "no object" do."""
    found = load_recipe(RECIPES / f"{name}.yaml")
    model = released(variant)
    norms = {
        f"{name}.{kind}"
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm))
        for kind in ("weight", "bias")
    }
    for parameter, decays in decayed(model, found.optimizer).items():
        free = parameter in norms or "query_embedding" in parameter or "relative_position_bias" in parameter
        assert decays != free, parameter


def test_recipes_of_the_scenes() -> None:
    assert load_recipe(RECIPES / "ovseg_scenes.yaml").model.model_type == "ovseg"
    assert load_adaptation_recipe(RECIPES / "ovseg_scenes_clip.yaml").equal_nouns == "ignored"


# facts sheets of OVSeg (section 6) and DeOP (section 8, which SimBaseline shares)
PUBLISHED = {
    "ovseg_swin_b_coco": {
        "variant": SWIN, "lr": 6e-5, "decay": 0.01, "backbone": 1.0, "steps": 120_000, "warmup": 1500, "crop": 640,
        "sizes": list(range(320, 1281, 64)), "max_size": 2560,
    },
    "ovseg_r101c_coco": {
        "variant": RESNET, "lr": 2e-4, "decay": 1e-4, "backbone": 0.1, "steps": 120_000, "warmup": 1500, "crop": 512,
        "sizes": [800], "max_size": 1333,
    },
    "simbaseline_r101c_coco156": {
        "variant": "simbaseline_coco156", "lr": 1e-4, "decay": 1e-4, "backbone": 0.1, "steps": 60_000, "warmup": 0,
        "crop": 640, "sizes": list(range(320, 961, 64)), "max_size": 2560,
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items(), ids=list(PUBLISHED))
def test_published_numbers(name: str, published: dict[str, Any]) -> None:
    found = load_recipe(RECIPES / f"{name}.yaml")
    trained = [name for name, p in released(published["variant"]).named_parameters() if p.requires_grad]
    settings = parameter_settings(trained, found.optimizer)
    assert settings["no_object_embedding"] == (published["lr"], published["decay"])
    rates = {lr for name, (lr, _) in settings.items() if name.startswith("proposal_network.backbone.")}
    assert list(rates) == pytest.approx([published["lr"] * published["backbone"]])
    assert (found.steps, found.batch_size, found.clip_grad_norm) == (published["steps"], 32, 0.01)
    assert (found.schedule.name, found.schedule.power) == ("poly", 0.9)
    assert found.schedule.warmup_steps == published["warmup"]
    resize, crop, jitter, flip, pad = found.augmentation
    assert (resize["sizes"], resize["max_size"]) == (published["sizes"], published["max_size"])
    assert (crop["height"], crop["width"], pad["height"], pad["value"]) == (*[published["crop"]] * 3, 128)
    assert (jitter["name"], flip["name"]) == ("colour_jitter", "horizontal_flip")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_step_in_small(name: str, tmp_path: Path) -> None:
    """The recipe as it is shipped, through examples/train.py, with a tiny model and data in the place of the real."""
    values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    given = values["model"]["config"]
    backbone = given.get("mask_config", {}).get("backbone_config", {})
    mask_config = dict(SMALL["mask_config"])
    if backbone:  # keeps what the recipe says of it
        mask_config["backbone_config"] = {**TINY_RESNET, **backbone}
    clip = {
        "projection_dim": 8,
        "vision_config": {**TOWER, "image_size": 32, "patch_size": 8},
        "text_config": {**TOWER, "max_position_embeddings": 16},
    }
    config = {key: value for key, value in given.items() if key != "backbone"}
    config |= {**SMALL, "clip_config": clip, "mask_config": mask_config}
    values["model"] = {"model_type": "ovseg", "config": config}
    values["processor"] = {**values.get("processor", {}), "tokenizer": "words"}
    values["data"] |= {"name": str(write_pictures(tmp_path / "pictures", 2)), "class_names": NAMES, "ignore_index": 255}
    values["data"]["eval_split"] = None
    for step in values["augmentation"]:
        step.update({key: 64 for key in ("height", "width") if key in step})
    values |= {"steps": 1, "batch_size": 2, "num_workers": 0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    train(["--recipe", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run")])
    model = AutoModelForOpenVocabularySegmentation.from_pretrained(tmp_path / "run" / "model")
    for key in ("mask_threshold", "prompt_type", "ensemble_weight"):
        assert getattr(model.config, key) == config.get(key, getattr(type(model.config)(), key))
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert all(f"train/loss_{term}" in log for term in ("ce", "mask", "dice", "ce_0", "mask_0", "dice_0"))
