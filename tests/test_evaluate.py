"""The evaluation command: an oracle chain over every benchmark, both averaging rules, processes, kills, bad input."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import disable_progress_bars, load_dataset
from PIL import Image

from examples import check_vocabulary as check_command
from examples.evaluate import main
from ov_segmentation import ledger
from ov_segmentation.auto import METHODS, load_class
from ov_segmentation.checkpoint_results import dataset_of
from ov_segmentation.data.benchmarks import evaluation_protocol
from ov_segmentation.data.labelled_pictures import LabelledPicture
from ov_segmentation.data.preparation import prepare
from ov_segmentation.evaluation.oracle import with_oracle_classes, with_oracle_masks
from ov_segmentation.evaluation.pictures import shrink
from ov_segmentation.evaluation.similarity import label_set_similarity
from ov_segmentation.evaluation.vocabulary_report import check_spelling, usable
from ov_segmentation.metrics import ConfusionMatrix
from ov_segmentation.modeling_outputs import OpenVocabularySegmentationOutput
from ov_segmentation.proposal_recall import ProposalScores, precision_of_proposals, recall_of_regions
from ov_segmentation.region_scores import region_scores
from ov_segmentation.vocabulary import Vocabulary
from tests import fake_model, official_trees
from tests.official_trees import TREES, names
from tests.tiny import TOKENIZER

disable_progress_bars()
ROOT = Path(__file__).parents[1]
# name lists by label id, as CAT-Seg's protocol has them; a background name of VOC 20b stands for label 20
SPELLED = {
    "coco_stuff_171": dict(enumerate(names("coco_stuff_171"))),
    "ade20k_150": dict(enumerate(names("ade20k_150.short"))),
    "ade20k_847": dict(enumerate(names("ade20k_847"))),
    "pascal_context_59": dict(enumerate(names("pascal_context_59"))),
    "pascal_context_459": dict(enumerate(names("pascal_context_459.glued"))),
    "pascal_voc_20": dict(enumerate(names("pascal_voc_20"))),
    "pascal_voc_20b": {**dict(enumerate(names("pascal_voc_20"))), 20: "water"},
    "camvid_11": dict(enumerate(names("camvid_11"))),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Every benchmark's small data set, from its official layout."""
    folder = tmp_path_factory.mktemp("data")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    for name in SPELLED:
        TREES[name](folder / "downloads" / name)
        prepare(name, folder / "downloads" / name, folder / name, expect_counts=False, splits=["validation"])
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def answers_of(prepared, name, method="cat_seg", spelled=None):
    """What a perfect model says, read from the prepared data set; ignored pixels get a class, it must not count."""
    rows = load_dataset(str(prepared / name), split="validation")
    answers = {}
    fake_model.remember(
        answers,
        [row["image"] for row in rows],
        [np.array(row["annotation"]).astype(np.int64) for row in rows],
        spelled or SPELLED[name],
        evaluation_protocol(name, method).vocabulary,
    )
    return answers


def evaluate(model, data, output, *arguments, benchmarks=("camvid_11",), protocol="cat_seg"):
    """The command; its reports by benchmark."""
    given = ["--model", str(model), "--data", *map(str, data), "--output", str(output), "--protocol", protocol]
    main([*given, "--benchmark", *benchmarks, *map(str, arguments)])
    return {name: json.loads((output / name / "report.json").read_text()) for name in benchmarks}


def assert_perfect(report, oracles=()):
    for mode in ("plain", *oracles):
        scores = report["scores"][mode]
        assert scores["miou"] == {"ground_truth": 1.0, "union": 1.0}
        assert scores["pixel_accuracy"] == 1.0
    assert report["miou"] == 1.0
    assert report["confusions"] == []


# ---------------------------------------------------------------------- the oracle chain


