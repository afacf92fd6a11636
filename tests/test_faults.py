"""Kill -9 in front of file operations, and the same command again: the result is that of an uninterrupted run.

Full disks too: a clear message, and what was written before is intact. Training itself: tests/test_training.py.
"""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, Features, Value
from PIL import Image

from examples import evaluate, mine_mask_pairs, prepare_dataset, segment_dataset, train, train_clip, train_sam
from examples import train_mask_adapted_clip as adapt_clip
from ov_segmentation.data.class_names import segmentation_features
from ov_segmentation.data.mask_pairs import mask_picture, pair_features
from ov_segmentation.data.nouns import extract_nouns, find_tagger
from ov_segmentation.data.preparation import prepare
from ov_segmentation.models.ovseg.image_processing_ovseg import OVSegImageProcessor
from ov_segmentation.models.ovseg.processing_ovseg import OVSegProcessor
from tests import fake_model, kills, official_trees
from tests.models.test_ovseg import TestOVSeg as TinyOVSeg
from tests.test_clip_training import VIT
from tests.test_evaluate import answers_of
from tests.tiny import TOKENIZER
from tests.training_runs import tiny_recipe, write_pictures, write_recipe

NAMES = ["road", "tree", "sky"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads of this process do not exist in a forked one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def try_moments(
    command: Callable[[Path], object], tmp_path: Path, result: Callable[[Path], object], most: int | None = 6
) -> None:
    """Kill `command(folder)` and compare with an uninterrupted run: at so many moments twice, or (None) at all once."""
    whole = tmp_path / "whole"
    done = kills.run(lambda: command(whole), whole)
    assert done.code == 0, done.output
    expected = result(whole)
    for moment in kills.moments(done.operations, most or done.operations):
        folder = tmp_path / f"killed-{moment}"
        again = () if most is None else (moment // 2 + 1,)
        kills.survive(lambda out=folder: command(out), folder, moment, *again)
        assert result(folder) == expected, f"killed at {moment} of {done.operations}"
        left = [path.name for path in tmp_path.rglob(f"*killed-{moment}*") if path.suffix in (".tmp", ".partial")]
        assert not left + list(folder.rglob("*.tmp"))


def limited(command: Callable[[], object], size: int) -> Callable[[], None]:
    """The command in a process where no file may be larger than `size` bytes, as on a disk that is full."""

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        command()

    return run


# ---------------------------------------------------------------------- preparation


@pytest.fixture(scope="module")
def camvid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("camvid")
    official_trees.camvid(folder, count=3)
    return folder


def preparation(camvid: Path, out: Path) -> None:
    arguments = ["camvid_11", "--source", str(camvid), "--output", str(out)]
    prepare_dataset.main([*arguments, "--expect-counts", "off", "--rows-per-file", "2"])


def test_preparation_survives_kills(camvid, tmp_path):
    try_moments(lambda out: preparation(camvid, out), tmp_path, kills.contents, most=10)


def test_preparation_on_a_full_disk(camvid, tmp_path):
    out = tmp_path / "out"
    done = kills.run(limited(lambda: preparation(camvid, out), 2000), out)
    assert done.code == 1
    assert "train-00000-of-00002.parquet could not be written" in done.output and "make room" in done.output
    assert "Traceback" not in done.output
    assert not out.exists()
    assert kills.run(lambda: preparation(camvid, out), out).code == 0


# ---------------------------------------------------------------------- evaluation


def figures(folder: Path) -> dict:
    report = json.loads((folder / "camvid_11/report.json").read_text())
    return {key: value for key, value in report.items() if key not in ("run", "seconds", "recorded")}


@pytest.fixture
def evaluation(camvid, tmp_path):
    """The command, of the folder that it writes."""
    data = tmp_path / "data"
    prepare("camvid_11", camvid, data / "camvid_11", expect_counts=False, splits=["validation"])
    model = fake_model.save(tmp_path / "model", answers_of(data, "camvid_11"))

    def command(out: Path) -> None:
        given = ["--model", str(model), "--data", str(data), "--benchmark", "camvid_11", "--protocol", "cat_seg"]
        evaluate.main([*given, "--output", str(out)])

    return command


def test_evaluation_survives_kills(evaluation, tmp_path):
    try_moments(evaluation, tmp_path, figures)


def test_evaluation_on_a_full_disk(evaluation, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert kills.run(lambda: evaluation(whole), whole).code == 0
    size = (whole / "camvid_11/state/pictures-00000.jsonl").stat().st_size
    # the seconds that a picture took have not always as many digits
    done = kills.run(limited(lambda: evaluation(out), size - 30), out)
    assert done.code == 1 and "Traceback" not in done.output, done.output
    assert "pictures-00000.jsonl could not be written" in done.output
    assert "make room and start the same command again" in done.output
    assert kills.run(lambda: evaluation(out), out).code == 0
    assert figures(out) == figures(whole)


# ---------------------------------------------------------------------- mining


@pytest.fixture(scope="module")
def mining(tmp_path_factory):
    """A tiny OVSeg model, and three pictures with captions and label maps."""
    extract_nouns("a red car", find_tagger("textblob")[1])  # loads its lexicon here, once for all forked processes
    folder = tmp_path_factory.mktemp("mining")
    image_processor = OVSegImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    TinyOVSeg().model().save_pretrained(folder / "model")
    OVSegProcessor(image_processor, TOKENIZER, ["a photo of a {}."]).save_pretrained(folder / "model")
    random = np.random.default_rng(0)
    labels = np.zeros((40, 60), dtype=np.uint8)
    labels[:, 30:] = 1
    rows = {
        "image": [Image.fromarray(random.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in range(3)],
        "annotation": [Image.fromarray(labels)] * 3,
        "file_name": [f"{i}.png" for i in range(3)],
        "classes": [[0, 1]] * 3,
        "caption": [["a red car on a road"], ["two dogs"], ["the sky above trees"]],
    }
    features = segmentation_features(NAMES, caption=[Value("string")])
    DatasetDict({"train": Dataset.from_dict(rows, features=features)}).save_to_disk(str(folder / "data"))
    return folder


def mine(mining: Path, out: Path) -> None:
    given = ["--model", str(mining / "model"), "--data", str(mining / "data"), "--output", str(out), "--cpu"]
    mine_mask_pairs.main([*given, "--tagger", "textblob", "--shard-size", "2"])


def test_mining_survives_kills(mining, tmp_path):
    try_moments(lambda out: mine(mining, out), tmp_path, kills.contents, most=4)


def test_mining_on_a_full_disk(mining, tmp_path):
    out = tmp_path / "out"
    done = kills.run(limited(lambda: mine(mining, out), 2000), out)
    assert done.code == 1
    assert "train-00000-of-00002.parquet could not be written" in done.output and "make room" in done.output
    assert "Traceback" not in done.output
    assert not list(out.rglob("*.parquet*"))


# ---------------------------------------------------------------------- bulk inference


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """Two pictures."""
    folder = tmp_path_factory.mktemp("album")
    random = np.random.default_rng(0)
    for index in range(2):
        Image.fromarray(random.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def bulk(mining: Path, album: Path, out: Path, *options: str) -> None:
    given = ["--model", str(mining / "model"), "--input", str(album), "--output", str(out), "--cpu"]
    segment_dataset.main([*given, "--labels", ",".join(NAMES), *options])


def without_report(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in kills.contents(folder).items() if name != "report.json"}


@pytest.mark.parametrize("options", [("--overlays",), ("--format", "dataset", "--shard-size", "1")], ids=["png", "set"])
def test_bulk_inference_survives_kills(mining, album, tmp_path, options):
    try_moments(lambda out: bulk(mining, album, out, *options), tmp_path, without_report, most=None)


@pytest.mark.parametrize("options", [("--overlays",), ("--format", "dataset")], ids=["png", "set"])
def test_bulk_inference_on_a_full_disk(mining, album, tmp_path, options):
    out = tmp_path / "out"
    done = kills.run(limited(lambda: bulk(mining, album, out, *options), 2000), out)
    assert done.code == 1
    assert "could not be written" in done.output and "make room" in done.output
    assert "Traceback" not in done.output
    assert not list(out.rglob("*.parquet*")) + list(out.rglob("overlays/*")) + list(out.rglob("label_maps/*"))


# ---------------------------------------------------------------------- training


def trained(folder: Path) -> tuple:
    """The weights and the log, times left out."""
    log = next(folder / name for name in ("log.jsonl", "train_log.jsonl") if (folder / name).is_file())
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    timed = [{k: v for k, v in line.items() if k not in ("seconds", "cpu_seconds")} for line in lines]
    model = folder / "model" if (folder / "model").is_dir() else folder
    weights = torch_bytes(model / "model.safetensors")
    return timed, weights


def torch_bytes(file: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    return {name: value.numpy().tobytes() for name, value in load_file(file).items()}


def test_training_survives_kills_while_it_writes(tmp_path):
    pictures = write_pictures(tmp_path / "pictures", 4)
    recipe = tiny_recipe(pictures, steps=3, num_workers=0, log_interval=1, accumulation=1, batch_size=2)
    recipe |= {"checkpoint": {"interval": 1, "total_limit": 1}, "evaluation": {"interval": 2, "max_samples": 1}}
    file = write_recipe(tmp_path / "tiny.yaml", recipe)
    try_moments(lambda out: train.main(["--recipe", str(file), "--output", str(out)]), tmp_path, trained, most=5)


def test_adaptation_of_clip_survives_kills(mining, tmp_path):
    random = np.random.default_rng(0)
    mask = np.zeros((20, 26), dtype=bool)
    mask[:10, 3:] = True
    rows = {
        "image": [Image.fromarray(random.integers(0, 256, (20, 26, 3), dtype=np.uint8)) for _ in range(6)],
        "mask": [mask_picture(mask)] * 6,
        "noun": ["red", "green", "blue"] * 2,
    }
    features = {name: pair_features()[name] for name in rows}
    Dataset.from_dict(rows, features=Features(features)).save_to_disk(str(tmp_path / "pairs"))
    recipe = {
        "model": {"from_pretrained": str(mining / "model")},
        "data": {"sources": [str(tmp_path / "pairs")]},
        "prompts": {"use": "trained", "kind": "deep", "depth": 2, "number": 4},
        "train_clip": True,
        "optimizer": {"lr": 1e-3},
        "steps": 3,
        "batch_size": 4,
        "log_interval": 1,
        "threads": 1,
        "num_workers": 0,
        "checkpoint": {"interval": 1, "total_limit": 1},
    }
    file = write_recipe(tmp_path / "adapt.yaml", recipe)
    try_moments(lambda out: adapt_clip.main(["--recipe", str(file), "--output", str(out)]), tmp_path, trained, most=4)


@pytest.fixture
def clip_recipe(tmp_path):
    model = {**VIT, "vision_config": {**VIT["vision_config"], "attention_dropout": 0.1}}
    values = {
        "architecture": "vit", "model": model, "crop_size": 32, "batch_size": 8, "eval_scenes": 128, "steps": 5,
        "eval_every": 2, "checkpoint_every": 1, "refresh_every": 2, "crops": {"num_blocks": 2},
    }  # fmt: skip
    file = tmp_path / "clip.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_training_of_clip_survives_kills(clip_recipe, tmp_path):
    command = ["--recipe", str(clip_recipe), "--output"]
    try_moments(lambda out: train_clip.main([*command, str(out)]), tmp_path, trained, most=5)
    whole = tmp_path / "whole"
    assert not (whole / "checkpoint.pt").exists()
    written = (whole / "model.safetensors").stat().st_mtime_ns
    again = kills.run(lambda: train_clip.main([*command, str(whole)]), whole)
    assert again.code == 0 and '"step": 5' in again.output
    assert (whole / "model.safetensors").stat().st_mtime_ns == written, "a run that is over is not done again"
    other = kills.run(lambda: train_clip.main([*command, str(whole), "--seed", "1"]), whole)
    assert other.code == 1 and "differ in seed" in other.output


def test_training_of_clip_saves_on_sigterm(clip_recipe, tmp_path):
    command = ["--recipe", str(clip_recipe), "--output"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert kills.run(lambda: train_clip.main([*command, str(whole)]), whole).code == 0
    done = kills.run(lambda: train_clip.main([*command, str(stopped)]), stopped, 8, signal.SIGTERM)
    assert (done.signal, done.code) == (None, 143), done.output
    assert (stopped / "checkpoint.pt").is_file() and not (stopped / "model.safetensors").exists()
    assert kills.run(lambda: train_clip.main([*command, str(stopped)]), stopped).code == 0
    assert trained(stopped) == trained(whole)


def test_training_of_clip_on_a_full_disk(clip_recipe, tmp_path):
    out = tmp_path / "out"
    command = ["--recipe", str(clip_recipe), "--output", str(out)]
    started = kills.run(lambda: train_clip.main(command), out, 9)
    assert started.signal is not None
    saved = (out / "checkpoint.pt").read_bytes()
    done = kills.run(limited(lambda: train_clip.main(command), len(saved) // 2), out)
    assert done.code == 1
    assert "checkpoint.pt could not be written" in done.output and "make room" in done.output
    assert "Traceback" not in done.output
    assert (out / "checkpoint.pt").read_bytes() == saved


@pytest.fixture
def sam_recipe(tmp_path):
    model = {
        "vision_config": {
            "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16,
            "image_size": 48, "patch_size": 6, "num_pos_feats": 4, "window_size": 0, "global_attn_indexes": [0],
        },
        "prompt_encoder_config": {
            "hidden_size": 8, "image_size": 48, "patch_size": 6, "image_embedding_size": 8, "mask_input_channels": 4,
        },
        "mask_decoder_config": {"hidden_size": 8, "mlp_dim": 8, "num_attention_heads": 2, "iou_head_hidden_dim": 8},
    }  # fmt: skip
    values = {"model": model, "scene_size": 48, "batch_size": 2, "steps": 5, "eval_scenes": 8}
    values |= {"log_every": 2, "checkpoint_every": 1, "eval_every": 4}
    file = tmp_path / "sam.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_training_of_sam_survives_kills_and_saves_on_sigterm(sam_recipe, tmp_path):
    command = ["--recipe", str(sam_recipe), "--output"]
    try_moments(lambda out: train_sam.main([*command, str(out)]), tmp_path, trained, most=4)
    stopped = tmp_path / "stopped"
    done = kills.run(lambda: train_sam.main([*command, str(stopped)]), stopped, 6, signal.SIGTERM)
    assert (done.signal, done.code) == (None, 143), done.output
    assert (stopped / "checkpoint.pt").is_file() and not (stopped / "model.safetensors").exists()
    assert kills.run(lambda: train_sam.main([*command, str(stopped)]), stopped).code == 0
    assert trained(stopped) == trained(tmp_path / "whole")
    other = kills.run(lambda: train_sam.main([*command, str(stopped), "--seed", "1"]), stopped)
    assert other.code == 1 and "differ in seed" in other.output
