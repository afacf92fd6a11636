"""Class names: order, synonyms, templates, comma rules, background, benchmark lists."""

import json
import warnings
from pathlib import Path

import pytest

from ov_segmentation import Vocabulary
from ov_segmentation.vocabulary import (
    BENCHMARKS,
    FOLDER,
    PROTOCOLS,
    load_prompt_templates,
    resolve_background,
    split_names,
    unseen_classes,
)

SOURCES = Path(__file__).parents[2] / "shared" / "vocabularies"


def test_order_and_labels_are_the_callers():
    vocabulary = Vocabulary(["zebra", ["car", "automobile"], "ape"])
    assert vocabulary.labels == ["zebra", "car", "ape"] == list(vocabulary)
    assert len(vocabulary) == 3
    assert vocabulary[1] == "car"
    assert vocabulary.prompts == [[["zebra"]], [["car", "automobile"]], [["ape"]]]


def test_prompts_are_classes_by_templates_by_synonyms():
    vocabulary = Vocabulary(["tree", ["car", "automobile"]], templates=["a {}.", "one {}"])
    assert vocabulary.prompts == [
        [["a tree."], ["one tree"]],
        [["a car.", "a automobile."], ["one car", "one automobile"]],
    ]


@pytest.mark.parametrize("name", ["{}", "a {0} b", "{", "}", "%s", "{name!r}", "\\1"])
def test_braces_in_a_name_are_part_of_it(name):
    assert Vocabulary([name], templates=["a {}."]).prompts == [[[f"a {name}."]]]


def test_processor_fills_in_what_the_vocabulary_leaves_open():
    names = ["building, edifice", "sky"]
    assert Vocabulary(names).prompts_with(["a {}"], "split") == [[["a building", "a edifice"]], [["a sky"]]]
    own = Vocabulary(names, templates=["{}!"], comma_rule="first")
    assert own.prompts_with(["a {}"], "split") == [[["building!"]], [["sky!"]]]


@pytest.mark.parametrize(
    ("rule", "texts"),
    [("keep", ["a, b", "c"]), ("split", ["a", "b", "c"]), ("first", ["a", "c"])],
)
def test_comma_rule_applies_to_each_synonym_and_not_to_the_label(rule, texts):
    vocabulary = Vocabulary([["a, b", "c"]], comma_rule=rule)
    assert vocabulary.prompts == [[texts]]
    assert vocabulary.labels == ["a, b"]


@pytest.mark.parametrize("rule", ["split", "first"])
def test_commas_that_separate_nothing(rule):
    assert Vocabulary([", "], comma_rule=rule).prompts == [[[", "]]]
    assert Vocabulary(["a,b"], comma_rule=rule).prompts == [[["a,b"]]]
    assert Vocabulary([", a, "], comma_rule=rule).prompts == [[["a"]]]


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ([], ValueError, "at least one"),
        (["a", " \t"], ValueError, "class 1 is blank"),
        ([["a", ""]], ValueError, "class 0 is blank"),
        (["a", []], ValueError, "Class 1 is an empty list"),
        (["cat", "dog", "cat", "dog"], ValueError, "'cat', 'dog'"),
        ([["cat", "puss", "puss"]], ValueError, "'puss'"),
        (["dog", ["cat", "puss"], ["puss", "cat"]], ValueError, "the same names.*: 'cat', 'puss'"),
        (["a", 3], TypeError, "Class 1"),
        ([["a", None]], TypeError, "None"),
        ("a, b", TypeError, "list"),
        (7, TypeError, "int"),
        ({"a", "b"}, TypeError, "ordered"),
        ({"a": 1}, TypeError, "ordered"),
        ([{"a", "b"}], TypeError, "list of synonyms"),
    ],
)
def test_names_that_cannot_be_used(names, error, message):
    with pytest.raises(error, match=message):
        Vocabulary(names)


def test_names_equal_up_to_case_and_blanks_warn_and_stay():
    names = ["Car", "car ", "tree", "traffic  light", "traffic light"]
    with pytest.warns(UserWarning, match="'Car', 'car '; 'traffic  light', 'traffic light'"):
        vocabulary = Vocabulary(names)
    assert vocabulary.labels == names


@pytest.mark.parametrize(
    ("names", "shared"),
    [
        (["car", ["automobile", "car"]], "'car' of 'car', 'automobile'"),
        ([["car", "auto"], "tree", ["auto", "truck"]], "'auto' of 'car', 'auto'"),
    ],
)
def test_names_that_classes_share_warn_and_stay(names, shared):
    """ADE20K-847's own names, once they are split at their commas, are of this kind."""
    with pytest.warns(UserWarning, match=f"several classes.*: {shared}\\.") as warned:
        vocabulary = Vocabulary(names)
    assert len(warned) == 1 and len(vocabulary) == len(names)


@pytest.mark.parametrize("templates", [[], ["a photo"], ["{} and {}"], ["{0}"], [3], "vild_15", "a photo"])
def test_templates_that_cannot_be_used(templates):
    with pytest.raises(ValueError, match="template"):
        Vocabulary(["a"], templates=templates)


def test_templates_are_a_list():
    with pytest.raises(TypeError, match=r"Prompt templates are a list of texts.*got 5"):
        Vocabulary(["a"], templates=5)


def test_templates_by_name_and_single():
    assert [len(load_prompt_templates(name)) for name in ("vild_14", "imagenet_80", "bare_1")] == [14, 80, 1]
    assert load_prompt_templates("one {}") == ("one {}",)


