"""One picture and its label file, checked, as a row of the data set."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from ...image_reading import open_picture
from ..label_transforms import LabelTransform
from .sources import Item


class Converted(NamedTuple):
    """What became of an item: a row and its pixels per class, or neither where it holds no labelled pixel and such
    pictures are left out, or what is wrong with it."""

    row: dict[str, Any] | None = None
    pixels: np.ndarray | None = None
    problem: str | None = None


def convert(
    item: Item,
    read_ids: Callable[[Path], np.ndarray],
    transform: LabelTransform,
    drops_unlabelled: bool,
    with_captions: bool,
) -> Converted:
    """Read, check and encode one item. The picture's bytes stay as they are; the label map is PNG of 8 or 16 bits."""
    name = item.picture.name
    try:
        picture = open_picture(item.picture)
        picture.load()
        encoded = item.picture.read_bytes()
    except (OSError, ValueError, SyntaxError) as error:
        return Converted(problem=f"{name}: the picture is corrupt ({error})")
    try:
        ids = read_ids(item.annotation)
    # MATLAB files fail in many ways
    except (
        OSError,
        ValueError,
        SyntaxError,
        KeyError,
        IndexError,
        TypeError,
        NotImplementedError,
        zlib.error,
    ) as error:
        return Converted(problem=f"{item.annotation.name}: the label map is corrupt ({type(error).__name__}: {error})")
    if ids.shape != (picture.height, picture.width):
        plain = PIL.Image.open(item.picture)
        if ids.shape != (plain.height, plain.width):
            return Converted(
                problem=f"{item.annotation.name}: the label map is {ids.shape[1]} x {ids.shape[0]} pixels, its picture "
                f"{picture.width} x {picture.height}"
            )
        # its EXIF tag would turn it away from its label map
        encoded = _png(plain.convert("RGB"))
    try:
        labels = transform(ids)
    except ValueError as error:
        return Converted(problem=f"{item.annotation.name}: {error}")
    pixels = np.bincount(labels[labels != transform.ignore_index], minlength=len(transform.classes))
    if drops_unlabelled and not pixels.any():
        return Converted()
    row = {
        "image": {"bytes": encoded, "path": item.file_name},
        "annotation": {"bytes": _png(PIL.Image.fromarray(labels)), "path": f"{Path(item.file_name).stem}.png"},
        "file_name": item.file_name,
        "classes": np.flatnonzero(pixels).tolist(),
    }
    return Converted(row | ({"captions": list(item.captions)} if with_captions else {}), pixels)


def _png(picture: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
