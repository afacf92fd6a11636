"""What cannot be loaded, and why: transformers' messages speak of missing files, and name neither path nor id."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the client's HTTP library
    LocalEntryNotFoundError,
)


class LoadingError(FileNotFoundError):
    """A checkpoint that is not there, or not all of it; the message says what was asked for and what to do."""


@contextlib.contextmanager
def loading_explained(source: object) -> Iterator[None]:
    """Raise a `LoadingError` in the place of an error behind which there is no such folder, a training run's folder,
    nothing in the cache, or a connection that broke off; what transformers says well enough passes.

    Args:
        source: folder or Hub id that is loaded.
    """
    try:
        yield
    except LoadingError:
        raise
    except (OSError, ValueError) as error:
        message = _explanation(source, error)
        if message is None:
            raise
        raise LoadingError(message) from error


def _explanation(source: object, error: OSError | ValueError) -> str | None:
    folder = Path(str(source))
    if (folder / "model" / "config.json").is_file() and not (folder / "config.json").is_file():
        return f"{source} is the folder of a training run: its checkpoint is {folder / 'model'}."
    causes = _causes(error)
    # a status, behind which the library's own error stands too, is an answer and no broken connection
    answered = any(isinstance(e, HfHubHTTPError) for e in causes)
    broken = None if answered else next((e for e in causes if isinstance(e, HTTPError)), None)
    uncached = any(isinstance(e, LocalEntryNotFoundError) for e in causes)
    if folder.is_file():
        return f"{source} is a file, and a checkpoint is a folder: `ov-segment doctor {source}` says how to convert it."
    if any(isinstance(e, HFValidationError) for e in causes):
        return f"There is no folder {source}, nor is that an id on the Hub, which is written OWNER/NAME."
    if uncached:
        place = f"{source} is no folder here, nor (or not all of it) in the Hub's cache, {constants.HF_HUB_CACHE}"
        if constants.HF_HUB_OFFLINE:
            return f"{place}; offline (HF_HUB_OFFLINE is set) nothing is downloaded. Check the name, or go online."
        reason = "" if broken is None else f" ({type(broken).__name__}: {broken})"
        return f"{place}; {constants.ENDPOINT} did not give it{reason}. Check the name and the connection."
    if broken is not None:
        return (
            f"The connection to {constants.ENDPOINT} broke off while {source} was downloaded "
            f"({type(broken).__name__}: {broken}). Nothing incomplete was kept: load it again."
        )
    return None


def _causes(error: BaseException) -> list[BaseException]:
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    return causes
