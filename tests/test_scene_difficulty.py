"""Harder scenes: what they change, and that the standard ones stay what they were."""

from __future__ import annotations

import pytest
import torch

from ov_segmentation.data.scene_difficulty import SceneDifficulty
from ov_segmentation.data.scene_vocabulary import SceneVocabulary
from ov_segmentation.data.scenes import SceneGenerator

SCENES = SceneVocabulary.small()
# of the first 24 scenes of seed 3, when the bundled checkpoints were trained
LABEL_SUM, MEAN_BRIGHTNESS = 27449461, 130.733


def render(difficulty: str, count: int = 24):
    return SceneGenerator(SCENES, seed=3, difficulty=difficulty).render(0, count)


def spoil(images: torch.Tensor, seed: int = 0, **effects) -> torch.Tensor:
    return SceneDifficulty(**effects).spoil(images, torch.Generator().manual_seed(seed))


def roughness(images: torch.Tensor) -> torch.Tensor:
    """Mean step between neighbouring pixels, of each picture."""
    pictures = images.float()
    return (pictures[..., 1:] - pictures[..., :-1]).abs().mean((1, 2, 3))


def test_standard_scenes_are_those_of_the_published_protocol() -> None:
    scenes = render("standard")
    assert int(scenes.label_maps.long().sum()) == LABEL_SUM
    assert scenes.images.float().mean().item() == pytest.approx(MEAN_BRIGHTNESS, abs=0.01)


def test_harsh_scenes_show_the_same_objects() -> None:
    standard, harsh = render("standard"), render("harsh")
    assert torch.equal(standard.label_maps, harsh.label_maps) and standard.captions == harsh.captions
    difference = (standard.images.float() - harsh.images.float()).abs().mean((1, 2, 3))
    assert difference.min() > 1
    assert torch.equal(harsh.images, render("harsh").images)


def test_crowded_scenes_hide_objects() -> None:
    standard, crowded = render("standard", 64), render("crowded", 64)
    assert (crowded.object_classes >= 0).all() and not (standard.object_classes >= 0).all()

    def visible(scenes) -> float:
        """Share of the drawn discs' area that is visible, at least about: objects hide one another."""
        drawn = (scenes.object_classes >= 0) * scenes.object_boxes[..., 2] ** 2
        return float((scenes.instance_maps >= 0).sum() / drawn.sum())

    assert visible(crowded) < 0.9 * visible(standard)


def test_effects_do_what_they_are_called() -> None:
    images = render("standard").images
    assert spoil(images) is images
    smoother = roughness(spoil(images, blur=2.0))
    assert (smoother <= roughness(images)).all() and smoother.mean() < 0.8 * roughness(images).mean()
    assert (roughness(spoil(images, noise=0.3)) > roughness(images)).float().mean() > 0.9
    dark = spoil(images, gradient=0.9).float()
    sides = torch.stack([dark[..., :24].mean((1, 2, 3)), dark[..., -24:].mean((1, 2, 3))])
    before = torch.stack([images[..., :24].float().mean((1, 2, 3)), images[..., -24:].float().mean((1, 2, 3))])
    assert ((sides[0] / sides[1]) / (before[0] / before[1]) - 1).abs().max() > 0.3
    poor, good = spoil(images, jpeg_quality=(5, 5)), spoil(images, jpeg_quality=(95, 95))
    errors = [(spoilt.float() - images.float()).abs().mean() for spoilt in (poor, good)]
    assert errors[0] > 2 * errors[1] > 0


@pytest.mark.parametrize("effects", [{"blur": 9.0}, {"gradient": 1.0}, {"jpeg_quality": (60, 20)}])
def test_impossible_effects_are_refused(effects: dict) -> None:
    with pytest.raises(ValueError, match="got"):
        SceneDifficulty(**effects)


def test_an_unknown_difficulty_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of"):
        SceneGenerator(SCENES, difficulty="impossible")
