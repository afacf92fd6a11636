"""The commands behind assets/ and docs/: what a bundled checkpoint holds, and the pictures drawn with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ov_segmentation import AutoModelForOpenVocabularySegmentation
from tests.test_demo import ASSETS
from tools import bundle, draw_pictures

ENTRY = {"command": "python x.py", "seed": 3, "commit": "abc", "figures": {"miou": 0.25}}


def test_a_bundle_is_half_as_large_and_says_where_it_comes_from(tmp_path: Path) -> None:
    source = ASSETS / "sed_scenes"
    whole = tmp_path / "whole"
    model = AutoModelForOpenVocabularySegmentation.from_pretrained(source, dtype=torch.float32)
    model.save_pretrained(whole)
    size = bundle.bundle(whole, tmp_path / "half", ENTRY)
    assert size < 0.55 * (whole / "model.safetensors").stat().st_size
    with safe_open(tmp_path / "half" / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert {name: metadata[name] for name in ("command", "seed", "commit")} == {
        "command": "python x.py",
        "seed": "3",
        "commit": "abc",
    }
    assert json.loads(metadata["scenes"]) == {"miou": 0.25}
    again = AutoModelForOpenVocabularySegmentation.from_pretrained(tmp_path / "half", dtype=torch.float32)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_what_a_training_wrote_comes_before_the_ledger(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    save_file({"x": torch.zeros(2)}, source / "model.safetensors", metadata={"command": "train", "recipe_hash": "12"})
    bundle.bundle(source, tmp_path / "half", ENTRY)
    with safe_open(tmp_path / "half" / "model.safetensors", "pt") as file:
        assert (file.metadata()["command"], file.metadata()["recipe_hash"]) == ("train", "12")
    assert load_file(tmp_path / "half" / "model.safetensors")["x"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_too_much_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(bundle.BundleError, match="MiB in bfloat16, at most 1 are bundled"):
        bundle.bundle(ASSETS / "sed_scenes", tmp_path / "half", ENTRY, max_bytes=2**20)
    assert not (tmp_path / "half").exists()


def test_pictures_are_drawn_from_the_bundled_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundled = {"san": "san_scenes", "sed": "sed_scenes", "deop": "deop_scenes_small"}
    monkeypatch.setattr(draw_pictures.demo, "CHECKPOINTS", bundled)
    draw_pictures.main(["--output", str(tmp_path)])
    sheet, maps = (np.asarray(Image.open(tmp_path / name)) for name in ("methods.png", "maps.png"))
    side, step = draw_pictures.SIDE, draw_pictures.SIDE + draw_pictures.GAP

    def tile(picture: np.ndarray, row: int, column: int) -> np.ndarray:
        top = row * (side + draw_pictures.TITLE + draw_pictures.GAP) + draw_pictures.TITLE
        return picture[top : top + side, draw_pictures.GAP + column * step :][:, :side]

    scene = np.asarray(draw_pictures.enlarged(Image.open(ASSETS / "scene.png")))
    assert (tile(sheet, 0, 0) == scene).all() and (tile(maps, 1, 0) == scene).all()
    # of SAN, SED and DeOP no two are alike
    tiles = [tile(sheet, 0, column) for column in (1, 2, 3)]
    assert all((tiles[i] != tiles[j]).any() for i in range(3) for j in range(i))
    assert len(maps) == 3 * (side + draw_pictures.TITLE + draw_pictures.GAP)
    assert all(tile(maps, row, column).std() > 5 for row in range(3) for column in range(5))


def test_without_queries_deop_has_no_anchors_to_draw() -> None:
    segment = draw_pictures.demo.load_checkpoint(str(ASSETS / "clip_vit_scenes"))
    names = [draw_pictures.THING, "red striped star"]
    picture = Image.open(ASSETS / "scene.png").convert("RGB")
    assert draw_pictures.deop_row(segment.model, segment.processor, picture, names) == []


def test_an_unknown_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no methods"):
        draw_pictures.main(["x=y", "--output", str(tmp_path)])
