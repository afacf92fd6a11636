"""Fine-tuning on pictures of one's own: what is held out and kept, low-rank updates, the command, the notebook; and
configurations for several GPUs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image
from safetensors.torch import load_file

from examples import finetune
from examples.train import main
from ov_segmentation import ledger
from ov_segmentation.data.datasets import load_segmentation_data
from ov_segmentation.models.san.modeling_san import SANForOpenVocabularySegmentation
from ov_segmentation.strict_mapping import RecipeError, from_mapping
from ov_segmentation.training.fine_tuning import fine_tuning_recipe
from ov_segmentation.training.loop import Terminated, train, training_pictures
from ov_segmentation.training.recipe import DataRecipe, Recipe, load_recipe, recipe_hash, recipe_values
from ov_segmentation.training.run import deepspeed_values
from ov_segmentation.training.trackers import read_log
from tools.run_notebook import run_cell

from .test_training import brief, forget_accelerate, send_during_step
from .training_runs import NAMES, ROOT, tiny_recipe, write_pictures, write_recipe

MODEL = str(ROOT / "assets" / "san_scenes")
NOTEBOOK = ROOT / "notebooks" / "finetune_on_twenty_pictures.ipynb"


@pytest.fixture(autouse=True)
def _fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    forget_accelerate()
    yield
    forget_accelerate()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As somebody would hand it over: `images/`, `masks/`, `class_names.json`, no splits."""
    root = write_pictures(tmp_path_factory.mktemp("mine"))
    for kind, name in (("images", "images"), ("annotations", "masks")):
        (root / kind / "train").rename(root / f"{name}.new")
        for file in sorted((root / kind / "val").iterdir()):
            file.unlink()
        (root / kind / "val").rmdir()
        (root / kind).rmdir()
        (root / f"{name}.new").rename(root / name)
    (root / "class_names.json").write_text(json.dumps(NAMES))
    return root


# ---------------------------------------------------------------------- recipes


def test_new_fields_leave_the_hash_of_other_recipes_alone(pictures: Path) -> None:
    values = recipe_values(from_mapping(Recipe, tiny_recipe(pictures)))
    assert "lora" not in values["model"]
    assert not {"holdout", "train_samples"} & set(values["data"])
    assert "at_start" not in values["evaluation"]
    assert from_mapping(Recipe, values) == from_mapping(Recipe, tiny_recipe(pictures))
    with_lora = tiny_recipe(pictures)
    with_lora["model"] = {**with_lora["model"], "trainable": "lora", "lora": {"rank": 4}}
    changed = from_mapping(Recipe, with_lora)
    assert recipe_values(changed)["model"]["lora"]["rank"] == 4
    assert recipe_hash(changed) != recipe_hash(from_mapping(Recipe, tiny_recipe(pictures)))


def test_what_is_held_out_is_not_trained_on(pictures: Path) -> None:
    data = load_segmentation_data(pictures, class_names=NAMES, ignore_index=255)

    def files(seed: int, **fields: Any) -> tuple[list[str], list[str]]:
        recipe = DataRecipe(name="x", eval_split=None, **fields)
        parts = training_pictures(data, recipe, seed)
        return tuple([part.file_name(i) for i in range(len(part))] for part in parts)

    trained, held = files(0, holdout=2)
    assert len(held) == 2
    assert sorted(trained + held) == [f"{i}.png" for i in range(7)]
    assert files(0, holdout=2) == (trained, held)
    assert len({tuple(files(seed, holdout=2)[1]) for seed in range(5)}) > 1
    trained, held = files(0, holdout=1, train_samples=3)
    assert sorted(trained + held) == ["0.png", "3.png", "6.png"]
    with pytest.raises(RecipeError, match="7 of 7 pictures leave none"):
        files(0, holdout=7)
    with pytest.raises(RecipeError, match=r"eval_split.*set it to null"):
        DataRecipe(name="x", holdout=2)
    with pytest.raises(RecipeError, match="train_samples must be at least 1"):
        DataRecipe(name="x", train_samples=0)


