"""Bulk inference: folders and data sets in, PNGs and data sets out, bad pictures, resuming, two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value, disable_progress_bars, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from transformers import pipeline

from examples.segment_dataset import main
from ov_segmentation.bulk.pictures import output_names
from ov_segmentation.bulk.results import LabelMapDataset, Segmented
from ov_segmentation.data.datasets import load_segmentation_data
from ov_segmentation.label_maps import read_label_map
from ov_segmentation.models.san.image_processing_san import SANImageProcessor
from ov_segmentation.models.san.processing_san import SANProcessor
from ov_segmentation.visualization import color_palette
from ov_segmentation.vocabulary import Vocabulary
from tests.kills import contents
from tests.models.test_san import TestSAN as Tiny
from tests.tiny import TOKENIZER, tiny_pictures

disable_progress_bars()
ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "assets"
NAMES = ["road", "tree", "sky"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    Tiny().model().save_pretrained(folder)
    SANProcessor(
        SANImageProcessor(size={"shortest_edge": 32, "longest_edge": 96}), TOKENIZER, ["a {}."]
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def album(tmp_path):
    """Pictures of several kinds in nested folders, and files that are none."""
    folder = tmp_path / "album"
    (folder / "trip/day 2").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    first, second, third, fourth = tiny_pictures((40, 60), (50, 30), (33, 47), (36, 36))
    first.save(folder / "a.png")
    second.save(folder / "trip/b.JPG")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    third.save(folder / "trip/day 2/c.jpg", exif=exif)
    fourth.quantize(16).save(folder / "trip/a.png")
    first.save(folder / ".hidden/thumbnail.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def segment(model, source, out, *options, names=NAMES):
    """The command; its exit code and report."""
    given = ["--model", model, "--input", source, "--output", out, "--cpu"]
    labels = [] if names is None else ["--labels", ",".join(names)]
    try:
        main(list(map(str, [*given, *labels, *options])))
    except SystemExit as ending:
        if ending.code != 3:
            raise
        return 3, json.loads((out / "report.json").read_text())
    return 0, json.loads((out / "report.json").read_text())


def expected_maps(model, paths, names=NAMES, **options):
    run = pipeline("open-vocabulary-segmentation", model=str(model), dtype=torch.float32)
    found = run([str(path) for path in paths], candidate_labels=names, output_type="map", **options)
    return [one["segmentation"] for one in found]


# ---------------------------------------------------------------------- folders and PNGs


def test_a_folder_of_pictures(model, album, tmp_path, capsys):
    code, report = segment(model, album, tmp_path / "out")
    assert (code, report["pictures"], report["before"], report["problems"]) == (0, 4, 0, [])
    assert "4 of 4 pictures segmented." in capsys.readouterr().out
    pictures = ["a.png", "trip/a.png", "trip/b.JPG", "trip/day 2/c.jpg"]
    maps = [Path(name).with_suffix(".png").as_posix() for name in pictures]
    found = {path.relative_to(tmp_path / "out/label_maps").as_posix() for path in (tmp_path / "out").rglob("*.png")}
    assert found == set(maps)
    for name, wanted in zip(maps, expected_maps(model, [album / name for name in pictures]), strict=True):
        with Image.open(tmp_path / "out/label_maps" / name) as label_map:
            assert label_map.mode == "L"
            np.testing.assert_array_equal(np.array(label_map), wanted)
    assert wanted.shape == (47, 33), "upright"
    classes = json.loads((tmp_path / "out/classes.json").read_text())
    assert classes["unlabelled"] == 255
    assert [(entry["id"], entry["name"]) for entry in classes["classes"]] == list(enumerate(NAMES))
    assert [entry["color"] for entry in classes["classes"]] == color_palette(3).tolist()


def test_palettes_overlays_background_and_thresholds(model, album, tmp_path):
    run = pipeline("open-vocabulary-segmentation", model=str(model), dtype=torch.float32)
    options = {"candidate_labels": NAMES, "background": ["tree", "sky"], "output_type": "map"}
    confidence = run(str(album / "a.png"), return_confidence=True, **options)["confidence"]
    # few values, each in many pixels: the one that has nearest to half of the pixels below it
    values = np.unique(confidence)
    threshold = float(values[np.argmin([abs((confidence < value).mean() - 0.5) for value in values])])
    options = ("--palette", "--overlays", "--background", "tree", "sky", "--threshold", threshold)
    segment(model, album, tmp_path / "out", *options)
    wanted = expected_maps(model, [album / "a.png"], background=["tree", "sky"], threshold=threshold)[0]
    assert 0.2 < (wanted < 0).mean() < 0.8
    label_map = Image.open(tmp_path / "out/label_maps/a.png")
    assert label_map.mode == "P"
    np.testing.assert_array_equal(np.array(label_map), np.where(wanted < 0, 255, wanted))
    assert label_map.getpalette()[: 3 * len(NAMES)] == color_palette(3).flatten().tolist()
    np.testing.assert_array_equal(read_label_map(tmp_path / "out/label_maps/a.png"), np.where(wanted < 0, 255, wanted))
    overlay = Image.open(tmp_path / "out/overlays/a.png")
    assert overlay.height == 40 and overlay.width > 60, "a legend beside the picture"


def test_more_than_255_classes_need_16_bits(model, album, tmp_path):
    names = [f"thing {number}" for number in range(300)]
    segment(model, album, tmp_path / "out", "--threshold", "1", "--max-samples", "1", names=names)
    label_map = Image.open(tmp_path / "out/label_maps/a.png")
    assert label_map.mode == "I;16"
    assert set(np.unique(np.array(label_map))) == {65535}
    assert json.loads((tmp_path / "out/classes.json").read_text())["unlabelled"] == 65535
    with pytest.raises(SystemExit, match="at most 256 colours"):
        segment(model, album, tmp_path / "other", "--palette", names=names)


def test_synonyms_and_packaged_vocabularies(model, album, tmp_path):
    (tmp_path / "names.json").write_text(json.dumps(["road", ["car", "automobile"]]))
    segment(model, album, tmp_path / "out", "--vocabulary", tmp_path / "names.json", "--max-samples", "1", names=None)
    classes = json.loads((tmp_path / "out/classes.json").read_text())["classes"]
    assert classes[1]["synonyms"] == ["car", "automobile"]
    segment(model, album, tmp_path / "camvid", "--vocabulary", "camvid_11", "--max-samples", "1", names=None)
    assert len(json.loads((tmp_path / "camvid/classes.json").read_text())["classes"]) == 11


def test_a_plain_clip(album, tmp_path):
    """DeOP segments with it, through the command as in the pipeline."""
    clip = ASSETS / "clip_vit_scenes"
    with pytest.warns(UserWarning, match="plain CLIP"):
        segment(clip, album, tmp_path / "out")
    with pytest.warns(UserWarning, match="plain CLIP"):
        (wanted,) = expected_maps(clip, [album / "a.png"])
    with Image.open(tmp_path / "out/label_maps/a.png") as label_map:
        np.testing.assert_array_equal(np.array(label_map), wanted)


def test_bad_pictures_are_named_and_the_rest_is_done(model, album, tmp_path, capsys):
    (album / "empty.png").touch()
    (album / "text.jpg").write_text("no picture")
    content = (album / "trip/b.JPG").read_bytes()
    (album / "half.jpg").write_bytes(content[: len(content) // 2])
    code, report = segment(model, album, tmp_path / "out", "--num-workers", "1")
    assert code == 3
    assert [entry["picture"] for entry in report["problems"]] == ["empty.png", "half.jpg", "text.jpg"]
    printed = capsys.readouterr()
    assert "4 of 7 pictures segmented." in printed.out and "half.jpg: cannot read" in printed.err
    (album / "half.jpg").write_bytes(content)  # mended: the same command does it now, and nothing else
    before = contents(tmp_path / "out/label_maps")
    code, report = segment(model, album, tmp_path / "out")
    assert (code, report["before"], len(report["problems"])) == (3, 4, 2)
    after = contents(tmp_path / "out/label_maps")
    assert set(after) - set(before) == {"half.png"}


def test_names_that_would_collide():
    assert output_names(["a.jpg", "a.png", "b.jpg"]) == ["a.jpg.png", "a.png.png", "b.png"]
    with pytest.raises(ValueError, match="rename one"):
        output_names(["a.jpg", "A.jpg"])


# ---------------------------------------------------------------------- data sets


@pytest.fixture
def dataset(tmp_path):
    """A data set of two splits; one picture of `train` cannot be read."""
    pictures = tiny_pictures((40, 60), (50, 30), (33, 47))
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"{index}.png")
    encoded = [(tmp_path / f"{index}.png").read_bytes() for index in range(3)]
    rows = {
        "picture": [{"bytes": content, "path": None} for content in [*encoded, b"no picture", None]],
        "file_name": [f"scenes/{index}.png" for index in range(5)],
    }
    rows["picture"][-1] = None
    features = Features({"picture": ImageFeature(), "file_name": Value("string")})
    train = Dataset.from_dict(rows, features=features)
    DatasetDict({"train": train, "test": train.select([0])}).save_to_disk(str(tmp_path / "dataset"))
    return tmp_path / "dataset"


def test_from_a_data_set_to_a_data_set(model, dataset, tmp_path):
    with pytest.raises(SystemExit, match="several splits: choose one of train, test"):
        segment(model, dataset, tmp_path / "out", "--format", "dataset")
    options = ("--split", "train", "--format", "dataset", "--shard-size", "2")
    code, report = segment(model, dataset, tmp_path / "out", *options)
    assert code == 3
    assert [entry["picture"] for entry in report["problems"]] == ["scenes/3.png", "scenes/4.png"]
    rows = load_dataset(str(tmp_path / "out"), split="train")
    assert rows["file_name"][:] == ["scenes/0.png", "scenes/1.png", "scenes/2.png"]
    data = load_segmentation_data(tmp_path / "out", ignore_index=255)
    assert data.vocabulary.labels == NAMES
    wanted = expected_maps(model, [tmp_path / f"{index}.png" for index in range(3)])
    for (image, label_map), row, expected in zip(data.split("train"), rows, wanted, strict=True):
        np.testing.assert_array_equal(label_map, expected)
        assert row["classes"] == np.unique(expected).tolist()
        assert image.size == expected.shape[::-1]
    code, report = segment(model, dataset, tmp_path / "out", *options)
    assert (code, report["before"], len(report["problems"])) == (3, 5, 2), "problems are remembered"


def test_from_a_data_set_to_pngs(model, dataset, tmp_path):
    segment(model, dataset, tmp_path / "out", "--split", "test", "--image-column", "picture")
    assert set(contents(tmp_path / "out/label_maps")) == {"scenes/0.png"}
    with pytest.raises(SystemExit, match="no column of pictures 'image'"):
        segment(model, dataset, tmp_path / "other", "--split", "test", "--image-column", "image")
    with pytest.raises(SystemExit, match="no split 'val'"):
        segment(model, dataset, tmp_path / "other", "--split", "val")


# ---------------------------------------------------------------------- runs


def test_a_folder_belongs_to_one_way_of_segmenting(model, album, tmp_path):
    out = tmp_path / "out"
    segment(model, album, out)
    with pytest.raises(SystemExit, match="another labels, threshold"):
        segment(model, album, out, "--threshold", "0.5", names=["car"])
    segment(model, album, out, "--threshold", "1", "--resume", "never")
    assert set(np.unique(read_label_map(out / "label_maps/a.png"))) == {255}
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tmp").touch()
    with pytest.raises(SystemExit, match="is not empty and holds no run"):
        segment(model, album, tmp_path / "thesis")
    assert (tmp_path / "thesis/chapter.tmp").exists()


def test_bad_input(model, album, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "nothing").mkdir()
    for source, options, message in (
        (tmp_path / "nothing", (), "There are no pictures in"),
        (tmp_path / "none", (), "There is no folder"),
        (album / "a.png", (), "is a file: give a folder"),
        (album, ("--split", "train"), "has no split 'train'"),
        (album, ("--threshold", "2"), "between 0 and 1"),
        (album, ("--background", "sea"), "'sea' is not one of"),
        (album, ("--set", "no_such_switch=1"), "no_such_switch"),
        (album, ("--set", "sliding_window"), "NAME=VALUE"),
        (album, ("--format", "dataset", "--palette"), "are for --format png"),
    ):
        with pytest.raises(SystemExit, match=message):
            segment(model, source, out, *options)
    with pytest.raises(SystemExit, match="would be taken for pictures"):
        segment(model, album, album / "out")
    with pytest.raises(SystemExit, match="neither a file nor a packaged one"):
        segment(model, album, out, "--vocabulary", "ade", names=None)
    with pytest.raises(SystemExit, match="2"):
        segment(model, album, out, "--max-samples", "0")


def test_two_processes_share_the_work(model, album, tmp_path):
    segment(model, album, tmp_path / "one")
    segment(model, album, tmp_path / "two", "--max-samples", "1")  # what an interrupted run had done
    (album / "bad.png").touch()
    variables = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "ACCELERATE_USE_CPU": "true"}
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    command = ["examples/segment_dataset.py", "--model", model, "--input", album, "--output", tmp_path / "two"]
    done = subprocess.run(
        [*start, "--rdzv_endpoint=localhost:0", *map(str, command), "--labels", ",".join(NAMES)],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert "4 of 5 pictures segmented (1 before)." in done.stdout, done.stderr[-3000:]
    assert "bad.png: cannot read" in done.stderr
    assert contents(tmp_path / "two/label_maps") == contents(tmp_path / "one/label_maps")


def test_a_shard_is_done_when_its_pictures_are_there(tmp_path):
    """A kill may leave the summary alone, which is written first."""
    results = LabelMapDataset(tmp_path, ["a.png"], Vocabulary(["road"]))
    results.write(0, [results.pack(Segmented(0, "a.png", problem="broken"))])
    assert results.is_done(0)
    assert results.problems(0) == [{"picture": "a.png", "problem": "broken"}]
    next((tmp_path / "data").iterdir()).unlink()
    assert not results.is_done(0)
