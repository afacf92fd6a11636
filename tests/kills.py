"""Processes that are killed (SIGKILL) in front of any chosen file operation, to try every moment of a run.

Python announces each file that it opens for writing, renames or removes, and each folder that it makes, to audit hooks;
the hook of a forked child counts those inside one folder and kills its own process at the wanted one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


class Outcome(NamedTuple):
    """How a child ended: the signal that killed it, or its exit code, its file operations, and what it printed."""

    signal: int | None
    code: int | None
    operations: int
    output: str


def run(
    command: Callable[[], object], folder: Path, kill_at: int | None = None, number: int = signal.SIGKILL
) -> Outcome:
    """`command()` in a process of its own, which gets signal `number` in front of its file operation number `kill_at`
    (from 0) in `folder` or, beside it, in a path that begins with its name."""
    # pipes: a limit on the size of files shall not meet them
    counts, answer = os.pipe()
    printed, log = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(counts)
        os.close(printed)
        _run_in_child(command, os.fspath(folder), kill_at, number, log, answer)
    os.close(answer)
    os.close(log)
    with os.fdopen(printed, errors="replace") as pipe:
        output = pipe.read()
    with os.fdopen(counts) as pipe:
        operations = len(pipe.read())
    status = os.waitpid(child, 0)[1]
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
    return Outcome(killed, code, operations, output)


def _run_in_child(
    command: Callable[[], object], folder: str, kill_at: int | None, number: int, log: int, answer: int
) -> None:
    code = 1
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        count = 0

        def watch(event: str, arguments: tuple) -> None:
            nonlocal count
            if event == "open":
                path, _, flags = arguments
                if not flags & WRITES:
                    return
            elif event in CHANGES:
                path = arguments[0]
            else:
                return
            if isinstance(path, int) or not os.path.abspath(os.fsdecode(path)).startswith(folder):
                return
            if count == kill_at:
                os.kill(os.getpid(), number)
            count += 1
            os.write(answer, b".")

        sys.addaudithook(watch)
        command()
        code = 0
    except SystemExit as ending:
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def survive(command: Callable[[], object], folder: Path, kill_at: int, *more: int) -> None:
    """Kill `command` at one moment after the other, then let it finish; every one of them has to come."""
    for moment in (kill_at, *more):
        outcome = run(command, folder, moment)
        if outcome.code == 0:  # nothing was left to do
            return
        assert outcome.signal == signal.SIGKILL, outcome.output
    outcome = run(command, folder)
    assert outcome.code == 0, f"killed at {(kill_at, *more)}: {outcome.output}"


def moments(total: int, most: int = 8) -> list[int]:
    """At most so many of `total` operations, the first and last ones among them."""
    if total <= most:
        return list(range(total))
    return sorted({round(i * (total - 1) / (most - 1)) for i in range(most)})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
