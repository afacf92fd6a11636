"""Ablations: rows, judgements, the written table, and one row for real."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import yaml

from examples import ablate
from ov_segmentation import ledger
from ov_segmentation.data.scene_folders import write_scenes
from ov_segmentation.strict_mapping import RecipeError
from ov_segmentation.training.ablation import Claim, Row, Study, judge, load_studies, measurements, render
from ov_segmentation.training.recipe import load_recipe
from tests.training_runs import tiny_recipe, write_recipe

ROOT = Path(__file__).resolve().parents[1]
STUDIES = load_studies(ROOT / "examples" / "ablations.yaml")
TRAINED = [
    (study, row)
    for study in STUDIES.values()
    for row in study.rows
    if row.of is None and row.same_as is None and row.recorded is None
]


@pytest.mark.parametrize(("study", "row"), TRAINED, ids=[f"{study.name}/{row.name}" for study, row in TRAINED])
def test_rows_are_changes_of_a_recipe_that_its_method_takes(study: Study, row: Row) -> None:
    from ov_segmentation.auto import METHODS, load_class

    recipe = load_recipe(ROOT / "examples" / study.recipe, [*study.budget, *row.change])
    assert recipe.model.model_type == study.method
    config = load_class(next(method for method in METHODS if method.model_type == study.method).config)
    assert set(recipe.model.config) <= set(vars(config()))


def entry(seed: int, **values: float) -> dict:
    return {"seed": seed, "figures": {"miou": 0.1, **values}}


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        ([0.3, 0.32, 0.34], [0.2, 0.25, 0.22], "confirmed"),
        ([0.2, 0.25, 0.22], [0.3, 0.32, 0.34], "contradicted"),
        ([0.3, 0.1, 0.2], [0.2, 0.2, 0.15], "no difference"),
        ([0.3], [0.1], "one seed"),
        ([], [0.1, 0.2], "not run"),
    ],
)
def test_a_sign_counts_when_it_exceeds_the_deviation(better: list, worse: list, verdict: str) -> None:
    found = judge(
        Claim("x", "y"),
        {seed: entry(seed, miou=value) for seed, value in enumerate(better)},
        {seed: entry(seed, miou=value) for seed, value in enumerate(worse)},
    )
    assert found.verdict == verdict
    if len(found.differences) > 1:
        differences = [first - second for first, second in zip(better, worse, strict=True)]
        assert (found.mean, found.deviation) == (statistics.mean(differences), statistics.stdev(differences))


def test_a_measurement_with_other_changes_is_another_row() -> None:
    study = Study("s", "san", "t", [Row("x", ["steps=2"]), Row("y")], [], recipe="r.yaml", budget=["seed=1"])
    line = {"study": "s", "row": "x", "recipe": "r.yaml", "change": ["steps=2"], "budget": ["seed=1"], "seed": 4}
    found = measurements(study, study.rows[0], [line, {**line, "budget": []}, {**line, "change": []}], {})
    assert found == {4: line}


def test_a_claim_about_a_row_that_there_is_not_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"no rows \['z'\], only \['x'\]"):
        Study("s", "san", "t", [Row("x")], [Claim("x", "z")])


def test_the_document_is_what_the_ledgers_say() -> None:
    entries = ablate.all_measurements(ROOT / "results" / "ablations.jsonl")
    assert (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8") == render(STUDIES, entries)


@pytest.mark.parametrize("option", ["--studies", "--table"])
def test_a_path_that_there_is_not_is_a_message(tmp_path: Path, option: str) -> None:
    with pytest.raises(SystemExit, match=r"ablate\.py: FileNotFoundError: .*nothere"):
        ablate.main(["--limit", "0", option, str(tmp_path / "nothere" / "x.md")])


def test_rows_are_trained_recorded_and_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}")
    scenes = tmp_path / "scenes"
    write_scenes(scenes, num_train=4, num_evaluation=8)
    changes = {"steps": 1, "accumulation": 1, "num_workers": 0}
    recipe = tiny_recipe(scenes / "train", **changes)
    recipe["data"] = {"name": str(scenes / "train"), "eval_split": None}
    write_recipe(tmp_path / "tiny.yaml", recipe)
    study = {
        "name": "tiny",
        "method": "san",
        "title": "Tiny",
        "recipe": "tiny.yaml",
        "budget": ["threads=1"],
        "scenes": 8,
        "claims": [{"better": "fused", "worse": "none"}],
        "rows": [
            {"name": "none", "change": ["model.config.fusion_map=[]"]},
            {"name": "fused", "paper": 27.5},
            {"name": "elsewhere", "recorded": {"name": "x"}},
        ],
    }
    (tmp_path / "studies.yaml").write_text(yaml.safe_dump({"studies": [study]}))
    file, table = tmp_path / "results" / "ablations.jsonl", tmp_path / "table.md"
    arguments = ["--studies", str(tmp_path / "studies.yaml"), "--data", str(scenes), "--output", str(tmp_path / "runs")]
    arguments += ["--ledger", str(file), "--table", str(table), "--resume", "--seeds", "0", "--stop-at-errors"]
    ablate.main([*arguments, "--limit", "1"])
    (first,) = ledger.read(file)
    assert (first["study"], first["row"], first["seed"], first["protocol"]) == ("tiny", "none", 0, "scenes-small-8")
    assert first["change"] == ["model.config.fusion_map=[]"]
    result = json.loads((tmp_path / "runs" / "tiny-none-0" / "result.json").read_text())
    assert (first["seconds"], first["figures"]["cpu_seconds"]) == (result["seconds"], result["cpu_seconds"])
    config = json.loads((tmp_path / "runs" / "tiny-none-0" / "model" / "config.json").read_text())
    assert config["fusion_map"] == []
    ablate.main(arguments)
    assert [line["row"] for line in ledger.read(file)] == ["none", "fused"]
    ablate.main(arguments)
    assert len(ledger.read(file)) == 2
    text = table.read_text()
    assert "| elsewhere | not run |" in text and "with one seed, no judgement" in text and "| 27.5 |" in text
