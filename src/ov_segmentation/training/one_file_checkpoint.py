"""The checkpoint of a training in one process (CLIP, SAM): one file, replaced as a whole, so that no kill spoils it."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..atomic_files import full_disk_message, remove_leftovers, write_atomically
from .checkpointing import CheckpointError
from .run_folder import RunFolderError

CHECKPOINT, RECIPE, RESULT = "checkpoint.pt", "recipe.json", "result.json"


@dataclass
class OneFileState:
    """What a run knows beside its weights.

    Args:
        step: optimiser steps done.
        seconds, cpu_seconds: spent on them, summed over the pieces of an interrupted run.
        losses: of the steps since the last line of the log.
        lines: of the log.
        is_over: whether no step is left.
    """

    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    is_over: bool = False


class OneFileFolder:
    """A run's folder: `recipe.json`, while it goes on `checkpoint.pt`, and at the end `result.json` beside the model.

    Args:
        path: the folder.
        identity: plain values that determine the result; a folder with others is refused.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = path, json.loads(json.dumps(identity))

    def claim(self) -> dict[str, Any] | None:
        """Make the folder this run's; the result, if the run is over.

        Raises:
            RunFolderError: the folder holds a run of another recipe that is over or can be continued.
        """
        file = self.path / RECIPE
        result = self.path / RESULT
        if file.is_file() and (result.is_file() or (self.path / CHECKPOINT).is_file()):
            other = json.loads(file.read_text(encoding="utf-8"))
            if changed := sorted(k for k in {*other, *self.identity} if other.get(k) != self.identity.get(k)):
                raise RunFolderError(
                    f"{self.path} holds a run of another recipe; they differ in {', '.join(changed)}. Give another "
                    f"--output, or remove that folder."
                )
        self.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path)
        write_atomically(file, json.dumps(self.identity, indent=1) + "\n")
        return json.loads(result.read_text(encoding="utf-8")) if result.is_file() else None

    def save(self, state: OneFileState, **parts: Any) -> None:
        """Replace the checkpoint; `parts` have a `state_dict`.

        Raises:
            CheckpointError: it could not be written; the one before is as it was.
        """
        content = io.BytesIO()
        weights = {name: part.state_dict() for name, part in parts.items()}
        torch.save({"state": vars(state), "random": torch.get_rng_state(), **weights}, content)
        try:
            write_atomically(self.path / CHECKPOINT, content.getvalue())
        except OSError as error:
            raise CheckpointError(full_disk_message(self.path / CHECKPOINT, error)) from error

    def load(self, **parts: Any) -> OneFileState:
        """Bring `parts` to where the checkpoint was, if there is one.

        Raises:
            CheckpointError: it cannot be read.
        """
        file = self.path / CHECKPOINT
        if not file.is_file():
            return OneFileState()
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(content[name])
            torch.set_rng_state(content["random"])
            return OneFileState(**content["state"])
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}). Delete it to start anew.") from error

    def finish(self, result: Mapping[str, Any]) -> None:
        """Note the result; the checkpoint has no further use."""
        write_atomically(self.path / RESULT, json.dumps(result, indent=1) + "\n")
        (self.path / CHECKPOINT).unlink(missing_ok=True)
