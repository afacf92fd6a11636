"""Checkpoints that are complete or not there: written to a temporary folder, flushed to the disk, then renamed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..atomic_files import TEMPORARY, full_disk_message, publish

PREFIX = "step-"
WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.pt", "state.json"
# accelerate writes these in shards of its own; such checkpoints need the same number of processes again
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read; the message says what is left and what to do."""


@dataclass
class TrainingState:
    """What a run knows beside weights and optimizer.

    Args:
        step: optimizer steps done.
        seconds: time spent, evaluation included, summed over the pieces of an interrupted run.
        cpu_seconds: the same of this process's CPU time, without data-loading processes.
        sums: sums of logged figures since the last line of the log, and `count`, how many went in.
        best_score, best_step: the best evaluation.
        evaluations_without_gain: evaluations since then.
    """

    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0
    best_score: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0


class CheckpointStore:
    """The folder `checkpoints/` of a run, with one folder `step-00000000` per checkpoint.

    Args:
        folder: made on the first save.
        total_limit: how many of the latest are kept.
    """

    def __init__(self, folder: Path, total_limit: int) -> None:
        self.folder, self.total_limit = folder, total_limit

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, rising."""
        if not self.folder.is_dir():
            return []
        names = [path.name for path in self.folder.iterdir() if path.name.startswith(PREFIX)]
        return sorted(int(name[len(PREFIX) :]) for name in names if name[len(PREFIX) :].isdigit())

    def path(self, step: int) -> Path:
        """Folder of the checkpoint after `step` optimizer steps."""
        return self.folder / f"{PREFIX}{step:08d}"

    def save(self, accelerator: Accelerator, model: Any, optimizer: Any, state: TrainingState) -> None:
        """Write a checkpoint; every process calls it. Older ones beyond the limit go, the best one stays.

        Raises:
            CheckpointError: it could not be written (a full disk); earlier checkpoints are as they were.
        """
        final = self.path(state.step)
        if state.step in self.steps():
            return
        if accelerator.distributed_type in SHARDED:
            partial = final.with_name(final.name + TEMPORARY)
            accelerator.save_state(str(partial))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                _write_state(partial, state)
                publish(partial, final)
        else:
            weights = accelerator.get_state_dict(model)
            if accelerator.is_main_process:
                atomic_folder(final, lambda partial: _write(partial, weights, accelerator, optimizer, state))
        if accelerator.is_main_process:
            self._remove_old(state.best_step)
        accelerator.wait_for_everyone()

    def load(self, accelerator: Accelerator, model: Any, optimizer: Any, step: int) -> TrainingState:
        """Bring model, optimizer and gradient scaler to where they were after `step` steps.

        Raises:
            CheckpointError: files that cannot be read.
        """
        folder = self.path(step)
        try:
            if accelerator.distributed_type in SHARDED:
                accelerator.load_state(str(folder))
            else:
                accelerator.unwrap_model(model).load_state_dict(load_file(folder / WEIGHTS))
                rest = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
                optimizer.load_state_dict(rest["optimizer"])
                if accelerator.scaler is not None and rest["scaler"] is not None:
                    accelerator.scaler.load_state_dict(rest["scaler"])
            return TrainingState(**json.loads((folder / STATE).read_text(encoding="utf-8")))
        except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"The checkpoint {folder} cannot be read ({error}). If its files were damaged, delete that folder and "
                f"start the same command again: it continues from the one before."
            ) from error

    def remove_temporary(self) -> None:
        """Delete what a killed process left half written."""
        if self.folder.is_dir():
            for path in self.folder.glob(f"*{TEMPORARY}"):
                shutil.rmtree(path, ignore_errors=True)

    def _remove_old(self, best_step: int | None) -> None:
        for step in self.steps()[: -self.total_limit]:
            if step != best_step:
                # renamed first, so that a kill in the middle leaves no folder that looks complete
                doomed = self.path(step).with_name(self.path(step).name + TEMPORARY)
                self.path(step).rename(doomed)
                shutil.rmtree(doomed)


def atomic_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder, then put it in the place of `final`.

    Raises:
        CheckpointError: writing failed; `final` is as it was, and the temporary folder is gone.
    """
    partial = final.with_name(final.name + TEMPORARY)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        publish(partial, final)
    except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own error for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(full_disk_message(final, error)) from error


def _write(
    folder: Path, weights: dict[str, torch.Tensor], accelerator: Accelerator, optimizer: Any, state: TrainingState
) -> None:
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
    scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
    torch.save({"optimizer": optimizer.state_dict(), "scaler": scaler}, folder / OPTIMIZER)
    _write_state(folder, state)


def _write_state(folder: Path, state: TrainingState) -> None:
    (folder / STATE).write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
