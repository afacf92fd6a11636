"""The end of a group of processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import distributed

from ov_segmentation.process_group import process_group_ended


@pytest.mark.parametrize("fails", [False, True])
def test_a_group_ends_with_what_it_did(tmp_path: Path, fails: bool) -> None:
    @process_group_ended()
    def work() -> None:
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        if fails:
            raise ValueError("disk full")

    if fails:
        with pytest.raises(ValueError, match="disk full"):
            work()
    else:
        work()
    assert not distributed.is_initialized()


@process_group_ended()
def answer() -> int:
    """Without a group."""
    return 42


def test_one_process_has_no_group_to_end() -> None:
    assert answer() == 42
