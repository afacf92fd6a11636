"""What the pipeline accepts as a picture, and how pictures are read and prepared one by one."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset, IterableDataset

PICTURE_KEY, LABELS_KEY = "image", "candidate_labels"
_SHOWN_CHARACTERS = 80


def is_single(inputs: Any) -> bool:
    """Whether `inputs` is one picture (or one dict that holds a picture), not several."""
    if isinstance(inputs, (np.ndarray, torch.Tensor)):
        return inputs.ndim < 4
    return isinstance(inputs, (str, bytes, os.PathLike, Image.Image, Mapping))


def load_picture(source: Any, timeout: float | None = None) -> Any:
    """A picture from a path, an http(s) URL, a data URI, base64 text or the bytes of a file; turned upright as its EXIF
    data says. PIL pictures are turned upright too; arrays and tensors are returned as they are.

    Raises:
        FileNotFoundError: text that is neither a URL, nor an existing file, nor base64.
        ValueError: a file that is no picture, is cut short, or is too large to be safe to unpack.
        TypeError: anything else.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return source
    if isinstance(source, Image.Image):
        return _upright(source, f"the {source.mode} picture of size {source.size}")
    if isinstance(source, bytes):
        return _open(BytesIO(source), f"{len(source)} bytes")
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if not isinstance(source, str):
        raise TypeError(
            f"A picture is a path, a URL, base64 text, a PIL picture, an array or a tensor; got {type(source).__name__}."
        )
    shown = repr(source if len(source) <= _SHOWN_CHARACTERS else source[:_SHOWN_CHARACTERS] + "...")
    if source.startswith(("http://", "https://")):
        return _open(BytesIO(_download(source, timeout)), shown)
    if source.startswith("data:"):
        return _open(BytesIO(_decode(source.partition(",")[2], shown)), shown)
    if os.path.isfile(source):
        return _open(source, shown)
    return _open(BytesIO(_decode(source, shown)), shown)


def _download(url: str, timeout: float | None) -> bytes:
    from huggingface_hub import get_session

    response = get_session().get(url, timeout=timeout, follow_redirects=True)
    response.raise_for_status()
    return response.content


def _decode(text: str, shown: str) -> bytes:
    try:
        decoded = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise FileNotFoundError(f"{shown} is neither an existing file, nor an http(s) URL, nor base64.") from error
    if not decoded:
        raise FileNotFoundError(f"{shown} is neither an existing file, nor an http(s) URL, nor base64.")
    return decoded


def _open(file: Any, shown: str) -> Image.Image:
    try:
        picture = Image.open(file)
    except UnidentifiedImageError as error:
        raise ValueError(f"{shown} is not a picture in a format that PIL reads.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(_bomb(shown, error)) from error
    return _upright(picture, shown)


def _upright(picture: Image.Image, shown: str) -> Image.Image:
    try:
        picture.load()
        return ImageOps.exif_transpose(picture)
    except Image.DecompressionBombError as error:
        raise ValueError(_bomb(shown, error)) from error
    except (OSError, SyntaxError) as error:  # PIL's two ways to say that a file ends early or is damaged
        raise ValueError(f"{shown} can't be decoded, it is cut short or damaged: {error}") from error


def _bomb(shown: str, error: Exception) -> str:
    return f"{shown} is too large to be safe: {error} If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS."


class Prepared(NamedTuple):
    """One picture ready for the model, and its own class names if it came with some."""

    inputs: dict[str, torch.Tensor]
    candidate_labels: Any


class Preparation:
    """Loads a picture and runs the image processor on it alone. Holds no model, so that it is cheap to send to workers."""

    def __init__(self, image_processor: Any, timeout: float | None = None) -> None:
        self.image_processor, self.timeout = image_processor, timeout

    def __call__(self, item: Any) -> Prepared:
        """The model's inputs for one picture, or for a dict (or dataset row) with "image" and maybe "candidate_labels"."""
        candidate_labels = None
        if isinstance(item, Mapping):
            if PICTURE_KEY not in item:
                raise ValueError(
                    f"A dict or dataset row needs the key {PICTURE_KEY!r}, this one has {', '.join(map(repr, item))}. "
                    f"For a column of another name: transformers.pipelines.pt_utils.KeyDataset(dataset, column)."
                )
            item, candidate_labels = item[PICTURE_KEY], item.get(LABELS_KEY)
        picture = load_picture(item, self.timeout)
        return Prepared(dict(self.image_processor(picture, return_tensors="pt")), candidate_labels)


class _PreparedDataset(Dataset):
    def __init__(self, source: Any, prepare: Preparation) -> None:
        self.source, self.prepare = source, prepare

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Prepared:
        return self.prepare(self.source[index])


class _PreparedStream(IterableDataset):
    def __init__(self, source: Iterable[Any], prepare: Preparation) -> None:
        self.source, self.prepare = source, prepare

    def __iter__(self) -> Iterator[Prepared]:
        return map(self.prepare, self.source)


def prepared_dataset(inputs: Any, prepare: Preparation) -> Dataset:
    """A torch dataset of `Prepared` pictures: indexable where `inputs` is, else a stream.

    Raises:
        TypeError: `inputs` can't be iterated over.
    """
    if isinstance(inputs, Sized) and hasattr(inputs, "__getitem__"):
        return _PreparedDataset(inputs, prepare)
    if isinstance(inputs, Iterable):
        return _PreparedStream(inputs, prepare)
    raise TypeError(
        f"Give a picture (path, URL, base64 text, PIL picture, array), or a list, dataset or generator of pictures; got "
        f"{type(inputs).__name__}."
    )
