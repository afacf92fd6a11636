"""The scenes on disk: a folder to train on, which names tier a alone, and one to evaluate all tiers on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..atomic_files import TEMPORARY, write_atomically
from .scene_vocabulary import TIERS
from .scenes_dataset import scenes_dataset

TRAIN_FOLDER, EVALUATION_FOLDER = "train", "evaluation"
WORLD_FILE = "scenes.json"
STANDARD_WORLD = {"size": 96, "geometry": "easy", "difficulty": "standard"}
"""What scenes are like unless [`write_scenes`] is told otherwise."""


def write_scenes(output: str | Path, num_train: int, num_evaluation: int, seed: int = 0, **scenes: Any) -> None:
    """Write `<output>/train` and `<output>/evaluation`, folders that `load_dataset` reads.

    `train` holds a `train` and a `validation` split of scenes composed of tier a, whose class names are those of tier a
    and no others. `evaluation` holds one `validation` split with scenes of all tiers and all class names.

    Args:
        num_train, num_evaluation: scenes; `train`'s own validation split has an eighth of `num_evaluation`.
        seed: training, validation and evaluation scenes come from seeds of their own that follow from it.
        scenes: `vocabulary`, `size`, `geometry`, `difficulty`, see [`scenes_dataset`]. What they are stands in
            `<output>/scenes.json` too, see [`world_suffix`].
    """
    parts = (
        (TRAIN_FOLDER, "train", num_train, TIERS[:1]),
        (TRAIN_FOLDER, "validation", max(1, num_evaluation // 8), TIERS[:1]),
        (EVALUATION_FOLDER, "validation", num_evaluation, TIERS),
    )
    for number, (folder, split, num, tiers) in enumerate(parts, start=1):
        data = Path(output) / folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        rows = scenes_dataset(num, len(parts) * seed + number, tiers, name_tiers_only=True, **scenes)
        file = data / f"{split}-00000-of-00001.parquet"
        partial = file.with_name(file.name + TEMPORARY)
        rows.to_parquet(partial)
        partial.replace(file)  # a file that is there is whole
    world = {name: scenes.get(name, standard) for name, standard in STANDARD_WORLD.items()}
    write_atomically(Path(output) / WORLD_FILE, json.dumps({**world, "seed": seed}, indent=1) + "\n")


def world_suffix(folder: str | Path) -> str:
    """What makes scenes other than the standard ones, as the end of a protocol's name: "-crowded_harsh"; "" if nothing.

    Args:
        folder: where [`write_scenes`] wrote them.
    """
    file = Path(folder) / WORLD_FILE
    # folders of before 2026-11-27 lack it
    world = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else STANDARD_WORLD
    return "".join(f"-{world[name]}" for name, standard in STANDARD_WORLD.items() if world[name] != standard)