@pytest.mark.parametrize("family", ["classes", "masks"])
def test_ground_truth_scores_100_on_every_benchmark(prepared, tmp_path, monkeypatch, capsys, family):
    monkeypatch.setattr(fake_model.FakeModel, "family", family)
    answers = {}
    for name in SPELLED:
        answers |= answers_of(prepared, name)
    model = fake_model.save(tmp_path / "model", answers)
    options = ("--oracle", "masks", "classes", "--proposal-recall")
    reports = evaluate(model, [prepared], tmp_path / "out", *options, benchmarks=tuple(SPELLED))
    printed = capsys.readouterr().out
    for report in reports.values():
        assert_perfect(report, ("masks", "classes"))
        assert report["protocol_id"] in printed
        assert report["pictures"] == 2
        # ignored pixels are a region of their own, which a model that names them does not have
        assert report["proposals"]["regions@0.3"]["recall"] >= 0.8
        assert ("proposals@0.5" in report["proposals"]) == (family == "masks")
    for name in ("coco_stuff_171", "pascal_voc_20"):  # they have a zero-shot split
        assert reports[name]["scores"]["plain"]["hiou"] == 1.0
    assert "hiou" not in reports["ade20k_150"]["scores"]["plain"]
    assert reports["pascal_voc_20b"]["protocol"]["names"] == "pascal_voc_20b"
    paper = {row["variant"]: row for row in reports["pascal_voc_20b"]["reported"]}
    assert paper["ViT-B/16"]["miou"] == 77.3
    assert paper["ViT-B/16"]["difference"] == pytest.approx(100 - 77.3)
    # 2 pictures of 24 pixels are not the published evaluation, and the report says so
    assert len(reports["ade20k_150"]["notes"]) == 2
    assert "not comparable" in printed


def test_other_protocols_find_their_names(prepared, tmp_path):
    """OVSeg lists PASCAL Context's classes in another order and spells one differently; SAN has "tv" in VOC."""
    order = {name: k for k, name in enumerate(names("pascal_context_59"))}
    spelled = {order["diningtable" if n == "table" else n]: n for n in names("pascal_context_59.ovseg_order")}
    answers = answers_of(prepared, "pascal_context_59", "ovseg", spelled)
    san = dict(enumerate(names("pascal_voc_20.san")))
    answers |= answers_of(prepared, "pascal_voc_20", "san", san)
    model = fake_model.save(tmp_path / "model", answers)
    for name, protocol in (("pascal_context_59", "ovseg"), ("pascal_voc_20", "san")):
        assert_perfect(evaluate(model, [prepared], tmp_path / "out", benchmarks=(name,), protocol=protocol)[name])


def known_errors(tmp_path):
    """Two pictures of CamVid's classes and a model that is wrong about half of the first.

    Ground truth: picture 0 is class 0 everywhere; picture 1 is class 1, its first 8 rows are not scored. Predictions:
    the right half of picture 0 is class 5. So IoU 0 is 1/2, IoU 1 is 1, and class 5 is in predictions only.
    """
    truth = [np.zeros((24, 32), int), np.ones((24, 32), int)]
    truth[1][:8] = 11
    predicted = [label_map.copy() for label_map in truth]
    predicted[0][:, 16:] = 5
    predicted[1][:8] = 7
    for number, label_map in enumerate(truth):
        official_trees.save_picture(tmp_path / f"data/images/validation/{number}.png", number)
        official_trees.save_map(tmp_path / f"data/annotations/validation/{number}.png", label_map)
    answers = {}
    pictures = [Image.open(tmp_path / f"data/images/validation/{number}.png") for number in range(2)]
    vocabulary = evaluation_protocol("camvid_11", "cat_seg").vocabulary
    fake_model.remember(answers, pictures, predicted, SPELLED["camvid_11"], vocabulary)
    return fake_model.save(tmp_path / "model", answers), f"camvid_11={tmp_path / 'data'}"


