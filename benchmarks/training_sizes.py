"""How each recipe is made to fit a machine without its data, its pre-trained weights and its memory.

What is measured is the recipe's own model, losses, optimizer and augmentation. Recipes of the published sizes get
random weights of that size, scenes of 480 pixels in place of photographs, and one picture a step; those of the scenes
are run as they are, around the CLIP in assets/. A recipe that continues another one's result begins with that one's
model, untrained.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "examples" / "recipes"
SCENES_CLIP = ROOT / "assets" / "clip_vit_scenes"
# folders in the one that `benchmarks/all.py` prepares
SCENES, LARGE_SCENES, PAIRS = "scenes", "large_scenes", "pairs"
# the recipe whose model another one begins with
EARLIER = {
    "deop_stage2_coco156": "deop_stage1_coco156",
    "deop_stage3_coco156": "deop_stage1_coco156",
    "deop_stage2_voc15": "deop_stage1_voc15",
    "deop_stage3_voc15": "deop_stage1_voc15",
    "deop_scenes_stage2": "deop_scenes_stage1",
    "deop_scenes": "deop_scenes_stage1",
    "deop_scenes_clip": "deop_scenes_stage1",
    "deop_scenes_small_stage2": "deop_scenes_small_stage1",
    "deop_scenes_small": "deop_scenes_small_stage1",
    "ovseg_clip_ft_vit_b": "ovseg_r101c_coco",
    "ovseg_clip_ft_vit_l": "ovseg_swin_b_coco",
    "ovseg_clip_mpt_vit_l": "ovseg_swin_b_coco",
    "ovseg_scenes_clip": "ovseg_scenes",
    "ovseg_scenes_prompts": "ovseg_scenes",
}
# module and name of a published size, by the recipe that makes its model
PUBLISHED = {
    "san_vit_b_16_coco": ("san", "san_vit_b_16"),
    "san_vit_large_14_coco": ("san", "san_vit_large_14"),
    "sed_convnext_b_coco": ("sed", "convnextB_768"),
    "sed_convnext_l_coco": ("sed", "convnextL_768"),
    "cat_seg_vit_b_coco": ("cat_seg", "vitb_384"),
    "cat_seg_vit_l_coco": ("cat_seg", "vitl_336"),
    "ovseg_r101c_coco": ("ovseg", "ovseg_R101c_vitB16_ft_mpt"),
    "ovseg_swin_b_coco": ("ovseg", "ovseg_swinbase_vitL14_ft_mpt"),
    "simbaseline_r101c_coco156": ("ovseg", "simbaseline_coco156"),
    "deop_stage1_coco156": ("deop", "coco156_r101c_vitb16"),
    "deop_stage1_voc15": ("deop", "voc15_r101c_vitb16"),
    "esc_net_vit_b_coco": ("esc_net", "vit_b_16_384"),
    "esc_net_vit_l_coco": ("esc_net", "vit_l_14_336"),
}
# crops are small
PAIRS_A_STEP = 8


def recipe_names() -> list[str]:
    """Names of all recipes that come with the project and train on what is made here."""
    return [path.stem for path in sorted(RECIPES.glob("*.yaml")) if not path.stem.endswith("_camvid")]


def kind_of(values: Mapping[str, Any]) -> str:
    """Which loop runs a recipe: "segmentation", "adaptation", "clip" or "sam"."""
    if "architecture" in values:
        return "clip"
    if "prompts_per_scene" in values or "prompt_encoder_config" in values["model"]:
        return "sam"
    return "adaptation" if "sources" in values.get("data", {}) else "segmentation"


def fitted(path: Path, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """A recipe's values for this machine, and what is different, in words.

    Args:
        path: the recipe.
        folder: with scenes and pairs.
    """
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.parent.resolve() != RECIPES or kind_of(values) in ("clip", "sam"):
        return values, []
    earlier = EARLIER.get(path.stem)
    if earlier is not None:
        first = yaml.safe_load((RECIPES / f"{earlier}.yaml").read_text(encoding="utf-8"))
        own = {key: value for key, value in values["model"].items() if key != "from_pretrained"}
        values["model"] = merged(first["model"], own)
        values["processor"] = merged(first.get("processor", {}), values.get("processor", {}))
    published = PUBLISHED.get(earlier or path.stem)
    changes = []
    if published is not None:
        values["model"] = random_weights(values["model"], published)
        values["processor"] = {**values.get("processor", {}), "tokenizer": "words"}
        changes.append("random weights")
    elif values["model"].get("from_clip"):
        values["model"]["from_clip"] = str(SCENES_CLIP)
        if values["model"]["model_type"] == "sed":  # its CLIP has a ConvNeXt
            return sed_on_scenes(values, folder)
    if kind_of(values) == "adaptation":
        values["data"] = {"sources": [str(folder / PAIRS)]}
    else:
        values["data"]["name"] = str(folder / (LARGE_SCENES if published else SCENES) / "train")
        values["data"] |= {"eval_split": None, "class_names": None, "ignore_index": None}
        values.get("evaluation", {}).pop("data", None)
    if published is not None:
        values["batch_size"], values["precision"], values["num_workers"] = 1, "no", 0
        if kind_of(values) == "adaptation":
            values["batch_size"] = PAIRS_A_STEP
        pictures = "pairs" if kind_of(values) == "adaptation" else "picture"
        changes.append(f"{values['batch_size']} {pictures} a step")
    return values, changes


def sed_on_scenes(values: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    """SED's recipe for scenes, continued from the checkpoint in assets/."""
    values["model"] = {
        "from_pretrained": str(ROOT / "assets" / "sed_scenes"),
        **{key: value for key, value in values["model"].items() if key in ("attention", "trainable")},
    }
    values["data"] |= {"name": str(folder / SCENES / "train"), "eval_split": None}
    return values, ["from assets/sed_scenes"]


def random_weights(model: Mapping[str, Any], published: tuple[str, str]) -> dict[str, Any]:
    """The model part of a recipe with random weights of a published size, the recipe's own configuration on top."""
    method, name = published
    own = {key: value for key, value in model.get("config", {}).items() if key != "backbone"}
    if method == "esc_net":
        config = esc_net_config(name)
    else:
        variants = import_module(f"ov_segmentation.models.{method}.convert_{method}").VARIANTS
        config = variants[name]().to_dict()
    rest = {key: value for key, value in model.items() if key not in ("from_clip", "from_sam", "config")}
    left_out = ("model_type", "architectures", "transformers_version", "dtype", "torch_dtype")
    config = {key: value for key, value in config.items() if key not in left_out and not key.startswith("_")}
    if method == "ovseg":  # SimBaseline was released with a text prompt that it learned; recipes begin with templates
        config["num_context_vectors"] = 0
    return {**rest, "model_type": method, "config": merged(config, own)}


def esc_net_config(name: str) -> dict[str, Any]:
    """ESC-Net's published sizes, which no conversion makes."""
    from benchmarks.count_esc_net import configurations

    return configurations()[name].to_dict()


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, the second one's values on top."""
    result = copy.deepcopy(dict(first))
    for key, value in second.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    return result
