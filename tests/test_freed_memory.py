"""Freed memory that the process keeps: real processes, whose page faults are counted."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

COUNT = """
import resource, sys, torch
from ov_segmentation.layers.freed_memory import keep_freed_memory
from tests.methods import CAT_SEG

CAT_SEG.model()


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def tensors():
    # the third one lies at the end of the heap, from where memory is given back
    for megabytes in (9, 12, 30):
        torch.ones(megabytes, 2**18)


for _ in range(3):
    tensors()
before = faults()
for _ in range(10):
    tensors()
print(keep_freed_memory(), faults() - before)
"""


def count(**environment: str) -> tuple[str, int]:
    """What `keep_freed_memory` says in a process that has built a model, and the page faults of ten more rounds."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", COUNT], capture_output=True, text=True, check=True, env={**clean, **environment}
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


def test_a_model_makes_the_process_keep_freed_memory_unless_the_environment_decides() -> None:
    a_round = 51 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    kept, faults = count()
    assert kept == "True" and faults < a_round  # of ten
    kept, faults = count(MALLOC_TRIM_THRESHOLD_="131072")
    assert kept == "False" and faults > 5 * a_round