@pytest.mark.parametrize(("averaging", "expected"), [("ground_truth", 0.75), ("union", 0.5)])
def test_known_errors_score_by_hand(tmp_path, averaging, expected):
    model, data = known_errors(tmp_path)
    report = evaluate(
        model, [data], tmp_path / "out", "--averaging", averaging, "--oracle", "masks", "classes",
        "--ledger", tmp_path / "ledger.jsonl", "--similarity",
    )["camvid_11"]  # fmt: skip
    assert report["miou"] == expected
    plain = report["scores"]["plain"]
    assert plain["miou"] == {"ground_truth": 0.75, "union": 0.5}
    assert plain["num_averaged"] == {"ground_truth": 2, "union": 3}
    pixels = 24 * 32
    assert plain["pixel_accuracy"] == pytest.approx((pixels / 2 + 16 * 32) / (pixels + 16 * 32))
    assert [row["iou"] for row in report["classes"]][:2] == [0.5, 1.0]
    assert report["classes"][2]["iou"] is None
    assert report["classes"][0]["pixels"] == pixels and report["classes"][5]["predicted_pixels"] == pixels // 2
    (pair,) = report["confusions"]
    assert pair == {"ground_truth": "sky", "predicted": "tree", "pixels": pixels // 2, "share": 0.5}
    # regions: the sky's mean score is the same for both names, the lower index wins; segments: both are sky
    assert report["scores"]["masks"]["miou"]["union"] == 1.0
    assert report["scores"]["classes"]["miou"]["union"] == 1.0
    entry = ledger.latest(tmp_path / "ledger.jsonl", benchmark="camvid_11")
    assert entry["figures"]["miou"] == expected and entry["protocol"] == report["protocol_id"]
    assert 0 < report["similarity_to_training"]["hausdorff_distance"] < 2
    document = (tmp_path / "out/camvid_11/report.md").read_text()
    assert f"mIoU {100 * expected:.2f}" in document and "| sky | tree |" in document


def test_the_ledger_says_which_split(tmp_path):
    """A card would call another one the validation split."""
    model, data = known_errors(tmp_path)
    for folder in ("images", "annotations"):
        (tmp_path / "data" / folder / "validation").rename(tmp_path / "data" / folder / "train")
    evaluate(model, [data], tmp_path / "out", "--split", "train", "--ledger", tmp_path / "ledger.jsonl")
    entry = ledger.latest(tmp_path / "ledger.jsonl", benchmark="camvid_11")
    assert dataset_of(entry) == ("camvid_11", "train")


# ---------------------------------------------------------------------- processes, kills, streams


def killed_after(pictures, arguments):
    """The signal that ends a process which runs the command and is killed behind so many pictures."""
    child = os.fork()
    if child == 0:
        try:
            fake_model.FakeModel.kill_after = fake_model.FakeModel.calls + pictures
            main(list(map(str, arguments)))
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else None


def launch_two(arguments):
    """The command with the fake model in two processes."""
    variables = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "ACCELERATE_USE_CPU": "true"}
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    command = [*start, "--rdzv_endpoint=localhost:0", "tests/fake_model.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=900)


def test_a_killed_run_goes_on_in_two_processes(tmp_path):
    official_trees.camvid(tmp_path / "in", count=7)
    prepare("camvid_11", tmp_path / "in", tmp_path / "camvid_11", expect_counts=False, splits=["validation"])
    model = fake_model.save(tmp_path / "model", answers_of(tmp_path, "camvid_11"))
    arguments = ["--model", model, "--data", tmp_path, "--output", tmp_path / "out", "--benchmark", "camvid_11"]
    arguments += ["--protocol", "cat_seg"]
    assert killed_after(2, arguments) == signal.SIGKILL
    assert not (tmp_path / "out/camvid_11/report.json").exists()
    first = tmp_path / "out/camvid_11/state/pictures-00000.jsonl"
    assert len(first.read_text().splitlines()) == 2
    with first.open("a") as file:  # what a kill in the middle of a write leaves
        file.write('{"index": 2, "name": "0001')
    done = launch_two(arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "out/camvid_11/report.json").read_text())
    assert_perfect(report)
    assert report["pictures"] == 7
    files = sorted((tmp_path / "out/camvid_11/state").glob("pictures-*.jsonl"))
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert sorted(record["index"] for record in records) == list(range(7))
    assert [len(file.read_text().splitlines()) for file in files] == [2 + 3, 2]