@pytest.mark.parametrize(
    ("background", "indices"),
    [
        (None, None),
        ([], None),
        ("wall", [1]),
        (2, [2]),
        (["floor", "wall"], [1, 2]),
        (["wall", 1, 0], [0, 1]),
        ("no_object", ["no_object"]),
        (["no_object", "floor", 0], [0, 2, "no_object"]),
        (range(1, 3), [1, 2]),
    ],
)
def test_background(background, indices):
    assert Vocabulary(["sky", "wall", "floor"], background=background).background == indices


@pytest.mark.parametrize(
    ("background", "error"),
    [("roof", ValueError), (3, ValueError), (-1, ValueError), ([1.0], TypeError), (1.5, TypeError), (True, TypeError)],
)
def test_background_that_cannot_be_used(background, error):
    with pytest.raises(error, match="background"):
        Vocabulary(["sky", "wall", "floor"], background=background)


def test_background_name_needs_labels():
    assert resolve_background([8, 1], None) == [1, 8]
    with pytest.raises(ValueError, match="labels="):
        resolve_background(["wall"], None)


def test_other_texts():
    vocabulary = Vocabulary.from_benchmark("pascal_voc_20b", "cat_seg")
    own = vocabulary.with_texts(None, None)
    assert (own.templates, own.comma_rule) == (None, None)
    assert own.background == vocabulary.background and own.synonyms == vocabulary.synonyms
    assert own.with_texts(vocabulary.templates, "first") == vocabulary
    with pytest.raises(ValueError, match="comma rule"):
        vocabulary.with_texts(None, "some")


def test_equal_vocabularies_are_one_key():
    first, second = (Vocabulary(["a", ["b", "c"]], background=["a"]) for _ in range(2))
    assert first == second
    assert len({first, second, Vocabulary(["a", ["b", "c"]]), Vocabulary(["a", "b"], templates="single_1")}) == 3


def test_every_benchmark_under_every_protocol():
    sizes = {name: int(name.rstrip("b").rsplit("_", 1)[1]) for name in BENCHMARKS} | {"pascal_voc_20b": 59}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for benchmark, lists in BENCHMARKS.items():
            for protocol, file in lists.items():
                vocabulary = Vocabulary.from_benchmark(benchmark, protocol=protocol)
                assert len(vocabulary) == sizes[benchmark]
                assert vocabulary.labels == json.loads((FOLDER / f"{file}.json").read_text())
                templates = PROTOCOLS[protocol].templates
                assert vocabulary.templates == (templates and load_prompt_templates(templates))
    used = {file for lists in BENCHMARKS.values() for file in lists.values()}
    assert {path.stem for path in FOLDER.glob("*.json")} - used == {"prompt_templates", "unseen_classes"}


def test_benchmark_protocols_differ_where_the_originals_do():
    san = Vocabulary.from_benchmark("ade20k_150", protocol="san")
    assert san.labels[6] == "road, route"
    assert san.prompts[6][0] == ["a photo of a road, route."]
    assert Vocabulary.from_benchmark("ade20k_150", "sed").labels[6] == "road"
    sed = Vocabulary.from_benchmark("ade20k_847", "sed")
    assert sed.prompts[1][0] == ["a bad photo of a building.", "a bad photo of a edifice."]
    assert Vocabulary.from_benchmark("ade20k_847", "cat_seg").prompts[1] == [["A photo of a building in the scene"]]
    assert Vocabulary.from_benchmark("ade20k_847", "deop").prompts[1] == [["building, edifice"]]
    assert Vocabulary.from_benchmark("pascal_voc_20", "san")[19] == "tv"
    assert Vocabulary.from_benchmark("pascal_voc_20b", "sed").background == list(range(20, 59))


def test_benchmark_errors_list_what_exists():
    with pytest.raises(ValueError, match="ade20k_150, ade20k_847, camvid_11"):
        Vocabulary.from_benchmark("ade_150")
    with pytest.raises(ValueError, match="cat_seg, esc_net, sed"):
        Vocabulary.from_benchmark("pascal_voc_20b", protocol="san")
    with pytest.raises(ValueError, match="Give one of: san, ovseg"):
        Vocabulary.from_benchmark("ade20k_150")
    assert Vocabulary.from_benchmark("camvid_11").templates is None


def test_unseen_classes():
    names = Vocabulary.from_benchmark("coco_stuff_171").labels
    unseen = [names[k] for k in unseen_classes("coco_stuff_171")]
    assert len(unseen) == 15
    assert {"frisbee", "giraffe", "road"} < set(unseen)
    assert unseen_classes("pascal_voc_20") == list(range(15, 20))


@pytest.mark.skipif(not SOURCES.is_dir(), reason="needs ../shared/vocabularies")
def test_package_data_equals_the_sources():
    for path in FOLDER.glob("*.json"):
        ours = json.loads(path.read_text())
        if isinstance(ours, list):
            assert ours == json.loads((SOURCES / path.name).read_text()), path.name
    templates = json.loads((SOURCES / "prompt_templates.json").read_text())
    for name, ours in json.loads((FOLDER / "prompt_templates.json").read_text()).items():
        assert ours == templates.get(name, ["{}"])
    splits = json.loads((SOURCES / "seen_unseen_splits.json").read_text())
    assert unseen_classes("coco_stuff_171") == splits["coco_stuff_164k"]["unseen"]
    assert unseen_classes("pascal_voc_20") == splits["voc_2012"]["unseen"]


def test_split_names():
    assert split_names("road, car ,traffic light") == ["road", "car", "traffic light"]
    with pytest.raises(ValueError, match="class 1 is blank"):
        Vocabulary(split_names("road,,car"))
