"""The small SAM: prompts, loss, a short training, and the methods that take it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from transformers import SamModel

from examples import train_sam
from ov_segmentation import ledger
from ov_segmentation.data.scene_vocabulary import SceneVocabulary
from ov_segmentation.data.scenes import SceneGenerator
from ov_segmentation.strict_mapping import RecipeError
from ov_segmentation.training.sam_evaluation import evaluate_sam
from ov_segmentation.training.sam_prompts import (
    PROMPTS,
    SMALLEST_REGION,
    ask,
    boxes_of,
    draw_prompts,
    mask_iou,
    scene_regions,
)
from ov_segmentation.training.sam_training import SamRecipe, build_sam, sam_loss
from ov_segmentation.training.sam_training import train_sam as train_sam_model

RECIPE = Path(__file__).resolve().parents[1] / "examples" / "recipes" / "sam_scenes.yaml"


@pytest.fixture(scope="module")
def scenes():
    return SceneGenerator(SceneVocabulary.small(), seed=5).render(0, 12)


def test_regions_have_one_class_each_and_their_prompts_lie_inside(scenes) -> None:
    regions = scene_regions(scenes)
    for picture in range(len(scenes)):
        for region in regions[picture].unique():
            assert len(scenes.label_maps[picture][regions[picture] == region].unique()) == 1
    points, targets = draw_prompts(regions, 6, 2, torch.Generator().manual_seed(0))
    x, y = points.long().unbind(-1)
    inside = targets[torch.arange(12)[:, None, None], torch.arange(6)[None, :, None], y, x]
    assert inside.all()
    assert targets.sum((-2, -1)).min() >= SMALLEST_REGION
    # small objects are drawn as often as large grounds
    big = targets.sum((-2, -1)) > targets[0, 0].numel() / 3
    assert 0.1 < big.float().mean() < 0.6


def test_boxes_and_iou() -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 2:5, 3:7] = True
    assert boxes_of(mask).tolist() == [[3, 2, 7, 5]]
    other = torch.zeros_like(mask)
    other[0, 2:5, 5:8] = True
    assert mask_iou(mask, other).item() == pytest.approx(6 / 15)
    assert mask_iou(mask & ~mask, mask & ~mask).item() == 0


def test_only_the_best_mask_is_trained() -> None:
    target = torch.zeros(1, 8, 8, dtype=torch.bool)
    target[0, :4] = True
    right = torch.where(target, 4.0, -4.0)
    logits = torch.stack([right, -right, torch.zeros_like(right)], dim=1).requires_grad_()
    sam_loss(logits, torch.zeros(1, 3), target).backward()
    assert logits.grad[0, 0].abs().sum() > 0 and not logits.grad[0, 1:].any()
    assert sam_loss(logits[:, :1], torch.ones(1, 1), target) < sam_loss(logits[:, 1:2], torch.zeros(1, 1), target)


@pytest.mark.parametrize("kind", PROMPTS)
def test_every_kind_of_prompt_changes_the_masks(kind: str, scenes) -> None:
    torch.manual_seed(0)
    model = build_sam(SamRecipe.from_yaml(RECIPE)).eval()
    prompts = draw_prompts(scene_regions(scenes[:2]), 3, 3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, scores = ask(model, scenes.images[:2], prompts, kind)
    assert logits.shape == (6, 3, 64, 64) and scores.shape == (6, 3)
    differs = prompts.targets.flatten(0, 1).flatten(1).unique(dim=0)
    assert len(logits.flatten(1).unique(dim=0)) >= len(differs) > 1


def test_untrained_attention_looks_where_the_prompt_is(scenes) -> None:
    """Of the point's attention at the start, at least half is within a cell of it (3 x 3 of 16 x 16 cells)."""
    torch.manual_seed(0)
    model, seen = build_sam(SamRecipe.from_yaml(RECIPE)).eval(), []
    transformer = model.mask_decoder.transformer
    attentions = [layer.cross_attn_token_to_image for layer in transformer.layers]
    for attention in (*attentions, transformer.final_attn_token_to_image):
        attention.register_forward_hook(lambda _, __, output: seen.append(output[1]))
    prompts = draw_prompts(scene_regions(scenes), 4, 1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        ask(model, scenes.images, prompts, "points")
    cells = (prompts.points[:, :, 0] / 6).flatten(0, 1).long()
    rows, columns = torch.arange(256) // 16, torch.arange(256) % 16
    near = ((columns - cells[:, :1]).abs() <= 1) & ((rows - cells[:, 1:]).abs() <= 1)
    assert len(seen) == 3
    for weights in seen:
        # `[prompts, heads, tokens, cells]`; five tokens are SAM's own, the sixth is the point
        assert (weights[:, 0, 5] * near).sum(-1).mean() > 0.5


def test_the_table_of_positions_is_one_and_not_trained() -> None:
    model = build_sam(SamRecipe.from_yaml(RECIPE))
    ours, pictures = model.prompt_encoder.shared_embedding, model.shared_image_embedding
    assert ours.positional_embedding is pictures.positional_embedding
    assert not ours.positional_embedding.requires_grad


@pytest.mark.slow
def test_a_minute_teaches_it_what_prompts_are(tmp_path: Path) -> None:
    """An eighth of the recipe: masks of objects from boxes and points are better than a disc in their place."""
    recipe = SamRecipe.from_yaml(RECIPE, steps=250)
    figures = train_sam_model(recipe, tmp_path, seed=1, progress_bar=False)
    assert figures["box_things"] > figures["disc_things"]
    assert figures["best_of_three_things"] > figures["disc_things"]
    assert figures["mask_things"] > 0.6
    assert figures["best_of_three_stuff"] > figures["disc_stuff"]


def test_training_beats_no_training_and_the_command_records_it(tmp_path: Path) -> None:
    values = yaml.safe_load(RECIPE.read_text())
    values |= {"steps": 12, "batch_size": 4, "warmup_steps": 2, "eval_scenes": 8, "decay_fraction": 0.2}
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(values))
    arguments = ["--recipe", str(small), "--output", str(tmp_path / "sam"), "--ledger", str(tmp_path / "l.jsonl")]
    train_sam.main(arguments)
    train_sam.main(arguments)  # finished: there is nothing to do, nor to record
    (line,) = ledger.read(tmp_path / "l.jsonl")
    torch.manual_seed(0)
    untrained = build_sam(SamRecipe.from_yaml(small)).eval()
    held_out = SceneGenerator(SceneVocabulary.small(), seed=1)
    before = evaluate_sam(untrained, held_out, 8)
    assert line["figures"]["best_of_three"] > before["best_of_three"]
    again = evaluate_sam(SamModel.from_pretrained(tmp_path / "sam").eval(), held_out, 8)
    assert again["iou"] == pytest.approx(line["figures"]["iou"], abs=0.02)
    assert again["disc"] == line["figures"]["disc"] > 0.1


