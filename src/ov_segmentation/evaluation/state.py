"""What an evaluation has counted so far, on the disk: one line a picture, so that a killed run goes on behind it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..atomic_files import full_disk_message, write_atomically
from ..metrics import ConfusionMatrix
from ..proposal_recall import ProposalScores

_IDENTITY = "identity.json"


class EvaluationError(RuntimeError):
    """An evaluation that cannot be done as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Record:
    """One picture's contribution.

    Args:
        index: its place in the split.
        name: its file's name.
        seconds: spent on it.
        counts: per mode the cells of the confusion matrix (flat) that it adds to, and how much.
        proposals: the fields of `ProposalScores` by definition and threshold, where they are asked for.
    """

    index: int
    name: str
    seconds: float
    counts: dict[str, tuple[list[int], list[int]]]
    proposals: dict[str, dict[str, int]] = field(default_factory=dict)

    @staticmethod
    def of(
        index: int,
        name: str,
        seconds: float,
        matrices: Mapping[str, ConfusionMatrix],
        proposals: Mapping[str, ProposalScores] | None = None,
    ) -> Record:
        """A record of one picture's matrices and proposals."""
        counts = {}
        for mode, matrix in matrices.items():
            flat = matrix.counts.flatten()
            cells = flat.nonzero()[:, 0]
            counts[mode] = (cells.tolist(), flat[cells].tolist())
        return Record(index, name, round(seconds, 3), counts, {k: dict(vars(v)) for k, v in (proposals or {}).items()})

    def add_to(self, matrices: Mapping[str, ConfusionMatrix]) -> None:
        """Count the picture."""
        for mode, (cells, numbers) in self.counts.items():
            matrices[mode].counts.view(-1).index_add_(0, torch.tensor(cells, dtype=torch.int64), torch.tensor(numbers))


class EvaluationState:
    """A folder with one file of records per process, and whose they are.

    Args:
        folder: the evaluation's; its files stand in a folder `state`.
        process: index of this process.
    """

    def __init__(self, folder: Path, process: int) -> None:
        self.folder = folder / "state"
        self.file = self.folder / f"pictures-{process:05d}.jsonl"

    def open(self, identity: Mapping[str, Any]) -> dict[int, Record]:
        """Make the folder this evaluation's, or find that it is, and read its records by index; the main process
        calls it before any other one writes.

        A line that a kill left incomplete is removed.

        Raises:
            EvaluationError: the folder holds records of another model, protocol or data set.
        """
        identity = json.loads(json.dumps(identity))
        file = self.folder / _IDENTITY
        if file.is_file():
            other = json.loads(file.read_text(encoding="utf-8"))
            if changed := sorted(key for key in {*identity, *other} if identity.get(key) != other.get(key)):
                raise EvaluationError(
                    f"{self.folder.parent} holds an evaluation with another {', '.join(changed)}. Give another "
                    f"--output, or --resume never to start anew."
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(identity, indent=1))
        records: dict[int, Record] = {}
        for part in sorted(self.folder.glob("pictures-*.jsonl")):
            records |= {record.index: record for record in _read(part)}
        return records

    def remove(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def append(self, record: Record) -> None:
        """Add a picture to this process's file; it is on the disk when this returns."""
        line = (json.dumps(vars(record)) + "\n").encode()
        try:
            descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                if (written := os.write(descriptor, line)) != len(line):
                    raise OSError(f"only {written} of {len(line)} bytes were taken")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise EvaluationError(full_disk_message(self.file, error)) from error


def _read(file: Path) -> list[Record]:
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        write_atomically(file, whole.decode())
    try:
        return [Record(**json.loads(line)) for line in whole.splitlines()]
    except (ValueError, TypeError) as error:
        raise EvaluationError(f"{file} is damaged ({error}): remove it, its pictures are then done again.") from error
