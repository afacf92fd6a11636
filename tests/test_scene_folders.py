"""Scenes on disk, and the evaluation that tells apart who has met a name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import load_dataset

from examples.evaluate_scenes import main as evaluate_command
from examples.make_scenes import main as make_scenes_command
from ov_segmentation.data.class_names import class_names
from ov_segmentation.data.datasets import load_segmentation_data
from ov_segmentation.data.scene_folders import world_suffix, write_scenes
from ov_segmentation.data.scene_vocabulary import SceneVocabulary
from ov_segmentation.metrics import ConfusionMatrix
from ov_segmentation.training import scene_evaluation
from ov_segmentation.training.scene_evaluation import absent_names, evaluate_scenes, majority_floor

SCENES = SceneVocabulary.small()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scenes")
    write_scenes(path, num_train=12, num_evaluation=16)
    return path


def test_a_folder_that_cannot_be_written_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"NotADirectoryError: .*file/scenes"):
        make_scenes_command(["--output", str(tmp_path / "file" / "scenes"), "--train", "1", "--evaluation", "1"])


def test_training_meets_the_names_of_tier_a_alone(folder: Path) -> None:
    data = load_dataset(str(folder / "train"))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 12, "validation": 2}
    names = class_names(data)
    assert names == [name for name, tier in zip(SCENES.names, SCENES.tiers, strict=True) if tier == "a"]
    for row in data["train"]:
        label_map = np.asarray(row["annotation"])
        assert label_map.min() >= 0 and label_map.max() < len(names)
        present = {names[index] for index in np.unique(label_map)}
        # a caption names what it shows; an object hidden behind others may be missing from the map
        assert all(name in row["caption"] for name in present)


def test_evaluation_has_all_names_and_other_scenes(folder: Path) -> None:
    data = load_dataset(str(folder / "evaluation"))
    assert list(data) == ["validation"] and class_names(data) == list(SCENES.names)
    trained = load_dataset(str(folder / "train"), split="train")
    assert not np.array_equal(np.asarray(data["validation"][0]["image"]), np.asarray(trained[0]["image"]))


def test_the_command_says_what_makes_the_scenes(folder: Path, tmp_path: Path) -> None:
    """Also where the model is missing: the scenes are looked for first, and no model is loaded."""
    arguments = ["--model", str(tmp_path / "model"), "--data"]
    for data in (tmp_path / "scenes", folder / "train"):
        with pytest.raises(SystemExit) as error:
            evaluate_command([*arguments, str(data)])
        assert f"no folder {data / 'evaluation'}: python examples/make_scenes.py --output {data}" in str(error.value)
    with pytest.raises(SystemExit) as error:
        evaluate_command([*arguments, str(folder)])
    assert "make_scenes" not in str(error.value) and str(tmp_path / "model") in str(error.value)


def test_scenes_that_are_not_the_standard_ones_have_a_protocol_of_their_own(folder: Path, tmp_path: Path) -> None:
    assert world_suffix(folder) == "" == world_suffix(tmp_path)
    write_scenes(tmp_path, num_train=1, num_evaluation=1, difficulty="crowded_harsh", size=64)
    assert world_suffix(tmp_path) == "-64-crowded_harsh"


def scores_of(predict, pictures) -> object:
    matrix = ConfusionMatrix(len(SCENES.names))
    for index in range(len(pictures)):
        label_map = torch.from_numpy(pictures[index].label_map)
        matrix.update([predict(label_map)], [label_map])
    return matrix.compute()


def test_tiers_and_shuffled_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = load_segmentation_data(folder / "evaluation").split("validation")
    asked = []

    def read_names(model, processor, pictures, accelerator: Accelerator, **options):
        """A model that knows every pixel's class and finds its name in the vocabulary that it is asked for."""
        labels = pictures.data.vocabulary.labels
        asked.append(labels)
        place = torch.tensor([labels.index(name) for name in SCENES.names])
        return scores_of(lambda label_map: place[label_map.long()], pictures)

    monkeypatch.setattr(scene_evaluation, "evaluate", read_names)
    figures = evaluate_scenes(None, None, pictures, SCENES)
    assert figures["miou"] == figures["hiou"] == figures["things_c"] == figures["stuff_a"] == 1.0
    assert figures["shuffled_miou"] < 0.1
    assert asked[1] != asked[0] == list(SCENES.names) and sorted(asked[1]) == sorted(asked[0])