def test_esc_net_and_deop_take_it(tmp_path: Path) -> None:
    from ov_segmentation.models.deop.modeling_deop import DeOPForOpenVocabularySegmentation
    from ov_segmentation.models.esc_net.modeling_esc_net import ESCNetForOpenVocabularySegmentation
    from ov_segmentation.training.recipe import load_recipe
    from tests.test_demo import ASSETS

    build_sam(SamRecipe.from_yaml(RECIPE)).save_pretrained(tmp_path)
    clip = ASSETS / "clip_vit_scenes"
    config = dict(load_recipe(RECIPE.with_name("esc_net_scenes.yaml")).model.config)
    model = ESCNetForOpenVocabularySegmentation.from_clip_and_sam(clip, tmp_path, **config)
    sam = SamModel.from_pretrained(tmp_path)
    weight = sam.mask_decoder.transformer.layers[0].mlp.lin1.weight
    assert torch.equal(model.blocks[0].sam.block.mlp.lin1.weight, weight)
    deop = DeOPForOpenVocabularySegmentation.from_clip_and_sam(clip, tmp_path, sam_points_per_side=4)
    assert deop.config.proposals == "sam"


def test_a_wrong_recipe_says_so(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**yaml.safe_load(RECIPE.read_text()), "stepz": 3}))
    with pytest.raises(RecipeError, match="Did you mean 'steps'"):
        SamRecipe.from_yaml(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="autocast 'float16'"):
        SamRecipe.from_yaml(RECIPE, autocast="float16")
    (tmp_path / "r.yaml").write_text("steps: [")
    with pytest.raises(RecipeError, match="is not YAML"):
        SamRecipe.from_yaml(tmp_path / "r.yaml")
