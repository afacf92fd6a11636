"""A connection that broke off while a checkpoint was downloaded: transformers' message speaks of missing files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # the latter: of the client's HTTP library


@contextlib.contextmanager
def broken_downloads_explained(source: object) -> Iterator[None]:
    """Raise an OSError that says what happened in the place of one behind which the connection broke off.

    Args:
        source: Hub id that is loaded.
    """
    try:
        yield
    except OSError as error:
        cause: BaseException | None = error
        while cause is not None and (isinstance(cause, HfHubHTTPError) or not isinstance(cause, HTTPError)):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise OSError(
            f"The connection to {constants.ENDPOINT} broke off while {source} was downloaded "
            f"({type(cause).__name__}: {cause}). Nothing incomplete was kept: load it again."
        ) from error
