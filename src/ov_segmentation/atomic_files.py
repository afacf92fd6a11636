"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

TEMPORARY = ".tmp"


def publish(partial: Path, final: Path) -> None:
    """Flush every file of `partial` to the disk, then rename the folder to `final`, replacing it."""
    for path in [*partial.rglob("*"), partial]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if final.exists():
        old = final.with_name(f"{final.name}.old{TEMPORARY}")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        partial.rename(final)
        shutil.rmtree(old)
    else:
        partial.rename(final)
    parent = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    partial = path.with_name(path.name + TEMPORARY)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
