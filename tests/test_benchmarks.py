"""The registry: every benchmark has a protocol per method, the facts sheets' numbers, ids that mean something."""

import json
from pathlib import Path

import pytest

from ov_segmentation.data.benchmarks import METHODS, evaluation_protocol, own_protocol, paper_scores
from ov_segmentation.data.label_sets import context_59_ids, label_set, label_sets
from ov_segmentation.data.preparation import BUILDERS
from ov_segmentation.vocabulary import BENCHMARKS
from tests.official_trees import names

PAIRS = [(benchmark, method) for benchmark, methods in BENCHMARKS.items() for method in METHODS if method in methods]


@pytest.mark.parametrize(("benchmark", "method"), PAIRS)
def test_every_protocol_is_whole(benchmark, method):
    protocol = evaluation_protocol(benchmark, method)
    labels = label_set(benchmark)
    assert protocol.class_names == labels.class_names
    assert set(protocol.label_of_class) == set(range(len(labels.class_names)))
    assert protocol.vocabulary.background is None
    assert json.loads(json.dumps(protocol.describe()))["templates"]
    assert protocol.id.startswith(f"{benchmark}/{method}/")


def test_ids_differ_where_protocols_do():
    ids = [evaluation_protocol(*pair).id for pair in PAIRS]
    assert len(set(ids)) == len(ids)
    protocol = evaluation_protocol("ade20k_150", "sed")
    assert protocol.id == evaluation_protocol("ade20k_150", "sed").id
    changed = [
        protocol.with_changes(averaging="union"),
        protocol.with_changes(switches={"rejection_top_k": None}),
        protocol.with_changes(split="train"),
        protocol.with_changes(names=[f"class {k}" for k in range(150)]),
    ]
    assert len({protocol.id, *(other.id for other in changed)}) == 5


def test_settings_of_the_sheets():
    def switches(benchmark, method):
        return evaluation_protocol(benchmark, method).switches

    weights = {name: switches(name, "ovseg")["ensemble_weight"] for name in BENCHMARKS if "ovseg" in BENCHMARKS[name]}
    assert weights["ade20k_150"] == weights["ade20k_847"] == 0.7
    assert weights["pascal_context_59"] == weights["pascal_context_459"] == 0.6
    assert weights["pascal_voc_20"] == 0.45
    assert switches("ade20k_150", "sed") == {"class_attention_pooling": 1, "rejection_top_k": 8}
    assert switches("ade20k_150", "cat_seg")["sliding_window"] is switches("ade20k_150", "esc_net")["sliding_window"]
    assert evaluation_protocol("ade20k_150", "deop").sizes == ((512, 2560),)
    short = {method: evaluation_protocol("ade20k_847", method).annotation_short_side for method in METHODS}
    assert short == dict.fromkeys(("sed", "cat_seg", "esc_net"), 512) | dict.fromkeys(("san", "ovseg", "deop"))
    averaging = {method: evaluation_protocol("pascal_context_459", method).averaging for method in METHODS}
    assert {method for method, rule in averaging.items() if rule == "union"} == {"san", "ovseg", "deop"}
    assert len(evaluation_protocol("ade20k_150", "san").vocabulary.templates) == 14


def test_zero_shot_splits():
    assert len(evaluation_protocol("coco_stuff_171", "deop").seen) == 156
    assert evaluation_protocol("pascal_voc_20", "deop").seen == tuple(range(15))
    assert evaluation_protocol("ade20k_150", "deop").seen is None


def test_folding_and_order():
    fold = evaluation_protocol("pascal_voc_20b", "cat_seg")
    assert (len(fold.vocabulary), len(fold.class_names)) == (59, 21)
    assert fold.label_of_class == (*range(20), *[20] * 39)
    ovseg = evaluation_protocol("pascal_context_59", "ovseg")
    for name, label in zip(ovseg.vocabulary.labels, ovseg.label_of_class, strict=True):
        assert ovseg.class_names[label] == {"table": "diningtable"}.get(name, name)


def test_context_59_is_sorted_by_the_ids_of_459():
    ids = context_59_ids()
    assert list(ids) == sorted(ids)
    glued = names("pascal_context_459.glued")
    assert [glued[k - 1] for k in ids[:3]] == ["aeroplane", "bag", "bed"]


def test_reported_scores():
    def miou(benchmark, method, **match):
        scores = evaluation_protocol(benchmark, method).reported_scores()
        return [s.miou for s in scores if all(getattr(s, key) == value for key, value in match.items())]

    assert miou("pascal_context_459", "san", variant="ViT-B/16", averaging="ground_truth") == [16.71]
    assert miou("pascal_context_459", "san", variant="ViT-B/16", averaging="union") == [12.6]
    assert miou("ade20k_847", "sed", variant="ConvNeXt-L") == [13.9]
    off = evaluation_protocol("ade20k_847", "sed").with_changes(switches={"rejection_top_k": None})
    assert [s.miou for s in off.reported_scores()] == [11.2, 13.7]
    assert miou("pascal_voc_20b", "esc_net", variant="ViT-L/14") == [86.3]
    assert {s.method for s in paper_scores()} == {"san", "sed", "cat_seg", "esc_net"}
    assert all(s.benchmark in BENCHMARKS and s.source and 0 < s.miou < 100 for s in paper_scores())


@pytest.mark.parametrize(
    "changes",
    [
        {"switches": {"sliding_window": False}},
        {"switches": {"class_attention_pooling": 2}},
        {"split": "train"},
    ],
)
def test_no_score_is_reported_for_another_evaluation(changes):
    protocol = evaluation_protocol("ade20k_150", "cat_seg")
    assert [score.miou for score in protocol.with_changes(**changes).reported_scores()] == []
    assert [score.miou for score in protocol.with_changes(switches=protocol.switches).reported_scores()] == [31.8, 37.9]


def test_bad_names_are_errors():
    with pytest.raises(ValueError, match="no benchmark 'ade'"):
        evaluation_protocol("ade", "san")
    with pytest.raises(ValueError, match="no evaluation protocol of 'clip'"):
        evaluation_protocol("ade20k_150", "clip")
    with pytest.raises(ValueError, match="pascal_voc_20b"):
        evaluation_protocol("pascal_voc_20b", "san")
    with pytest.raises(ValueError, match="149 names, but the label maps need 150"):
        evaluation_protocol("ade20k_150", "san").with_changes(names=[f"class {k}" for k in range(149)])
    with pytest.raises(ValueError, match="There is no data set"):
        label_set("ade")


def test_every_benchmark_can_be_prepared():
    assert set(BENCHMARKS) <= set(BUILDERS) == set(label_sets())
    for labels in label_sets().values():
        if labels.transform is not None:
            assert len(labels.transform.classes) == len(labels.class_names)
            assert labels.transform.ignore_index == labels.ignore_index
        assert labels.ignore_index >= len(labels.class_names)


def test_own_data():
    protocol = own_protocol("streets", "san", ["road", ["car", "auto"]], [255], "validation")
    assert protocol.class_names == ("road", "car")
    assert protocol.reported_scores() == []


def test_scores_are_package_data():
    setup = (Path(__file__).parents[1] / "setup.py").read_text()
    assert '"data/*.json"' in setup
