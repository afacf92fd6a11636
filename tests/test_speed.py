"""The command that measures speed: what it counts, what it forces, and what it writes and leaves out."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import growth, measuring, precision, rows, speed, training, training_sizes
from ov_segmentation import ledger
from ov_segmentation.layers import attention
from ov_segmentation.layers.sliding_window import window_offsets
from ov_segmentation.modeling_outputs import OpenVocabularySegmentationOutput
from ov_segmentation.models.sed import chunks
from ov_segmentation.post_processing import post_process_semantic_segmentation
from ov_segmentation.profiling import ATTENTION, CONVOLUTION, MATRIX_PRODUCT, MultiplyAddCounter
from ov_segmentation.strict_mapping import from_mapping
from ov_segmentation.training.adaptation_recipe import AdaptationRecipe
from ov_segmentation.training.recipe import Recipe
from tests.training_runs import MODEL


def test_multiply_adds_are_counted_by_kind():
    query, key = torch.ones(1, 2, 5, 8), torch.ones(1, 2, 7, 8)
    with torch.no_grad(), MultiplyAddCounter() as counter:
        nn.Linear(3, 4)(torch.ones(6, 3))
        nn.Conv2d(4, 6, 3, groups=2, bias=False)(torch.ones(1, 4, 5, 6))
        nn.functional.scaled_dot_product_attention(query, key, key)
    assert counter.multiply_adds == {
        MATRIX_PRODUCT: 6 * 3 * 4,
        CONVOLUTION: 6 * 2 * 9 * 3 * 4,  # 2 input channels per group, 3 x 4 positions
        ATTENTION: 2 * (2 * 5 * 7 * 8),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_tiles_counts_as_attention_and_what_follows_does_not(dtype):
    tokens, channels = 600, 64
    query = torch.ones(1, 2, tokens, channels, dtype=dtype)
    with torch.no_grad(), MultiplyAddCounter() as counter:
        assert attention.prefers_tiles(query)
        attention.tiled_attention(query, query, query)
        query[0] @ query[0].transpose(1, 2)
    scores = 2 * tokens * tokens * channels
    assert counter.multiply_adds == {MATRIX_PRODUCT: scores, CONVOLUTION: 0, ATTENTION: 2 * scores}


def test_a_call_is_measured_beside_the_unit(monkeypatch):
    monkeypatch.setattr(measuring, "UNIT_PIXELS", 32)
    linear = nn.Linear(256, 256)
    figures = measuring.measure(lambda: linear(torch.ones(512, 256)), torch.float32, repeats=2, budget=30)
    assert figures["multiply_adds"] == {MATRIX_PRODUCT: 512 * 256 * 256, CONVOLUTION: 0, ATTENTION: 0}
    assert figures["repeats"] == 2
    assert figures["units"] == pytest.approx(figures["seconds"] / figures["unit_seconds"])
    floor = 512 * 256 * 256 / figures["rates"][MATRIX_PRODUCT]
    assert figures["over_floor"] == pytest.approx(figures["seconds"] / floor)
    assert figures["peak_mib"] >= figures["before_mib"] > 0
    json.dumps(figures, allow_nan=False)


def test_sed_keeps_the_classes_it_is_told():
    keep = rows.keeping((6, 4, 3))
    counts = [10, 10]
    for number in (6, 4, 3):
        kept = keep(torch.randn(sum(counts), 4, 4), counts, top_k=1).split(counts)
        assert [int(row.sum()) for row in kept] == [number, number]
        counts = [number, number]
    assert chunks.best_classes(torch.randn(10, 4, 4), [10], 10).all()  # the model's own is as it was


def test_crops_are_those_it_is_told():
    masks = rows.set_masks(torch.randn(2, 5, 4, 6), 3) > 0
    assert masks.flatten(2).any(2).tolist() == [[True] * 3 + [False] * 2] * 2


@pytest.fixture
def small_san(monkeypatch):
    clip = {**MODEL["clip_config"], "vision_config": {**MODEL["clip_config"]["vision_config"], "patch_size": 32}}
    small = {**MODEL, "clip_config": clip, "side_patch_size": 32, "side_image_size": 64}
    san = rows.Size("SAN", lambda: rows.SANConfig(**small), (64, 96), {"size": {"shortest_edge": 64}})
    monkeypatch.setitem(rows.SIZES, "san", san)
    monkeypatch.setattr(measuring, "UNIT_PIXELS", 32)


def test_masks_and_classes_are_like_a_trained_models(small_san):
    model, image_processor, pictures, text = rows.build("san", 20, "float32")
    with torch.no_grad():
        outputs = rows.like_trained(model(**image_processor(images=pictures, return_tensors="pt"), text_embeds=text))
    inside = outputs.masks_queries_logits > 0
    assert (inside.sum(1) == 1).all()
    (label_map,) = post_process_semantic_segmentation(outputs)
    assert len(label_map.unique()) > 1


def test_kept_classes_share_the_picture_in_place():
    logits = torch.full((2, 5, 6, 8), -100.0)
    kept = torch.tensor([[True, False, True, True, False], [False, True, False, False, False]])
    outputs = OpenVocabularySegmentationOutput(logits=logits, score_function="sigmoid", kept_classes=kept)
    assert rows.like_trained(outputs).logits is logits
    assert ((logits > 0).sum(1) == 1).all()
    assert (logits.amax(dim=(2, 3)) > -100).equal(kept)


def test_a_row_goes_from_pixels_to_the_label_map(small_san):
    figures = speed.measure_row("san", 20, "float32", repeats=1, budget=1)
    assert figures["multiply_adds"][MATRIX_PRODUCT] > 0
    assert figures["multiply_adds"][ATTENTION] > 0


ASSETS = Path(__file__).resolve().parents[1] / "assets"


def test_label_maps_of_a_trained_model_are_the_same_in_bfloat16():
    names = (ASSETS / "scene_labels.txt").read_text().strip()
    figures = precision.agreement(str(ASSETS / "san_scenes"), [str(ASSETS / "scene.png")], names)
    assert 0.99 < figures["agreement"] <= 1
    assert figures["worst_picture"] <= figures["agreement"]


def test_long_rows_are_extrapolated_along_the_two_before_them():
    done = [({"classes": 20}, {"seconds": 3.0}), ({"classes": 120}, {"seconds": 5.0})]
    assert growth.predicted("classes", [], {"classes": 20}) is None
    assert growth.predicted("classes", done[:1], {"classes": 40}) == 6
    assert growth.predicted("classes", done, {"classes": 220}) == pytest.approx(7)


@pytest.mark.parametrize("name", ["san", "ovseg-20", "deop", "sed", "cat_seg", "esc_net"])
def test_a_large_picture_is_cut_into_as_many_windows_as_asked_for(name):
    config = rows.SIZES[name].config()
    (side,) = {*growth.geometry(config, 4).values()} - {None}
    side = side[0] if isinstance(side, tuple) else side
    assert len(window_offsets(side, config.window_pixels, config.window_stride)) == 4


def test_rows_beyond_three_minutes_are_marked(tmp_path, monkeypatch, capsys):
    measured = {"units": 1.0, "cpu_units": 1.0, "peak_mib": 900, "extrapolated": False}
    measured |= {f"{part}_seconds": 1.0 for part in ("processor", "model", "map")}
    monkeypatch.setattr(
        measuring, "run_fresh", lambda script, task, threads: {**measured, "seconds": task["classes"] / 9}
    )
    path = tmp_path / "growth.jsonl"
    assert growth.main(["--tables", "classes", "--methods", "san", "--ledger", str(path)]) == 0
    marks = {entry["task"]["classes"]: entry["figures"]["extrapolated"] for entry in ledger.read(path)}
    assert marks == {20: False, 150: False, 847: False, 3000: True, 10_000: True}
    assert "extrapolated" in capsys.readouterr().out


@pytest.mark.parametrize("name", training_sizes.recipe_names())
def test_every_recipe_is_made_to_fit(name, tmp_path):
    values, _ = training_sizes.fitted(training_sizes.RECIPES / f"{name}.yaml", tmp_path)
    kind = training_sizes.kind_of(values)
    if kind == "segmentation":
        made = from_mapping(Recipe, values)
        assert made.data.name.startswith(str(tmp_path))
        for source in (made.model.from_pretrained, made.model.from_clip):
            assert source is None or Path(source).is_dir()
    elif kind == "adaptation":
        assert from_mapping(AdaptationRecipe, values).model.from_pretrained is None
    if training_sizes.PUBLISHED.get(training_sizes.EARLIER.get(name, name)):
        assert values["num_workers"] == 0
    assert kind in training.RUNNERS


def test_loading_is_a_share_of_the_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training, "clock", lambda: (now[0], 2 * now[0]))
    timer = training.StepTimer()
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)

    def wait(seconds):
        now[0] += seconds

    with timer.running():
        for seconds in (5, 3, 1):
            timer.loads(wait)(seconds)
            wait(9)
            optimizer.step()
    assert timer.figures(1)["step_seconds"] == 11
    assert timer.figures(2) == {
        "step_seconds": 10,
        "step_cpu_seconds": 20,
        "data_share": pytest.approx(0.1),
        "data_cpu_share": pytest.approx(0.1),
    }
    optimizer.step()
    assert len(timer.ends) == 3  # nothing is noted afterwards


FIGURES = {
    "seconds": 2.0,
    "cpu_seconds": 4.0,
    "units": 0.7,
    "over_floor": 1.4,
    "peak_mib": 4000,
    "multiply_adds": {MATRIX_PRODUCT: 6e10},
}


def test_targets_are_those_of_the_originals():
    few, many = (speed.compare("san", k, "float32", FIGURES) for k in (150, 847))
    assert few["target_units"] == pytest.approx(0.6 * 0.70)
    assert few["target_gigabytes"] is None
    assert many["target_gigabytes"] == pytest.approx(2.2)
    assert speed.missed({**FIGURES, **few}) == ["units", "floor"]
    assert speed.missed({**FIGURES, **many}) == ["units", "floor", "memory"]
    assert speed.missed({**FIGURES, **few, "units": 0.8, "over_floor": 1.2}) == ["slower than the original"]
    assert speed.missed({**FIGURES, **speed.compare("esc_net", 20, "float32", FIGURES), "over_floor": 1.2}) == []


def test_rows_are_recorded_and_left_out_when_resumed(tmp_path, monkeypatch, capsys):
    measured = []

    def run_fresh(script, task, threads):
        measured.append((task["name"], task["classes"], task["dtype"], threads))
        if task["classes"] == 847:
            raise RuntimeError("no memory")
        return dict(FIGURES)

    monkeypatch.setattr(measuring, "run_fresh", run_fresh)
    path = tmp_path / "speed.jsonl"
    chosen = ["--methods", "san", "--dtypes", "float32", "--threads", "1", "--ledger", str(path)]
    assert speed.main([*chosen, "--classes", "150"]) == 0
    assert speed.main([*chosen, "--resume"]) == 1
    assert measured == [("san", k, "float32", 1) for k in (150, 20, 847)]
    assert [entry["classes"] for entry in ledger.read(path)] == [150, 20]
    monkeypatch.setattr(ledger, "revision", lambda: {"commit": "another", "dirty": False})
    assert speed.main([*chosen, "--classes", "150", "--resume"]) == 0
    assert len(measured) == 4
    assert speed.main([*chosen, "--classes", "150", "--until", "0"]) == 0
    assert len(measured) == 4
    shown = capsys.readouterr().out
    assert "no memory" in shown
    assert "the time is over" in shown
    assert "misses units, floor" in shown


def test_a_recipe_that_there_is_not_is_a_message():
    with pytest.raises(SystemExit, match=r"there is no recipe nothere\.yaml"):
        training.main(["nothere.yaml"])
