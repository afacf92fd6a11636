"""Where a run's numbers go: a JSON-lines file always, TensorBoard or another of accelerate's trackers on request."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, get_available_trackers, on_main_process

LOG_FILE = "log.jsonl"


class JSONLinesTracker(GeneralTracker):
    """One JSON object per call of `log`, each with its optimizer step, flushed to the disk at once.

    The file holds figures that follow from recipe and seed only (no times), so an interrupted and continued run leaves
    the same file as an uninterrupted one.

    Args:
        path: the file.
        last_step: step of the checkpoint that the run continues from (None: none). Later lines, left by a run that died
            after that checkpoint, are cut off, and so is a line that was written by half.
    """

    name = "json_lines"
    requires_logging_directory = False

    def __init__(self, path: str | Path, last_step: int | None = None) -> None:
        super().__init__()
        self.path = Path(path)
        self.last_step = -1 if last_step is None else last_step

    @on_main_process
    def start(self) -> None:
        """Cut the file back to `last_step`."""
        kept = [line for line in read_log(self.path) if line["step"] <= self.last_step] if self.path.exists() else []
        partial = self.path.with_suffix(".tmp")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(self.path)

    @property
    def tracker(self) -> Path:
        """The file."""
        return self.path

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Nothing: the recipe lies beside the log."""

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None, **kwargs: Any) -> None:
        """Append `values` with `step`."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Lines of a log, without a last one that was written by half."""
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def build_trackers(
    names: list[str], folder: Path, last_step: int | None
) -> tuple[list[Any], dict[str, dict[str, Any]]]:
    """What accelerate's `log_with` and `init_trackers(init_kwargs=)` take.

    Raises:
        ImportError: a tracker whose package is not installed (accelerate itself only warns and logs nothing).
    """
    available = sorted(tracker.value for tracker in get_available_trackers())
    for name in names:
        if name not in available:
            raise ImportError(
                f"The recipe asks for the tracker {name!r}, which is not installed (or unknown). Install it, for "
                f"example `pip install {name}`, or take it out of `trackers`. Installed: "
                f"{', '.join(available) or 'none'}."
            )
    # what a run logged after its last checkpoint is logged again by its continuation
    options = {"tensorboard": {"purge_step": last_step + 1}} if "tensorboard" in names and last_step else {}
    return [JSONLinesTracker(folder / LOG_FILE, last_step), *names], options
