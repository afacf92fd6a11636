"""Builders: every official layout, exact ids of 8 and 16 bits, counts, bad files, resume, nothing half-written."""

import dataclasses
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from datasets import Image as ImageFeature
from datasets import disable_progress_bars, load_dataset
from PIL import Image

from examples.prepare_dataset import main
from ov_segmentation.data import preparation
from ov_segmentation.data.class_names import class_names
from ov_segmentation.data.label_sets import label_set, label_sets
from ov_segmentation.data.label_transforms import LabelTransform
from ov_segmentation.data.preparation import BUILDERS, PreparationError, building, prepare
from ov_segmentation.data.preparation.card import read_card
from ov_segmentation.vocabulary import unseen_classes
from tests import official_trees
from tests.official_trees import TREES

disable_progress_bars()
CAMVID = Path(os.environ.get("CAMVID_DIR", "../shared/camvid"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def ids(annotation):
    return np.array(annotation).astype(np.int64)


@pytest.mark.parametrize("name", TREES)
def test_every_download(name, tmp_path):
    expected = TREES[name](tmp_path / "download")
    arguments = [name, "--source", str(tmp_path / "download"), "--output", str(tmp_path / "out")]
    main([*arguments, "--expect-counts", "off"])
    loaded = load_dataset(str(tmp_path / "out"))
    labels = label_set(name)
    assert class_names(loaded) == list(labels.class_names)
    assert loaded["train"].features["annotation"] == ImageFeature()
    streamed = load_dataset(str(tmp_path / "out"), streaming=True)
    for split, maps in expected.items():
        rows = {row["file_name"]: row for row in loaded[split]}
        assert set(rows) == set(maps)
        for file, prepared in maps.items():
            found = ids(rows[file]["annotation"])
            assert (found == prepared).all()
            assert rows[file]["annotation"].mode == ("I;16" if labels.ignore_index == 65535 else "L")
            assert rows[file]["classes"] == sorted(set(prepared.flat) - {labels.ignore_index})
            assert rows[file]["image"].mode == "RGB"
            if name == "coco_captions":
                assert rows[file]["captions"] == [f"Caption {k} of {file}." for k in (0, 1)]
        for row in streamed[split]:
            assert (ids(row["annotation"]) == maps[row["file_name"]]).all()
    card = read_card(tmp_path / "out")
    assert (card["data_set"], card["ignore_index"]) == (name, labels.ignore_index)
    assert card["pictures"] == {split: len(maps) for split, maps in expected.items()}
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["download", "out"]


def test_pictures_keep_their_bytes(tmp_path):
    official_trees.camvid(tmp_path / "in")
    out = prepare("camvid_11", tmp_path / "in", tmp_path / "out", expect_counts=False)
    rows = load_dataset(str(out), split="train").cast_column("image", ImageFeature(decode=False))
    for row in rows:
        assert row["image"]["bytes"] == (tmp_path / "in/images/train" / row["file_name"]).read_bytes()


@pytest.mark.skipif(not CAMVID.is_dir(), reason="needs CamVid (CAMVID_DIR)")
@pytest.mark.slow
def test_camvid_itself(tmp_path):
    out = prepare("camvid_11", CAMVID, tmp_path / "out")
    assert {split: rows.num_rows for split, rows in load_dataset(str(out)).items()} == {"train": 367, "validation": 101}


def test_camvid_in_segnets_layout(tmp_path):
    expected = official_trees.camvid(tmp_path / "in")
    for split in ("train", "val"):
        (tmp_path / "in/images" / split).rename(tmp_path / "in" / split)
        (tmp_path / "in/annotations" / split).rename(tmp_path / "in" / f"{split}annot")
    (tmp_path / "in/images").rmdir()
    out = prepare("camvid_11", tmp_path / "in", tmp_path / "out", expect_counts=False, splits=["validation"])
    rows = load_dataset(str(out))
    assert list(rows) == ["validation"]
    assert rows["validation"]["file_name"][:] == sorted(expected["validation"])


# ---------------------------------------------------------------------- ids


def test_coco_ids_of_the_unseen_classes():
    """The facts sheet of DeOP gives the unseen classes as ids of the files and as classes."""
    raw = np.array([[20, 24, 32, 33, 40, 56, 86, 99, 105, 123, 144, 147, 148, 168, 171]])
    assert label_set("coco_stuff_171").transform(raw).tolist() == [unseen_classes("coco_stuff_171")]
    assert set(label_set("coco_stuff_156").transform(raw).flat) == {255}


def test_every_class_has_its_id():
    for labels in label_sets().values():
        if labels.transform is not None:
            raw = np.array([labels.transform.classes])
            assert labels.transform(raw).tolist() == [list(range(len(labels.class_names)))], labels.name


def test_unknown_ids_are_named():
    transform = LabelTransform((1, (2, 4)), frozenset({0}))
    assert transform(np.array([[0, 1, 2, 4]])).tolist() == [[255, 0, 1, 1]]
    for wrong in (3, 5, -1, 70000):
        with pytest.raises(ValueError, match=rf"\[{wrong}\]"):
            transform(np.array([[0, wrong]]))


# ---------------------------------------------------------------------- bad downloads


def camvid_tree(tmp_path, count=3):
    official_trees.camvid(tmp_path / "in", count)
    return tmp_path / "in"


def refused(tmp_path, name="camvid_11", source=None, **options):
    """The message of a preparation that must fail and leave no output."""
    with pytest.raises(PreparationError) as error:
        prepare(name, source or tmp_path / "in", tmp_path / "out", **{"expect_counts": False, **options})
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    return str(error.value)


def test_wrong_folder(tmp_path):
    (tmp_path / "in").mkdir()
    for name in BUILDERS:
        assert str(tmp_path / "in") in refused(tmp_path, name)
    assert "There is no folder" in refused(tmp_path, source=tmp_path / "nowhere")


def test_command_exits_with_the_message(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(SystemExit) as error:
        main(["ade20k_150", "--source", str(tmp_path / "in"), "--output", str(tmp_path / "out")])
    assert "Is it the right download" in str(error.value)


def test_missing_and_surplus_files_are_named(tmp_path):
    source = camvid_tree(tmp_path)
    (source / "annotations/val/0001TP_000002.png").unlink()
    (source / "images/val/0001TP_000003.jpg").unlink()
    message = refused(tmp_path)
    assert "0001TP_000002" in message and "0001TP_000003" in message
    (source / "images/train/notes.txt").write_text("surplus")
    assert "notes.txt" in refused(tmp_path)


def test_partial_downloads_are_counted_and_named(tmp_path):
    official_trees.ade20k_150(tmp_path / "in")
    message = refused(tmp_path, "ade20k_150", expect_counts=True, splits=["validation"])
    assert "2000 pictures, but there are 2" in message
    assert "ADE_val_00000003" in message and "1978 more" in message
    assert "--expect-counts off" in message


def test_known_counts_pass(tmp_path, monkeypatch):
    official_trees.ade20k_847(tmp_path / "in")
    known = dataclasses.replace(
        label_set("ade20k_847"), pictures={"train": 2, "validation": 2}, classes_in_pictures={"validation": 3}
    )
    monkeypatch.setattr(preparation, "label_set", lambda name: known)
    assert prepare("ade20k_847", tmp_path / "in", tmp_path / "out").is_dir()
    wrong = dataclasses.replace(known, classes_in_pictures={"validation": 847})
    monkeypatch.setattr(preparation, "label_set", lambda name: wrong)
    with pytest.raises(PreparationError, match=r"3 classes occur .* should be 847"):
        prepare("ade20k_847", tmp_path / "in", tmp_path / "other")


def test_ade_full_index(tmp_path):
    official_trees.ade20k_847(tmp_path / "in")
    root = tmp_path / "in/ADE20K_2021_17_01"
    index = pickle.loads((root / "index_ade20k.pkl").read_bytes())
    lost = root / "images/ADE/validation/urban/street_1/ADE_val_00000001_seg.png"
    lost.rename(tmp_path / "kept.png")
    Image.new("RGB", (4, 4)).save(root / "images/ADE/validation/urban/street_1/extra.jpg")
    message = refused(tmp_path, "ade20k_847")
    assert "ADE_val_00000001_seg.png" in message and "extra.jpg" in message
    (root / "index_ade20k.pkl").write_bytes(pickle.dumps({**index, "objectnames": index["objectnames"][:-3]}))
    assert "3 of the 847 classes" in refused(tmp_path, "ade20k_847")
    (root / "index_ade20k.pkl").write_bytes(pickle.dumps(os.system))  # a pickle that wants code
    assert "is not the index" in refused(tmp_path, "ade20k_847")


def test_corrupt_files_are_all_named_and_the_rest_is_kept(tmp_path):
    source = camvid_tree(tmp_path, count=4)
    picture, label_map = source / "images/train/0001TP_000002.jpg", source / "annotations/val/0001TP_000003.png"
    contents = picture.read_bytes(), label_map.read_bytes()
    picture.write_bytes(contents[0][: len(contents[0]) // 2])
    label_map.write_bytes(contents[1][:40])
    unknown = source / "annotations/val/0001TP_000001.png"
    good = Image.open(unknown).copy()
    Image.fromarray(np.full((24, 32), 12, np.uint8)).save(unknown)
    message = refused(tmp_path, rows_per_file=2)
    assert "0001TP_000002.jpg: the picture is corrupt" in message
    assert "0001TP_000003.png: the label map is corrupt" in message
    assert "0001TP_000001.png: it holds the label ids [12]" in message
    assert "3 files" in message
    written = [path.name for path in (tmp_path / "out.partial/data").glob("*.parquet")]
    assert written == ["train-00001-of-00002.parquet"]
    picture.write_bytes(contents[0])
    label_map.write_bytes(contents[1])
    good.save(unknown)
    out = prepare("camvid_11", source, tmp_path / "out", expect_counts=False, rows_per_file=2)
    assert load_dataset(str(out), split="validation").num_rows == 4


def test_sizes_that_differ(tmp_path):
    source = camvid_tree(tmp_path)
    official_trees.save_picture(source / "images/train/0001TP_000001.jpg", 0, (30, 40))
    assert "is 32 x 24 pixels, its picture 40 x 30" in refused(tmp_path)


def test_a_picture_that_exif_would_turn_away_from_its_label_map(tmp_path):
    source = camvid_tree(tmp_path)
    file = source / "images/train/0001TP_000001.jpg"
    picture = Image.open(file)
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(file, exif=exif)
    out = prepare("camvid_11", source, tmp_path / "out", expect_counts=False)
    row = load_dataset(str(out), split="train")[0]
    assert row["image"].size == row["annotation"].size == (32, 24)
    assert (np.array(row["image"]) == np.array(Image.open(file).convert("RGB"))).all()


def test_pascal_context_with_other_names(tmp_path):
    official_trees.pascal_context(tmp_path / "in")
    text = (tmp_path / "in/labels.txt").read_text()
    (tmp_path / "in/labels.txt").write_text(text.replace("300: ", "300: not "))
    assert "300 is 'not " in refused(tmp_path, "pascal_context_459")
    (tmp_path / "in/labels.txt").write_text(text)
    (tmp_path / "in/pascalcontext_val.txt").write_text("2008_000001\n2008_009999\n")
    assert "2008_009999" in refused(tmp_path, "pascal_context_459")
    (tmp_path / "in/pascalcontext_val.txt").unlink()
    assert "pascalcontext_val.txt" in refused(tmp_path, "pascal_context_459")


def test_voc_without_sbd(tmp_path):
    official_trees.pascal_voc(tmp_path / "in")
    (tmp_path / "in/benchmark_RELEASE").rename(tmp_path / "elsewhere")
    assert "benchmark_RELEASE" in refused(tmp_path, "pascal_voc_20")
    out = prepare("pascal_voc_20", tmp_path / "in", tmp_path / "out", expect_counts=False, splits=["validation"])
    assert list(load_dataset(str(out))) == ["validation"]


def test_pictures_without_a_seen_class_are_left_out(tmp_path):
    official_trees.coco(tmp_path / "in", count=3, pairs=[(20, 255), (0, 0)])
    first = sorted((tmp_path / "in/stuffthingmaps/train2017").iterdir())[0]
    official_trees.save_map(first, np.full((24, 32), 20))
    out = prepare("coco_stuff_156", tmp_path / "in", tmp_path / "out", expect_counts=False, rows_per_file=1)
    rows = load_dataset(str(out), split="train")
    assert rows.num_rows == 2
    assert first.stem not in [Path(name).stem for name in rows["file_name"]]
    out = prepare("coco_stuff_171", tmp_path / "in", tmp_path / "all", expect_counts=False)
    assert load_dataset(str(out), split="train").num_rows == 3


def test_coco_captions_of_other_pictures(tmp_path):
    official_trees.coco(tmp_path / "in")
    file = tmp_path / "in/annotations/captions_val2017.json"
    file.write_text(file.read_text().replace("000000000014.jpg", "000000009999.jpg"))
    message = refused(tmp_path, "coco_captions")
    assert "000000009999.jpg" in message and "000000000014.jpg" in message


# ---------------------------------------------------------------------- resume


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    source = camvid_tree(tmp_path, count=5)
    read, calls = building.convert, []

    def counted(item, **options):
        calls.append(item.file_name)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return read(item, **options)

    monkeypatch.setattr(building, "convert", counted)
    options = {"expect_counts": False, "rows_per_file": 2, "splits": ["train", "validation"]}
    with pytest.raises(KeyboardInterrupt):
        prepare("camvid_11", source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out.partial/data/half.parquet.tmp").write_text("half-written")
    calls[:5] = []
    calls.extend(["-"] * 6)  # never again
    before = len(calls)
    prepare("camvid_11", source, tmp_path / "out", **options)
    assert len(calls) - before == 5  # the five training pictures were written
    whole = prepare("camvid_11", source, tmp_path / "whole", **options)
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.glob("*.partial"))
    for split in ("train", "validation"):
        one, other = (load_dataset(str(folder), split=split) for folder in (tmp_path / "out", whole))
        assert one["file_name"][:] == other["file_name"][:]
        assert [ids(row).tolist() for row in one["annotation"]] == [ids(row).tolist() for row in other["annotation"]]
    assert (tmp_path / "out/README.md").read_text() == (whole / "README.md").read_text()


def test_output_that_is_there(tmp_path):
    source = camvid_tree(tmp_path)
    out = prepare("camvid_11", source, tmp_path / "out", expect_counts=False)
    written = (out / "README.md").stat().st_mtime_ns
    assert prepare("camvid_11", source, out, expect_counts=False) == out
    assert (out / "README.md").stat().st_mtime_ns == written
    official_trees.ade20k_150(tmp_path / "ade")
    with pytest.raises(PreparationError, match="holds camvid_11"):
        prepare("ade20k_150", tmp_path / "ade", out, expect_counts=False)
    (tmp_path / "other").mkdir()
    with pytest.raises(PreparationError, match="something else"):
        prepare("camvid_11", source, tmp_path / "other", expect_counts=False)


@pytest.mark.slow
def test_several_workers(tmp_path):
    source = camvid_tree(tmp_path)
    for workers in (0, 2):
        prepare("camvid_11", source, tmp_path / str(workers), expect_counts=False, workers=workers)
    assert (tmp_path / "0/README.md").read_text() == (tmp_path / "2/README.md").read_text()
