"""DeOP's three stages and Table 3 by one command."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import deop_scenes
from ov_segmentation import ledger
from ov_segmentation.data.scene_folders import write_scenes
from ov_segmentation.training.ablation import load_studies, measurements

ROOT = Path(__file__).resolve().parents[1]


def test_rows_of_a_seed_are_trained_recorded_and_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scenes(tmp_path / "scenes", 12, 2, seed=0)
    record = tmp_path / "deop.jsonl"
    rows = ["prompts, severance", "prompts, severance, anchors"]
    tiny = ["steps=1", "batch_size=2", "data.eval_split=null", "checkpoint.interval=1", "threads=1"]
    command = ["--clip", str(ROOT / "assets" / "clip_vit_scenes"), "--scenes", str(tmp_path / "scenes")]
    command += ["--output", str(tmp_path / "runs"), "--seed", "3", "--rows", *rows, "--ledger", str(record)]
    deop_scenes.main([*command, "--set", *tiny])
    folders = {path.name for path in (tmp_path / "runs").iterdir()}
    assert folders == {"stage1", "stage2", "prompts_severance", "prompts_severance_anchors"}
    assert all("seed: 3\n" in (tmp_path / "runs" / name / "recipe.yaml").read_text() for name in folders)
    entries = ledger.read(record)
    assert [(entry["name"], entry["seed"]) for entry in entries] == [(f"deop_scenes, {row}", 3) for row in rows]
    assert all(entry["figures"]["cpu_seconds"] > 0 for entry in entries)
    # what the written table reads
    studies = load_studies(ROOT / "examples" / "ablations.yaml")
    study = studies["deop_parts"]
    assert {row.name: list(measurements(study, row, entries, studies)) for row in study.rows} == {
        **{row: [] for row in deop_scenes.TABLE_3},
        **{row: [3] for row in rows},
    }
    # the same command prints what is there, and trains and records nothing
    monkeypatch.setattr(deop_scenes, "train", None)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("prompts")]
    deop_scenes.main([*command, "--set", *tiny])
    assert [line for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("prompts")] == printed
    assert len(ledger.read(record)) == 2


def test_unknown_rows_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        deop_scenes.main(["--clip", "c", "--scenes", "s", "--output", "o", "--rows", "anchors"])
    assert "prompts, severance, anchors" in capsys.readouterr().err
