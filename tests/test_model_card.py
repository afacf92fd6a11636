"""The card of a checkpoint: valid for the Hub, filled from ledger and checkpoint; nobody's own text is replaced."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from safetensors.torch import load_file, save_file

from ov_segmentation import AutoModelForOpenVocabularySegmentation, ledger
from ov_segmentation.auto import METHODS
from ov_segmentation.checkpoint_results import (
    METRICS,
    eval_results,
    newest,
    results_of,
    saved_weights_digest,
    weights_metadata,
)
from ov_segmentation.data.benchmarks import paper_scores
from ov_segmentation.evaluation.runner import weights_digest
from ov_segmentation.method_facts import FACTS, paper_table
from ov_segmentation.model_card import (
    CARD,
    CardError,
    History,
    build_card,
    is_generated,
    public_command,
    public_name,
    write_card,
)
from ov_segmentation.training.loop import train
from ov_segmentation.training.recipe import load_recipe
from tests import training_runs

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "assets" / "san_scenes"
HISTORY = History(
    "trained",
    base_models=["owner/clip", "my_clip"],
    training_data="streets (20 pictures)",
    dataset_id="owner/streets",
    class_names=["road", "car"],
    settings={"Steps": 8},
)


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the bundled checkpoint."""
    return Path(shutil.copytree(BUNDLED, tmp_path / "checkpoint"))


def measured(path: Path, **values) -> ledger.Entry:
    """A line of a ledger about a SAN."""
    entry = {"command": "measure", "seed": 0, "seconds": 1, "figures": {"miou": 0.25}, "protocol": "p", "machine": "m"}
    return ledger.append(path, **{**entry, "method": "san", **values})


# ---------------------------------------------------------------------- the card


def test_the_card_is_valid_and_says_what_it_was_given(checkpoint):
    entry = measured(
        checkpoint.parent / "l.jsonl", figures={"miou": 0.25, "pixel_accuracy": 0.5, "steps": 3}, dataset="streets"
    )
    card = build_card(
        checkpoint, repo_id="me/streets-san", history=HISTORY, entries=[entry], weights_license="cc-by-nc-4.0"
    )
    loaded = ModelCard(str(card))
    data = loaded.data
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "ov_segmentation",
        "image-segmentation",
        "cc-by-nc-4.0",
    )
    assert (data.base_model, data.datasets, data.model_name) == (["owner/clip"], ["owner/streets"], "streets-san")
    assert data.eval_results == eval_results([entry])
    assert [(r.metric_type, r.metric_value) for r in data.eval_results] == [("mean_iou", 0.25), ("accuracy", 0.5)]
    assert all(isinstance(result, EvalResult) and result.dataset_type == "streets" for result in data.eval_results)
    for text in ("import ov_segmentation", 'model="me/streets-san"', "cc-by-nc-4.0", "not for commercial use"):
        assert text in loaded.text
    for text in ("my_clip", "streets (20 pictures)", "2 names: road, car", "| Steps | 8 |", "mean IoU 25.0 %"):
        assert text in loaded.text


def test_without_measurements_there_is_no_model_index(checkpoint):
    config = checkpoint / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "weights_license": None}))
    card = ModelCard(str(build_card(checkpoint)))
    assert card.data.eval_results is None and "model-index" not in str(card)
    assert "None was measured with this checkpoint." in card.text
    assert "not stated" in card.text and card.data.license is None
    assert "Not recorded." in card.text


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.model_type)
def test_every_method_has_its_facts_and_the_papers_numbers(checkpoint, method):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "model_type": method.model_type}))
    text = build_card(checkpoint).text
    assert FACTS[method.model_type].paper in text
    for heading in (
        "## Use",
        "## Vocabulary",
        "## Where the weights come from",
        "## Limits",
        "## Licence and citation",
    ):
        assert text.count(f"\n{heading}\n") == 1
    scores = [score for score in paper_scores() if score.method == method.model_type]
    assert ("**None of these numbers was measured here.**" in text) == bool(scores)
    table = paper_table(method.model_type) or ""
    assert all(f" {score.miou} " in table for score in scores)
    assert "{{" not in text and "{%" not in text


def test_a_licence_that_the_hub_does_not_know_is_named(checkpoint):
    data = build_card(checkpoint, weights_license="Our Licence 1.0").data
    assert (data.license, data.license_name) == ("other", "our-licence-1.0")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CardError, match=r"no config\.json"):
        build_card(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CardError, match="'bert'"):
        build_card(tmp_path)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("openai/clip-vit-base-patch16", "openai/clip-vit-base-patch16"),
        ("/somewhere/of/mine/my_clip", "my_clip"),
        ("../runs/san_scenes/model", "san_scenes"),
        ("~/clips/mine", "mine"),
    ],
)
def test_a_card_names_no_place_on_a_disk(source, name):
    assert public_name(source) == name


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["x", "--data", "/srv/me/street", "--names=~/a.json"], ["x", "--data", "street", "--names=a.json"]),
        (["--data", "/srv/me/my pictures/old street"], ["--data", "old street"]),
        (["--set", 'data.sources=["/a/b", "/c d/e"]', "lr=1/2"], ["--set", 'data.sources=["b", "e"]', "lr=1/2"]),
        (["--model", "assets/san", "--data", "OWNER/NAME"], ["--model", "assets/san", "--data", "OWNER/NAME"]),
    ],
)
def test_a_command_names_no_place_on_a_disk(words, shown):
    assert shlex.split(public_command(shlex.join(words))) == shown