def test_streams_and_finished_runs(prepared, tmp_path):
    model = fake_model.save(tmp_path / "model", answers_of(prepared, "ade20k_150"))
    plain = evaluate(model, [prepared], tmp_path / "plain", benchmarks=("ade20k_150",))["ade20k_150"]
    before = fake_model.FakeModel.calls
    streamed = evaluate(model, [prepared], tmp_path / "stream", "--streaming", benchmarks=("ade20k_150",))["ade20k_150"]
    assert fake_model.FakeModel.calls == before + 2
    for report in (plain, streamed):
        assert_perfect(report)
    assert streamed["classes"] == plain["classes"]
    for folder, options in (("plain", ()), ("stream", ("--streaming",))):  # nothing left to do
        assert_perfect(
            evaluate(model, [prepared], tmp_path / folder, *options, benchmarks=("ade20k_150",))["ade20k_150"]
        )
    assert fake_model.FakeModel.calls == before + 2
    first = evaluate(
        model, [prepared], tmp_path / "one", "--streaming", "--max-samples", 1, benchmarks=("ade20k_150",)
    )["ade20k_150"]
    assert first["pictures"] == 1 and first["protocol_id"].endswith("+first1")


def test_another_evaluation_in_the_folder(tmp_path):
    model, data = known_errors(tmp_path)
    evaluate(model, [data], tmp_path / "out")
    with pytest.raises(SystemExit, match="another protocol"):
        evaluate(model, [data], tmp_path / "out", "--set", "class_attention_pooling=2")
    with pytest.raises(SystemExit, match="another modes"):
        evaluate(model, [data], tmp_path / "out", "--oracle", "masks")
    evaluate(model, [data], tmp_path / "out", "--oracle", "masks", "--resume", "never")
    kept = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    with pytest.raises(SystemExit, match="no split 'test'"):
        evaluate(model, [data], tmp_path / "out", "--resume", "never", "--split", "test")
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()} == kept


# ---------------------------------------------------------------------- bad input


def refused(*arguments, **options):
    with pytest.raises(SystemExit) as error:
        evaluate(*arguments, **options)
    return str(error.value)


def test_bad_input_is_named(prepared, tmp_path):
    model, data = known_errors(tmp_path)
    assert "There is no data set for ade20k_150" in refused(model, [data], tmp_path / "o", benchmarks=("ade20k_150",))
    wrong = f"ade20k_150={prepared / 'pascal_voc_20'}"
    assert "holds pascal_voc_20, not ade20k_150" in refused(model, [wrong], tmp_path / "o", benchmarks=("ade20k_150",))
    (tmp_path / "names.json").write_text(json.dumps(["a", "b"]))
    message = refused(model, [data], tmp_path / "o", "--vocabulary", tmp_path / "names.json")
    assert "the vocabulary has 2 names, but the label maps need 11" in message
    assert "NAME=VALUE" in refused(model, [data], tmp_path / "o", "--set", "class_attention_pooling")
    # before any data set is looked for
    assert "FakeModel has no switch foo. It has: class" in refused(model, ["none"], tmp_path / "o", "--set", "foo=1")
    for number in ("0", "-1", "two"):
        assert refused(model, [data], tmp_path / "o", "--max-samples", number) == "2"
    assert "There is no split 'test'" in refused(model, [data], tmp_path / "o", "--split", "test")
    assert "no evaluation protocol of 'fake_segmentation'" in refused_without_protocol(model, data, tmp_path / "o")
    assert not (tmp_path / "o").exists()
    label_map = tmp_path / "data/annotations/validation/1.png"
    official_trees.save_map(label_map, np.full((24, 32), 40))
    assert "holds the id 40" in refused(model, [data], tmp_path / "o2")
    label_map.write_bytes(label_map.read_bytes()[:50])
    message = refused(model, [data], tmp_path / "o3")
    assert "1.png" in message and "cannot be decoded" in message
    label_map.unlink()
    assert "has no label map" in refused(model, [data], tmp_path / "o4")


