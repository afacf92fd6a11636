"""The commands that measure: what they put into the ledger is what the run and the fixtures say."""

import re

import pytest
import yaml

from ov_segmentation import ledger
from tests.parity.common import case_folders
from tests.training_runs import tiny_recipe, write_pictures
from tools import ledger_tables, measure_parity, readme_tables, record_training

# other folders hold training stages and relatives, which have tests of their own
CASES = [(method, folder) for method in measure_parity.RECORDED for folder in case_folders(method, "case")]


@pytest.mark.parametrize(("method", "folder"), CASES, ids=[f"{method}-{folder.name}" for method, folder in CASES])
def test_parity_of_scores(method, folder):
    found = measure_parity.differences(method, folder)
    assert 0 < found["scores"] <= 5e-5  # exactly 0 would mean that something was compared with itself
    assert found["text"] <= 1e-5


def test_a_training_run_is_recorded_and_shown(tmp_path):
    from ov_segmentation.training.loop import train
    from ov_segmentation.training.recipe import load_recipe

    changes = {"steps": 1, "accumulation": 1, "num_workers": 0, "seed": 11}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tiny_recipe(write_pictures(tmp_path / "data"), **changes)))
    result = train(load_recipe(file), tmp_path / "run", command="accelerate launch examples/train.py --recipe x")
    entry = record_training.record(tmp_path / "run", tmp_path / "camvid.jsonl", "three colours")
    assert entry["figures"]["miou"] == result["miou"]
    assert (entry["seed"], entry["method"], entry["seconds"]) == (11, "san", round(result["seconds"], 3))
    assert entry["command"] == "accelerate launch examples/train.py --recipe x"
    assert {name: entry[name] for name in ("commit", "dirty")} == ledger.revision()
    assert entry["protocol"] == "three colours; IoU averaged over ground_truth classes"
    shown = readme_tables.TABLES["camvid"].render(tmp_path)
    assert ledger_tables.percent(result["miou"]) in re.split(r" *\| *", shown.splitlines()[-1])
