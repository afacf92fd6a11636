"""Adaptation of CLIP to masked crops: crops, loss over processes, recipes, runs, accuracy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from PIL import Image as PILImage
from pyarrow import parquet
from torch.nn.functional import cross_entropy, interpolate

from examples.mine_mask_pairs import main as mine
from examples.ovseg_on_scenes import main as on_scenes
from examples.train_mask_adapted_clip import main as command_line
from ov_segmentation import AutoModelForOpenVocabularySegmentation
from ov_segmentation.data.mask_pairs import MaskPair, load_mask_pairs, mask_picture, pair_features
from ov_segmentation.models.ovseg.image_processing_ovseg import OVSegImageProcessor
from ov_segmentation.models.ovseg.processing_ovseg import OVSegProcessor
from ov_segmentation.strict_mapping import RecipeError, from_mapping
from ov_segmentation.training.adaptation_recipe import AdaptationRecipe
from ov_segmentation.training.crop_samples import CropBatchMaker, CropSample, crop_inputs, random_box
from ov_segmentation.training.mask_adaptation import MaskAdaptation, adapt, prepare_prompts
from tests.models.test_ovseg import TestOVSeg as Tiny
from tests.tiny import TOKENIZER

ROOT = Path(__file__).parents[1]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
TRAINED = "clip.vision_model.encoder.layers.0.mlp.fc1.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OVSeg model and pairs of coloured crops."""
    folder = tmp_path_factory.mktemp("adaptation")
    image_processor = OVSegImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    Tiny().model().save_pretrained(folder / "model")
    OVSegProcessor(image_processor, TOKENIZER, ["a photo of a {}."]).save_pretrained(folder / "model")
    random, rows = np.random.default_rng(0), {"image": [], "mask": [], "noun": [], "caption": []}
    for index in range(12):
        noun = list(COLOURS)[index % 3]
        picture = random.integers(0, 40, (20, 26, 3)) + np.array(COLOURS[noun]) - 20
        mask = np.zeros((20, 26), dtype=bool)
        mask[: 10 + index % 7, 3:] = True
        rows["image"].append(PILImage.fromarray(picture.clip(0, 255).astype(np.uint8)))
        rows["mask"].append(mask_picture(mask))
        rows["noun"].append(noun)
        rows["caption"].append(f"a {noun} car" if index else "")
    features = Features({name: pair_features()[name] for name in rows})
    Dataset.from_dict(rows, features=features).save_to_disk(str(folder / "pairs"))
    return folder


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    pairs = str(folder / "pairs")
    return {
        "model": {"from_pretrained": str(folder / "model")},
        "data": {"sources": [pairs], "evaluation": pairs},
        "train_clip": True,
        "optimizer": {"lr": 1e-3},
        "steps": 2,
        "batch_size": 4,
        "log_interval": 1,
        "threads": 1,
        **changes,
    }


def recipe(folder: Path, **changes: Any) -> AdaptationRecipe:
    return from_mapping(AdaptationRecipe, values(folder, **changes))


# ---------------------------------------------------------------------- crops