def refused_without_protocol(model, data, output):
    with pytest.raises(SystemExit) as error:
        main(["--model", str(model), "--data", data, "--output", str(output), "--benchmark", "camvid_11"])
    return str(error.value)


def test_own_names_and_own_data(tmp_path):
    model, data = known_errors(tmp_path)
    own = [f"name {k}" for k in range(11)]
    (tmp_path / "data/class_names.json").write_text(json.dumps(own))
    answers = {}
    pictures = [Image.open(tmp_path / f"data/images/validation/{number}.png") for number in range(2)]
    maps = [np.array(Image.open(tmp_path / f"data/annotations/validation/{number}.png")) for number in range(2)]
    protocol = evaluation_protocol("camvid_11", "cat_seg").with_changes(names=own)
    fake_model.remember(answers, pictures, maps, dict(enumerate(own)), protocol.vocabulary)
    fake_model.save(tmp_path / "model", answers)
    (tmp_path / "names.json").write_text(json.dumps(own))
    report = evaluate(model, [data], tmp_path / "a", "--vocabulary", tmp_path / "names.json")["camvid_11"]
    assert_perfect(report)
    assert "other names than the published ones" in report["notes"]
    report = evaluate(
        model, [f"streets={tmp_path / 'data'}"], tmp_path / "b", "--ignore-index", 11, benchmarks=("streets",)
    )["streets"]
    assert_perfect(report)
    both = [data, f"streets={tmp_path / 'data'}"]
    message = refused(model, both, tmp_path / "c", "--split", "train", benchmarks=("streets",))
    assert "There is no split 'train'" in message and not (tmp_path / "c").exists()
    assert "leave out reduce_labels" in refused(model, [data], tmp_path / "c", "--reduce-labels")
    for number, ids in enumerate(maps):  # as ADE20K's files have them
        from_one = np.where(ids == 11, 0, ids + 1).astype(np.uint8)
        Image.fromarray(from_one).save(tmp_path / f"data/annotations/validation/{number}.png")
    street = f"streets={tmp_path / 'data'}"
    assert_perfect(evaluate(model, [street], tmp_path / "d", "--reduce-labels", benchmarks=("streets",))["streets"])
    message = refused(model, [street], tmp_path / "d", "--ignore-index", 11, benchmarks=("streets",))
    assert "another columns" in message


# ---------------------------------------------------------------------- what the checkpoint decides


def scored(model, place, output, *arguments, benchmark="camvid_11"):
    """The report of a checkpoint under its own method's protocol, or what the arguments say."""
    data = f"{benchmark}={place.partition('=')[2]}"
    main(["--model", str(model), "--data", data, "--output", str(output), "--benchmark", benchmark, *arguments])
    return json.loads((output / benchmark / "report.json").read_text())


def save_san(folder, templates=None):
    importlib.import_module("tests.models.test_san").TestSAN().model().save_pretrained(folder)
    image_processor = load_class("SANImageProcessor")(size={"shortest_edge": 640, "longest_edge": 2560})
    load_class("SANProcessor")(image_processor, TOKENIZER, templates).save_pretrained(folder)
    return folder


def test_a_checkpoint_with_templates_of_its_own(tmp_path):
    _, data = known_errors(tmp_path / "tree")
    model = save_san(tmp_path / "model", ["one {}.", "a {}"])
    report = scored(model, data, tmp_path / "own", "--similarity", "--max-samples", "1")
    assert report["protocol"]["templates"] == ["one {}.", "a {}"]
    assert "names go into 2 templates of the checkpoint, published: 14 templates" in report["notes"]
    report = scored(model, data, tmp_path / "published", "--protocol", "san", "--max-samples", "1")
    assert len(report["protocol"]["templates"]) == 14
    assert not any("template" in note for note in report["notes"])
    assert report["protocol_id"] == scored(
        save_san(tmp_path / "as published"), data, tmp_path / "as", "--max-samples", "1"
    )["protocol_id"]  # fmt: skip


