"""The group of processes that `torchrun` or `accelerate launch` makes of a script."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed


@contextmanager
def process_group_ended() -> Iterator[None]:
    """Around what several processes do, or as a decorator: their group, if there is one, ends with it, by an error too.

    Else its threads live until the interpreter is gone, and may abort a process whose work is done.
    """
    try:
        yield
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