def test_a_recipe_for_ones_own_pictures(folder: Path, pictures: Path) -> None:
    recipe = fine_tuning_recipe(MODEL, folder, ignore_index=255)
    assert (recipe.data.holdout, recipe.data.eval_split, recipe.model.trainable) == (1, None, "adapter")
    assert recipe.augmentation[1] == {"name": "random_crop", "height": 96, "width": 128}
    assert recipe.processor.image_processor == {}
    recipe = fine_tuning_recipe(MODEL, pictures, class_names=NAMES, trainable=["prompts", "lora"], short_side=200)
    assert (recipe.data.holdout, recipe.data.eval_split) == (None, "val")
    assert recipe.processor.image_processor["size"] == {"shortest_edge": 200, "longest_edge": 800}
    with pytest.raises(ValueError, match=r"no column 'photo'"):
        fine_tuning_recipe(MODEL, pictures, class_names=NAMES, image_column="photo")
    columns = {"image_column": "image", "annotation_column": "annotation", "reduce_labels": True}
    recipe = fine_tuning_recipe(MODEL, pictures, class_names=NAMES, **columns)
    assert {name: getattr(recipe.data, name) for name in columns} == columns
    recipe = fine_tuning_recipe(MODEL, pictures, class_names=NAMES, pictures=5)
    assert (recipe.data.holdout, recipe.data.eval_split, recipe.data.train_samples) == (1, None, 5)
    with pytest.raises(RecipeError, match="1 labelled picture"):
        fine_tuning_recipe(MODEL, pictures, class_names=NAMES, pictures=1)


# ---------------------------------------------------------------------- runs


def test_low_rank_updates_survive_a_stop_and_are_merged_at_the_end(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {**tiny_recipe(pictures)["model"], "trainable": "lora", "lora": {"rank": 2, "dropout": 0.1}}
    recipe = brief(pictures, steps=3, model=model, optimizer={"lr": 0.05})
    train(recipe, tmp_path / "whole")
    forget_accelerate()
    with monkeypatch.context() as patched:
        send_during_step(patched, 1, signal.SIGTERM)
        with pytest.raises(Terminated):
            train(recipe, tmp_path / "parts")
    forget_accelerate()
    checkpoint = load_file(tmp_path / "parts/checkpoints/step-00000002/model.safetensors")
    assert any("lora_A" in name for name in checkpoint)
    train(recipe, tmp_path / "parts")
    whole, parts = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())

    monkeypatch.setitem(sys.modules, "peft", None)
    exported = SANForOpenVocabularySegmentation.from_pretrained(tmp_path / "whole/model")
    assert not [name for name in exported.state_dict() if "lora" in name or "base_layer" in name]
    first = tmp_path / "start"
    forget_accelerate()
    train(brief(pictures, steps=1, model={**model, "trainable": "adapter", "lora": None}), first)
    start = load_file(first / "model/model.safetensors")
    changed = {k for k, value in whole.items() if k.startswith("clip.") and not torch.equal(value, start[k])}
    assert changed == {
        f"clip.vision_model.encoder.layers.{i}.self_attn.{part}_proj.weight" for i in (0, 1) for part in "qv"
    }


def test_the_start_is_scored_and_kept_where_nothing_is_better(pictures: Path, tmp_path: Path) -> None:
    """A learning rate that ruins the model: what is exported is what it began with."""
    fields = {
        "data": {**tiny_recipe(pictures)["data"], "eval_split": None, "holdout": 2},
        "evaluation": {"interval": 1, "patience": 2, "at_start": True},
        "export": {"weights": "best"},
    }
    model = {"from_pretrained": MODEL, "trainable": "adapter"}
    processor = {"image_processor": {"size": {"shortest_edge": 32, "longest_edge": 64}}}
    options = {**fields, "model": model, "processor": processor, "clip_grad_norm": None}
    result = train(brief(pictures, steps=9, optimizer={"lr": 0.5}, **options), tmp_path / "run")
    lines = [line for line in read_log(tmp_path / "run/log.jsonl") if "evaluation/miou" in line]
    assert lines[0]["step"] == 0
    assert result["initial_miou"] == lines[0]["evaluation/miou"]
    scores = [line["evaluation/miou"] for line in lines]
    best = max(range(len(scores)), key=lambda i: (scores[i], -i))
    assert result["exported_step"] == lines[best]["step"]
    assert result["steps"] == min(9, lines[best]["step"] + 2), "two evaluations without a gain end it"


