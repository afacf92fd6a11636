"""Label maps, scores and confidence from outputs: against the originals' numbers, and against the plain formulas."""

import itertools
import json
import os
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from ov_segmentation.image_processing import OpenVocabularySegmentationImageProcessor
from ov_segmentation.modeling_outputs import OpenVocabularySegmentationOutput
from ov_segmentation.post_processing import post_process_semantic_segmentation
from ov_segmentation.resampling import Bilinear
from ov_segmentation.score_argmax import undominated_classes
from ov_segmentation.score_fields import MaskField

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "fixtures"
FIXTURES = Path(os.environ.get("PARITY_FIXTURES") or (SHARED if SHARED.is_dir() else ROOT / "tests" / "fixtures"))


def folders(method):
    found = sorted(path.parent for path in (FIXTURES / method).glob("case*/outputs.safetensors"))
    absent = pytest.mark.skip(reason=f"no {method} fixtures in {FIXTURES}; set PARITY_FIXTURES")
    return pytest.mark.parametrize("folder", found or [pytest.param(None, marks=absent)], ids=lambda f: f and f.name)


def fixture(folder):
    return (
        json.loads((folder / "hparams.json").read_text()),
        load_file(folder / "inputs.safetensors"),
        load_file(folder / "outputs.safetensors"),
    )


def compare(outputs, expected, **options):
    """Scores within 5e-5; both paths give the class with the highest recorded score wherever that is clear."""
    size = [tuple(expected.shape[1:])]
    full = post_process_semantic_segmentation(outputs, size, return_segmentation_scores=True, **options)[0]
    pruned = post_process_semantic_segmentation(outputs, size, **options)[0]
    assert (full.segmentation_scores - expected).abs().max() <= 5e-5
    clear = gap(expected) > 1e-4
    assert clear.float().mean() > 0.9
    for found in (full.segmentation, pruned):
        assert torch.equal(found[clear], expected.argmax(0)[clear])


def gap(scores):
    """Distance between the best and the second best score of every pixel."""
    if len(scores) == 1:
        return torch.ones(scores.shape[1:])
    best = scores.topk(2, dim=0).values
    return best[0] - best[1]


def resize(maps, size):
    return F.interpolate(maps[None].float(), size=tuple(size), mode="bilinear", align_corners=False)[0]


def smooth(*shape, seed=0, scale=4.0):
    *leading, h, w = shape
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, int(np.prod(leading)), -(-h // 4), -(-w // 4), generator=generator)
    return F.interpolate(coarse, size=(h, w), mode="bicubic").reshape(shape) * scale


def mask_outputs(K=7, N=9, B=1, sizes=((40, 52),), padded=(64, 64), low=(16, 16), seed=0, sharp=3.0, **fields):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, N, K + 1, generator=generator) * sharp
    return OpenVocabularySegmentationOutput(
        class_queries_logits=logits,
        class_queries_scores=logits.softmax(-1)[..., :-1],
        masks_queries_logits=smooth(B, N, *low, seed=seed + 1),
        **{
            "reshaped_input_sizes": torch.tensor(sizes).expand(B, 2),
            "padded_sizes": torch.tensor([padded] * B),
            **fields,
        },
    )


def class_outputs(K=7, B=1, low=(24, 24), seed=0, **fields):
    fields = {"score_function": "sigmoid", "reshaped_input_sizes": torch.tensor([[48, 60]] * B), **fields}
    return OpenVocabularySegmentationOutput(logits=smooth(B, K, *low, seed=seed) - 3, **fields)


def sliding_outputs(rows, boxes, canvas_size=(8, 8)):
    return class_outputs(B=rows, view_boxes=torch.tensor(boxes), canvas_size=canvas_size)


# ------------------------------------------------------------------ the originals' numbers


@folders("san")
def test_san(folder):
    _, inputs, expected = fixture(folder)
    for path in ("masked_self_attention", "cross_attention"):
        if f"final/{path}/sem_seg_scores" not in expected:
            continue
        class_logits = expected[f"rec/{path}/class_logits"]
        outputs = OpenVocabularySegmentationOutput(
            class_queries_logits=class_logits,
            class_queries_scores=class_logits.softmax(-1)[..., :-1],
            masks_queries_logits=expected["side/mask_logits_low_res"],
            reshaped_input_sizes=torch.tensor([inputs["image_resized"].shape[:2]]),
            padded_sizes=torch.tensor([expected["pre/side_input"].shape[-2:]]),
        )
        compare(outputs, expected[f"final/{path}/sem_seg_scores"])
    other_order = expected.get("final/masked_self_attention/sem_seg_scores_if_resized_last")
    if other_order is not None:
        class_logits = expected["rec/masked_self_attention/class_logits"]
        outputs.class_queries_scores = class_logits.softmax(-1)[..., :-1]
        compare(outputs, other_order, resizes_mask_logits=False)


