"""Any data set of pictures and label maps: local trees, saved datasets, parquet, imagefolders; names, ids, errors."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from datasets import (
    Array2D,
    Array3D,
    Dataset,
    DatasetDict,
    Features,
    Image,
    List,
    Value,
    disable_progress_bars,
)
from PIL import Image as PILImage

from ov_segmentation.data.class_names import segmentation_features
from ov_segmentation.data.datasets import load_segmentation_data
from ov_segmentation.image_reading import read_image
from ov_segmentation.label_maps import IGNORED

disable_progress_bars()
NAMES = ["sky", "road", "car"]
CAMVID = Path(os.environ.get("CAMVID_DIR", "../shared/camvid"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def picture(value=0, size=(6, 4)):
    return PILImage.new("RGB", size, (value, 0, 0))


def label_map(*ids, size=(6, 4), dtype=np.uint8):
    flat = np.resize(np.array(ids, dtype=dtype), size[0] * size[1])
    return PILImage.fromarray(flat.reshape(size[1], size[0]))


def write_tree(root, splits, count=2, annotation=None):
    for split in splits:
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            picture(index).save(root / "images" / split / f"{index}.jpg")
            (annotation or label_map(0, 1, 2, 255)).save(root / "annotations" / split / f"{index}.png")
    return root


def test_local_tree(tmp_path):
    data = load_segmentation_data(write_tree(tmp_path, ["train", "val"]), class_names=NAMES, ignore_index=255)
    assert list(data.splits) == ["train", "val"]
    assert set(data.splits["train"].column_names) == {"image", "annotation", "file_name"}
    assert data.vocabulary.labels == NAMES
    image, ids = data.split("val")[1]
    assert (image.mode, image.size, ids.shape, ids.dtype) == ("RGB", (6, 4), (4, 6), np.int32)
    assert set(np.unique(ids)) == {0, 1, 2, IGNORED}
    assert len(data.split("val", max_samples=1)) == 1


def test_local_tree_without_splits_and_with_a_names_file(tmp_path):
    write_tree(tmp_path, [""])
    (tmp_path / "class_names.json").write_text(json.dumps(["sky", ["road", "street"], "car"]))
    data = load_segmentation_data(tmp_path, ignore_index=[255])
    assert list(data.splits) == ["train"]
    assert data.vocabulary.synonyms == [["sky"], ["road", "street"], ["car"]]


def test_what_notebooks_and_file_managers_leave_is_no_data(tmp_path):
    write_tree(tmp_path, [""])
    (tmp_path / "images/.ipynb_checkpoints").mkdir()
    (tmp_path / "images/._0.jpg").touch()
    data = load_segmentation_data(tmp_path, class_names=NAMES, ignore_index=255)
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 2}


def rows(count=3, ids=(0, 1, 300), dtype=np.uint16):
    return {
        "image": [picture(i) for i in range(count)],
        "annotation": [label_map(*ids, dtype=dtype)] * count,
        "file_name": [f"{i}.jpg" for i in range(count)],
        "classes": [[0, 1]] * count,
    }


@pytest.mark.parametrize("layout", ["save_to_disk", "dict_to_disk", "parquet"])
def test_saved_datasets_bring_their_class_names_and_16_bit_ids(tmp_path, layout):
    names = [f"class {k}" for k in range(400)]
    dataset = Dataset.from_dict(rows(), features=segmentation_features(names))
    folder = tmp_path / "data"
    if layout == "save_to_disk":
        dataset.save_to_disk(folder)
    elif layout == "dict_to_disk":
        DatasetDict(train=dataset).save_to_disk(folder)
    else:
        dataset.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    data = load_segmentation_data(folder)
    assert data.vocabulary.labels == names
    assert set(np.unique(data.split("train")[2].label_map)) == {0, 1, 300}


def test_imagefolder_with_metadata(tmp_path):
    (tmp_path / "train").mkdir()
    with (tmp_path / "train" / "metadata.jsonl").open("w") as file:
        for index in range(2):
            picture(index).save(tmp_path / "train" / f"{index}.png")
            label_map(1).save(tmp_path / "train" / f"{index}_mask.png")
            line = {"image_file_name": f"{index}.png", "label_file_name": f"{index}_mask.png"}
            file.write(json.dumps(line) + "\n")
    data = load_segmentation_data(tmp_path, class_names=NAMES)
    assert (data.split("train")[0].label_map == 1).all()


def test_columns_are_found_by_type_and_name_or_given(tmp_path):
    features = Features({"photo": Image(), "depth": Image(), "classes_png": Image(), "id": Value("int64")})
    values = {"photo": [picture(9)], "depth": [picture()], "classes_png": [label_map(2)], "id": [1]}
    Dataset.from_dict(values, features=features).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match=r"Cannot tell the image and annotation column.*photo, depth, classes_png"):
        load_segmentation_data(tmp_path / "d", class_names=NAMES)
    with pytest.raises(ValueError, match=r"no column 'picture'.*photo"):
        load_segmentation_data(tmp_path / "d", class_names=NAMES, image_column="picture")
    data = load_segmentation_data(
        tmp_path / "d", class_names=NAMES, image_column="photo", annotation_column="classes_png"
    )
    image, ids = data.split("train")[0]
    assert image.getpixel((0, 0)) == (9, 0, 0)
    assert (ids == 2).all()


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_other_kinds_are_read_when_they_are_named(tmp_path, streaming):
    ids = np.arange(24, dtype=np.uint8).reshape(4, 6) % 3
    picture(9).save(tmp_path / "picture.png")
    columns = {
        "array": (Array3D((4, 6, 3), "uint8"), np.array(picture(9))),
        "path": (Value("string"), str(tmp_path / "picture.png")),
        "encoded": (Image(decode=False), picture(9)),
        "ids": (Array2D((4, 6), "uint8"), ids),
        "nested": (List(List(Value("int32"))), ids.tolist()),
        "encoded_ids": (Image(decode=False), PILImage.fromarray(ids)),
    }
    features = Features({name: feature for name, (feature, _) in columns.items()})
    rows = Dataset.from_dict({name: [value] for name, (_, value) in columns.items()}, features=features)
    (tmp_path / "d").mkdir()
    rows.to_parquet(tmp_path / "d/train.parquet")
    for names in (("array", "ids"), ("path", "nested"), ("encoded", "encoded_ids")):
        image, annotation = names
        data = load_segmentation_data(
            tmp_path / "d", class_names=NAMES, image_column=image, annotation_column=annotation, streaming=streaming
        )
        found = next(data.stream("train").samples(lambda index: True))[2] if streaming else data.split("train")[0]
        assert found.image.getpixel((0, 0)) == (9, 0, 0), names
        assert (found.label_map == ids).all(), names


def test_a_lone_column_of_pictures_is_what_its_name_says(tmp_path):
    Dataset.from_dict({"image": [picture()]}, features=Features({"image": Image()})).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match="Cannot tell the annotation column"):
        load_segmentation_data(tmp_path / "d", class_names=NAMES)


def test_pictures_of_16_bits_are_those_of_inference(tmp_path):
    values = np.random.default_rng(0).integers(0, 2**16, (4, 6)).astype(np.uint16)
    root = write_tree(tmp_path, ["train"], count=1)
    (root / "images/train/0.jpg").unlink()
    PILImage.fromarray(values).save(root / "images/train/0.png")
    found = load_segmentation_data(root, class_names=NAMES, ignore_index=255).split("train")[0].image
    assert (np.array(found) == read_image(root / "images/train/0.png")[0]).all()


def test_columns_may_swap_their_names(tmp_path):
    features = Features({"image": Image(), "label": Image()})
    values = {"image": [label_map(1)], "label": [picture(7)]}
    Dataset.from_dict(values, features=features).save_to_disk(tmp_path / "d")
    data = load_segmentation_data(tmp_path / "d", class_names=NAMES, image_column="label", annotation_column="image")
    assert (data.split("train")[0].label_map == 1).all()


def test_reduce_labels(tmp_path):
    data = load_segmentation_data(
        write_tree(tmp_path, ["train"], annotation=label_map(0, 1, 3)), class_names=NAMES, reduce_labels=True
    )
    assert set(np.unique(data.split("train")[0].label_map)) == {IGNORED, 0, 2}


def test_reduce_labels_names_the_id_of_the_file_and_the_one_to_ignore(tmp_path):
    tree = write_tree(tmp_path, ["train"], annotation=label_map(0, 1, 255))
    data = load_segmentation_data(tree, class_names=NAMES, reduce_labels=True, ignore_index=255)
    with pytest.raises(ValueError, match=r"the id 255, which reduce_labels lowers to 254.*Give ignore_index=254"):
        data.split("train")[0]
    data = load_segmentation_data(tree, class_names=NAMES, reduce_labels=True, ignore_index=254)
    assert set(np.unique(data.split("train")[0].label_map)) == {IGNORED, 0}


def test_palette_label_maps_keep_their_indices(tmp_path):
    palette = label_map(0, 2).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 200, 100, 50])
    data = load_segmentation_data(write_tree(tmp_path, ["train"], annotation=palette), class_names=NAMES)
    assert set(np.unique(data.split("train")[0].label_map)) == {0, 2}


def test_packaged_names_and_a_names_file(tmp_path):
    write_tree(tmp_path / "d", ["train"])
    assert len(load_segmentation_data(tmp_path / "d", class_names="camvid_11").vocabulary) == 11
    file = tmp_path / "names.json"
    file.write_text(json.dumps(NAMES))
    assert load_segmentation_data(tmp_path / "d", class_names=str(file)).vocabulary.labels == NAMES
    with pytest.raises(FileNotFoundError, match=r"'camvid'.*neither a file nor a packaged.*camvid_11"):
        load_segmentation_data(tmp_path / "d", class_names="camvid")
    file.write_text(json.dumps({"0": "sky"}))
    with pytest.raises(ValueError, match="JSON list"):
        load_segmentation_data(tmp_path / "d", class_names=str(file))


def test_no_class_names_anywhere(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no class_names\.json in .*: write it"):
        load_segmentation_data(write_tree(tmp_path / "tree", ["train"]))
    Dataset.from_dict({key: rows()[key] for key in ("image", "annotation")}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="no column 'classes'"):
        load_segmentation_data(tmp_path / "saved")


def first_sample_error(root, **options):
    data = load_segmentation_data(root, class_names=NAMES, **options)
    with pytest.raises(ValueError, match="sample 1 of split 'train'") as caught:
        data.split("train")[1]
    return str(caught.value)


def test_label_map_of_another_size_names_the_sample(tmp_path):
    label_map(0, size=(5, 4)).save(write_tree(tmp_path, ["train"]) / "annotations/train/1.png")
    message = first_sample_error(tmp_path, ignore_index=255)
    assert "(1.jpg)" in message
    assert "5 x 4" in message
    assert "6 x 4" in message


def test_label_id_out_of_range_names_sample_and_id(tmp_path):
    message = first_sample_error(write_tree(tmp_path, ["train"]))
    assert "(1.jpg)" in message
    assert "255" in message
    assert "0 to 2" in message


def test_colour_pictures_are_no_label_maps(tmp_path):
    message = first_sample_error(write_tree(tmp_path, ["train"], annotation=picture()))
    assert "one channel" in message


def test_missing_split_and_empty_split(tmp_path):
    data = load_segmentation_data(write_tree(tmp_path, ["train", "val"], count=0), class_names=NAMES)
    with pytest.raises(ValueError, match=r"no split 'validation'.*train, val"):
        data.split("validation")
    with pytest.raises(ValueError, match="'train' is empty"):
        data.split("train")


def test_unpaired_files_and_missing_folders(tmp_path):
    write_tree(tmp_path / "a", ["train"])
    (tmp_path / "a/annotations/train/1.png").unlink()
    with pytest.raises(FileNotFoundError, match="'1', which has no label map"):
        load_segmentation_data(tmp_path / "a", class_names=NAMES)
    write_tree(tmp_path / "b", ["train"])
    (tmp_path / "b/images/test").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no folder .*annotations/test"):
        load_segmentation_data(tmp_path / "b", class_names=NAMES)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        load_segmentation_data(tmp_path / "c", class_names=NAMES)


@pytest.mark.skipif(not CAMVID.is_dir(), reason="set CAMVID_DIR to the folder with CamVid's images/ and annotations/")
def test_camvid():
    data = load_segmentation_data(CAMVID, class_names="camvid_11", ignore_index=11)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 367, "val": 101}
    image, ids = data.split("val")[0]
    assert (image.size, ids.shape) == ((480, 360), (360, 480))
    assert set(np.unique(ids)) <= {IGNORED, *range(11)}
