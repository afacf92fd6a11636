"""SIGTERM, with which a scheduler asks a run to stop, and Ctrl-C: the run saves first."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any


class Terminated(SystemExit):
    """Raised after a checkpoint was written because of SIGTERM or SIGINT (Ctrl-C): the run can be continued.

    The exit status is 128 + the signal's number, as shells have it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """A list that each SIGTERM and the first SIGINT (Ctrl-C) are appended to when they arrive.

    A second SIGINT does what it did before, which is to end the run at once. The handlers are put back at the end.
    """
    arrived: list[signal.Signals] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    process = os.getpid()

    def note(number: int, frame: Any) -> None:
        arrived.append(signal.Signals(number))
        if number == signal.SIGINT:
            signal.signal(number, before[number])
            if os.getpid() == process:  # forked workers of data loaders have this handler too
                os.write(2, b"\nThe run stops after this step and saves; Ctrl-C again ends it at once.\n")

    for number in before:
        signal.signal(number, note)
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