@folders("ovseg")
def test_ovseg(folder):
    hparams, _, expected = fixture(folder)
    image = hparams["image"]
    outputs = OpenVocabularySegmentationOutput(
        class_queries_scores=expected["fused_class_scores"][None],
        masks_queries_logits=expected["mask_logits"],
        reshaped_input_sizes=torch.tensor([image["resized_height_width"]]),
        padded_sizes=torch.tensor([image["padded_height_width"]]),
    )
    compare(outputs, expected["semantic_scores"], resizes_mask_logits=False)
    compare(outputs, expected["semantic_scores_resized_image"], resizes_mask_logits=False)


@folders("deop")
def test_deop(folder):
    hparams, _, expected = fixture(folder)
    outputs = OpenVocabularySegmentationOutput(
        class_queries_scores=expected["cls.probabilities"],
        masks_queries_logits=expected["proposal.mask_logits"],
        reshaped_input_sizes=torch.tensor([hparams["resized_hw"]]),
        padded_sizes=torch.tensor([hparams["padded_hw"]]),
    )
    if outputs.class_queries_scores.shape[-1] > len(hparams["class_names"]):
        outputs.class_queries_scores = outputs.class_queries_scores[..., :-1]
    compare(outputs, expected["final.semantic_scores"], resizes_mask_logits=False)


@folders("sed")
def test_sed(folder):
    _, _, expected = fixture(folder)
    modes = sorted({name.split("/")[0] for name in expected if name.endswith("/scores/final")} - {"small_image"})
    assert {"full"} < set(modes)
    num_classes = expected["full/logits/main"].shape[1]
    for mode in modes:
        logits, kept = expected[f"{mode}/logits/main"], None
        if mode.startswith("cer"):
            classes = expected[f"{mode}/cer/kept_class_indices_2"]
            kept = torch.zeros(1, num_classes, dtype=torch.bool)
            kept[:, classes] = True
            logits = torch.full((1, num_classes, *logits.shape[2:]), -100.0)
            logits[:, classes] = expected[f"{mode}/logits/main"]
        outputs = OpenVocabularySegmentationOutput(logits=logits, score_function="sigmoid", kept_classes=kept)
        compare(outputs, expected[f"{mode}/scores/final"])


@folders("cat_seg")
def test_cat_seg(folder):
    hparams, _, expected = fixture(folder)
    whole = [name for name in ("whole", "whole_pool_train", "whole_many_classes") if f"{name}/scores/final" in expected]
    assert whole
    for mode in whole:
        logits = expected[f"{mode}/logits/all_classes"]
        outputs = OpenVocabularySegmentationOutput(
            logits=logits, score_function="sigmoid", kept_classes=logits[..., 0, 0] > -99
        )
        compare(outputs, expected[f"{mode}/scores/final"])
    window, stride = hparams["sliding_window"]["kernel"], hparams["sliding_window"]["stride"]
    height, width = hparams["sliding_window"]["out_res"]
    boxes = [
        [x, y, x + window, y + window]
        for y in range(0, height - window + 1, stride)
        for x in range(0, width - window + 1, stride)
    ]
    logits = expected["sliding/logits/all_classes"]
    outputs = OpenVocabularySegmentationOutput(
        logits=logits,
        score_function="sigmoid",
        kept_classes=logits[..., 0, 0] > -99,
        view_boxes=torch.tensor([*boxes, [0, 0, width, height]]),
        canvas_size=(height, width),
    )
    compare(outputs, expected["sliding/scores/final"])
    if "sliding/scores/on_canvas" in expected:
        compare(outputs, expected["sliding/scores/on_canvas"])


# ------------------------------------------------------------------ against the plain formulas


def plain_mask_scores(outputs, b, target, resizes_mask_logits=True):
    masks = resize(outputs.masks_queries_logits[b], outputs.padded_sizes[b])
    height, width = outputs.reshaped_input_sizes[b]
    masks = masks[:, :height, :width]

    def activation(logits):
        limit = outputs.mask_threshold
        return logits.sigmoid() if limit is None else (logits.sigmoid() > limit).float()

    masks = activation(resize(masks, target)) if resizes_mask_logits else resize(activation(masks), target)
    return torch.einsum("nk,nhw->khw", outputs.class_queries_scores[b], masks)


def stitched(view_scores, outputs, target):
    """Windows averaged, then averaged with the global view. view_scores(v, size): scores of view v at a size."""
    boxes = outputs.view_boxes.tolist()
    height, width = outputs.canvas_size
    x0, y0, x1, y1 = boxes[0]
    window = (y1 - y0, x1 - x0)
    whole = None
    if boxes[-1] == [0, 0, width, height]:
        boxes.pop()
        # the global view is scored at the size of a window
        whole = resize(view_scores(len(boxes), window), outputs.canvas_size)
    canvas, count = 0, torch.zeros(outputs.canvas_size)
    for v, (x0, y0, x1, y1) in enumerate(boxes):
        margins = (x0, width - x1, y0, height - y1)
        canvas = canvas + F.pad(view_scores(v, (y1 - y0, x1 - x0)), margins)
        count[y0:y1, x0:x1] += 1
    if not boxes:
        return resize(whole, target)
    return resize(canvas / count if whole is None else (canvas / count + whole) / 2, target)


