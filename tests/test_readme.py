"""README and model cards say what the ledger says, and hold no measurement typed by hand."""

import ast
import builtins
import re
import sys

import pytest

from ov_segmentation import ledger
from tools import ledger_tables, readme

DOCUMENTS = readme.documents()


def test_documents_are_up_to_date(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tools/readme.py", "--check"])
    assert readme.main() == 0, capsys.readouterr().out


def test_check_finds_and_make_readme_mends_a_stale_document(tmp_path, monkeypatch, capsys):
    document = tmp_path / "README.md"
    document.write_text("<!-- table:methods -->\nstale\n<!-- /table -->\n")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    for options, status in ((["--check"], 1), ([], 0), (["--check"], 0)):
        monkeypatch.setattr(sys, "argv", ["tools/readme.py", *options])
        assert readme.main() == status
        assert ("stale" in document.read_text()) == bool(status)
    assert "Out of date" in capsys.readouterr().out


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_no_measurement_is_typed_by_hand(path):
    by_hand = readme.BLOCK.sub("", path.read_text(encoding="utf-8"))
    measurement = re.compile(r"\d+(\.\d+)? ?%|\|[^|\n]*\d+\.\d+[^|\n]*\||(mIoU|accuracy|seconds?|minutes)\W+\d+[.]\d+")
    assert [match.group() for match in measurement.finditer(by_hand)] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(path):
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", path.read_text(encoding="utf-8"))
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_snippets_of_the_readme_use_no_name_that_they_do_not_make():
    text = (readme.ROOT / "README.md").read_text(encoding="utf-8")
    known = {*dir(builtins), "path", "image", "predicted_maps", "label_maps", "seen_ids", "rows"}  # the reader's own
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) >= 4
    for block in blocks:
        used = set()
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Name):
                (used if isinstance(node.ctx, ast.Load) else known).add(node.id)
            elif isinstance(node, (ast.arg, ast.FunctionDef)):
                known.add(node.arg if isinstance(node, ast.arg) else node.name)
            elif isinstance(node, ast.alias):
                known.add(node.asname or node.name.split(".")[0])
        assert used <= known, f"{sorted(used - known)} in:\n{block}"


def test_a_snippet_that_trains_loads_in_float32():
    """Steps smaller than the resolution of bfloat16 change no weight of a checkpoint that was saved in it."""
    text = (readme.ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "Trainer(" in block]
    assert blocks
    assert all('dtype="float32"' in block for block in blocks)


@pytest.fixture
def results(tmp_path):
    """A ledger of two methods, one of them measured twice."""
    for method, miou in (("san", 0.25), ("sed", 0.5), ("san", 0.311)):
        ledger.append(
            tmp_path / "camvid.jsonl",
            command="a | b",
            seed=0,
            seconds=90,
            figures={"miou": miou},
            method=method,
            machine="m",
        )
    return tmp_path


COLUMNS = (
    ledger_tables.Column("Method", "method"),
    ledger_tables.Column("mIoU", "figures.miou", ledger_tables.percent),
    ledger_tables.Column("Command", "command", ledger_tables.code),
)


def test_tables_show_the_newest_of_each_kind(results):
    table = ledger_tables.LedgerTable("camvid.jsonl", COLUMNS, key=("method",))
    assert table.render(results).splitlines() == [
        "| Method | mIoU | Command |",
        "| --- | --- | --- |",
        "| san | 31.1 | `a \\| b` |",
        "| sed | 50.0 | `a \\| b` |",
    ]
    only = ledger_tables.LedgerTable("camvid.jsonl", COLUMNS, key=("method",), match={"method": "sed"})
    assert "san" not in only.render(results)
    assert ledger_tables.LedgerTable("none.jsonl", COLUMNS, key=()).render(results) == "*Nothing measured yet.*"
    with pytest.raises(LookupError, match=r"figures\.pacc"):
        ledger_tables.LedgerTable("camvid.jsonl", (ledger_tables.Column("p", "figures.pacc"),), key=()).render(results)


def test_a_row_of_several_seeds_has_mean_and_deviation(tmp_path):
    path = tmp_path / "scenes.jsonl"
    runs = (("san", 0, 0.1, {}), ("san", 0, 0.2, {}), ("san", 1, 0.4, {"random": 0.5}), ("sed", 0, 0.3, {}))
    for name, seed, miou, more in runs:
        ledger.append(path, command="c", seed=seed, seconds=1, figures={"miou": miou, **more}, name=name)
    columns = (
        ledger_tables.Column("Name", "name"),
        ledger_tables.Column("mIoU", "figures.miou", ledger_tables.percent),
        ledger_tables.Column("Random", "figures.random", ledger_tables.percent),
        ledger_tables.Column("Seeds", "seed"),
    )
    table = ledger_tables.SeedsTable("scenes.jsonl", columns, key=("name", "seed"))
    assert table.render(tmp_path).splitlines()[2:] == ["| san | 30.0 ± 14.1 | 50.0 | 0, 1 |", "| sed | 30.0 | - | 0 |"]


def test_blocks_are_filled_and_the_rest_stays(results, monkeypatch):
    monkeypatch.setitem(readme.TABLES, "t", ledger_tables.LedgerTable("camvid.jsonl", COLUMNS[:2], key=("method",)))
    value = ledger_tables.Value("camvid.jsonl", "figures.miou", ledger_tables.percent, {"method": "san"})
    monkeypatch.setitem(readme.VALUES, "v", value)
    before = "a\n<!-- table:t -->\nold\n<!-- /table -->\nb <!-- value:v -->9.9<!-- /value --> c\n"
    after = readme.fill(before, results)
    assert after == (
        "a\n<!-- table:t -->\n| Method | mIoU |\n| --- | --- |\n| san | 31.1 |\n| sed | 50.0 |\n<!-- /table -->\n"
        "b <!-- value:v -->31.1<!-- /value --> c\n"
    )
    assert readme.fill(after, results) == after


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("<!-- table:methods -->", "no partner"),
        ("x <!-- /value -->", "no partner"),
        ("<!-- table:methods --><!-- /value -->", "no partner"),
        ("<!-- table:nonsense --><!-- /table -->", "nonsense"),
        ("<!-- value:nonsense --><!-- /value -->", "nonsense"),
    ],
)
def test_wrong_markers_are_errors(document, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        readme.fill(document, tmp_path)


def test_a_value_that_was_not_measured_is_an_error(results):
    with pytest.raises(LookupError, match="deop"):
        ledger_tables.Value("camvid.jsonl", "figures.miou", ledger_tables.percent, {"method": "deop"}).render(results)
