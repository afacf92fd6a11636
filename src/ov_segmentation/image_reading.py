"""Reading pictures of any kind into 8-bit RGB.

All six methods were trained and are evaluated on 8-bit RGB pictures that PIL resizes, so everything becomes that first.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL.Image
import PIL.ImageOps
from huggingface_hub.utils import httpx
from transformers.utils import is_torch_tensor

Loaded = TypeVar("Loaded")

_CHANNELS_LAST, _CHANNELS_FIRST = "channels_last", "channels_first"
_MODE_OF_CHANNELS = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def flatten(items: Any, max_ndim: int) -> list[Any]:
    """One list of single pictures (or label maps) from one of them, a list, nested lists or batched arrays.

    Args:
        items: paths, URLs, bytes of files, PIL pictures, arrays, tensors.
        max_ndim: an array of more dimensions than this is a batch.
    """
    if isinstance(items, (list, tuple)) or getattr(items, "ndim", 0) > max_ndim:
        return [single for item in items for single in flatten(item, max_ndim)]
    return [items]


def load_each(what: str, items: Sequence[Any], load: Callable[[Any], Loaded]) -> list[Loaded]:
    """`load` applied to every item; an error says which item it was."""
    loaded = []
    for index, item in enumerate(items):
        try:
            loaded.append(load(item))
        except (ValueError, TypeError) as error:
            raise type(error)(f"{what} {index}: {error}") from error
    return loaded


def open_picture(source: str | bytes | os.PathLike | PIL.Image.Image, timeout: float | None = 60) -> PIL.Image.Image:
    """A decoded PIL picture, EXIF rotation applied, mode as stored.

    Args:
        source: a path, an http(s) URL, a base64 string, a data URI, bytes of a file or a PIL picture.
        timeout: seconds to wait for a URL; None: for ever.

    Raises:
        ValueError: nothing readable there, a truncated file, or more pixels than PIL's decompression-bomb limit.
    """
    try:
        picture = source if isinstance(source, PIL.Image.Image) else PIL.Image.open(_locate(source, timeout))
        limit = PIL.Image.MAX_IMAGE_PIXELS
        if limit is not None and picture.width * picture.height > limit:
            raise ValueError(
                f"{picture.width} x {picture.height} pixels are more than PIL's limit of {limit} (a guard against "
                f"decompression bombs). If you trust the file, raise PIL.Image.MAX_IMAGE_PIXELS."
            )
        if 0 in picture.size:
            raise ValueError(f"the picture is empty ({picture.width} x {picture.height}).")
        return PIL.ImageOps.exif_transpose(picture)
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"{error} If you trust the file, raise PIL.Image.MAX_IMAGE_PIXELS.") from error
    except (OSError, SyntaxError) as error:  # PIL's decoders raise both for truncated and broken files
        name = str(source)[:200] if isinstance(source, (str, os.PathLike)) else "it"
        raise ValueError(f"cannot read {name}: {error}") from error


def _locate(source: str | bytes | os.PathLike, timeout: float | None) -> Path | BytesIO:
    if isinstance(source, bytes):
        return BytesIO(source)
    text = os.fspath(source)
    if text.startswith(("http://", "https://")):
        try:
            return BytesIO(httpx.get(text, follow_redirects=True, timeout=timeout).raise_for_status().content)
        except httpx.HTTPError as error:
            raise ValueError(f"cannot fetch {text}: {error}") from error
    if os.path.isfile(text):
        return Path(text)
    if os.path.isdir(text):
        raise ValueError(f"{text} is a folder: give the picture files in it.")
    encoded = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return BytesIO(base64.b64decode("".join(encoded.split()), validate=True))
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"no such file, nor an http(s) URL, nor base64: {text[:200]!r}") from error


def read_image(image: Any, input_data_format: str | None = None, convert_rgb: bool = True) -> tuple[np.ndarray, bool]:
    """One picture as uint8 RGB.

    Args:
        image: path, URL, base64, bytes of a file, PIL picture of any mode, or an array or tensor `[H, W]`, `[H, W, C]`
            or `[C, H, W]` with C of 1 (grey), 2 (grey, alpha), 3 or 4 (RGB, alpha). Alpha is dropped, not composited,
            as PIL's `convert("RGB")` does. 16-bit pictures keep their upper 8 bits (rounded). Integer arrays wider than
            16 bits and PIL's mode "I" hold 8-bit values if none exceeds 255, else 16-bit ones. Floats hold fractions of
            white if none exceeds 1, else values up to 255, and are rounded to 8 bits; fractions that end between 1 and
            2 are an error. PIL's palettes are looked up.
        input_data_format: "channels_first" or "channels_last" where an array's shape is ambiguous; by default a channel
            axis of 3 or 4 is preferred, then the last axis for arrays and the first for tensors.
        convert_rgb: False: anything but three channels is an error.

    Returns:
        `[H, W, 3]` uint8, and whether the values came as fractions of white (that is, already rescaled).

    Raises:
        ValueError: unreadable, empty, NaN or infinite, out of range, or of a shape that is no picture.
        TypeError: not a picture at all.
    """
    if isinstance(image, (str, bytes, os.PathLike, PIL.Image.Image)):
        return _pil_to_rgb(open_picture(image), convert_rgb)
    first_preferred = is_torch_tensor(image)
    if first_preferred:
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f"a picture is a path, URL, bytes of a file, PIL image, array or tensor, got {type(image).__name__}."
        )
    values, fractions = _to_8_bit(_channels_last(image, input_data_format, first_preferred))
    channels = values.shape[-1]
    if channels == 3:
        return values, fractions
    if not convert_rgb:
        raise ValueError(f"three channels are needed with do_convert_rgb=False, got {channels}.")
    mode = _MODE_OF_CHANNELS[channels]
    rgb = PIL.Image.fromarray(values[..., 0] if channels == 1 else values, mode=mode).convert("RGB")
    return np.array(rgb), fractions


def _pil_to_rgb(picture: PIL.Image.Image, convert_rgb: bool) -> tuple[np.ndarray, bool]:
    if not convert_rgb and picture.mode != "RGB":
        raise ValueError(f"mode RGB is needed with do_convert_rgb=False, got {picture.mode}.")
    try:
        if picture.mode == "F" or picture.mode.startswith("I"):  # convert() would clip these at 255
            values, fractions = _to_8_bit(np.array(picture))
            return np.repeat(values[..., None], 3, axis=-1), fractions
        if picture.mode in ("La", "RGBa", "PA"):  # these have no direct way to RGB
            picture = picture.convert("LA" if picture.mode == "La" else "RGBA")
        return np.array(picture.convert("RGB")), False
    except (OSError, SyntaxError) as error:
        raise ValueError(f"cannot decode it: {error}") from error


def _channels_last(image: np.ndarray, input_data_format: str | None, first_preferred: bool) -> np.ndarray:
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise ValueError(f"a picture is [H, W], [H, W, C] or [C, H, W], got shape {list(image.shape)}.")
    if image.ndim == 2:
        return image[..., None]
    order = (_CHANNELS_FIRST, _CHANNELS_LAST) if first_preferred else (_CHANNELS_LAST, _CHANNELS_FIRST)
    if input_data_format is not None:
        order = (getattr(input_data_format, "value", input_data_format),)
    channels = {_CHANNELS_FIRST: image.shape[0], _CHANNELS_LAST: image.shape[-1]}
    unknown = set(order) - set(channels)
    if unknown:
        raise ValueError(f'input_data_format is "{_CHANNELS_FIRST}" or "{_CHANNELS_LAST}", got {unknown.pop()!r}.')
    for likely in ((3, 4), (1, 2)):
        for layout in order:
            if channels[layout] in likely:
                return image if layout == _CHANNELS_LAST else np.moveaxis(image, 0, -1)
    raise ValueError(f"no axis of shape {list(image.shape)} can be the channels (1 to 4 of them, first or last).")


def _to_8_bit(values: np.ndarray) -> tuple[np.ndarray, bool]:
    if values.dtype == np.uint8:
        return values, False
    if values.dtype == bool:
        return values * np.uint8(255), False
    if np.issubdtype(values.dtype, np.floating):
        return _floats_to_8_bit(values)
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"pixels of type {values.dtype} are not supported.")
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest > 65535:
        raise ValueError(f"integer pixels must lie in 0..255 (8 bit) or 0..65535 (16 bit), got {lowest}..{highest}.")
    sixteen_bit = (values.dtype.itemsize == 2 and values.dtype.kind == "u") or highest > 255
    if not sixteen_bit:
        return values.astype(np.uint8), False
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8), False


def _floats_to_8_bit(values: np.ndarray) -> tuple[np.ndarray, bool]:
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} pixel values are NaN or infinite.")
    lowest, highest = float(values.min()), float(values.max())
    if lowest < 0 or highest > 255:
        raise ValueError(f"float pixels must lie in 0..1 or 0..255 before normalisation, got {lowest:g}..{highest:g}.")
    fractions = highest <= 1
    if 1 < highest < 2 and (values % 1).any():  # values up to 255 would be a picture that is all but black
        raise ValueError(
            f"float pixels are fractions of white, which end at 1, or values up to 255, got {lowest:g}..{highest:g}. "
            f"Clip fractions to 0..1, or give uint8."
        )
    return np.rint(values * 255 if fractions else values).astype(np.uint8), fractions