def check_against(scores, outputs, target, **options):
    """Every result of ours against plain scores [K, H, W]."""
    found = post_process_semantic_segmentation(
        outputs, [target], return_segmentation_scores=True, return_confidence=True, **options
    )[0]
    assert (found.segmentation_scores - scores).abs().max() < 1e-5 * max(1, float(scores.max()))
    assert torch.equal(found.segmentation, found.segmentation_scores.argmax(0))
    confidence = torch.where(scores.sum(0) > 0, scores.amax(0) / scores.sum(0), 0)
    assert (found.confidence - confidence).abs().max() < 1e-4
    pruned = post_process_semantic_segmentation(outputs, [target], return_confidence=True, **options)[0]
    assert pruned.segmentation_scores is None
    assert (pruned.confidence - confidence).abs().max() < 1e-4
    map_only = post_process_semantic_segmentation(outputs, [target], **options)[0]
    for result in (pruned.segmentation, map_only):
        assert (result.dtype, result.shape) == (torch.int64, tuple(target))
        differs = result != scores.argmax(0)
        assert not differs[gap(scores) > 1e-5].any()
        assert differs.float().mean() < 0.01


@pytest.mark.parametrize("K", [1, 7, 300])
@pytest.mark.parametrize("target", [(40, 52), (100, 131), (33, 20), (1, 1), (1, 70)])
@pytest.mark.parametrize("resizes_mask_logits", [True, False])
def test_mask_family(K, target, resizes_mask_logits):
    outputs = mask_outputs(K=K, seed=K)
    scores = plain_mask_scores(outputs, 0, target, resizes_mask_logits)
    check_against(scores, outputs, target, resizes_mask_logits=resizes_mask_logits)


def test_mask_threshold():
    outputs = mask_outputs(N=3, mask_threshold=0.6)
    scores = plain_mask_scores(outputs, 0, (80, 90), resizes_mask_logits=False)
    assert (scores.sum(0) == 0).any()  # pixels in no mask
    check_against(scores, outputs, (80, 90), resizes_mask_logits=False)


@pytest.mark.parametrize("K", [1, 7, 300])
@pytest.mark.parametrize("target", [(24, 24), (100, 131), (11, 20), (1, 70)])
@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_per_class_family(K, target, score_function):
    outputs = class_outputs(K=K, score_function=score_function, seed=K)
    scores = outputs.logits[0].sigmoid() if score_function == "sigmoid" else outputs.logits[0].softmax(0)
    check_against(resize(scores, target), outputs, target)


def test_rejected_classes_score_exactly_zero():
    outputs = class_outputs(K=9)
    outputs.kept_classes = torch.tensor([[False, True, False, True, True, False, False, False, False]])
    outputs.logits[:, ~outputs.kept_classes[0]] = -100.0
    kept = outputs.kept_classes[0, :, None, None]
    check_against(resize(outputs.logits[0].sigmoid() * kept, (50, 60)), outputs, (50, 60))
    result = post_process_semantic_segmentation(outputs, [(50, 60)], return_segmentation_scores=True)[0]
    assert (result.segmentation_scores[~outputs.kept_classes[0]] == 0).all()
    outputs.kept_classes = torch.zeros_like(outputs.kept_classes)
    result = post_process_semantic_segmentation(outputs, [(50, 60)], return_confidence=True)[0]
    assert (result.segmentation == 0).all()
    assert (result.confidence == 0).all()
    assert (post_process_semantic_segmentation(outputs, [(50, 60)], threshold=0.0)[0] == -1).all()


