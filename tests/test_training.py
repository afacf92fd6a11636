"""The training loop: recipes, optimizer groups, order, checkpoints, faults, several processes, export."""

import copy
import json
import os
import pickle
import resource
import shutil
import signal
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, pipeline

import ov_segmentation  # noqa: F401  (registers the pipeline)
from ov_segmentation.data.augmentation import build_augmentations
from ov_segmentation.data.datasets import load_segmentation_data
from ov_segmentation.metrics import ConfusionMatrix
from ov_segmentation.models.san import convert_san
from ov_segmentation.models.san.modeling_san import SANForOpenVocabularySegmentation
from ov_segmentation.strict_mapping import RecipeError, from_mapping
from ov_segmentation.training.building import build_model_and_processor, select_trainable
from ov_segmentation.training.checkpointing import CheckpointError, CheckpointStore, TrainingState
from ov_segmentation.training.data_loading import BatchMaker, StepBatches, TrainingSamples, training_loader
from ov_segmentation.training.loop import Terminated, train
from ov_segmentation.training.optimization import build_optimizer, learning_rate_factor, parameter_settings
from ov_segmentation.training.recipe import Recipe, ScheduleRecipe, load_recipe, recipe_hash
from ov_segmentation.training.run_folder import RunFolderError
from ov_segmentation.training.trackers import read_log
from ov_segmentation.vocabulary import Vocabulary

from .tiny import TOKENIZER, tiny_clip_config
from .training_runs import NAMES, ROOT, launch, tiny_recipe, was_killed, write_pictures, write_recipe

RECIPES = sorted((ROOT / "examples/recipes").glob("san_*.yaml"))
FIXTURES = Path(__file__).parent / "fixtures/san"


def forget_accelerate():
    """Accelerate keeps one state per process, precision included."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


@pytest.fixture(autouse=True)
def _fresh_accelerate(monkeypatch):
    """Each test starts anew, on the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    forget_accelerate()
    yield
    forget_accelerate()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def tiny(pictures, **changes):
    return from_mapping(Recipe, tiny_recipe(pictures, **changes))


