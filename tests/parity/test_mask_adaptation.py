"""The two CLIP adaptations of OVSeg against the original: features, loss, gradients, one optimizer step."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ov_segmentation.data.mask_pairs import equality_mask
from ov_segmentation.models.ovseg.convert_ovseg import convert, key_rules
from ov_segmentation.strict_mapping import from_mapping
from ov_segmentation.training.mask_adaptation import MaskAdaptation
from ov_segmentation.training.optimization import build_optimizer
from ov_segmentation.training.recipe import OptimizerRecipe

from .common import Case, assert_close, each_case

NORMALISED, FEATURES, LOSS, GRADIENTS = 1e-6, 1e-5, 1e-4, 1e-4
# a first step of Adam is the learning rate times the gradient's sign; a gradient near 0 may have that of its rounding
STEP = 1e-2
DECAYED = r"(bias|logit_scale|class_embedding|layrnorm\.weight|layer_?norm\d?\.weight)$"
OPTIMIZERS = {
    "ft": {
        "lr": 5e-6, "weight_decay": 0.2, "betas": [0.9, 0.98], "eps": 1e-6,
        "groups": [{"pattern": DECAYED, "weight_decay": 0.0}],
    },
    "mpt": {"lr": 0.05, "betas": [0.9, 0.98], "eps": 1e-6},
}  # fmt: skip
each_kind = pytest.mark.parametrize("kind", ["ft", "mpt"])


class AdaptationCase(Case):
    """The tensors of the adaptations beside an OVSeg fixture."""

    def __init__(self, folder: Path) -> None:
        super().__init__("ovseg", folder)
        self.inputs = load_file(folder / "clip_training_inputs.safetensors")
        self.expected = load_file(folder / "clip_training_outputs.safetensors")
        self.grad_norms = json.loads((folder / "clip_training_grad_norms.json").read_text())

    def picture(self, index: int) -> np.ndarray:
        """The original's evaluation transform: short side to 224, bicubic, and the square in the middle."""
        picture = PIL.Image.fromarray(self.inputs[f"raw_region_{index}"].numpy())
        scale = 224 / min(picture.size)
        # torchvision truncates the long side and rounds the crop's place
        size = [224 if side == min(picture.size) else int(side * scale) for side in picture.size]
        picture = picture.resize(size, PIL.Image.Resampling.BICUBIC)
        x, y = (round((side - 224) / 2) for side in size)
        return np.asarray(picture.crop((x, y, x + 224, y + 224)))

    def crops(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs `[4, 3, 224, 224]` and their masks, by the equality trick after the resize."""
        pictures = [self.picture(index) for index in range(4)]
        mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        crops = [(torch.tensor(picture).permute(2, 0, 1).float() / 255 - mean) / std for picture in pictures]
        return torch.stack(crops), torch.stack([torch.tensor(equality_mask(picture)) for picture in pictures])

    @functools.lru_cache  # noqa: B019 - cases live as long as the tests
    def step(self, kind: str) -> tuple[MaskAdaptation, object, dict[str, torch.Tensor]]:
        """The module after one optimizer step, its outputs before, and the gradients."""
        model = convert(self.checkpoint, self.config)
        prompts = model.visual_prompts if kind == "mpt" else None
        module = MaskAdaptation(model.clip, prompts, train_clip=kind == "ft", train_prompts=kind == "mpt").train()
        optimizer = build_optimizer(module, from_mapping(OptimizerRecipe, OPTIMIZERS[kind]))
        outputs = module(*self.crops(), self.inputs["token_ids"])
        outputs.loss.backward()
        gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        optimizer.step()
        return module, outputs, gradients


@each_case("ovseg")
def test_pictures_and_masks_are_the_originals(folder: Path) -> None:
    case = AdaptationCase.load(folder)
    crops, masks = case.crops()
    if "images" in case.inputs:  # left out of what tests/fixtures ships, since they follow from the regions
        assert_close(crops, case.inputs["images"], NORMALISED)
        assert torch.equal(masks, case.inputs["masks"].bool())
    assert all(0.05 < mask.float().mean() < 0.95 for mask in masks)


@each_kind
@each_case("ovseg")
def test_features_and_loss(folder: Path, kind: str) -> None:
    case = AdaptationCase.load(folder)
    _, outputs, _ = case.step(kind)
    assert_close(outputs.image_features, case.expected[f"{kind}_image_features"], FEATURES)
    assert_close(outputs.text_features, case.expected[f"{kind}_text_features"], FEATURES)
    assert_close(outputs.loss.reshape(1), case.expected[f"{kind}_loss"], LOSS)


@each_kind
@each_case("ovseg")
def test_gradients_and_frozen_parts(folder: Path, kind: str) -> None:
    case = AdaptationCase.load(folder)
    _, _, gradients = case.step(kind)
    norms = {name: norm for name, norm in case.grad_norms[f"{kind}_grad_norm"].items() if norm is not None}
    prefix = "clip_adapter.clip_model."
    mapping = key_rules(case.config).map_keys([prefix + name for name in norms])
    covered = set()
    for name, norm in norms.items():
        targets = mapping[prefix + name]
        covered |= set(targets)
        found = torch.stack([gradients[target].double().square().sum() for target in targets]).sum().sqrt()
        assert_close(found.reshape(1), torch.tensor([norm]), GRADIENTS, relative=True)
    assert covered == set(gradients)


@each_kind
@each_case("ovseg")
def test_one_step(folder: Path, kind: str) -> None:
    case = AdaptationCase.load(folder)
    module, _, _ = case.step(kind)
    clip, lr = module.clip, OPTIMIZERS[kind]["lr"]
    after = {"logit_scale": clip.logit_scale.reshape(1)}
    if kind == "ft":
        after["text_projection"] = clip.text_projection.weight.T
        after["visual_class_embedding"] = clip.vision_model.embeddings.class_embedding
        after["visual_proj"] = clip.visual_projection.weight.T
    else:
        after["mask_embedding"] = module.visual_prompts.embedding
    recorded = {name for name in case.expected if name.startswith(f"{kind}_") and name.endswith("_after_step")}
    assert recorded == {f"{kind}_{name}_after_step" for name in after}
    for name, value in after.items():
        assert_close(value, case.expected[f"{kind}_{name}_after_step"], STEP * lr + 1e-7)


@each_case("ovseg")
def test_recorded_temperature(folder: Path) -> None:
    case = AdaptationCase.load(folder)
    model = convert(case.checkpoint, case.config)
    for kind in ("ft", "mpt"):
        assert_close(model.clip.logit_scale.exp().reshape(1), case.expected[f"{kind}_logit_scale"], 1e-4)