VIEWS = {
    "windows and global": [[0, 0, 48, 48], [32, 0, 80, 48], [0, 16, 48, 64], [32, 16, 80, 64], [0, 0, 80, 64]],
    "windows": [[0, 0, 48, 64], [32, 0, 80, 64]],
    "global": [[0, 0, 80, 64]],
    "one window and global": [[0, 0, 80, 64], [0, 0, 80, 64]],
}


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("K", [3, 120])
@pytest.mark.parametrize("family", ["sigmoid", "softmax", "masks", "binary masks"])
def test_sliding_views(views, K, family):
    boxes = torch.tensor(VIEWS[views])
    B, V = 2, len(boxes)
    fields = {"view_boxes": boxes, "canvas_size": (64, 80), "reshaped_input_sizes": torch.tensor([[30, 40], [50, 60]])}
    if "masks" in family:
        limit = 0.6 if "binary" in family else None
        outputs = mask_outputs(K=K, B=B * V, sharp=4.0, **fields, mask_threshold=limit)
    else:
        outputs = class_outputs(K=K, B=B * V, score_function=family, **fields)
        outputs.kept_classes = torch.rand(B * V, K, generator=torch.Generator().manual_seed(1)) < 0.7

    def view_scores(row, size):
        if "masks" in family:
            masks = resize(outputs.masks_queries_logits[row], size).sigmoid()
            masks = masks if limit is None else (masks > limit).float()
            return torch.einsum("nk,nhw->khw", outputs.class_queries_scores[row], masks)
        logits, kept = outputs.logits[row], outputs.kept_classes[row, :, None, None]
        scores = resize(logits, size).sigmoid() if family == "sigmoid" else resize(logits.softmax(0), size)
        return scores * kept

    targets = [(70, 90), (31, 43)]
    maps = post_process_semantic_segmentation(outputs, targets)
    assert len(maps) == B
    for b, target in enumerate(targets):
        one = OpenVocabularySegmentationOutput(**outputs)
        per_view = {"logits", "kept_classes", "class_queries_logits", "class_queries_scores", "masks_queries_logits"}
        for name in per_view & set(outputs):
            one[name] = outputs[name][b * V : (b + 1) * V]
        check_against(
            stitched(partial(lambda b, v, size: view_scores(b * V + v, size), b), outputs, target), one, target
        )
        assert torch.equal(maps[b], post_process_semantic_segmentation(one, [target])[0])


def test_batch_rows_are_independent():
    outputs = mask_outputs(B=3, sizes=((40, 52),))
    outputs.reshaped_input_sizes = torch.tensor([[40, 52], [64, 30], [64, 64]])
    maps = post_process_semantic_segmentation(outputs)
    assert [tuple(m.shape) for m in maps] == [(40, 52), (64, 30), (64, 64)]
    for b, found in enumerate(maps):
        assert torch.equal(found, plain_mask_scores(outputs, b, found.shape).argmax(0))


def test_half_precision_outputs_are_scored_in_float32():
    outputs = mask_outputs()
    outputs.class_queries_scores = outputs.class_queries_scores.bfloat16()
    outputs.masks_queries_logits = outputs.masks_queries_logits.bfloat16()
    plain = OpenVocabularySegmentationOutput(**outputs)
    plain.class_queries_scores, plain.masks_queries_logits = (
        outputs.class_queries_scores.float(), outputs.masks_queries_logits.float(),
    )  # fmt: skip
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = post_process_semantic_segmentation(outputs, [(40, 52)], return_segmentation_scores=True)[0]
    assert found.segmentation_scores.dtype == torch.float32
    assert (found.segmentation_scores - plain_mask_scores(plain, 0, (40, 52))).abs().max() < 1e-5


# ------------------------------------------------------------------ pruning and ties


@pytest.mark.parametrize(("source", "target"), [((40, 40), (640, 640)), ((128, 96), (100, 140)), ((7, 1), (1, 9))])
def test_interpolation_of_rectangles(source, target):
    maps = torch.randn(*source, 3)
    expected = resize(maps.permute(2, 0, 1), target).permute(1, 2, 0)
    bilinear = Bilinear((source, target))
    for top in range(0, target[0], 37):
        for left in range(0, target[1], 51):
            rows, columns = (top, min(top + 37, target[0])), (left, min(left + 51, target[1]))
            (r0, r1), (c0, c1) = bilinear.window(rows, columns)
            found = bilinear(maps[r0:r1, c0:c1], rows, columns)
            assert (found - expected[slice(*rows), slice(*columns)]).abs().max() < 2e-6


@pytest.mark.parametrize(
    "steps",
    [
        [((7, 9), (64, 60))],
        [((50, 40), (20, 33))],
        [((30, 40), (30, 40))],
        [((1, 7), (9, 7))],
        [((10, 13), (40, 52)), ((35, 50), (61, 77))],
    ],
)
def test_extremes_of_rectangles(steps):
    torch.manual_seed(0)
    (height, width), bilinear = steps[-1][1], Bilinear(*steps)
    rows = [(top, min(top + 9, height)) for top in range(0, height, 9)]
    columns = [(left, min(left + 5, width)) for left in range(0, width, 5)]
    maps = torch.randn(*steps[0][0], 4)
    low, high = bilinear.extremes(maps, rows, columns)
    wider = 0.0
    for i, j in itertools.product(range(len(rows)), range(len(columns))):
        (r0, r1), (c0, c1) = bilinear.window(rows[i], columns[j])
        found = bilinear(maps[r0:r1, c0:c1], rows[i], columns[j]).flatten(0, 1)
        assert (low[i, j] <= found.amin(0) + 1e-5).all()
        assert (high[i, j] >= found.amax(0) - 1e-5).all()
        source = maps[r0:r1, c0:c1].flatten(0, 1)  # never beyond what the rectangle is made of
        assert (low[i, j] >= source.amin(0) - 1e-5).all()
        assert (high[i, j] <= source.amax(0) + 1e-5).all()
        wider += float((source.amax(0) - high[i, j]).sum())
    assert wider > 1 or bilinear.columns.identity


