"""The ledger: what a line holds, concurrent writers, broken files."""

import json
import multiprocessing
import subprocess
from pathlib import Path

import pytest

from ov_segmentation import ledger

ROOT = Path(__file__).parents[1]


def add(path, **changes):
    fields = {"command": "python x.py", "seed": 1, "seconds": 2.5, "figures": {"miou": 0.31, "per_class": [0.1, 0.5]}}
    return ledger.append(path, **{**fields, **changes})


def test_a_line_holds_what_is_needed_to_measure_again(tmp_path):
    path = tmp_path / "new" / "camvid.jsonl"
    entry = add(path, protocol="camvid_11", method="san")
    assert ledger.read(path) == [entry] == [json.loads(path.read_text())]
    assert entry["figures"] == {"miou": 0.31, "per_class": [0.1, 0.5]}
    assert (entry["command"], entry["seed"], entry["seconds"]) == ("python x.py", 1, 2.5)
    assert (entry["protocol"], entry["method"]) == ("camvid_11", "san")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert entry["commit"] == (head.stdout.strip() or None)
    assert "torch " in entry["machine"]
    assert " cores" in entry["machine"]
    assert entry["date"].endswith("+00:00")


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_dirty_means_other_files_than_results(tmp_path, monkeypatch):
    package = tmp_path / "src" / "package"
    package.mkdir(parents=True)
    (package / "ledger.py").write_text("")
    git(tmp_path, "init")
    monkeypatch.setattr(ledger, "__file__", str(package / "ledger.py"))
    path = tmp_path / "results" / "x.jsonl"
    assert add(path)["commit"] is None
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    assert add(path)["dirty"] is False
    assert add(path)["dirty"] is False  # results/x.jsonl differs by now
    (package / "ledger.py").write_text("changed")
    assert add(path)["dirty"] is True


def test_latest_is_the_last_that_matches(tmp_path):
    path = tmp_path / "x.jsonl"
    for method, seconds in (("san", 1), ("sed", 2), ("san", 3)):
        add(path, method=method, seconds=seconds)
    assert ledger.latest(path, method="san")["seconds"] == 3
    assert ledger.latest(path)["method"] == "san"
    with pytest.raises(LookupError, match="deop"):
        ledger.latest(path, method="deop")
    with pytest.raises(LookupError):
        ledger.latest(path, no_such_field=None)
    with pytest.raises(FileNotFoundError):
        ledger.read(tmp_path / "none.jsonl")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_figures_must_be_numbers(tmp_path, value):
    path = tmp_path / "x.jsonl"
    with pytest.raises(ValueError, match="NaN or infinite"):
        add(path, figures={"miou": value})
    assert not path.exists()


def test_a_run_records_what_it_had_loaded(tmp_path):
    entry = add(tmp_path / "x.jsonl", code={"commit": "0" * 40, "dirty": False})
    assert (entry["commit"], entry["dirty"]) == ("0" * 40, False)


def test_own_fields_cannot_be_overridden(tmp_path):
    with pytest.raises(ValueError, match="commit"):
        add(tmp_path / "x.jsonl", commit="0" * 40)


@pytest.mark.parametrize("broken", ['{"figures": {"miou": 0.', "[1, 2]", ""])
def test_a_broken_line_is_named(tmp_path, broken):
    path = tmp_path / "x.jsonl"
    add(path)
    path.write_text(path.read_text() + broken + "\n")
    with pytest.raises(ValueError, match="line 2"):
        ledger.read(path)


def write_many(path, writer):
    for index in range(20):
        ledger.append(path, command="x" * 20000, seed=index, seconds=0, figures={}, writer=writer, machine="m", code={})


def test_writers_at_the_same_time_do_not_mix(tmp_path):
    path = tmp_path / "x.jsonl"
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write_many, args=(path, str(index))) for index in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=60)
    assert [writer.exitcode for writer in writers] == [0] * 4
    entries = ledger.read(path)
    assert sorted((entry["writer"], entry["seed"]) for entry in entries) == [(w, s) for w in "0123" for s in range(20)]
    assert {len(entry["command"]) for entry in entries} == {20000}
