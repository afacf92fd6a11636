"""What the pipeline accepts as a picture, and how pictures are read and prepared one by one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from .image_reading import open_picture

PICTURE_KEY, LABELS_KEY = "image", "candidate_labels"
TIMEOUT = 60.0


def is_single(inputs: Any) -> bool:
    """Whether `inputs` is one picture (or one dict that holds a picture), not several."""
    if isinstance(inputs, (np.ndarray, torch.Tensor)):
        return inputs.ndim < 4
    # an open file would be iterated over line by line
    return isinstance(inputs, (str, bytes, os.PathLike, Image.Image, Mapping)) or hasattr(inputs, "read")


class Prepared(NamedTuple):
    """One picture ready for the model, and its own class names if it came with some."""

    inputs: dict[str, torch.Tensor]
    candidate_labels: Any


class Preparation:
    """Loads a picture and runs the image processor on it alone.

    Holds no model, so that it is cheap to send to workers.
    """

    def __init__(self, image_processor: Any, timeout: float | None = TIMEOUT) -> None:
        self.image_processor, self.timeout = image_processor, timeout

    def __call__(self, item: Any) -> Prepared:
        """The model's inputs for a picture, or for a dict (or row) with "image" and maybe "candidate_labels"."""
        candidate_labels = None
        if isinstance(item, Mapping):
            if PICTURE_KEY not in item:
                raise ValueError(
                    f"A dict or dataset row needs the key {PICTURE_KEY!r}, this one has {', '.join(map(repr, item))}. "
                    f"For a column of another name: transformers.pipelines.pt_utils.KeyDataset(dataset, column)."
                )
            item, candidate_labels = item[PICTURE_KEY], item.get(LABELS_KEY)
        picture = open_picture(item, self.timeout) if isinstance(item, (str, bytes, os.PathLike)) else item
        inputs = dict(self.image_processor(picture, return_tensors="pt"))
        if len(inputs["pixel_values"]) != 1:
            raise ValueError(
                f"One picture is needed at each place of a list, got {len(inputs['pixel_values'])} at one."
            )
        return Prepared(inputs, candidate_labels)


class _PreparedDataset(Dataset):
    def __init__(self, source: Any, prepare: Preparation) -> None:
        self.source, self.prepare = source, prepare

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Prepared:
        with _naming(index):
            return self.prepare(self.source[index])


class _PreparedStream(IterableDataset):
    def __init__(self, source: Iterable[Any], prepare: Preparation) -> None:
        self.source, self.prepare = source, prepare

    def __iter__(self) -> Iterator[Prepared]:
        for index, item in enumerate(self.source):
            with _naming(index):
                prepared = self.prepare(item)
            yield prepared


@contextlib.contextmanager
def _naming(index: int) -> Iterator[None]:
    """Say which of many pictures an error is about; the image processor, which sees one at a time, calls it 0."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:  # a data set decodes its own pictures: PIL's error is an OSError
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"picture {index}: {str(error).removeprefix('picture 0: ')}") from error


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
        f"Give a picture (path, URL, base64 text, bytes of a file, PIL picture, array), or a list, dataset or "
        f"generator of pictures; got {type(inputs).__name__}."
    )