def test_training_crops_are_those_of_inference(folder: Path) -> None:
    pair = load_mask_pairs(folder / "pairs")[4]
    whole = CropSample(pair, (0, 0, 26, 20))
    crops, masks = crop_inputs([whole, CropSample(pair, (3, 2, 20, 12))], 32)
    mean, std = (
        torch.tensor(v)[:, None, None]
        for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    picture = (torch.tensor(pair.crop).permute(2, 0, 1) / 255 - mean) / std * torch.tensor(pair.mask)
    expected = interpolate(picture[None], size=(32, 32), mode="bicubic")[0]
    torch.testing.assert_close(crops[0], expected, atol=1e-5, rtol=0)
    part = interpolate(picture[None, :, 2:12, 3:20], size=(32, 32), mode="bicubic")[0]
    torch.testing.assert_close(crops[1], part, atol=1e-5, rtol=0)
    assert masks.shape == (2, 32, 32)
    visible, _ = crop_inputs([whole], 32, mask_fill="none")
    assert not torch.allclose(visible[0], crops[0], atol=0.1)


def test_random_parts_lie_on_the_mask() -> None:
    mask = np.zeros((50, 80), dtype=bool)
    mask[20:25, 30:40] = True
    boxes = [random_box(mask, (0.3, 0.6), (0.75, 4 / 3), np.random.default_rng(i)) for i in range(40)]
    assert len(set(boxes)) > 20
    for x0, y0, x1, y1 in boxes:
        assert 0 <= x0 < x1 <= 80 and 0 <= y0 < y1 <= 50
        assert mask[y0:y1, x0:x1].any()
        assert 0.25 < (x1 - x0) * (y1 - y0) / 4000 < 0.65
        assert 0.7 < ((x1 - x0) / 80) / ((y1 - y0) / 50) < 1.43
    assert random_box(mask, (1.0, 1.0), (1.0, 1.0), np.random.default_rng(0)) == (0, 0, 80, 50)


def test_each_noun_is_tokenised_once(folder: Path) -> None:
    asked = []

    def tokenizer(texts: list[str], **options: Any) -> Any:
        asked.extend(texts)
        return TOKENIZER(texts, **options)

    pair = load_mask_pairs(folder / "pairs")[4]
    make_batch = CropBatchMaker(tokenizer, 32, "a {}.")
    for nouns in (["tree", "road", "tree"], ["sky", "road"]):
        ids = make_batch([CropSample(pair._replace(noun=noun), (0, 0, 26, 20)) for noun in nouns])["input_ids"]
        texts = [f"a {noun}." for noun in nouns]
        expected = TOKENIZER(texts, padding="max_length", truncation=True, return_tensors="pt")
        assert torch.equal(ids, expected["input_ids"])
    assert sorted(asked) == ["a road.", "a sky.", "a tree."]


# ---------------------------------------------------------------------- loss


def module_and_inputs(**options: Any) -> tuple[MaskAdaptation, dict[str, torch.Tensor]]:
    model = Tiny().model()
    module = MaskAdaptation(model.clip, model.visual_prompts, train_clip=True, train_prompts=True, **options)
    random = np.random.default_rng(1)
    samples = []
    for size in ((20, 30), (33, 17), (24, 24), (16, 40)):
        mask = np.zeros(size, dtype=bool)
        mask[: size[0] // 2] = True
        mask[-1, -1] = True
        pair = MaskPair(random.integers(0, 256, (*size, 3), dtype=np.uint8), mask, "x")
        samples.append(CropSample(pair, (0, 0, size[1], size[0])))
    crops, masks = crop_inputs(samples, 32)
    ids = TOKENIZER(["road", "tree", "road", "sky"], padding="max_length", return_tensors="pt")["input_ids"]
    return module, {"crops": crops, "masks": masks, "input_ids": ids}


def test_the_loss_is_clips() -> None:
    module, inputs = module_and_inputs()
    outputs = module(**inputs)
    logits = module.clip.logit_scale.exp() * outputs.image_features @ outputs.text_features.T
    target = torch.arange(4)
    expected = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(outputs.loss, expected)
    torch.testing.assert_close(outputs.text_features[0], outputs.text_features[2])
    outputs.loss.backward()
    trained = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"clip.logit_scale", "visual_prompts.embedding", TRAINED} <= trained
    assert not [name for name in trained if name.startswith(("clip.text_", "clip.text_projection"))]


def test_equal_nouns_may_be_left_out() -> None:
    module, inputs = module_and_inputs(equal_nouns="ignored")
    outputs = module(**inputs)
    logits = module.clip.logit_scale.exp() * outputs.image_features @ outputs.text_features.T
    logits[0, 2] = logits[2, 0] = -1e9
    target = torch.arange(4)
    expected = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(outputs.loss, expected)


WORKER = """
import os, sys, torch
from pathlib import Path
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from examples.mine_mask_pairs import main as mine
from ov_segmentation.training.mask_adaptation import adapt
from tests.test_mask_adaptation import module_and_inputs, mining_command, recipe
torch.set_num_threads(1)
folder, out = Path(sys.argv[2]), Path(sys.argv[1])
mine(mining_command(folder, out / "mined"))
rank = distributed.get_rank()
for mode in (True, False):
    module, inputs = module_and_inputs(gather_with_gradient=mode)
    wrapped = DistributedDataParallel(module, find_unused_parameters=True)
    outputs = wrapped(**{key: value[2 * rank : 2 * rank + 2] for key, value in inputs.items()})
    outputs.loss.backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save({"loss": outputs.loss.detach(), "gradients": gradients}, f"{sys.argv[1]}/{mode}.pt")
    distributed.barrier()
    del wrapped
adapt(recipe(folder, steps=3), out / "run")
"""


def mining_command(folder: Path, output: Path) -> list[str]:
    """Pairs of a picture each; the pictures are the crops that pairs are made of elsewhere."""
    places = ["--model", str(folder / "model"), "--data", str(folder / "pairs"), "--output", str(output)]
    return [*places, "--tagger", "textblob", "--shard-size", "1", "--cpu"]


def test_two_processes_equal_one(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The loss and its gradients; a whole run with its evaluation; and mining, which shares its shards."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "worker.py"), str(tmp_path), str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    module, inputs = module_and_inputs()
    outputs = module(**inputs)
    outputs.loss.backward()
    for mode, factor in ((True, 1.0), (False, 0.5)):
        found = torch.load(tmp_path / f"{mode}.pt", weights_only=True)
        torch.testing.assert_close(found["loss"], outputs.loss.detach(), rtol=1e-5, atol=1e-5)
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                # the temperature takes no part in the gathering
                expected = parameter.grad * (1.0 if name == "clip.logit_scale" else factor)
                torch.testing.assert_close(found["gradients"][name], expected, rtol=1e-3, atol=1e-5, msg=name)

    result = adapt(recipe(folder, steps=3), tmp_path / "alone")
    lines, others = (
        [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        for run in ("alone", "run")
    )
    assert [line["step"] for line in others] == [line["step"] for line in lines]
    for line, other in zip(lines, others, strict=True):
        assert other == pytest.approx(line, rel=1e-3)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["crops"] == result["crops"] == 12

    capsys.readouterr()
    mine(mining_command(folder, tmp_path / "mined alone"))
    counts = json.loads(capsys.readouterr().out)
    assert (counts["shards"], counts["captions_without_nouns"], counts["pairs"]) == (12, 1, 11)
    printed = done.stdout[done.stdout.index("{") :]
    assert json.JSONDecoder().raw_decode(printed)[0] == counts
    shared, alone = (
        [row for file in sorted((tmp_path / name / "data").iterdir()) for row in parquet.read_table(file).to_pylist()]
        for name in ("mined", "mined alone")
    )
    # the last bit of a cosine depends on the names that a process has embedded together
    assert [row.pop("score") for row in shared] == pytest.approx([row.pop("score") for row in alone], abs=1e-5)
    assert shared == alone


# ---------------------------------------------------------------------- runs


def test_fine_tuning_then_prompts_then_fine_tuning_again(folder: Path, tmp_path: Path) -> None:
    result = adapt(recipe(folder), tmp_path / "ft")
    assert 0 <= result["top1"] <= result["top5"] == 1.0
    assert result["crops"] == 12
    assert result["best_top1"] is not None
    before = AutoModelForOpenVocabularySegmentation.from_pretrained(folder / "model").state_dict()
    tuned = AutoModelForOpenVocabularySegmentation.from_pretrained(tmp_path / "ft" / "model")
    assert tuned.visual_prompts is None
    changed = {name for name, value in tuned.state_dict().items() if not torch.equal(value, before[name])}
    assert TRAINED in changed
    assert all(
        name.startswith(("clip.vision_model.", "clip.visual_projection.", "clip.logit_scale")) for name in changed
    )

    prompts = {"use": "trained", "kind": "mask", "depth": 3}
    then = {"model": {"from_pretrained": str(tmp_path / "ft" / "model")}, "train_clip": False, "prompts": prompts}
    adapt(recipe(folder, **then), tmp_path / "mpt")
    both = AutoModelForOpenVocabularySegmentation.from_pretrained(tmp_path / "mpt" / "model")
    assert both.visual_prompts.embedding.shape[0] == both.config.prompt_depth == 3
    assert torch.equal(both.state_dict()[TRAINED], tuned.state_dict()[TRAINED])
    log = [json.loads(line) for line in (tmp_path / "mpt" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "train/loss" in line] == [1, 2]

    again = {"model": {"from_pretrained": str(tmp_path / "mpt" / "model")}, "prompts": {"use": "frozen"}}
    adapt(recipe(folder, **again), tmp_path / "last")
    last = AutoModelForOpenVocabularySegmentation.from_pretrained(tmp_path / "last" / "model")
    assert torch.equal(last.visual_prompts.embedding, both.visual_prompts.embedding)
    assert not torch.equal(last.state_dict()[TRAINED], both.state_dict()[TRAINED])


def test_both_at_once_continues_after_a_stop(folder: Path, tmp_path: Path) -> None:
    prompts = {"use": "trained", "kind": "deep", "depth": 2, "number": 4}
    changes = {
        "prompts": prompts,
        "steps": 3,
        "checkpoint": {"interval": 1, "total_limit": 9},
        "data": {"sources": [str(folder / "pairs")]},
    }
    adapt(recipe(folder, **changes), tmp_path / "whole")
    adapt(recipe(folder, **changes), tmp_path / "parts")
    for step in (2, 3):
        checkpoint = tmp_path / "parts" / "checkpoints" / f"step-{step:08d}"
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    adapt(recipe(folder, **changes), tmp_path / "parts")
    whole, parts = (
        AutoModelForOpenVocabularySegmentation.from_pretrained(tmp_path / name / "model") for name in ("whole", "parts")
    )
    assert whole.visual_prompts.embedding.shape == (2, 4, 32)
    assert all(torch.equal(value, parts.state_dict()[name]) for name, value in whole.state_dict().items())


# ---------------------------------------------------------------------- recipes and bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_clip": False}, "Nothing to train"),
        ({"template": "a photo"}, "template"),
        ({"crop_scale": [0.0, 1.0]}, "crop_scale"),
        ({"steps": 0}, "steps"),
        ({"checkpoint": {"interval": 0}}, "checkpoint.interval"),
        ({"evaluation": {"interval": 0}}, "evaluation.interval"),
        ({"evaluation": {"patience": 0}}, "evaluation.patience"),
        ({"batch_size": 5, "accumulation": 2}, "multiple of accumulation"),
        ({"prompts": {"use": "learned"}}, "prompts.use"),
        ({"temperature": 100}, "temperature"),
    ],
    ids=str,
)
def test_impossible_recipes(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(folder, **changes)


def test_frozen_prompts_must_be_there(folder: Path) -> None:
    wanted = recipe(folder, prompts={"use": "frozen", "kind": "deep"}).prompts
    with pytest.raises(RecipeError, match="no such prompts"):
        prepare_prompts(Tiny().model(), wanted)


def test_nouns_of_the_evaluation_must_be_class_names(folder: Path, tmp_path: Path) -> None:
    data = {"sources": [str(folder / "pairs")], "evaluation": str(folder / "pairs"), "class_names": ["red", "green"]}
    with pytest.raises(ValueError, match=r"no class names.*blue"):
        adapt(recipe(folder, data=data, steps=1), tmp_path)


def test_command_line_says_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="No recipe at"):
        command_line(["--recipe", str(tmp_path / "none.yaml")])
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values(folder)))
    with pytest.raises(SystemExit, match="Nothing to train"):
        command_line(["--recipe", str(path), "--set", "train_clip=false"])


@pytest.mark.slow
def test_the_chain_on_scenes(tmp_path: Path) -> None:
    sizes = {"train": 16, "evaluation": 4, "clip-steps": 2, "steps": 1, "adaptation-steps": 1, "train-pictures": 4}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    ledger = tmp_path / "ledger.jsonl"
    options += ["--max-evaluation", "2", "--min-score", "-1"]  # an untrained CLIP's cosines
    options += ["--ledger", str(ledger), "--output", str(tmp_path / "run")]
    on_scenes(options)
    on_scenes(options)  # nothing is left to do
    with pytest.raises(SystemExit, match=r"another recipe.*seed"):
        on_scenes([*options, "--seed", "1"])
    with pytest.raises(SystemExit, match=r"maskformer.*another recipe.*seed"):
        on_scenes([*options, "--seed", "1", "--clip", str(tmp_path / "run" / "clip")])
    entries = [json.loads(line) for line in ledger.read_text().splitlines()]
    names = ["maskformer", "fine_tuned", "prompts", "both"]
    assert [entry["name"] for entry in entries] == [f"ovseg_scenes_{name}" for name in names]
    assert all({"crops_top1", "miou"} <= set(entry["figures"]) for entry in entries)
