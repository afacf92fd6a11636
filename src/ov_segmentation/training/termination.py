"""SIGTERM, with which a scheduler asks a run to stop: it saves first."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterable
from typing import Any

TERMINATED = 128 + signal.SIGTERM
"""Exit status of a run that was asked to stop by SIGTERM, saved, and can be continued."""


class Terminated(SystemExit):
    """Raised after a checkpoint was written because of SIGTERM."""


@contextlib.contextmanager
def termination_flag() -> Iterable[list[bool]]:
    """A one-element list that becomes [True] when SIGTERM arrives; the handler before it is put back at the end."""
    flag = [False]

    def note(signum: int, frame: Any) -> None:
        flag[0] = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, before)
