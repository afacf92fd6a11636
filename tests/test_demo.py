"""The bundled checkpoint and `make demo`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from examples import demo
from examples.demo import CHECKPOINTS
from ov_segmentation.image_reading import read_image

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "assets"
CHECKPOINT = ASSETS / "san_scenes"
MAX_BYTES = 4 * 1024**2
# around the middle of the blue plain circle
BLUE_CIRCLE = (slice(8, 21), slice(63, 76))
OTHER_NAMES = ["red dotted bar", "yellow plain cross", "gray grainy ground", "blue speckled ground"]


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    # one thread, as the bundled checkpoint was made: another number rounds differently
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", sorted({*CHECKPOINTS.values()}))
def test_checkpoint_is_small_and_says_where_it_comes_from(name: str) -> None:
    checkpoint = ASSETS / name
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) <= MAX_BYTES
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        metadata = file.metadata()
        types = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 - not a dict
    # positions of tokens and windows are numbers, and CLIP's temperature stays in float32
    assert "BF16" in types <= {"BF16", "F32", "I64"}
    assert {"command", "seed", "commit"} <= set(metadata)
    assert f"--recipe examples/recipes/{name}.yaml" in metadata["command"]


@pytest.mark.parametrize("method", CHECKPOINTS)
def test_every_bundled_method_reads_names(method: str) -> None:
    """The large blue circle of the scene is found by its name; asked for something else, the models do not find it."""
    segment = demo.load(method)
    picture, _ = read_image(str(ASSETS / "scene.png"))

    def share_of_circle(name: str) -> float:
        result = segment(picture, candidate_labels=[name, *OTHER_NAMES], output_type="map")
        return float((result["segmentation"][BLUE_CIRCLE] == 0).mean())

    found = {name: share_of_circle(name) for name in ("blue plain circle", "red striped star")}
    assert found["blue plain circle"] > 0.9 and found["red striped star"] < 0.1


@pytest.mark.parametrize("method", CHECKPOINTS)
def test_every_bundled_method_takes_windows(method: str) -> None:
    """Windows of a scene's own size over the magnified scene: the blue circle is found again."""
    names = [name.strip() for name in demo.LABELS.split(",")]
    picture, _ = read_image(str(ASSETS / "scene.png"))
    result = demo.load(method)(picture, candidate_labels=names, output_type="map", sliding_window=True)
    assert (result["segmentation"][BLUE_CIRCLE] == names.index("blue plain circle")).mean() > 0.9


def test_demo_prints_a_table_and_draws_an_overlay(tmp_path: Path) -> None:
    printed = run("examples/demo.py", "--output", tmp_path / "demo.png")
    assert "purple checkered star" in printed and "confidence" in printed
    assert np.asarray(Image.open(tmp_path / "demo.png")).std() > 20


def test_demo_takes_other_names(tmp_path: Path) -> None:
    printed = run("examples/demo.py", "--labels", "blue plain circle, zebra", "--output", tmp_path / "demo.png")
    assert "blue plain circle" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--picture", "nothere.png"], "ValueError: no such file"),
        (["--labels", "a,,b"], "ValueError: The name of class 1 is blank"),
        (["--model", "nowhere/at-all"], "LoadingError: nowhere/at-all is no folder here"),
        (["--output", "nothere/demo.png"], "FileNotFoundError: .*nothere/demo.png"),
    ],
)
def test_bad_input_is_a_message(options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        demo.main(options)


@pytest.mark.slow
def test_training_again_gives_the_same_checkpoint_within_two_points(tmp_path: Path) -> None:
    """Scenes, CLIP and SAN from nothing by the recipes (half an hour): mean IoU and hIoU within 2 points."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    run("examples/make_scenes.py", "--output", "scenes", "--train", "6000", cwd=tmp_path)
    clip = ("--recipe", "examples/recipes/clip_vit_scenes.yaml", "--output", "clip_vit_scenes", "--seed", "0")
    run("examples/train_clip.py", *clip, cwd=tmp_path)
    run("examples/train.py", "--recipe", "examples/recipes/san_scenes.yaml", "--set", "threads=1", cwd=tmp_path)

    def figures(model: Path) -> dict[str, float]:
        printed = run("examples/evaluate_scenes.py", "--model", model, "--data", "scenes", cwd=tmp_path)
        return {line.split()[0]: float(line.split()[1]) for line in printed.splitlines() if len(line.split()) == 2}

    bundled, again = figures(CHECKPOINT), figures(tmp_path / "runs" / "san_scenes" / "model")
    assert again["miou"] == pytest.approx(bundled["miou"], abs=2)
    assert again["hiou"] == pytest.approx(bundled["hiou"], abs=2)