def test_interpolations_in_turn_are_one():
    torch.manual_seed(1)  # float32 alone: one set of numbers in twenty differs by up to 3e-6
    maps, steps = torch.randn(10, 13, 3), (((10, 13), (40, 52)), ((35, 50), (61, 77)))
    once = resize(maps.permute(2, 0, 1), steps[0][1])[:, :35, :50]
    expected = resize(once, steps[1][1]).permute(1, 2, 0)
    bilinear = Bilinear(*steps)
    for rows, columns in (((0, 61), (0, 77)), ((3, 20), (40, 77)), ((60, 61), (0, 1))):
        (r0, r1), (c0, c1) = bilinear.window(rows, columns)
        found = bilinear(maps[r0:r1, c0:c1], rows, columns)
        assert (found - expected[slice(*rows), slice(*columns)]).abs().max() < 2e-6


def brute_force_undominated(weights):
    """By the definition, with exact numbers: nobody else is at least as high everywhere (a tie: nobody before it)."""
    columns, kept = weights.T, []
    for k, column in enumerate(columns):
        others = [j for j in range(len(columns)) if j != k and (columns[j] >= column).all()]
        if not any(j < k or (columns[j] > column)[column > 0].all() for j in others):
            kept.append(k)
    return kept


@pytest.mark.parametrize("seed", range(8))
def test_undominated_classes(seed):
    generator = torch.Generator().manual_seed(seed)
    # few levels: many dominated and equal classes
    weights = torch.randint(0, 4, (3, 60), generator=generator).float() / 4
    kept = undominated_classes(weights)
    assert kept.tolist() == brute_force_undominated(weights)
    assert len(kept) < 30
    assert undominated_classes(torch.zeros(3, 5)).tolist() == [0]
    assert undominated_classes(torch.ones(3, 5)).tolist() == [0]
    assert undominated_classes(torch.rand(50, 20, generator=generator)).tolist() == list(range(20))


def exact_mask_outputs(K, N, seed, levels=4):
    """Binary masks and weights that are multiples of 1/levels: sums have no rounding, and ties abound."""
    generator = torch.Generator().manual_seed(seed)
    return OpenVocabularySegmentationOutput(
        class_queries_scores=torch.randint(0, levels, (1, N, K), generator=generator) / levels,
        masks_queries_logits=torch.where(smooth(1, N, 64, 64, seed=seed) > 0, 50.0, -50.0),
        mask_threshold=0.5,
        reshaped_input_sizes=torch.tensor([[64, 64]]),
        padded_sizes=torch.tensor([[64, 64]]),
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("K", "N"), [(2, 1), (40, 3), (40, 12), (500, 5)])
def test_pruned_argmax_is_exact_with_ties(K, N, seed):
    outputs = exact_mask_outputs(K, N, seed)
    scores = plain_mask_scores(outputs, 0, (64, 64))
    tied = (scores == scores.amax(0)).sum(0) > 1
    assert tied.any()
    assert torch.equal(post_process_semantic_segmentation(outputs)[0], scores.argmax(0))
    full = post_process_semantic_segmentation(outputs, return_segmentation_scores=True)[0]
    assert torch.equal(full.segmentation_scores, scores)
    assert torch.equal(full.segmentation, scores.argmax(0))


@pytest.mark.parametrize("seed", range(5))
def test_classes_that_are_beaten_win_nowhere(seed):
    torch.manual_seed(seed)
    positions = torch.cartesian_prod(torch.arange(48), torch.arange(48)) / 48
    near = 1 - torch.cdist(positions, torch.rand(12, 2))
    first, second = near.topk(2).values.T[:, :, None]
    masks = (100 * (near - torch.where(near == first, second, first))).clamp(-12, 12).view(48, 48, 12)  # a region each
    weights = (4 * torch.randn(12, 60)).softmax(1)
    weights[:, 7] = weights[:, 30] = 0  # never anywhere
    weights[:, 11] = weights[:, 40]  # the same everywhere
    field = MaskField(masks, weights, weights.sum(1), [((96, 96), (96, 96))], torch.sigmoid)
    every, told, spans = torch.arange(60), 0, [(start, start + 32) for start in range(0, 96, 32)]
    bounds = field.bounds(spans, spans)
    pairs = torch.cartesian_prod(torch.arange(9), every).T
    beaten_in = bounds.beaten(*pairs).view(9, 60)
    for beaten, low, high, tile in zip(
        beaten_in, bounds.low.flatten(0, 1), bounds.high.flatten(0, 1), itertools.product(spans, repeat=2), strict=True
    ):
        scores = field.scores(*tile, every)
        best = scores.amax(-1)
        assert ((scores >= low - 1e-6) & (scores <= high + 1e-6)).all()
        assert (scores[..., beaten] < best[..., None]).all()
        assert not beaten[scores.flatten(0, 1).argmax(1).unique()].any()
        # more than bounds alone tell
        told += int((beaten & (high >= low.max())).sum())
    assert told > 9 * 10


