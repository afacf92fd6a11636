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
    old = final.with_name(f"{final.name}.old{TEMPORARY}")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)  # also that of a process which was killed between the two
    parent = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all, also when the disk is full or the process is killed."""
    partial = path.with_name(path.name + TEMPORARY)
    try:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error  # a failed write does not know its file


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a killed process left anywhere in a folder; no other one may be writing there."""
    for path in folder.rglob(f"*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def full_disk_message(path: Path, error: BaseException) -> str:
    """What to tell when `path` could not be written."""
    place = next(folder for folder in (path.parent, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    return (
        f"{path} could not be written: {error}. {free / 1e6:.0f} MB are free there. What was saved before is intact: "
        f"make room and start the same command again to continue from it."
    )