def test_the_command_and_what_it_records(
    folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--model", MODEL, "--data", str(pictures), "--names", str(folder / "class_names.json")]
    arguments += ["--ignore-index", "255", "--pictures", "5", "--short-side", "32", "--steps", "2", "--batch-size", "2"]
    arguments += ["--threads", "1", "--trainable", "prompts", "attention", "--test-split", "val"]
    finetune.main([*arguments, "--output", str(tmp_path / "run"), f"--ledger={tmp_path / 'results.jsonl'}"])
    printed = capsys.readouterr().out
    assert "held-out pictures: mIoU" in printed
    assert all(name in printed for name in NAMES)
    entry = ledger.read(tmp_path / "results.jsonl")[0]
    assert entry["command"].startswith("python examples/finetune.py --model")
    assert not {"--output", "--ledger"} & set(entry["command"].split())
    assert (entry["method"], entry["trainable"], entry["pictures"]) == ("san", "prompts + attention", 5)
    assert {"test_miou_before", "test_miou", "held_out_miou", "trainable_parameters"} <= entry["figures"].keys()
    assert (tmp_path / "run/model/README.md").is_file()


def test_a_class_that_does_not_occur_has_no_score() -> None:
    assert [finetune.percent(share) for share in (0.256, float("nan"))] == ["25.6%", "-"]


def test_held_out_pictures_without_a_label_are_named_before_the_first_step(pictures: Path, tmp_path: Path) -> None:
    data = shutil.copytree(pictures, tmp_path / "data")
    for file in (data / "annotations/val").iterdir():
        Image.fromarray(np.full((40, 48), 255, dtype=np.uint8)).save(file)
    recipe = fine_tuning_recipe(MODEL, data, class_names=NAMES, ignore_index=255, short_side=32, steps=1, threads=1)
    with pytest.raises(ValueError, match=r"no miou: none of its pictures has a labelled pixel"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run/checkpoints").exists()


def test_two_processes_train_and_one_scores_the_test_split(folder: Path, pictures: Path, tmp_path: Path) -> None:
    arguments = ["--model", MODEL, "--data", str(pictures), "--names", str(folder / "class_names.json")]
    arguments += ["--ignore-index", "255", "--short-side", "32", "--steps", "1", "--batch-size", "2", "--threads", "1"]
    arguments += ["--test-split", "val", "--ledger", str(tmp_path / "results.jsonl"), "--output", str(tmp_path / "run")]
    environment = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*start, "examples/finetune.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[:3000]
    assert json.loads((tmp_path / "run/result.json").read_text())["processes"] == 2
    assert done.stdout.count("held-out pictures:") == done.stdout.count("(val, ") == 1
    assert len(ledger.read(tmp_path / "results.jsonl")) == 1


def test_what_is_trained_is_an_option_of_the_training_command_too(pictures: Path, tmp_path: Path) -> None:
    values = tiny_recipe(pictures, steps=1, num_workers=0)
    file = write_recipe(tmp_path / "tiny.yaml", {**values, "data": {**values["data"], "eval_split": None}})
    main(["--recipe", str(file), "--output", str(tmp_path / "run"), "--trainable", "prompts", "^side_adapter.*fc2"])
    recipe = load_recipe(tmp_path / "run/recipe.yaml")
    assert recipe.model.trainable == ["prompts", "^side_adapter.*fc2"]
    queries, side, width, layers = 5, 16, 8, 2
    updated = json.loads((tmp_path / "run/result.json").read_text())["trainable_parameters"]
    assert updated == 2 * queries * side + width + layers * (4 * side * side + side)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--trainable", "adaptor"], "model.trainable must be one of 'method', 'adapter', 'prompts'"),
        (["--data", "/nowhere"], "There is no folder"),
        (["--model", str(ROOT / "assets/clip_vit_scenes")], "from_clip"),
        (["--ledger", "x.jsonl"], "give that too"),
    ],
)
def test_mistakes_on_the_command_line(folder: Path, tmp_path: Path, changes: list[str], message: str) -> None:
    arguments = ["--model", MODEL, "--data", str(folder), "--ignore-index", "255", "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        finetune.main([*arguments, *changes])
    assert message in str(stopped.value)


def code_cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("own", [False, True], ids=["splits", "own folder"])
def test_the_notebook_runs(
    own: bool, pictures: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cells, in one namespace, with small values in the place of those in its cell of parameters."""
    monkeypatch.chdir(NOTEBOOK.parent)
    values = {"DATA": str(pictures), "NAMES": NAMES, "PICTURES": 5, "TEST_SPLIT": "val"}
    if own:
        values = {"DATA": str(folder), "NAMES": None, "PICTURES": None, "TEST_SPLIT": None}
    values |= {"IGNORED": 255, "OUTPUT": str(tmp_path / "run"), "SHORT_SIDE": 32, "STEPS": 2}
    namespace: dict[str, Any] = {}
    printed = ""
    for cell in code_cells():
        printed += run_cell("".join(cell["source"]), namespace)
        if "parameters" in cell["metadata"].get("tags", []):
            assert values.keys() <= namespace.keys()
            namespace.update(values)
    assert (tmp_path / "run/model/config.json").is_file()
    assert "held-out pictures: mIoU" in printed and ("mIoU " in printed.partition("CPU minutes")[2]) == (not own)


def test_the_notebook_shows_results_and_no_paths_of_a_machine() -> None:
    text = NOTEBOOK.read_text()
    assert len(text) < 40_000
    assert not [word for word in ("/work/", "/home/", "/root/", "/tmp/", "image/png") if word in text]
    assert all(cell["execution_count"] for cell in code_cells())
    assert "mIoU" in "".join(line for cell in code_cells() for out in cell["outputs"] for line in out.get("text", []))


# ---------------------------------------------------------------------- several GPUs


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("deepspeed_zero2", "DEEPSPEED")])
def test_accelerate_reads_the_configurations(name: str, kind: str) -> None:
    """Its own class refuses keys that it does not know."""
    file = ROOT / "examples" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert config.distributed_type.value == kind
    assert not config.use_cpu
    assert config.mixed_precision == "no", "the recipe says"
    if kind == "FSDP":
        options = {name.removeprefix("fsdp_"): value for name, value in config.fsdp_config.items()}
        options["cpu_offload"] = options.pop("offload_params")
        version = options.pop("version")
        plugin = FullyShardedDataParallelPlugin(fsdp_version=version, **options)
        assert plugin.fsdp_version == 2
        # the methods run parts of CLIP's blocks by themselves: the whole model has to be one unit
        assert plugin.auto_wrap_policy is None
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == 2
    assert "not run on GPUs" in file.read_text() or "untested" in file.read_text()


def test_deepspeed_is_told_what_the_recipe_says(pictures: Path) -> None:
    recipe = from_mapping(Recipe, tiny_recipe(pictures, batch_size=16, accumulation=2, clip_grad_norm=None))
    assert deepspeed_values(recipe, 4) == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
    }


def test_label_map_folders_of_other_names(folder: Path) -> None:
    data = load_segmentation_data(folder, ignore_index=255)
    assert data.vocabulary.labels == NAMES
    assert len(data.split("train")) == 7
    assert set(np.unique(data.split("train")[0].label_map)) == {-100, 0, 1, 2}