@pytest.fixture(scope="module")
def whole_run(pictures, tmp_path_factory):
    """A run of the tiny recipe that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    done = launch(write_recipe(folder / "tiny.yaml", tiny_recipe(pictures)), folder / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


def assert_same_run(first, second):
    assert (first / "log.jsonl").read_bytes() == (second / "log.jsonl").read_bytes()
    for name in ("model/model.safetensors", "checkpoints/step-00000008/model.safetensors"):
        weights, others = load_file(first / name), load_file(second / name)
        assert weights.keys() == others.keys()
        for key, value in weights.items():
            assert torch.equal(value, others[key]), key
    states = [torch.load(run / "checkpoints/step-00000008/optimizer.pt") for run in (first, second)]
    for one, other in zip(
        states[0]["optimizer"]["state"].values(), states[1]["optimizer"]["state"].values(), strict=True
    ):
        assert all(torch.equal(one[key], other[key]) for key in one)


# ---------------------------------------------------------------------- recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_project_are_valid(path):
    recipe = load_recipe(path)
    assert build_augmentations(recipe.augmentation)
    assert recipe_hash(recipe) != recipe_hash(load_recipe(path, ["seed=1"]))
    assert recipe_hash(recipe) == recipe_hash(load_recipe(path, ["num_workers=7"]))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optimizer.weight_dekay=0", "Unknown key 'optimizer.weight_dekay'.*'weight_decay'"),
        ("bach_size=2", "Unknown key 'bach_size'.*'batch_size'"),
        ("steps=many", "steps must be of type int, got 'many'"),
        ("steps=0", "steps must be at least 1"),
        ("precision=half", "precision must be one of 'no', 'bf16', 'fp16'"),
        ("accumulation=3", "multiple of accumulation 3"),
        ("augmentation.9.name=x", "list of 5, '9' is no index"),
        ("model.from_clip=null", None),
        ("model.model_type=null", "model needs from_pretrained"),
        ("model.from_pretrained=x", "stands alone"),
        ("optimizer={}", "lacks optimizer.lr"),
        ("seed", "key=value"),
    ],
)
def test_mistakes_in_recipes(tmp_path, assignment, message):
    file = write_recipe(tmp_path / "r.yaml", tiny_recipe(tmp_path))
    if message is None:
        assert load_recipe(file, [assignment]).model.from_clip is None
        return
    with pytest.raises(RecipeError, match=message):
        load_recipe(file, [assignment])


def test_overrides_are_yaml_and_scientific_numbers_are_numbers(tmp_path):
    file = write_recipe(tmp_path / "r.yaml", tiny_recipe(tmp_path))
    recipe = load_recipe(file, ["optimizer.lr=1e-4", "augmentation.1.height=8", "evaluation.patience=3"])
    assert recipe.optimizer.lr == 1e-4
    assert recipe.augmentation[1]["height"] == 8
    assert recipe.evaluation.patience == 3


# ---------------------------------------------------------------------- optimizer


@pytest.mark.parametrize("variant", ["san_vit_b_16", "san_vit_large_14"])
def test_groups_of_the_papers_recipes_are_those_of_the_released_logs(variant):
    recorded = json.loads((FIXTURES / f"optimizer_groups_{variant}.json").read_text())
    config = convert_san.VARIANTS[variant]()
    with torch.device("meta"):
        model = SANForOpenVocabularySegmentation(config)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    settings = parameter_settings(trained, load_recipe(ROOT / f"examples/recipes/{variant}_coco.yaml").optimizer)
    targets = convert_san.map_keys(recorded, config)
    expected = {target: (r["lr"], r["weight_decay"]) for key, r in recorded.items() for target in targets[key]}
    assert settings == expected


def test_first_fitting_group_counts_and_idle_ones_are_errors(pictures):
    optimizer = tiny(pictures).optimizer
    groups = [{"pattern": "bias$", "lr_multiplier": 0.1}, {"pattern": "norm", "weight_decay": 0.5}]
    recipe = from_mapping(type(optimizer), {"lr": 1.0, "weight_decay": 0.01, "groups": groups})
    settings = parameter_settings(["a.norm.bias", "a.norm.weight", "b.weight"], recipe)
    assert settings == {"a.norm.bias": (0.1, 0.01), "a.norm.weight": (1.0, 0.5), "b.weight": (1.0, 0.01)}
    with pytest.raises(RecipeError, match="'norm' is the first fit of no trained parameter"):
        parameter_settings(["a.norm.bias"], recipe)


def test_schedules():
    poly = ScheduleRecipe(name="poly", power=0.9)
    assert [learning_rate_factor(poly, step, 10) for step in (0, 5)] == [1.0, 0.5**0.9]
    cosine = ScheduleRecipe(name="cosine")
    assert learning_rate_factor(cosine, 5, 10) == pytest.approx(0.5)
    flat = ScheduleRecipe(name="constant", decay_from=0.5)
    assert [learning_rate_factor(flat, step, 8) for step in (0, 3, 6)] == [1.0, 1.0, 0.5]
    warm = ScheduleRecipe(name="constant", warmup_steps=3)
    assert [learning_rate_factor(warm, step, 100) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_what_is_trained(pictures):
    frozen = tiny_recipe(pictures)["model"]
    frozen["config"] = {**frozen["config"], "train_clip": False}
    model, _ = build_model_and_processor(tiny(pictures, model=frozen), [])
    assert not model.trains_text
    select_trainable(model, ["^side_adapter", "logit_scale"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "clip.logit_scale" in trained
    assert all(name.startswith("side_adapter") or name == "clip.logit_scale" for name in trained)
    assert sum(len(group["params"]) for group in build_optimizer(model, tiny(pictures).optimizer).param_groups) == len(
        trained
    )
    select_trainable(model, "all")
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(RecipeError, match=r"'sidecar' is no option .* finds none"):
        select_trainable(model, ["sidecar"])


def test_a_misspelt_field_of_the_model_is_found(pictures, tmp_path):
    """transformers would keep what a configuration does not know, and nothing would read it."""
    CLIPModel(CLIPConfig(**tiny_clip_config())).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    around = {"model_type": "san", "from_clip": str(tmp_path)}
    for model, tokenizer in (({"model_type": "san"}, "words"), (around, None)):
        nested = {"clip_config": {"vision_config": {"image_sise": 32}}}
        for config, told in (
            ({"num_querys": 3}, r"'num_querys'. Did you mean 'num_queries'"),
            (nested, r"'clip_config\.vision_config\.image_sise'. Did you mean 'image_size'"),
        ):
            recipe = tiny(pictures, model={**model, "config": config}, processor={"tokenizer": tokenizer})
            with pytest.raises(ValueError, match=told):
                build_model_and_processor(recipe, [])


# ---------------------------------------------------------------------- order and seeds


def test_order_depends_neither_on_processes_nor_on_where_a_run_starts():
    def steps(first, accumulation, processes):
        parts = [list(StepBatches(first, 6, 12, accumulation, process, processes)) for process in range(processes)]
        micro_batches = [[i for share in shares for i in share] for shares in zip(*parts, strict=True)]
        return [micro_batches[i : i + accumulation] for i in range(0, len(micro_batches), accumulation)]

    assert steps(0, 2, 1) == steps(0, 2, 3)
    assert steps(0, 2, 1)[4:] == steps(4, 2, 2)
    assert [list(chain(*step)) for step in steps(0, 1, 1)] == [list(chain(*step)) for step in steps(0, 3, 2)]
    with pytest.raises(RecipeError, match="multiple of 10"):
        StepBatches(0, 1, 12, accumulation=2, num_processes=5)


def test_every_epoch_sees_every_sample_once_and_workers_change_nothing(pictures):
    data = load_segmentation_data(pictures, class_names=NAMES, ignore_index=255)
    recipe = tiny(pictures)
    samples = TrainingSamples(data.split("train"), build_augmentations(recipe.augmentation), 3)
    order = [samples.order[position] for position in range(14)]
    assert [epoch for epoch, _ in order] == [0] * 7 + [1] * 7
    first, second = ([index for _, index in order[start : start + 7]] for start in (0, 7))
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    assert [samples.order[position] for position in range(13, -1, -1)] == order[::-1]
    # where worker processes are started anew instead of forked, samples are sent to them
    assert np.array_equal(pickle.loads(pickle.dumps(samples))[9].image, samples[9].image)
    processor = build_model_and_processor(recipe, [data.vocabulary])[1].image_processor
    runs = [list(training_loader(samples, StepBatches(1, 5, 4), BatchMaker(processor), n, False)) for n in (0, 2)]
    assert len(runs[0]) == 4
    for one, other in zip(*runs, strict=True):
        assert one.keys() == other.keys() >= {"pixel_values", "labels", "sample_seeds"}
        assert all(torch.equal(one[key], other[key]) for key in one)
    seeds = torch.cat([batch["sample_seeds"] for batch in runs[0]])
    assert len(seeds.unique()) == len(seeds)
    assert {-100} < set(torch.cat([b["labels"].flatten() for b in runs[0]]).tolist()) <= {-100, 0, 1, 2}


# ---------------------------------------------------------------------- whole runs


def test_killed_in_an_epoch_and_an_accumulation_a_run_continues_bit_by_bit(pictures, whole_run, tmp_path):
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_recipe(pictures))
    run = tmp_path / "run"
    # in step 5 of 8, after the first of its two micro-batches
    assert was_killed(launch(recipe, run, kill_after=9))
    assert CheckpointStore(run / "checkpoints", 2).steps() == [3]
    assert [line["step"] for line in read_log(run / "log.jsonl")] == [2, 4], "a line behind the checkpoint"
    assert not (run / "model").exists()
    # a kill between a checkpoint's files: what it leaves must not count
    (run / "checkpoints/step-00000004.tmp").mkdir()
    done = launch(recipe, run)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Continuing after optimizer step 3 of 8." in done.stdout + done.stderr
    assert_same_run(whole_run, run)
    assert not list((run / "checkpoints").glob("*.tmp"))


def test_the_exported_folder_loads_in_the_pipeline(whole_run):
    result = json.loads((whole_run / "result.json").read_text())
    assert {"miou", "seconds", "pixel_accuracy", "trainable_parameters"} <= result.keys()
    assert "hiou" not in result, "the classes of the evaluation are those of the training"
    with safe_open(whole_run / "model/model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["seed"] == "3"
    assert metadata["command"].startswith("accelerate launch examples/train.py --recipe")
    assert float(metadata["miou"]) == result["miou"]
    segment = pipeline("open-vocabulary-segmentation", model=str(whole_run / "model"))
    picture = Image.new("RGB", (48, 40), (90, 140, 220))
    found = segment(picture, candidate_labels=NAMES, output_type="map")
    assert found["segmentation"].shape == (40, 48)


def test_log_holds_losses_rates_and_scores(whole_run):
    lines = read_log(whole_run / "log.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 5, 6, 8, 8]
    train_lines = [line for line in lines if "train/loss" in line]
    terms = [sum(v for k, v in line.items() if k.startswith("train/loss_")) for line in train_lines]
    assert terms == pytest.approx([line["train/loss"] for line in train_lines], rel=1e-5)
    assert [line["train/lr"] for line in train_lines][1:] == pytest.approx(
        [1e-3 * (1 - s / 8) ** 0.9 for s in (3, 5, 7)]
    )
    assert [0 <= line["evaluation/miou"] <= 1 for line in lines if "evaluation/miou" in line] == [True, True]


def test_a_checkpoint_holds_the_scale_of_fp16_gradients(tmp_path):
    accelerator, model = Accelerator(cpu=True), torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    store = CheckpointStore(tmp_path, 1)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    accelerator.scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    accelerator.scaler.step(optimizer)
    accelerator.scaler.update()
    saved = accelerator.scaler.state_dict()
    assert (saved["scale"], saved["_growth_tracker"]) == (1024.0, 1)
    store.save(accelerator, model, optimizer, TrainingState(step=1))
    accelerator.scaler = torch.amp.GradScaler("cpu")
    store.load(accelerator, model, optimizer, 1)
    assert accelerator.scaler.state_dict() == saved


def send_during_step(monkeypatch, step, number):
    """A real signal to this process in the first forward of optimizer step `step`."""
    calls, forward = [0], SANForOpenVocabularySegmentation.forward

    def signalled(self, *args, **kwargs):
        calls[0] += self.training
        if self.training and calls[0] == 2 * step + 1:
            os.kill(os.getpid(), number)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(SANForOpenVocabularySegmentation, "forward", signalled)


def test_sigterm_saves_a_full_disk_spoils_nothing_and_the_run_goes_on(pictures, whole_run, tmp_path, monkeypatch):
    recipe, run = tiny(pictures, num_workers=0), tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        send_during_step(patched, 1, signal.SIGTERM)
        with pytest.raises(Terminated) as stopped:
            train(recipe, run)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    store = CheckpointStore(run / "checkpoints", 2)
    assert store.steps() == [2]

    saved = (store.path(2) / "model.safetensors").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(saved) // 2, hard))  # the kernel refuses larger files
    try:
        with pytest.raises(
            CheckpointError, match=r"step-00000003 could not be written.*What was saved before is intact"
        ):
            train(recipe, run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    assert (store.path(2) / "model.safetensors").read_bytes() == saved

    train(recipe, run)
    assert_same_run(whole_run, run)


def test_ctrl_c_saves_and_a_second_one_ends_at_once(pictures, tmp_path):
    """Step 4 of 8 has two micro-batches: the signal comes in the last one, or in both."""
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_recipe(pictures))
    for calls, code, steps in ((7, 130, [3, 4]), (6, -signal.SIGINT, [3])):
        run = tmp_path / str(calls)
        done = launch(recipe, run, kill_after=calls, number=signal.SIGINT)
        assert done.returncode == code, done.stderr[-3000:]
        assert CheckpointStore(run / "checkpoints", 2).steps() == steps
        assert done.stderr.count("Ctrl-C again ends it at once") == 1
        assert ("Stopped by SIGINT after step 4; the same command continues" in done.stdout) == (code == 130)
        assert ("Traceback" in done.stderr) == (code != 130)


def brief(pictures, **changes):
    """One step, no evaluation, no workers."""
    data = {**tiny_recipe(pictures)["data"], "eval_split": None}
    return tiny(pictures, **{"num_workers": 0, "steps": 1, "log_interval": 1, "data": data, **changes})


def test_a_run_folder_belongs_to_one_recipe(pictures, tmp_path):
    run, recipe = tmp_path / "run", brief(pictures)
    train(recipe, run)
    with pytest.raises(RunFolderError, match=r"another recipe; they differ in optimizer.lr, seed"):
        train(brief(pictures, seed=4, optimizer={**tiny_recipe(pictures)["optimizer"], "lr": 1}), run)
    with pytest.raises(RunFolderError, match="is not empty"):
        train(recipe, run, resume="never")
    # a start that failed takes the folder from nobody
    with pytest.raises(FileNotFoundError):
        train(brief(tmp_path / "pictuers"), tmp_path / "typed")
    assert (tmp_path / "typed/recipe.yaml").is_file()
    train(recipe, tmp_path / "typed")
    assert (tmp_path / "typed/result.json").is_file()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").touch()
    with pytest.raises(RunFolderError, match=r"chapter\.tex but no recipe\.yaml"):
        train(recipe, tmp_path / "thesis")


def test_a_run_that_is_over_leaves_what_it_exported_alone(pictures, tmp_path):
    run, recipe = tmp_path / "run", brief(pictures)
    result = train(recipe, run)
    card = run / "model/README.md"
    card.write_text(card.read_text() + "My own words.\n")
    assert train(recipe, run) == result
    assert card.read_text().endswith("My own words.\n")
    shutil.rmtree(run / "model")
    train(recipe, run)
    assert card.is_file(), "exported again"


def test_a_group_that_does_not_learn_is_logged_with_the_rate_of_the_others(pictures, tmp_path):
    groups = [{"pattern": "^background", "lr_multiplier": 0.0}, {"pattern": ".", "lr_multiplier": 2.0}]
    train(brief(pictures, optimizer={"lr": 1e-3, "groups": groups}, schedule={"name": "constant"}), tmp_path / "run")
    assert read_log(tmp_path / "run/log.jsonl")[0]["train/lr"] == 1e-3


def test_a_damaged_checkpoint_is_named(pictures, tmp_path):
    recipe = brief(pictures)
    train(recipe, tmp_path / "run")
    file = tmp_path / "run/checkpoints/step-00000001/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"step-00000001 cannot be read.*delete that folder"):
        train(recipe, tmp_path / "run")


def without_dropout(recipe):
    """Every process and every micro-batch draws dropout masks of its own."""
    recipe = copy.deepcopy(recipe)
    for tower in ("vision_config", "text_config"):
        recipe["model"]["config"]["clip_config"][tower]["attention_dropout"] = 0.0
    return recipe


def test_micro_batches_give_what_one_batch_gives(tmp_path):
    """Where annotations are uneven too: one of the pictures has none."""
    pictures = write_pictures(tmp_path / "pictures", 4)
    Image.new("L", (48, 40), 255).save(pictures / "annotations/train/2.png")
    recipe = without_dropout(tiny_recipe(pictures))
    logs = []
    for accumulation in (1, 2):
        changes = {"model": recipe["model"], "accumulation": accumulation}
        train(brief(pictures, **changes), tmp_path / f"run-{accumulation}")
        logs.append(read_log(tmp_path / f"run-{accumulation}/log.jsonl")[0])
    assert {"train/loss", "train/loss_ce", "train/loss_mask", "train/grad_norm"} <= logs[0].keys()
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_two_processes_give_what_one_gives(pictures, tmp_path):
    changes = {"num_workers": 0, "steps": 3, "log_interval": 1, "accumulation": 1}
    recipe = without_dropout(tiny_recipe(pictures, **changes))
    file = write_recipe(tmp_path / "tiny.yaml", recipe)
    done = launch(file, tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    train(load_recipe(file), tmp_path / "one")
    assert json.loads((tmp_path / "two/result.json").read_text())["processes"] == 2
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    for one, two in zip(*logs, strict=True):
        assert one == pytest.approx(two, rel=1e-5, abs=1e-7) if "train/loss" in one else one == two
    # a checkpoint of two processes continues on one
    shutil.rmtree(tmp_path / "two/model")
    assert train(load_recipe(file), tmp_path / "two")["processes"] == 1


def test_trackers(pictures, tmp_path):
    with pytest.raises(ImportError, match="asks for the tracker 'comet_ml', which is not installed"):
        train(brief(pictures, trackers=["comet_ml"]), tmp_path / "run")
    train(brief(pictures, trackers=["tensorboard"]), tmp_path / "run")
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_losses_with_activation_checkpointing_are_the_same(pictures, tmp_path):
    model = tiny_recipe(pictures)["model"]
    for name, options in (("plain", {}), ("checkpointed", {"activation_checkpointing": True})):
        train(brief(pictures, steps=3, model={**model, **options}), tmp_path / name)
    assert read_log(tmp_path / "plain/log.jsonl") == read_log(tmp_path / "checkpointed/log.jsonl")


def test_precision(pictures, tmp_path):
    train(brief(pictures), tmp_path / "no")
    train(brief(pictures, precision="bf16"), tmp_path / "bf16")  # in the same process, as in a notebook
    exact, rounded = (read_log(tmp_path / name / "log.jsonl")[0]["train/loss"] for name in ("no", "bf16"))
    assert exact != rounded
    assert exact == pytest.approx(rounded, rel=0.05)
    with pytest.raises(RecipeError, match="fp16 needs a GPU"):
        train(brief(pictures, precision="fp16"), tmp_path / "fp16")


def test_around_a_clip_and_evaluated_with_another_vocabulary(pictures, tmp_path):
    recipe = tiny_recipe(pictures)
    scratch, processor = build_model_and_processor(tiny(pictures), [Vocabulary(NAMES)])
    scratch.clip.save_pretrained(tmp_path / "clip")
    processor.tokenizer.save_pretrained(tmp_path / "clip")
    names = [["sky", "clouds"], "road", "lorry", "tree"]
    changes = {
        "model": {
            "model_type": "san",
            "from_clip": str(tmp_path / "clip"),
            "config": {k: v for k, v in recipe["model"]["config"].items() if k not in ("clip_config", "train_clip")},
        },
        "processor": {**recipe["processor"], "tokenizer": None},
        "data": recipe["data"],
        "evaluation": {"interval": 5, "max_samples": 2, "data": {**recipe["data"], "class_names": names}},
    }
    result = train(brief(pictures, **changes), tmp_path / "run")
    # two of three classes in these pictures have a name that was trained
    assert result["miou"] == pytest.approx((2 * result["miou_seen"] + result["miou_unseen"]) / 3)
    assert "hiou" in result
    trained = load_file(tmp_path / "run/model/model.safetensors")
    changed = {
        name for name, value in scratch.clip.state_dict().items() if not torch.equal(trained[f"clip.{name}"], value)
    }
    assert changed == {"vision_model.embeddings.position_embedding.weight"}, "the rest of CLIP is frozen"


@pytest.mark.parametrize("method", ["sed"])
def test_a_tokenizer_of_words_fits_models_without_a_whole_clip(method):
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    recipe = tiny_recipe(Path("nowhere"))
    recipe |= {
        "model": {"model_type": method, "config": {"text_config": {**text, "projection_dim": 8}}},
        "processor": {"tokenizer": "words", "templates": ["a {}"]},
    }
    with torch.device("meta"):
        model, processor = build_model_and_processor(from_mapping(Recipe, recipe), [Vocabulary(NAMES)])
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    assert model.config.text_config.eos_token_id == processor.tokenizer.eos_token_id


def test_best_weights_are_kept_and_exported_and_patience_stops(pictures, tmp_path, monkeypatch):
    scores = iter([0.1, 0.7, 0.6, 0.5, 0.9])

    def scored(*args, **kwargs):
        matrix = ConfusionMatrix(2)
        score = next(scores)
        matrix.counts[0, 0], matrix.counts[0, 2] = int(1000 * score), 1000 - int(1000 * score)
        return matrix.compute()

    monkeypatch.setattr("ov_segmentation.training.loop.evaluate", scored)
    recipe = tiny(
        pictures,
        num_workers=0,
        steps=5,
        evaluation={"interval": 1, "patience": 2},
        checkpoint={"interval": 100, "total_limit": 1},
        export={"weights": "best", "dtype": "bfloat16"},
    )
    result = train(recipe, tmp_path / "run")
    assert (result["steps"], result["best_step"], result["exported_step"]) == (4, 2, 2)
    assert result["miou"] == result["best_miou"] == 0.7, "the figures are those of what is exported"
    assert CheckpointStore(tmp_path / "run/checkpoints", 1).steps() == [2, 4]
    exported = load_file(tmp_path / "run/model/model.safetensors")
    best = load_file(tmp_path / "run/checkpoints/step-00000002/model.safetensors")
    assert torch.equal(exported.pop("clip.logit_scale"), best["clip.logit_scale"])
    assert all(torch.equal(value, best[key].bfloat16()) for key, value in exported.items())
    assert SANForOpenVocabularySegmentation.from_pretrained(tmp_path / "run/model").dtype == torch.bfloat16


def test_a_trained_model_is_fine_tuned_with_its_own_processor(pictures, whole_run, tmp_path):
    model = {"from_pretrained": str(whole_run / "model"), "trainable": ["background_embedding"]}
    recipe = tiny(pictures, num_workers=0, steps=2, model=model, processor={}, optimizer={"lr": 0.1})
    train(recipe, tmp_path / "run")
    before, after = (load_file(folder / "model/model.safetensors") for folder in (whole_run, tmp_path / "run"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"background_embedding"}
    old, new = (json.loads((f / "model/processor_config.json").read_text()) for f in (whole_run, tmp_path / "run"))
    assert old == new


def test_a_loss_that_is_no_number_stops_the_run(pictures, tmp_path):
    recipe = tiny(pictures, num_workers=0, optimizer={"lr": 1e30}, clip_grad_norm=None, steps=4, log_interval=1)
    with pytest.raises(FloatingPointError, match="Lower the learning rate"):
        train(recipe, tmp_path / "run")


def test_a_gradient_that_is_no_number_spoils_no_checkpoint(pictures, tmp_path, monkeypatch):
    calls, forward = [], SANForOpenVocabularySegmentation.forward

    def spoiled(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        calls.append(outputs)
        if len(calls) == 2:  # adds nothing, and the derivative of the root is infinite there
            outputs.loss = outputs.loss + (0 * self.background_embedding.sum()).sqrt()
        return outputs

    monkeypatch.setattr(SANForOpenVocabularySegmentation, "forward", spoiled)
    recipe = brief(pictures, steps=3, accumulation=1, checkpoint={"interval": 1})
    with pytest.raises(FloatingPointError, match=r"after optimizer step 2\. .*The last checkpoint is intact"):
        train(recipe, tmp_path / "run")
    assert CheckpointStore(tmp_path / "run/checkpoints", 2).steps() == [1]