def test_switches_that_a_method_lacks_are_left_out_of_anothers_protocol(tmp_path):
    _, data = known_errors(tmp_path / "tree")
    model = save_san(tmp_path / "model")
    report = scored(model, data, tmp_path / "out", "--protocol", "cat_seg", "--max-samples", "1")
    assert report["protocol"]["switches"] == {"sliding_window": True}
    lacks = "SANForOpenVocabularySegmentation has no class_attention_pooling, max_classes"
    assert f"{lacks}, which cat_seg's protocol sets" in report["notes"]


@pytest.mark.parametrize("name", ["sed_scenes", "clip_vit_scenes"])
@pytest.mark.filterwarnings("ignore:.*is a plain CLIP")
def test_own_data_is_asked_for_with_the_checkpoints_texts_and_switches(tmp_path, name):
    """The bundled SED takes one template, the published 80, and keeps all classes; a CLIP is segmented with by DeOP,
    published with no template."""
    _, data = known_errors(tmp_path / "tree")
    (tmp_path / "tree/data/class_names.json").write_text(json.dumps([f"circle, {k}" for k in range(11)]))
    arguments = ("--ignore-index", "11", "--max-samples", "1")
    report = scored(ROOT / "assets" / name, data, tmp_path / "out", *arguments, benchmark="streets")
    assert len(report["protocol"]["templates"]) == {"sed_scenes": 1, "clip_vit_scenes": 14}[name]
    assert report["protocol"]["comma_rule"] == {"sed_scenes": "split", "clip_vit_scenes": "keep"}[name]
    assert not any("template" in note for note in report["notes"])
    own = {"class_attention_pooling": 1, "rejection_top_k": None}
    assert report["protocol"]["switches"] == {"sed_scenes": own, "clip_vit_scenes": {}}[name]
    if name == "sed_scenes":
        asked = (*arguments, "--set", "rejection_top_k=2")
        report = scored(ROOT / "assets" / name, data, tmp_path / "asked", *asked, benchmark="streets")
        assert report["protocol"]["switches"] == own | {"rejection_top_k": 2}
    report = scored(ROOT / "assets" / name, data, tmp_path / "sed", *arguments[2:], "--protocol", "sed")
    kept = "published: 80 templates (the checkpoint takes no other number)"
    assert any(kept in note for note in report["notes"]) == (name == "sed_scenes")


def test_texts_of_a_trained_text_side_are_cached(tmp_path):
    """With gradients they would not be, and the names' graph would stay in memory for the whole evaluation."""
    _, data = known_errors(tmp_path / "tree")
    arguments = ("--max-samples", "1", "--text-cache", str(tmp_path / "texts"))
    scored(ROOT / "assets/cat_seg_scenes", data, tmp_path / "out", *arguments)
    assert len(list((tmp_path / "texts").iterdir())) == 1
    scored(ROOT / "assets/cat_seg_scenes", data, tmp_path / "similarity", *arguments, "--similarity")
    assert len(list((tmp_path / "texts").iterdir())) == 2


# ---------------------------------------------------------------------- parts


def test_shrinking_as_opencv():
    """Labels by floor(position x scale); the picture bilinearly with half-pixel centres, not anti-aliased."""
    values = np.arange(4 * 6, dtype=np.uint8).reshape(4, 6) * 10
    picture = LabelledPicture(Image.fromarray(np.stack([values] * 3, -1)), np.arange(24).reshape(4, 6).astype(np.int32))
    small = shrink(picture, 2)
    assert small.image.size == (3, 2)
    assert small.label_map.tolist() == [[0, 2, 4], [12, 14, 16]]
    assert np.array(small.image)[..., 0].tolist() == [[35, 55, 75], [155, 175, 195]]
    assert shrink(picture, 4) is picture