def test_a_later_class_that_is_never_below_does_not_hide_a_tie():
    outputs = exact_mask_outputs(3, 2, 0)
    # class 2 is never below class 0 and above it for query 1 alone: equal wherever only query 0 is present
    outputs.class_queries_scores = torch.tensor([[[0.5, 0.0, 0.5], [0.25, 0.0, 0.5]]])
    outputs.masks_queries_logits = torch.full((1, 2, 64, 64), -50.0)
    outputs.masks_queries_logits[0, 0, :32] = 50
    outputs.masks_queries_logits[0, 1, :, :32] = 50
    found = post_process_semantic_segmentation(outputs)[0]
    assert (found[:32, 32:] == 0).all()
    assert (found[:, :32] == 2).all()
    assert (found[32:, 32:] == 0).all()  # no mask at all


@pytest.mark.parametrize("seed", range(4))
def test_per_class_ties_go_to_the_lowest_index(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-2, 3, (1, 30, 64, 64), generator=generator).float()
    outputs = OpenVocabularySegmentationOutput(logits=logits, score_function="sigmoid")
    for size in ((64, 64), (128, 128)):
        scores = resize(logits[0].sigmoid(), size)
        found = post_process_semantic_segmentation(outputs, [size])[0]
        full = post_process_semantic_segmentation(outputs, [size], return_segmentation_scores=True)[0]
        assert torch.equal(full.segmentation, full.segmentation_scores.argmax(0))
        if size == (64, 64):
            assert torch.equal(found, scores.argmax(0))
        assert not (found != scores.argmax(0))[gap(scores) > 1e-6].any()


def neighbouring_scores(seed):
    """Two classes with a score each, the second one the next larger number: interpolation rounds some of them alike."""
    torch.manual_seed(seed)
    lower = torch.randn(1)
    both = torch.stack([lower, torch.nextafter(lower, torch.tensor(9.0))], dim=1)[..., None, None]
    return OpenVocabularySegmentationOutput(logits=both.repeat(1, 1, 7, 9), score_function="sigmoid"), (80 + seed, 70)


def sums_in_another_order(seed):
    """Eight classes with the same weights of queries that are present everywhere, each in an order of its own."""
    torch.manual_seed(seed)
    weights = torch.rand(40)
    outputs = mask_outputs(padded=(64, 64), sizes=((64, 64),))
    outputs.class_queries_scores = torch.stack([weights[torch.randperm(40)] for _ in range(8)], dim=1)[None]
    outputs.masks_queries_logits = torch.full((1, 40, 8, 8), 40.0)
    return outputs, (64, 64)


def masks_at_the_threshold(seed):
    """Two queries with a class each; the mask of the stronger one is as little above the threshold as can be, and
    interpolation rounds it below that in places."""
    torch.manual_seed(seed)
    threshold = 0.3 + 0.6 * torch.rand(1).item()
    outputs = mask_outputs(padded=(64, 70), sizes=((64, 70),), mask_threshold=threshold)
    outputs.class_queries_scores = torch.tensor([[[0.6, 0.0], [0.0, 0.5]]])
    lowest = torch.tensor(threshold).logit() - 1e-6
    while lowest.sigmoid() <= threshold:
        lowest = torch.nextafter(lowest, torch.tensor(9.0))
    outputs.masks_queries_logits = torch.stack([lowest, torch.tensor(9.0)])[None, :, None, None].repeat(1, 1, 7, 9)
    return outputs, (64, 70)


@pytest.mark.parametrize("near_tie", [neighbouring_scores, sums_in_another_order, masks_at_the_threshold])
def test_rounding_hides_no_winner(near_tie):
    """Bounds that are equal to scores but for rounding: what they leave out must not be the best class somewhere."""
    for seed in range(24):
        outputs, size = near_tie(seed)
        every = post_process_semantic_segmentation(outputs, [size], return_segmentation_scores=True)[0]
        assert torch.equal(every.segmentation, every.segmentation_scores.argmax(0))
        assert torch.equal(post_process_semantic_segmentation(outputs, [size])[0], every.segmentation)


# ------------------------------------------------------------------ background, threshold, confidence


