"""Freed memory stays with the process, so that the next layer need not ask the system for it again."""

from __future__ import annotations

import ctypes
import functools
import os
import platform

# glibc's names for `mallopt`, of malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**30
# larger tensors go back to the system as before: kept, they would leave holes that no other fits into
LARGEST_KEPT_TENSOR = 32 * 2**20
# a caller who set one of these has decided
_CALLERS_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc keep up to 1 GiB of freed memory of tensors up to 32 MiB, once in a process; true if it does.

    On its own it gives a tensor of some megabytes back to the system as soon as a layer is done with it, and asks for
    the same memory again for the next one; the system then clears it page by page, which takes longer than a layer
    that only moves or adds numbers. The memory that a picture needs at its peak stays what it was; between pictures
    the process holds on to it, as torch does on GPUs.

    Does nothing where the environment sets glibc's own variables (`MALLOC_TRIM_THRESHOLD_=131072` is the way to have
    memory given back), or where another C library than glibc is.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _CALLERS_VARIABLES):
        return False
    set_option = ctypes.CDLL(None).mallopt
    return bool(set_option(_MMAP_THRESHOLD, LARGEST_KEPT_TENSOR) and set_option(_TRIM_THRESHOLD, KEPT_BYTES))
