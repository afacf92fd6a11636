"""The folder of a training run, and whose run it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from ..atomic_files import write_atomically
from .recipe import Recipe, differences, recipe_values
from .trackers import LOG_FILE, read_log

RECIPE, RESULT, MODEL, CHECKPOINTS = "recipe.yaml", "result.json", "model", "checkpoints"


class RunFolderError(RuntimeError):
    """An output folder that this run must not write to."""


class RunFolder:
    """`recipe.yaml`, `log.jsonl`, `checkpoints/`, `model/`, `result.json`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def model(self) -> Path:
        """The exported model and processor."""
        return self.path / MODEL

    def claim(self, recipe: Recipe, resume: str) -> None:
        """Make the folder this recipe's, or find that it is. A run that took no step gives way.

        Raises:
            RunFolderError: it holds a run of another recipe, something else, or (resume="never") anything.
        """
        file = self.path / RECIPE
        values = recipe_values(recipe)
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"{self.path} is a file; give a folder with --output.")
        contents = sorted(item.name for item in self.path.iterdir()) if self.path.is_dir() else []
        if contents and resume == "never":
            raise RunFolderError(f"{self.path} is not empty ({', '.join(contents[:5])}); give another --output.")
        if file.is_file() and not self._has_progress():
            # it ended before its first step, over a path or an option, say: nothing is lost
            (self.path / LOG_FILE).unlink(missing_ok=True)
        elif file.is_file():
            other = yaml.safe_load(file.read_text(encoding="utf-8"))
            if changed := differences(values, other):
                raise RunFolderError(
                    f"{self.path} holds a run of another recipe; they differ in {', '.join(changed)}. Give another "
                    f"--output, or remove that folder."
                )
        elif contents:
            raise RunFolderError(
                f"{self.path} holds {', '.join(contents[:5])} but no {RECIPE}: it is no training run. Give "
                f"another --output."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(file, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

    def _has_progress(self) -> bool:
        """Whether anything of a run is there but its recipe and the log of a start."""
        checkpoints = self.path / CHECKPOINTS
        has_checkpoint = checkpoints.is_dir() and any(checkpoints.iterdir())
        log = self.path / LOG_FILE
        has_steps = log.is_file() and any(line["step"] > 0 for line in read_log(log))
        return has_checkpoint or has_steps or any((self.path / name).exists() for name in (RESULT, MODEL))

    def evaluation_of(self, step: int) -> dict[str, Any]:
        """The figures of the evaluation after `step` optimizer steps, without their prefix; empty if there was none."""
        prefix = "evaluation/"
        lines = [line for line in read_log(self.path / LOG_FILE) if line["step"] == step]
        return {key[len(prefix) :]: value for line in lines for key, value in line.items() if key.startswith(prefix)}

    def result(self) -> dict[str, Any] | None:
        """What `write_result` wrote, if the exported model is still there; None: the run is not over."""
        file = self.path / RESULT
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() and self.model.is_dir() else None

    def write_result(self, result: dict[str, Any]) -> None:
        """Write `result.json`."""
        write_atomically(self.path / RESULT, json.dumps(result, indent=1) + "\n")