def test_a_local_folder_that_looks_like_a_hub_id_is_none(tmp_path, monkeypatch):
    (tmp_path / "data" / "camvid").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("data/camvid") == "camvid"


# ---------------------------------------------------------------------- whose card it is


def test_only_an_unchanged_card_of_ours_is_written_anew(checkpoint):
    file = checkpoint / CARD
    assert write_card(checkpoint, history=HISTORY)
    first = file.read_text()
    assert is_generated(first)
    assert write_card(checkpoint, model_name="other")
    assert "owner/streets" in file.read_text()  # where the weights come from is read from the card before
    for mine in (first.replace("Intended for", "For"), first.replace("owner/clip", "owner/other"), "# Mine\n"):
        assert not is_generated(mine)
        file.write_text(mine)
        assert not write_card(checkpoint)
        assert file.read_text() == mine


def test_other_weights_do_not_inherit_a_history(checkpoint):
    write_card(checkpoint, history=HISTORY)
    weights = load_file(checkpoint / "model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert write_card(checkpoint)
    assert "Not recorded." in (checkpoint / CARD).read_text()


def test_save_pretrained_writes_no_card(tmp_path):
    model = AutoModelForOpenVocabularySegmentation.from_pretrained(BUNDLED)
    (tmp_path / CARD).write_text("# Mine\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text() == "# Mine\n"
    model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / CARD).exists()


# ---------------------------------------------------------------------- which measurements belong to it


def test_the_digest_is_that_of_the_loaded_model():
    model = AutoModelForOpenVocabularySegmentation.from_pretrained(BUNDLED, dtype=torch.float32)
    assert saved_weights_digest(BUNDLED) == weights_digest(model)


def test_a_line_belongs_by_weights_by_recipe_or_by_name(checkpoint, tmp_path):
    path, digest = tmp_path / "ledger.jsonl", saved_weights_digest(checkpoint)
    metadata = weights_metadata(checkpoint)
    recipe = {"recipe_hash": metadata["recipe_hash"], "code": {"commit": metadata["commit"], "dirty": True}}
    recipe["seed"] = int(metadata["seed"])
    mine = [
        measured(path, weights=digest, name="whatever"),
        measured(path, **recipe),
        measured(path, name="san_scenes", seed=recipe["seed"]),
    ]
    for other in (
        {"weights": "0" * 16, "name": "san_scenes"},
        {**recipe, "seed": recipe["seed"] + 1},
        {**recipe, "recipe_hash": "000000000000", "name": "san_scenes"},
        {"name": "another"},
        {"name": "san_scenes", "seed": recipe["seed"] + 1},
        {"weights": digest, "method": "sed"},
    ):
        measured(path, **other)
    assert results_of(checkpoint, [path], "san", name="san_scenes") == mine
    assert results_of(checkpoint, [path, path], "san") == mine[:2]
    others = tmp_path / "others.jsonl"
    measured(others, name="another")
    assert results_of(checkpoint, [others, path, others], "san") == mine[:2], "a glob finds ledgers without a line too"
    with pytest.raises(LookupError, match=r"none of the 9 lines is of method 'deop'.*'deop_scenes'"):
        results_of(checkpoint, [path], "deop", name="deop_scenes")
    with pytest.raises(FileNotFoundError):
        results_of(checkpoint, [tmp_path / "none.jsonl"], "san")


def test_results_of_other_weights_in_the_folder_are_an_error(checkpoint):
    measured(checkpoint / "results.jsonl", weights="0" * 16)
    with pytest.raises(LookupError, match="of other weights"):
        results_of(checkpoint, [], "san")


def test_a_repeated_measurement_replaces_the_one_before(tmp_path):
    path = tmp_path / "ledger.jsonl"
    lines = [measured(path), measured(path, protocol="q"), measured(path, figures={"miou": 0.3})]
    assert newest(lines) == [lines[2], lines[1]]


def test_every_known_figure_has_a_metric_of_the_hub():
    assert {kind for kind, _ in METRICS.values()} == {"mean_iou", "accuracy"}


# ---------------------------------------------------------------------- training


def test_training_exports_a_card_with_its_own_evaluation(tmp_path):
    pictures = training_runs.write_pictures(tmp_path / "pictures")
    recipe = training_runs.tiny_recipe(pictures, steps=2, num_workers=0)
    recipe["model"]["config"] = {**recipe["model"]["config"], "weights_license": "mit"}
    recipe = load_recipe(training_runs.write_recipe(tmp_path / "recipe.yaml", recipe))
    result = train(recipe, tmp_path / "tiny_streets", command=f"train it --data {tmp_path / 'streets'}")
    folder = tmp_path / "tiny_streets" / "model"
    (line,) = ledger.read(folder / "results.jsonl")
    assert line["figures"]["miou"] == result["miou"] and line["weights"] == saved_weights_digest(folder)
    assert line["protocol"].startswith("pictures val; first 3 pictures; shortest_edge 32")
    card = ModelCard.load(folder / CARD)
    assert is_generated((folder / CARD).read_text())
    assert (card.data.model_name, card.data.license) == ("tiny_streets", "mit")
    values = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert values == {METRICS[name][1]: result[name] for name in METRICS if name in result}
    assert all(math.isfinite(value) for value in values.values())
    assert "3 names: sky, road, car" in card.text and "from random weights" in card.text
    assert "pictures (7 pictures of 3 classes)" in card.text
    assert "| Command | `train it --data streets` |" in card.text and str(tmp_path) not in str(card)
    assert results_of(folder, [], "san") == [line]
