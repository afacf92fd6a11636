"""A tiny data set and a tiny SAN recipe for the real training loop, in this process or in processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["sky", "road", "car"]
PICTURES = 7

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 8,
}
MODEL = {
    "train_clip": True,
    "clip_input_scale": 1.0,
    "clip_config": {
        "projection_dim": 8,
        # dropout in both towers: its draws have to be repeatable too
        "vision_config": {**TOWER, "image_size": 32, "patch_size": 8, "attention_dropout": 0.1},
        "text_config": {**TOWER, "max_position_embeddings": 16, "attention_dropout": 0.1},
    },
    "num_feature_layers": 1,
    "num_recognition_layers": 1,
    "fusion_map": [[0, 0]],
    "side_hidden_size": 16,
    "side_num_layers": 2,
    "side_num_attention_heads": 2,
    "side_patch_size": 8,
    "side_image_size": 32,
    "num_queries": 5,
    "mask_embed_dim": 8,
    "mask_hidden_dim": 8,
    "num_points": 64,
}


def write_pictures(root: Path, count: int = PICTURES) -> Path:
    """A local tree of `count` pictures of 48 x 40 with two splits; colour tells the class."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            ids = generator.integers(0, 3, (5, 6)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            colours = np.array([[90, 140, 220], [100, 100, 100], [200, 40, 40]])[ids]
            noisy = np.clip(colours + generator.normal(0, 10, colours.shape), 0, 255).astype(np.uint8)
            ids[:4] = 255
            Image.fromarray(noisy).save(root / "images" / split / f"{index}.png")
            Image.fromarray(ids).save(root / "annotations" / split / f"{index}.png")
    return root


def tiny_recipe(pictures: Path, **changes: Any) -> dict[str, Any]:
    """Augmentation, dropout, two workers, accumulation 2; logging, evaluation and checkpoints at different steps."""
    recipe = {
        "model": {"model_type": "san", "attention": "eager", "config": MODEL},
        "processor": {
            "tokenizer": "words",
            "templates": ["a photo of a {}.", "the {}"],
            "image_processor": {"size": {"shortest_edge": 32}, "pad_multiple": 8},
        },
        "data": {"name": str(pictures), "eval_split": "val", "class_names": NAMES, "ignore_index": 255},
        "augmentation": [
            {"name": "resize_short_side", "sizes": [24, 32, 40]},
            {"name": "random_crop", "height": 32, "width": 32},
            {"name": "colour_jitter"},
            {"name": "horizontal_flip"},
            {"name": "pad_to_size", "height": 32, "width": 32},
        ],
        "optimizer": {"lr": 1e-3, "weight_decay": 0.01, "groups": [{"pattern": "norm|bias$", "weight_decay": 0.0}]},
        "schedule": {"name": "poly", "warmup_steps": 2},
        "steps": 8,
        "batch_size": 4,
        "accumulation": 2,
        "clip_grad_norm": 1.0,
        "threads": 1,
        "num_workers": 2,
        "seed": 3,
        "log_interval": 2,
        "evaluation": {"interval": 5, "max_samples": 3},
        "checkpoint": {"interval": 3, "total_limit": 2},
    }
    return {**recipe, **changes}


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(recipe))
    return path


SIGNAL_IN_FORWARD = """
import os, signal, sys
from ov_segmentation.models.san.modeling_san import SANForOpenVocabularySegmentation as Model
from examples.train import main
calls, forward = 0, Model.forward
def counted(self, *args, **kwargs):
    global calls
    calls += self.training
    if calls > {calls}:
        os.killpg(0, {number})
    return forward(self, *args, **kwargs)
Model.forward = counted
main(sys.argv[1:])
"""


def launch(
    recipe: Path, output: Path, *, kill_after: int | None = None, number: int = signal.SIGKILL, processes: int = 1
) -> subprocess.CompletedProcess:
    """`examples/train.py` in processes of its own; `kill_after`: in each training forward behind so many, signal
    `number` to it and its workers, as a terminal sends it."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    if kill_after is not None:
        start = [sys.executable, "-c", SIGNAL_IN_FORWARD.format(calls=kill_after, number=int(number))]
    elif processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0"]
        start += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "examples/train.py"]
    else:
        start = [sys.executable, "examples/train.py"]
    command = [*start, "--recipe", str(recipe), "--output", str(output)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, start_new_session=True
    )


def was_killed(done: subprocess.CompletedProcess) -> bool:
    return done.returncode == -signal.SIGKILL