def test_region_scores_are_means_of_the_scores():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 5, 6, 7, generator=generator)
    outputs = OpenVocabularySegmentationOutput(logits=logits, score_function="sigmoid")
    region = torch.randint(-1, 3, (13, 15), generator=generator)
    size = {"mode": "bilinear", "align_corners": False}
    scores = torch.nn.functional.interpolate(logits.sigmoid(), (13, 15), **size)[0]
    expected = torch.stack([scores[:, region == r].mean(1) for r in range(3)])
    torch.testing.assert_close(region_scores(outputs, [region])[0], expected)


def test_oracles_say_what_is_wrong():
    """Perfect masks with two names swapped: oracle classes heal it. Perfect names on shifted masks: oracle masks do."""
    truth = torch.tensor([[0, 0, 1, 1], [0, 0, 1, -1]])
    swapped = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]])
    healed = with_oracle_classes(swapped, truth, torch.tensor([0, 1, 1]))
    assert healed.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    shifted = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1]])
    logits = torch.nn.functional.one_hot(shifted, 3).permute(2, 0, 1)[None] * 8.0 - 4
    logits[:, 0] += 0.5
    outputs = OpenVocabularySegmentationOutput(logits=logits, score_function="sigmoid")
    masks = with_oracle_masks(outputs, truth, True)
    assert masks.tolist() == [[0, 0, 1, 1], [0, 0, 1, -1]]
    assert with_oracle_classes(shifted, truth, torch.tensor([0, 1, 1])).tolist() == [[0, 1, 1, 1], [0, 1, 1, 1]]


def test_hausdorff_distance_by_hand():
    first = torch.eye(3)[:2]
    second = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0, 0, 1]])
    similarity = label_set_similarity(first, second)
    assert similarity.to_second == pytest.approx(0.2)
    assert similarity.to_first == pytest.approx(1.0)
    assert similarity.hausdorff_distance == pytest.approx(1.0)
    assert similarity.mean_nearest == pytest.approx(0.9)
    assert similarity.nearest.tolist() == [0, 1]


def test_spelling():
    report = check_spelling(["road", " ", "Road", ["car", "auto"], ["bus", "auto"], "car", "tree ", []])
    assert report["blank"] == [1, 7]
    assert report["duplicates"] == {"car": [3, 5]}
    assert report["same_text"] == [[0, 2]]
    assert report["shared_synonyms"] == {"auto": [3, 4]}
    assert report["edges"] == [6]
    assert usable(["a", " ", "a", ["b", "b", "c"], "d"]) == (["a", ["b", "c"], "d"], [0, 3, 4])
    same = [["b", "c"], "a", ["c", "b"]]
    assert check_spelling(same)["duplicates"] == {"b": [0, 2], "c": [0, 2]}
    assert usable(same) == ([["b", "c"], "a"], [0, 1])


def test_vocabulary_command(tmp_path, capsys):
    model = fake_model.save(tmp_path / "model", {})
    long = "very " * 90 + "long"
    (tmp_path / "names.json").write_text(json.dumps(["sky", "house", " house ", long]))
    arguments = ["--model", str(model), "--training", "camvid_11", "--output", str(tmp_path / "out")]
    check_command.main([*arguments, "--names", str(tmp_path / "names.json")])
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["too_long"] == [3]
    assert report["same_text"] == [[1, 2]]
    assert [pair["ids"] for pair in report["near_synonyms"]] == [[1, 2]]
    assert report["training"][-1] == {"id": 0, "nearest": "sky", "cosine": pytest.approx(1)}
    assert "Near-synonyms" in capsys.readouterr().out
    with pytest.raises(SystemExit) as error:  # a name that cannot be used
        check_command.main([*arguments, "--names", "sky,,sky"])
    assert error.value.code == 1
    with pytest.raises(SystemExit, match="no usable class name"):
        check_command.main([*arguments, "--names", ","])


def test_vocabulary_command_knows_benchmarks_that_not_every_method_has(tmp_path):
    model = fake_model.save(tmp_path / "model", {})
    arguments = ["--model", str(model), "--training", "pascal_voc_20b", "--output", str(tmp_path / "out")]
    check_command.main([*arguments, "--names", "road"])
    assert json.loads((tmp_path / "out/report.json").read_text())["training"][0]["nearest"] == "road"


