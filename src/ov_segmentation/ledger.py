"""The ledger of measurements: one JSON line a run in `results/*.jsonl`.

README and model cards take every number from it (`make readme`).
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


def append(
    path: str | Path,
    *,
    command: str,
    seed: int | None,
    seconds: float,
    figures: Mapping[str, Any],
    protocol: str | None = None,
    machine: str | None = None,
    code: Mapping[str, Any] | None = None,
    **extra: Any,
) -> Entry:
    """Write one measurement as the ledger's last line, and return it.

    The line is one write to a file opened for appending, then flushed to the disk: processes that append at the same
    time do not mix, and what returned survives a crash.

    Args:
        path: the ledger, say `results/camvid.jsonl`; made if missing.
        command: the shell command that measured it, runnable from the project's root.
        seed: the run's seed; None where nothing is random.
        seconds: wall time of what was measured.
        figures: the numbers: name -> number, or a list or mapping of numbers. Shares in [0, 1], not percentages.
        protocol: id of the evaluation protocol (name list, templates, resolution, ignored ids, averaged classes).
        machine: what it ran on; default: `describe_machine()`.
        code: what ran, as `revision()` gave it when it started; default: what is there now.
        **extra: further fields (`method`, `dataset`, `recipe_hash`, ...).

    Raises:
        ValueError: a figure is NaN or infinite, or an extra field has the name of a standard one.
    """
    entry: Entry = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **(revision() if code is None else code),
        "command": command,
        "seed": seed,
        "seconds": round(float(seconds), 3),
        "machine": describe_machine() if machine is None else machine,
        "protocol": protocol,
    }
    if clash := {*entry, "figures"} & set(extra):
        raise ValueError(f"{sorted(clash)} are written by the ledger itself.")
    entry |= {**extra, "figures": dict(figures)}
    try:
        line = (json.dumps(entry, allow_nan=False) + "\n").encode()
    except ValueError as error:
        raise ValueError(f"The figures hold a number that is NaN or infinite: {dict(figures)}") from error
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        written = os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if written != len(line):
        raise OSError(f"Only {written} of {len(line)} bytes went into {path}: is the disk full? Remove its last line.")
    return entry


def read(path: str | Path) -> list[Entry]:
    """All measurements of a ledger, oldest first.

    Raises:
        FileNotFoundError: no such ledger.
        ValueError: a line that is no JSON object, with its number.
    """
    entries = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}): mend or remove it.") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object: mend or remove it.")
        entries.append(entry)
    return entries


def latest(path: str | Path, **match: Any) -> Entry:
    """The last measurement whose fields equal `match`; LookupError, naming what was looked for, if there is none."""
    for entry in reversed(read(path)):
        if all(key in entry and entry[key] == value for key, value in match.items()):
            return entry
    raise LookupError(f"{path} has no entry with {match}.")


def describe_machine() -> str:
    """Cores this process may use, accelerator if there is one, and the versions that decide about numbers."""
    import torch

    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    parts = [f"{cores} cores {platform.machine()}"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    parts += [
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"transformers {version('transformers')}",
    ]
    return ", ".join(parts)


def revision() -> Entry:
    """Commit of the project that this file belongs to, and whether other tracked files differ from it.

    `{"commit": hash, "dirty": bool}`, both None where the package does not lie in its own checkout. `results/` does not
    count as a difference: one measurement must not make the next one's tree dirty.
    """
    file = Path(__file__).resolve()
    root = file.parent
    # installed from a wheel, the file may lie inside another project's checkout
    if _git(root, "ls-files", "--error-unmatch", file.name) is None:
        return {"commit": None, "dirty": None}
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)results")
    return {"commit": commit, "dirty": bool(changed)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
