"""A guard against silent damage: two methods, trained for a minute each, must label classes that training never named.

Scenes, recipes, training, export and evaluation are the real ones; CLIP is the bundled one. A model that does not read
names stays below 2 % (`shuffled`); the bounds are well above that and well below what the recipes reach here.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_demo import ASSETS, run

RECIPES = Path(__file__).resolve().parents[1] / "examples" / "recipes"
FEW = ["batch_size=8", "threads=1", "data.eval_split=null", "export.dtype=float32"]
RUNS = {
    # method: (optimizer steps, least mean IoU in percent over the classes of tiers b and c that occur)
    "san": (200, 6.0),
    "ovseg": (240, 5.0),
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard") / "scenes"
    run("examples/make_scenes.py", "--output", folder, "--train", "1600", "--evaluation", "64", "--seed", "1")
    return folder


@pytest.mark.parametrize("method", RUNS)
def test_a_minute_of_training_finds_classes_it_never_saw(method: str, scenes: Path, tmp_path: Path) -> None:
    steps, least = RUNS[method]
    changes = [f"model.from_clip={ASSETS / 'clip_vit_scenes'}", f"data.name={scenes / 'train'}", f"steps={steps}"]
    recipe = RECIPES / f"{method}_scenes.yaml"
    run("examples/train.py", "--recipe", recipe, "--output", tmp_path / "run", "--set", *changes, *FEW)
    printed = run("examples/evaluate_scenes.py", "--model", tmp_path / "run" / "model", "--data", scenes)
    figures = {name: float(value) for name, value in re.findall(r"^ *(\w+) +(\d+\.\d)$", printed, re.MULTILINE)}
    print(f"{method}: {figures}")
    unseen = (figures["things_b"] + figures["things_c"]) / 2
    assert unseen > least
    assert unseen > 4 * max(figures["shuffled_things_b"], figures["shuffled_things_c"])