def test_made_up_names_are_a_floor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = load_segmentation_data(folder / "evaluation").split("validation")
    asked = []

    def only_known_names(model, processor, pictures, accelerator: Accelerator, **options):
        """A model that finds every pixel's name, or the first class where it is not asked for."""
        labels = pictures.data.vocabulary.labels
        asked.append(labels)
        place = torch.tensor([labels.index(name) if name in labels else 0 for name in SCENES.names])
        return scores_of(lambda label_map: place[label_map.long()], pictures)

    monkeypatch.setattr(scene_evaluation, "evaluate", only_known_names)
    figures = evaluate_scenes(None, None, pictures, SCENES, floors=("random",))
    assert figures["miou"] == 1.0 and figures["random_miou"] < 0.1 and "shuffled_miou" not in figures
    assert len(set(asked[1])) == len(SCENES.names) and not set(asked[1]) & set(SCENES.names)
    with pytest.raises(ValueError, match=r"got \['blind'\]"):
        evaluate_scenes(None, None, pictures, SCENES, floors=("blind",))


def test_distractors_are_asked_for_and_shown_nowhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = load_segmentation_data(folder / "evaluation").split("validation")
    absent = absent_names(SCENES, 20, seed=0)
    assert len(set(absent)) == 20 and not set(absent) & set(SCENES.names)

    def fooled(model, processor, pictures, accelerator: Accelerator, **options):
        """A model that takes one class for the last distractor."""
        labels = pictures.data.vocabulary.labels
        matrix = ConfusionMatrix(len(labels))
        for index in range(len(pictures)):
            label_map = torch.from_numpy(pictures[index].label_map)
            answer = torch.tensor([labels.index(name) for name in SCENES.names])
            answer[len(SCENES.names) - 1] = labels.index(absent[-1])
            matrix.update([answer[label_map.long()]], [label_map])
        return matrix.compute()

    monkeypatch.setattr(scene_evaluation, "evaluate", fooled)
    figures = evaluate_scenes(None, None, pictures, SCENES, floors=(), distractors=absent)
    assert 0.9 < figures["miou"] < 1.0 and figures["things_a"] == 1.0
    with pytest.raises(ValueError, match="200 names more than this one"):
        absent_names(SCENES, 1000, seed=0)


def test_every_class_can_be_asked_for_in_two_wordings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = load_segmentation_data(folder / "evaluation").split("validation")
    asked = []

    def perfect(model, processor, pictures, accelerator: Accelerator, **options):
        asked.append(pictures.data.vocabulary)
        return scores_of(lambda label_map: label_map.long(), pictures)

    monkeypatch.setattr(scene_evaluation, "evaluate", perfect)
    figures = evaluate_scenes(None, None, pictures, SCENES, floors=("shuffled",), synonyms=True)
    assert figures["miou"] == 1.0 and asked[0].labels == list(SCENES.names)
    assert asked[0].prompts[0] == [["red plain circle", "plain red circle"]]
    assert all(len(wordings) == 2 for vocabulary in asked for (wordings,) in vocabulary.prompts)


def test_the_majority_class_is_a_floor(folder: Path) -> None:
    pictures = load_segmentation_data(folder / "evaluation").split("validation")
    figures = majority_floor(pictures, SCENES)
    maps = np.stack([pictures[index].label_map for index in range(len(pictures))])
    counts = np.bincount(maps.flatten(), minlength=len(SCENES.names))
    assert figures["pixel_accuracy"] == pytest.approx(counts.max() / counts.sum())
    # its IoU is its share of all pixels, every other class has none
    assert figures["miou"] == pytest.approx(counts.max() / counts.sum() / np.count_nonzero(counts))
    assert figures["shuffled_miou"] == figures["miou"]


def test_other_class_names_are_refused(folder: Path) -> None:
    pictures = load_segmentation_data(folder / "train").split("validation")
    with pytest.raises(ValueError, match="evaluate on the folder 'evaluation'"):
        evaluate_scenes(None, None, pictures, SCENES)