def test_own_vocabulary_keeps_the_methods_texts():
    protocol = evaluation_protocol("pascal_voc_20", "sed").with_changes(names=[f"n{k}" for k in range(20)])
    assert len(protocol.vocabulary.templates) == 80
    assert isinstance(protocol.vocabulary, Vocabulary) and protocol.names.startswith("given:")


# ---------------------------------------------------------------------- the methods themselves


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.model_type)
def test_methods_score_as_by_hand(method, tmp_path):
    """Every method through the command equals processor, model with the protocol's switches, and post-processing."""
    tests_of_method = importlib.import_module(f"tests.models.test_{method.model_type}")
    templates = {"sed": {"num_templates": 80}, "cat_seg": {"num_templates": 1}}.get(method.model_type, {})
    model = getattr(tests_of_method, f"Test{method.name}")().model(**templates)
    image_processor = load_class(method.image_processor)(size={"shortest_edge": 64, "longest_edge": 2560})
    processor = load_class(method.processor)(image_processor, TOKENIZER)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    _, data = known_errors(tmp_path / "tree")
    given = ["--model", str(tmp_path / "model"), "--data", data, "--output", str(tmp_path / "out")]
    main([*given, "--benchmark", "camvid_11", "--oracle", "masks", "classes", "--proposal-recall"])
    report = json.loads((tmp_path / "out/camvid_11/report.json").read_text())
    protocol = evaluation_protocol("camvid_11", method.model_type)
    matrix = ConfusionMatrix(11, ignore_index=11)
    proposals = {f"{kind}@{iou}": ProposalScores() for kind in ("proposals", "regions") for iou in (0.3, 0.5)}
    with torch.no_grad():
        text_embeds = model.encode_vocabulary(**processor(text=protocol.vocabulary, return_tensors="pt"))
        for number in range(2):
            picture, label_map = (
                Image.open(tmp_path / f"tree/data/{kind}/validation/{number}.png") for kind in ("images", "annotations")
            )
            inputs = processor(images=picture, return_tensors="pt")
            outputs = model(**inputs, text_embeds=text_embeds, **protocol.switches)
            maps = processor.post_process_semantic_segmentation(outputs, target_sizes=[(24, 32)])
            matrix.update(maps, [np.array(label_map)])
            ids = torch.tensor(np.array(label_map)).long()
            ids[ids == 11] = -100
            for iou in (0.3, 0.5):
                proposals[f"regions@{iou}"] += recall_of_regions(maps[0], ids, range(11), iou)
                if outputs.masks_queries_logits is not None:
                    masks = torch.nn.functional.interpolate(
                        outputs.masks_queries_logits, size=inputs["pixel_values"].shape[-2:], mode="bilinear"
                    )
                    height, width = inputs["reshaped_input_sizes"][0].tolist()
                    found = precision_of_proposals(masks[0, :, :height, :width], ids, range(11), iou)
                    proposals[f"proposals@{iou}"] += found
    kinds = ("proposals", "regions") if outputs.masks_queries_logits is not None else ("regions",)
    assert sorted(report["proposals"]) == [f"{kind}@{iou}" for kind in kinds for iou in (0.3, 0.5)]
    for name, values in report["proposals"].items():
        assert {key: values[key] for key in vars(proposals[name])} == vars(proposals[name])
        assert values["candidates"] > 0 and values["regions_seen"] > 0
        assert values["recall"] == proposals[name].figures()["recall"] and values["recall_unseen"] is None
    scores = matrix.compute(protocol.averaging)
    assert report["miou"] == scores.miou
    assert [row["predicted_pixels"] for row in report["classes"]] == matrix.counts[:, :11].sum(0).tolist()
    # each oracle is at least as good as the map on its own terms: names by majority, masks of the ground truth
    assert report["scores"]["classes"]["pixel_accuracy"] >= report["scores"]["plain"]["pixel_accuracy"]
    assert report["scores"]["masks"]["num_pixels"] == scores.num_pixels
