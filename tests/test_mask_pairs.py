"""Nouns, mining of mask pairs, and reading them in every format."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value, load_dataset
from PIL import Image as PILImage

from examples.mine_mask_pairs import main
from ov_segmentation.data.class_names import segmentation_features
from ov_segmentation.data.mask_pairs import MASKED_OUT, load_mask_pairs, pair_features
from ov_segmentation.data.mining import MiningOptions, PairMiner
from ov_segmentation.data.mining_run import MiningRun, SourcePictures
from ov_segmentation.data.nouns import extract_nouns, find_tagger
from ov_segmentation.models.ovseg.image_processing_ovseg import OVSegImageProcessor
from ov_segmentation.models.ovseg.processing_ovseg import OVSegProcessor
from tests.models.test_ovseg import TestOVSeg as Tiny
from tests.tiny import TOKENIZER

NAMES = ["road", "tree", "sky"]
CAPTIONS = [
    ["A red car on a road", "Two dogs and a car"],
    ["", "running quickly"],
    ["THE SKY ABOVE TREES", "sky"],
]
TAGGER = find_tagger("textblob")[1]


# ---------------------------------------------------------------------- nouns


@pytest.mark.parametrize(
    ("caption", "nouns"),
    [
        ("A man riding a wave on top of a surfboard.", ["man", "wave", "top", "surfboard"]),
        ("TWO DOGS ON A BEACH", ["dogs", "beach"]),
        ("", []),
        ("   ", []),
        ("12 3.4 !!", []),
        ("a cat and a cat", ["cat"]),
    ],
)
def test_nouns(caption: str, nouns: list[str]) -> None:
    found = extract_nouns(caption, TAGGER)
    assert set(found) <= set(nouns) | {"top"}
    assert [noun for noun in found if noun != "top"] == [noun for noun in nouns if noun != "top"]


def test_long_captions_phrases_and_singular_forms() -> None:
    assert extract_nouns("a dog and " * 200, TAGGER) == ["dog"]
    assert extract_nouns("a red striped circle on green grainy ground", TAGGER, phrases=True) == [
        "red striped circle",
        "green grainy ground",
    ]
    assert extract_nouns("two dogs", TAGGER, singular=True) == ["dog"]


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("a red striped cross and a dotted cross on gray cloudy ground", ["red striped cross", "dotted cross"]),
        ("A MAN NEXT TO A STOP SIGN", ["man", "stop sign"]),
        ("the kids play catch near two bear", ["kids", "bear"]),
        ("a man in a shirt walk his dog", ["man", "shirt", "dog"]),
        ("two dogs run", ["dogs"]),
    ],
)
def test_verbs_of_the_lexicon_are_nouns_where_only_nouns_can_stand(caption: str, phrases: list[str]) -> None:
    found = extract_nouns(caption, TAGGER, phrases=True)
    assert [phrase for phrase in found if phrase not in ("catch", "gray cloudy ground")] == phrases


@pytest.fixture
def nltk_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """NLTK with the data of a tagger that knows three words, and with no other data."""
    import nltk

    folder = tmp_path / "nltk" / "taggers" / "averaged_perceptron_tagger_eng"
    folder.mkdir(parents=True)
    tags = {"ball": "NN", "kids": "NNS", "a": "DT", "throw": "VBP"}
    parts = {"weights": {"bias": {"IN": 1.0}}, "tagdict": tags, "classes": [*set(tags.values()), "IN"]}
    for part, content in parts.items():
        (folder / f"averaged_perceptron_tagger_eng.{part}.json").write_text(json.dumps(content))
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    nltk.tag._get_tagger.cache_clear()  # NLTK keeps the tagger that it has loaded
    yield folder
    nltk.tag._get_tagger.cache_clear()


def test_nltk_where_its_data_is(nltk_data: Path) -> None:
    name, tagger = find_tagger("nltk")
    assert name == "nltk"
    assert extract_nouns("KIDS throw a ball.", tagger) == ["kids", "ball"]
    assert find_tagger()[0] == "nltk"  # the authors' choice comes first


def test_nltk_without_its_data(nltk_data: Path) -> None:
    for file in nltk_data.iterdir():
        file.unlink()
    nltk_data.rmdir()
    with pytest.raises(ImportError, match=r"no data: python -m nltk\.downloader averaged_perceptron_tagger_eng"):
        find_tagger("nltk")
    assert find_tagger()[0] != "nltk"


class SpacyModel:
    """What is used of a spaCy pipeline."""

    def __call__(self, caption: str) -> list[SimpleNamespace]:
        tags = {"kids": "NNS", "ball": "NN"}
        return [SimpleNamespace(text=word, tag_=tags.get(word, "IN")) for word in caption.split()]


def test_spacy_where_a_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """spaCy is not installed here: a stand-in with the functions that are called, by their documented names."""
    installed, loaded = ["de_core_news_sm", "en_core_web_sm"], []

    def load(model: str, disable: list[str]) -> SpacyModel:
        loaded.append(model)
        return SpacyModel()

    util = SimpleNamespace(get_installed_models=lambda: installed)
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(util=util, load=load, __spec__="spacy"))
    name, tagger = find_tagger("spacy")
    assert (name, loaded) == ("spacy en_core_web_sm", ["en_core_web_sm"])
    assert extract_nouns("Kids throw a ball", tagger) == ["kids", "ball"]
    installed.remove("en_core_web_sm")
    with pytest.raises(ImportError, match="no English model: python -m spacy download"):
        find_tagger("spacy")


def test_missing_taggers_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import ov_segmentation.data.nouns as nouns

    assert find_tagger("auto")[0] in ("nltk", "textblob") or find_tagger("auto")[0].startswith("spacy")
    with pytest.raises(ValueError, match="stanza"):
        find_tagger("stanza")
    monkeypatch.setattr(nouns, "find_spec", lambda name: None)
    for name in ("nltk", "spacy", "textblob"):
        with pytest.raises(ImportError, match="pip install"):
            find_tagger(name)
    with pytest.raises(ImportError, match="No part-of-speech tagger"):
        find_tagger()


# ---------------------------------------------------------------------- mining


def label_map() -> np.ndarray:
    labels = np.zeros((40, 60), dtype=np.uint8)
    labels[:, 30:] = 1
    labels[:5] = 255
    return labels


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures with two captions each and label maps of the classes 0 and 1 of three."""
    random = np.random.default_rng(0)
    rows = {
        "image": [PILImage.fromarray(random.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in CAPTIONS],
        "annotation": [PILImage.fromarray(label_map()) for _ in CAPTIONS],
        "file_name": [f"{i}.png" for i in range(3)],
        "classes": [[0, 1]] * 3,
        "caption": CAPTIONS,
    }
    features = segmentation_features(NAMES, caption=[Value("string")])
    folder = tmp_path_factory.mktemp("captions")
    (folder / "data").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    """A tiny OVSeg model without visual prompts, most of whose proposals hold pixels."""
    model = Tiny().model(prompt_type="none", mask_threshold=0.1)
    image_processor = OVSegImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    return model, OVSegProcessor(image_processor, TOKENIZER, ["a photo of a {}."])


def mined(data: Path, parts: tuple[Any, Any], index: int = 0, **changes: Any) -> Any:
    options = MiningOptions(**changes)
    loading = {"ignore_index": 255} if options.needs_annotation else {}
    pictures = SourcePictures(data, "train", options, **loading)
    return PairMiner(*parts, options, TAGGER, pictures.class_names).mine(*pictures[index])


def test_each_noun_gets_its_nearest_proposal(data: Path, parts: tuple[Any, Any]) -> None:
    found = mined(data, parts)
    assert [pair["noun"] for pair in found.pairs] == ["car", "road"]
    assert found.counts["pairs"] == found.counts["nouns"] == 2
    model, processor = parts
    picture = SourcePictures(data, "train", MiningOptions())[0].image
    inputs = processor(images=picture, return_tensors="pt")
    with torch.no_grad():
        (masks,) = model.propose_masks(inputs["pixel_values"], inputs["reshaped_input_sizes"])
        features, valid = model.encode_masks(inputs["pixel_values"], [masks])
        text = model.encode_vocabulary(**processor(text=["car", "road"], return_tensors="pt"))
    similarity = (text @ features[0].T).masked_fill(~valid[0], -2)
    for pair, row in zip(found.pairs, similarity, strict=True):
        assert pair["score"] == pytest.approx(row.max().item(), abs=1e-5)
        mask = masks[row.argmax()]
        x0, y0, x1, y1 = pair["box"]
        np.testing.assert_array_equal(np.asarray(pair["mask"]) > 0, mask[y0:y1, x0:x1].numpy())
        assert mask.sum() == (np.asarray(pair["mask"]) > 0).sum()
        resized = np.asarray(picture.resize((96, 64), PILImage.Resampling.BILINEAR))
        np.testing.assert_array_equal(np.asarray(pair["image"]), resized[y0:y1, x0:x1])


def test_four_cases_of_masks_and_nouns(data: Path, parts: tuple[Any, Any]) -> None:
    annotated = mined(data, parts, masks="annotation", nouns="classes")
    assert [pair["noun"] for pair in annotated.pairs] == ["road", "tree"]
    assert [pair["score"] for pair in annotated.pairs] == [None, None]
    assert [pair["box"] for pair in annotated.pairs] == [[0, 8, 48, 64], [48, 8, 96, 64]]
    named = mined(data, parts, masks="annotation")
    assert [pair["noun"] for pair in named.pairs] == ["car", "road"]
    assert all(pair["box"] in ([0, 8, 48, 64], [48, 8, 96, 64]) for pair in named.pairs)
    classes = mined(data, parts, nouns="classes")
    assert [pair["noun"] for pair in classes.pairs] == ["road", "tree"]
    assert all(isinstance(pair["score"], float) for pair in classes.pairs)


def test_what_the_paper_leaves_open(data: Path, parts: tuple[Any, Any]) -> None:
    def nouns(**changes: Any) -> list[str]:
        return [pair["noun"] for pair in mined(data, parts, **changes).pairs]

    assert nouns(captions_per_image=2) == ["car", "road", "dogs", "car"]
    assert nouns(captions_per_image=2, deduplicate=True, singular=True) == ["car", "road", "dog"]
    assert nouns(phrases=True) == ["red car", "road"]
    assert nouns(min_score=1.1) == []
    whole = mined(data, parts, masks="annotation", nouns="classes", min_area=0.45)
    assert whole.pairs == []
    assert whole.counts["pictures_without_masks"] == 1


def test_pictures_that_give_nothing(data: Path, parts: tuple[Any, Any]) -> None:
    empty = mined(data, parts, index=1, captions_per_image=2)
    assert empty.pairs == []
    assert empty.counts["captions_without_nouns"] == 2
    assert [pair["noun"] for pair in mined(data, parts, index=2).pairs] == ["sky", "trees"]
    model, _ = parts
    threshold, model.config.mask_threshold = model.config.mask_threshold, 0.999
    try:
        nothing = mined(data, parts)
    finally:
        model.config.mask_threshold = threshold
    assert nothing.pairs == []
    assert nothing.counts["pictures_without_masks"] == 1


def test_long_captions_and_long_nouns(data: Path, parts: tuple[Any, Any]) -> None:
    """Two hundred words are read to the end; a name that CLIP's text tower cannot hold is cut, and the user told."""
    options = MiningOptions(phrases=True, captions_per_image=3)
    picture = SourcePictures(data, "train", options)[0].image
    miner = PairMiner(*parts, options, TAGGER)
    captions = ["A DOG AND " * 66 + "A CAT", "a " + "big " * 199 + "house", None]
    with pytest.warns(UserWarning, match="are cut"):
        found = miner.mine(picture, captions)
    assert [pair["noun"] for pair in found.pairs] == ["dog", "cat", "big " * 199 + "house"]
    assert found.counts["captions_without_nouns"] == 1


def test_a_run_is_shared_and_continues(data: Path, parts: tuple[Any, Any], tmp_path: Path) -> None:
    options = MiningOptions()
    pictures = SourcePictures(data, "train", options)
    miner = PairMiner(*parts, options, TAGGER)
    run = MiningRun(tmp_path / "pairs", {"masks": "proposals"}, 3, shard_size=2)
    run.claim()
    run.work(pictures, miner, process=1, num_processes=2)
    assert [run.shard(n).is_file() for n in range(2)] == [False, True]
    assert run.summary()["shards_missing"] == 1
    written = run.shard(1).stat().st_mtime_ns
    run.work(pictures, miner)
    assert run.shard(1).stat().st_mtime_ns == written
    summary = run.summary()
    assert (summary["pictures"], summary["pairs"], summary["shards_missing"]) == (3, 4, 0)
    assert summary["distinct_nouns"] == 4
    rows = load_dataset(str(tmp_path / "pairs"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["noun"][:] == ["car", "road", "sky", "trees"]
    assert rows["picture"][:] == [0, 0, 2, 2]
    with pytest.raises(ValueError, match="other settings"):
        MiningRun(tmp_path / "pairs", {"masks": "annotation"}, 3, shard_size=2).claim()
    with pytest.raises(ValueError, match="no mining run"):
        MiningRun(data, {}, 3).claim()


def test_captions_are_found_as_prepared_data_sets_have_them(data: Path, tmp_path: Path) -> None:
    """`coco_captions` of examples/prepare_dataset.py has a column `captions`."""
    rows = load_dataset(str(data), split="train", cache_dir=str(tmp_path / "cache"))
    (tmp_path / "prepared").mkdir()
    rows.rename_column("caption", "captions").to_parquet(tmp_path / "prepared/train-00000-of-00001.parquet")
    for folder in (data, tmp_path / "prepared"):
        assert SourcePictures(folder, "train", MiningOptions())[0].captions == CAPTIONS[0]


def test_command_line(data: Path, parts: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, processor = parts
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    command = ["--model", str(tmp_path / "model"), "--data", str(data), "--output", str(tmp_path / "out"), "--cpu"]
    main([*command, "--tagger", "textblob", "--captions-per-image", "2"])
    counts = json.loads(capsys.readouterr().out)
    assert counts["captions"] == 6
    assert counts["captions_without_nouns"] == 2
    pairs = load_mask_pairs(tmp_path / "out")
    assert len(pairs) == counts["pairs"] == 7
    with pytest.raises(SystemExit, match="no column 'title'"):
        main([*command, "--caption-column", "title"])
    with pytest.raises(SystemExit, match="other settings"):
        main([*command, "--tagger", "textblob"])


# ---------------------------------------------------------------------- reading


def masked_picture(path: Path) -> np.ndarray:
    """A picture whose masked-out pixels have the authors' colour; returns its mask."""
    mask = np.zeros((20, 30), dtype=bool)
    mask[5:15, 10:25] = True
    picture = np.where(mask[..., None], np.uint8(200), np.array(MASKED_OUT, dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.fromarray(picture).save(path)
    return mask


def test_the_authors_table_and_class_folders(tmp_path: Path) -> None:
    mask = masked_picture(tmp_path / "pictures" / "a.png")
    (tmp_path / "pairs.csv").write_text("filepath\ttitle\npictures/a.png\tteapot, blue\n")
    masked_picture(tmp_path / "classes" / "cup" / "b.png")
    for source, noun in ((tmp_path / "pairs.csv", "teapot, blue"), (tmp_path / "classes", "cup")):
        pairs = load_mask_pairs(source)
        assert [pair.noun for pair in pairs] == [noun]
        np.testing.assert_array_equal(pairs[0].mask, mask)
        assert pairs[0].crop.shape == (20, 30, 3)
    mixture = load_mask_pairs([tmp_path / "pairs.csv", tmp_path / "classes"])
    assert mixture.nouns == ["cup", "teapot, blue"]


def test_a_mixture_has_the_shares_that_are_asked_for(tmp_path: Path) -> None:
    """Table 8: two sources, interleaved; the same seed gives the same order."""
    masked_picture(tmp_path / "a.png")
    for name, number in (("many", 400), ("few", 100)):
        lines = "".join(f"a.png\t{name}{index}\n" for index in range(number))
        (tmp_path / f"{name}.csv").write_text(f"filepath\ttitle\n{lines}")
    sources = [tmp_path / "many.csv", tmp_path / "few.csv"]

    def nouns(**options: Any) -> list[str]:
        return load_mask_pairs(sources, **options).rows["noun"][:]

    assert sorted(nouns()) == sorted([f"many{i}" for i in range(400)] + [f"few{i}" for i in range(100)])
    mixed = nouns(probabilities=[0.75, 0.25], seed=3)
    assert len(mixed) > 250
    assert sum(noun.startswith("many") for noun in mixed) / len(mixed) == pytest.approx(0.75, abs=0.06)
    assert len(set(mixed)) == len(mixed)
    assert mixed == nouns(probabilities=[0.75, 0.25], seed=3) != nouns(probabilities=[0.75, 0.25], seed=4)
    with pytest.raises(ValueError, match=r"2 sources.*3 shares"):
        nouns(probabilities=[0.5, 0.25, 0.25])
    with pytest.raises(ValueError, match="add up to 1"):
        nouns(probabilities=[0.5, 0.25])


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        load_mask_pairs(tmp_path / "none.csv")
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="filepath and title"):
        load_mask_pairs(tmp_path / "bad.csv")
    (tmp_path / "lost.csv").write_text("filepath\ttitle\nlost.png\tcup\n")
    with pytest.raises(FileNotFoundError, match=r"lost\.png"):
        load_mask_pairs(tmp_path / "lost.csv")
    features = Features({"image": Image(), "text": Value("string")})
    picture = PILImage.fromarray(np.zeros((4, 4, 3), dtype=np.uint8))
    Dataset.from_dict({"image": [picture], "text": ["x"]}, features=features).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="mask, noun"):
        load_mask_pairs(tmp_path / "other")


def test_a_run_that_found_nothing(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    empty = Dataset.from_dict({name: [] for name in pair_features()}, features=pair_features())
    empty.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="holds no pairs in the split 'train'"):
        load_mask_pairs(tmp_path)


def test_an_empty_mask_names_its_pair(tmp_path: Path) -> None:
    PILImage.new("RGB", (8, 8), MASKED_OUT).save(tmp_path / "blank.png")
    (tmp_path / "pairs.tsv").write_text("filepath\ttitle\nblank.png\tcup\n")
    with pytest.raises(ValueError, match=r"Pair 0 .*'cup'"):
        load_mask_pairs(tmp_path / "pairs.tsv")[0]
