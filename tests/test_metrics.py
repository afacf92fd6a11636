"""The confusion matrix against hand-computed scores, a brute-force reference, evaluate and two processes."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ov_segmentation.metrics import ConfusionMatrix


def brute_force(predictions, references, num_classes, ignore_index):
    """IoU per class from sets of pixels, with no matrix involved."""
    prediction = np.concatenate([np.asarray(item).ravel() for item in predictions])
    reference = np.concatenate([np.asarray(item).ravel() for item in references])
    scored = reference != ignore_index
    prediction, reference = prediction[scored], reference[scored]
    iou = []
    for index in range(num_classes):
        union = ((prediction == index) | (reference == index)).sum()
        iou.append(((prediction == index) & (reference == index)).sum() / union if union else math.nan)
    return np.array(iou), prediction, reference


def random_maps(num_classes, pictures=6, seed=0, ignore_index=-100):
    """Pictures of several sizes; a third of the classes not in the ground truth, some pixels ignored or unlabelled."""
    generator = np.random.default_rng(seed)
    predictions, references = [], []
    for _ in range(pictures):
        size = generator.integers(5, 40, 2)
        reference = generator.integers(0, max(1, num_classes * 2 // 3), size)
        prediction = np.where(generator.random(size) < 0.6, reference, generator.integers(0, num_classes - 1, size))
        prediction[generator.random(size) < 0.1] = -1
        reference[generator.random(size) < 0.1] = ignore_index
        predictions.append(prediction)
        references.append(reference)
    return predictions, references


def matrix_of(predictions, references, num_classes, **kwargs):
    matrix = ConfusionMatrix(num_classes, **kwargs)
    matrix.update(predictions, references)
    return matrix


def test_hand_computed():
    # Class 0: 3 pixels, 2 found. Class 1: 2 pixels, 1 found, 1 unlabelled. Class 2: only predicted (once, where 0 is).
    # Class 3: nowhere. One ignored pixel, predicted as 3.
    reference = torch.tensor([[0, 0, 0], [1, 1, -100]])
    prediction = torch.tensor([[0, 0, 2], [1, -1, 3]])
    matrix = matrix_of(prediction, reference, 4)
    assert matrix.counts.tolist() == [[2, 0, 1, 0, 0], [0, 1, 0, 0, 1], [0] * 5, [0] * 5]
    scores = matrix.compute()
    assert scores.iou_per_class[:3].tolist() == pytest.approx([2 / 3, 1 / 2, 0])
    assert scores.iou_per_class[3].isnan()
    assert scores.miou == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert (scores.num_averaged, scores.num_pixels) == (2, 5)
    assert scores.pixel_accuracy == pytest.approx(3 / 5)
    assert scores.accuracy_per_class[:2].tolist() == pytest.approx([2 / 3, 1 / 2])
    assert scores.mean_accuracy == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores.frequency_weighted_iou == pytest.approx(3 / 5 * 2 / 3 + 2 / 5 * 1 / 2)
    union = matrix.compute("union")
    assert union.miou == pytest.approx((2 / 3 + 1 / 2) / 3)
    assert union.num_averaged == 3


def test_seen_and_unseen():
    reference = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    prediction = torch.tensor([0, 0, 1, 1, 1, 3, 2, 2])
    matrix = matrix_of(prediction, reference, 4)  # IoU 2/3, 2/3, 2/3, 0 (predicted only)
    scores = matrix.compute(seen=[0, 1])
    assert scores.miou_seen == pytest.approx(2 / 3)
    assert scores.miou_unseen == pytest.approx(2 / 3)
    union = matrix.compute("union", seen=[1, 0])
    assert union.miou_unseen == pytest.approx(1 / 3)
    assert union.hiou == pytest.approx(2 * (2 / 3) * (1 / 3) / (2 / 3 + 1 / 3))
    assert matrix.compute().hiou is None
    assert "hiou" not in matrix.compute().figures()


def test_harmonic_mean_of_zeros_is_zero():
    assert matrix_of(torch.tensor([1, 0]), torch.tensor([0, 1]), 2).compute(seen=[0]).hiou == 0


@pytest.mark.parametrize("num_classes", [1, 2, 11, 300, 847])
@pytest.mark.parametrize("ignore_index", [-100, 65535])
def test_equals_brute_force(num_classes, ignore_index):
    predictions, references = random_maps(max(num_classes, 2), ignore_index=ignore_index)
    if num_classes == 1:
        predictions = [np.minimum(item, 0) for item in predictions]
        references = [np.where(item == ignore_index, item, 0) for item in references]
    iou, prediction, reference = brute_force(predictions, references, num_classes, ignore_index)
    scores = matrix_of(predictions, references, num_classes, ignore_index=ignore_index).compute()
    np.testing.assert_allclose(scores.iou_per_class.numpy(), iou, rtol=0, atol=1e-15)
    present = np.unique(reference)
    occurring = np.union1d(present, prediction[prediction >= 0])
    assert scores.miou == pytest.approx(iou[present].mean(), abs=1e-12)
    assert scores.pixel_accuracy == pytest.approx((prediction == reference).mean(), abs=1e-12)
    union = matrix_of(predictions, references, num_classes, ignore_index=ignore_index).compute("union")
    assert union.miou == pytest.approx(np.nansum(iou[present]) / len(occurring), abs=1e-12)


def test_rules_differ_where_classes_are_only_predicted():
    matrix = matrix_of(*random_maps(11), 11)
    assert matrix.compute("union").miou < matrix.compute("ground_truth").miou


def test_every_way_of_giving_maps_counts_the_same():
    predictions, references = (np.stack([item[:5, :5] for item in maps]) for maps in random_maps(7))
    expected = matrix_of(list(predictions), list(references), 7).counts
    assert int(expected.sum()) > 0
    for given in (
        (predictions, references),
        (torch.from_numpy(predictions), list(references)),
        (list(torch.from_numpy(predictions)), references),
        (predictions.tolist(), references.tolist()),
        ((item for item in predictions), (torch.from_numpy(item).short() for item in references)),
    ):
        assert torch.equal(matrix_of(*given, 7).counts, expected)
    unsigned = matrix_of(np.maximum(predictions, 0).astype(np.uint16), np.maximum(references, 0).astype(np.uint8), 7)
    assert int(unsigned.counts.sum()) == predictions.size


def test_several_ignored_ids():
    matrix = matrix_of(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 255, 1, 254]), 2, ignore_index=[254, 255])
    assert matrix.counts.tolist() == [[1, 0, 0], [0, 1, 0]]


def test_inputs_are_left_alone():
    prediction, reference = np.array([[-1, 0]]), np.array([[0, -100]])
    matrix_of(prediction, reference, 1)
    assert prediction.tolist() == [[-1, 0]]
    assert reference.tolist() == [[0, -100]]


def test_merging_parts_equals_the_whole():
    predictions, references = random_maps(20)
    merged = matrix_of(predictions[:2], references[:2], 20)
    merged += matrix_of(predictions[2:], references[2:], 20)
    assert torch.equal(merged.counts, matrix_of(predictions, references, 20).counts)
    with pytest.raises(ValueError, match="cannot be added"):
        merged += ConfusionMatrix(21)


def test_nothing_scored_is_nan():
    matrix = matrix_of(torch.tensor([0, 1]), torch.tensor([-100, -100]), 2)
    scores = matrix.compute(seen=[0])
    assert scores.num_pixels == 0
    assert all(math.isnan(value) for value in (scores.miou, scores.pixel_accuracy, scores.mean_accuracy, scores.hiou))


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        ([0, 5], [0, 1], "predictions hold the id 5"),
        ([0, -2], [0, 1], "predictions hold the id -2"),
        ([0, 1], [0, 255], "references hold the id 255"),
        ([0, 1], [0, -1], "references hold the id -1"),
        ([0, 1, 1], [0, 1], "does not fit"),
    ],
)
def test_wrong_ids_and_sizes(prediction, reference, message):
    matrix = ConfusionMatrix(5)
    with pytest.raises(ValueError, match=message):
        matrix.update(torch.tensor(prediction), torch.tensor(reference))
    assert not matrix.counts.any()


def test_wrong_types_and_options():
    matrix = ConfusionMatrix(3)
    with pytest.raises(TypeError, match="integer"):
        matrix.update(torch.zeros(2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(TypeError, match="integer"):
        matrix.update(np.zeros(2, dtype=np.int64), np.zeros(2))
    with pytest.raises(ValueError, match="2 predictions for 3 references"):
        matrix.update([np.zeros(2, np.int64)] * 2, [np.zeros(2, np.int64)] * 3)
    with pytest.raises(ValueError, match="averaging"):
        matrix.compute("all")
    with pytest.raises(ValueError, match="seen"):
        matrix.compute(seen=[0, 3])
    with pytest.raises(ValueError, match="num_classes"):
        ConfusionMatrix(0)


def test_evaluate_metric_equals_the_matrix():
    from ov_segmentation.evaluate_metric import OpenVocabularySegmentationMetric

    predictions, references = random_maps(9)
    expected = matrix_of(predictions, references, 9).compute("union", seen=[0, 1, 2])
    metric = OpenVocabularySegmentationMetric(9, averaging="union", seen=[0, 1, 2])
    metric.add(prediction=predictions[0], reference=references[0])
    metric.add_batch(predictions=predictions[1:], references=references[1:])
    result = metric.compute()
    assert {name: result[name] for name in expected.figures()} == expected.figures()
    np.testing.assert_array_equal(result["iou_per_class"], expected.iou_per_class.numpy())
    given_to_compute = metric.compute(predictions=[item.tolist() for item in predictions], references=references)
    assert given_to_compute["miou"] == result["miou"]
    assert (
        metric.compute(predictions=predictions, references=references, averaging="ground_truth")["miou"]
        > result["miou"]
    )
    with pytest.raises(ValueError, match="both"):
        metric.compute(predictions=predictions)


def test_evaluate_combine():
    import evaluate

    from ov_segmentation.evaluate_metric import OpenVocabularySegmentationMetric

    predictions, references = random_maps(9)
    metrics = [OpenVocabularySegmentationMetric(9, averaging=rule) for rule in ("ground_truth", "union")]
    combined = evaluate.combine(metrics)
    combined.add_batch(predictions=predictions, references=references)
    results = combined.compute()
    again = evaluate.combine(metrics).compute(predictions=predictions, references=references)
    matrix = matrix_of(predictions, references, 9)
    expected = {matrix.compute(rule).miou for rule in ("ground_truth", "union")}
    assert len(expected) == 2
    for result in (results, again):
        assert {value for name, value in result.items() if name.endswith("miou")} == expected


PROCESS = """
import json, os
import torch
from accelerate import Accelerator
from ov_segmentation.metrics import ConfusionMatrix
from tests.test_metrics import random_maps

accelerator = Accelerator(cpu=True)
predictions, references = random_maps(847, pictures=7)
matrix = ConfusionMatrix(847)
for index in range(accelerator.process_index, 7, accelerator.num_processes):  # 4 and 3 pictures
    matrix.update(predictions[index], references[index])
before = matrix.counts.clone()
total = matrix.reduce(accelerator)
assert torch.equal(matrix.counts, before)
with open(f"{os.environ['RESULTS']}/{accelerator.process_index}.json", "w") as file:
    json.dump({"processes": accelerator.num_processes, "own": int(before.sum()), "counts": total.counts.tolist()}, file)
"""


def test_two_processes_equal_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    root = Path(__file__).parents[1]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "RESULTS": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "src")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run([*launch, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / f"{index}.json").read_text()) for index in range(2)]
    expected = matrix_of(*random_maps(847, pictures=7), 847).counts
    assert [result["processes"] for result in results] == [2, 2]
    assert sum(result["own"] for result in results) == int(expected.sum())
    for result in results:
        assert result["own"] < int(expected.sum())
        assert torch.equal(torch.tensor(result["counts"]), expected)