def test_folded_background():
    outputs = class_outputs(K=8)
    plain = post_process_semantic_segmentation(outputs, [(60, 60)], return_confidence=True)[0]
    assert set(range(8)) == set(plain.segmentation.unique().tolist())
    for background, folded in ((5, [5]), ([6, 2, 3], [2, 3, 6]), (torch.tensor([7, 1]), [1, 7]), ([4, 4], [4])):
        found = post_process_semantic_segmentation(outputs, [(60, 60)], return_confidence=True, background=background)[
            0
        ]
        expected = plain.segmentation.clone()
        expected[sum((expected == k) for k in folded).bool()] = folded[0]
        assert torch.equal(found.segmentation, expected)
        assert torch.equal(found.confidence, plain.confidence)


@pytest.mark.parametrize("background", ["no_object", ["no_object"], ["no_object", 2, 1]])
def test_no_object_competes(background):
    outputs = mask_outputs(K=5, N=12, seed=4, sharp=4.0)
    no_object = outputs.class_queries_logits.softmax(-1)[..., -1:]
    everything = OpenVocabularySegmentationOutput(**outputs)
    everything.class_queries_scores = torch.cat([outputs.class_queries_scores, no_object], -1)
    scores = plain_mask_scores(everything, 0, (40, 52))
    expected = scores.argmax(0)
    assert {1, 2, 5} < set(expected.unique().tolist())
    expected[expected == 5] = -1
    if len(background) == 3:
        expected[expected == 2] = 1
    for with_scores in (False, True):
        found = post_process_semantic_segmentation(
            outputs, [(40, 52)], with_scores, return_confidence=True, background=background
        )[0]
        assert torch.equal(found.segmentation, expected)
        assert (found.confidence - scores.amax(0) / scores.sum(0)).abs().max() < 1e-5
    assert found.segmentation_scores.shape == (5, 40, 52)


def test_threshold_compares_confidence():
    outputs = class_outputs(K=4)
    plain = post_process_semantic_segmentation(outputs, [(60, 60)], return_confidence=True)[0]
    assert plain.confidence.min() > 0
    assert plain.confidence.max() <= 1
    for threshold in (0.0, float(plain.confidence.median()), 1.0):
        found = post_process_semantic_segmentation(outputs, [(60, 60)], threshold=threshold)[0]
        assert torch.equal(found, torch.where(plain.confidence < threshold, -1, plain.segmentation))
    result = post_process_semantic_segmentation(outputs, [(60, 60)], return_segmentation_scores=True, threshold=0.5)[0]
    assert result.confidence is None


def test_one_class_has_confidence_one():
    for outputs in (class_outputs(K=1), mask_outputs(K=1)):
        result = post_process_semantic_segmentation(outputs, [(30, 30)], return_confidence=True)[0]
        assert (result.segmentation == 0).all()
        assert torch.allclose(result.confidence, torch.ones(30, 30))


def test_pixels_without_any_score():
    outputs = exact_mask_outputs(4, 3, 0)
    outputs.masks_queries_logits[..., 20:] = -50.0
    result = post_process_semantic_segmentation(outputs, return_confidence=True)[0]
    assert (result.segmentation[:, 20:] == 0).all()
    assert (result.confidence[:, 20:] == 0).all()
    assert (post_process_semantic_segmentation(outputs, threshold=0.0)[0][:, 20:] == -1).all()


def test_target_sizes():
    outputs = class_outputs(B=2)
    for sizes in (
        [(5, 6), (7, 8)],
        torch.tensor([[5, 6], [7, 8]]),
        np.array([[5, 6], [7, 8]]),
        [[5, 6], torch.tensor([7, 8])],
    ):
        maps = post_process_semantic_segmentation(outputs, sizes)
        assert [tuple(m.shape) for m in maps] == [(5, 6), (7, 8)]
    assert [tuple(m.shape) for m in post_process_semantic_segmentation(outputs)] == [(48, 60)] * 2
    result = post_process_semantic_segmentation(outputs, return_segmentation_scores=True)[0]
    assert type(result).__mro__[1].__name__ == "SemanticSegmentationPostProcessorOutput"
    assert result.confidence is None


def test_image_processor_passes_its_order_of_operations():
    outputs = mask_outputs()
    for order in (True, False):
        processor = OpenVocabularySegmentationImageProcessor(resizes_mask_logits=order)
        found = processor.post_process_semantic_segmentation(outputs, [(90, 90)], return_segmentation_scores=True)[0]
        assert (found.segmentation_scores - plain_mask_scores(outputs, 0, (90, 90), order)).abs().max() < 1e-5
    assert (
        plain_mask_scores(outputs, 0, (90, 90), True) - plain_mask_scores(outputs, 0, (90, 90), False)
    ).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("outputs", "options", "message"),
    [
        (OpenVocabularySegmentationOutput(), {}, "must hold either logits"),
        (class_outputs(B=2), {"target_sizes": [(5, 5)]}, "2 pictures need as many target sizes .*got 1"),
        (class_outputs(), {"target_sizes": [5]}, "one .height, width. per picture"),
        (class_outputs(), {"target_sizes": 64}, "one .height, width. per picture, got 64"),
        (class_outputs(), {"target_sizes": [(5, 0)]}, "must be positive"),
        (class_outputs(reshaped_input_sizes=None), {}, "pass target_sizes"),
        (class_outputs(), {"threshold": 1.5}, "threshold is a confidence between 0 and 1, got 1.5"),
        (class_outputs(), {"background": [2, 7]}, r"background indices \[7\] are out of range: there are 7 classes"),
        (class_outputs(), {"background": -1}, "no class with index -1"),
        (class_outputs(), {"background": "sky"}, r"background names \['sky'\]"),
        (class_outputs(), {"background": "no_object"}, "needs a method with a no-object class"),
        (class_outputs(score_function="tanh"), {}, "score_function must be"),
        (sliding_outputs(3, [[0, 0, 8, 8]] * 2), {}, "3 rows .* 2 sliding"),
        (sliding_outputs(1, [[0, 0, 8, 9]]), {}, "does not lie on the canvas"),
        (sliding_outputs(1, [[0, 0, 8, 4]]), {}, "32 canvas pixels uncovered"),
        (sliding_outputs(1, [[0, 0, 8, 8]], canvas_size=None), {}, "canvas_size"),
        (mask_outputs(sharp=float("nan")), {}, "non-negative"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_bad_input(outputs, options, message):
    with pytest.raises(ValueError, match=message):
        post_process_semantic_segmentation(outputs, **options)


@pytest.mark.parametrize("outputs", [None, class_outputs().to_tuple(), dict(class_outputs())], ids=type)
def test_outputs_are_what_a_model_returns(outputs):
    with pytest.raises(TypeError, match=f"without return_dict=False.*got {type(outputs).__name__}"):
        post_process_semantic_segmentation(outputs)


def test_a_threshold_is_a_number():
    with pytest.raises(TypeError, match=r"between 0 and 1, got '0\.5'"):
        post_process_semantic_segmentation(class_outputs(), threshold="0.5")


@pytest.mark.parametrize("background", [1.7, [1.7], True, [None]])
def test_a_background_class_is_an_index(background):
    with pytest.raises(TypeError, match="is a label or an index, got"):
        post_process_semantic_segmentation(class_outputs(), background=background)


def test_nan_in_the_outputs():
    for outputs, name in ((class_outputs(), "logits"), (mask_outputs(), "masks_queries_logits")):
        outputs[name][0, 2, 3, 3] = float("nan")
        with pytest.raises(ValueError, match="NaN or infinite"):
            post_process_semantic_segmentation(outputs)
    outputs = mask_outputs()
    outputs.class_queries_logits = None
    with pytest.raises(ValueError, match="needs class_queries_logits"):
        post_process_semantic_segmentation(outputs, background="no_object")


# ------------------------------------------------------------------ memory and time

MEASURE = """
    import resource, sys, torch
    from torch.nn import functional as F
    from ov_segmentation.modeling_outputs import OpenVocabularySegmentationOutput as Output
    from ov_segmentation.post_processing import post_process_semantic_segmentation

    K, height, width = map(int, sys.argv[1:])
    torch.manual_seed(0)
    smooth = lambda n, side: F.interpolate(torch.randn(1, n, 10, 10), size=(side, side), mode="bicubic") * 6 - 6
    weights = (torch.randn(1, 100, K + 1) * 3).softmax(-1)[..., :-1]
    sizes = torch.tensor([[640, 640]])
    masks = Output(class_queries_scores=weights, masks_queries_logits=smooth(100, 40),
                   reshaped_input_sizes=sizes, padded_sizes=sizes)
    classes = Output(logits=smooth(K, 96), score_function="sigmoid")
    for outputs in (masks, classes):
        post_process_semantic_segmentation(outputs, [(33, 33)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for outputs in (masks, classes):
        post_process_semantic_segmentation(outputs, [(height, width)], return_confidence=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize(
    ("height", "width", "limit"),
    [
        (600, 800, 150),  # all scores: 1551 MB
        pytest.param(3000, 4000, 1000, marks=pytest.mark.slow),  # all scores: 38773 MB
    ],
)
def test_memory_without_scores(height, width, limit):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), "847", str(height), str(width)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) / 1024 < limit  # KiB on Linux


def test_pruning_is_faster_than_all_scores():
    """847 classes of which few can win in any one place, as a trained model's queries make it."""
    outputs = mask_outputs(K=847, N=100, sizes=((320, 320),), padded=(320, 320), low=(20, 20))
    post_process_semantic_segmentation(outputs)
    start = time.process_time()
    post_process_semantic_segmentation(outputs)
    pruned = time.process_time() - start
    start = time.process_time()
    plain_mask_scores(outputs, 0, (320, 320)).argmax(0)
    assert pruned < (time.process_time() - start) / 2
