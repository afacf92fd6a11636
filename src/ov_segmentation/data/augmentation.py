"""Augmentations of a picture together with its label map, on PIL and numpy.

Each is a frozen dataclass, called with (picture, label map, generator), that returns the changed pair; all randomness
comes from the generator that is passed in. Label maps are int32 `[H, W]` and are only ever cut, or resized to the
nearest pixel, so any class id and -100 (ignored) survive. They are what the six papers' recipes are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image
from transformers.image_utils import SizeDict

from ..image_processing import resized_size
from ..label_maps import IGNORED, resize_label_map
from ..strict_mapping import RecipeError, from_mapping, unknown_key

HUE_STEPS = 180
"""Hue is counted in 180 steps of two degrees, as OpenCV does for 8-bit pictures."""


class Augmentation(Protocol):
    """A paired transform."""

    def __call__(
        self, image: Image.Image, label_map: np.ndarray, generator: np.random.Generator
    ) -> tuple[Image.Image, np.ndarray]:
        """Return the transformed RGB picture and int32 label map `[H, W]`."""


def _resize(image: Image.Image, label_map: np.ndarray, height: int, width: int) -> tuple[Image.Image, np.ndarray]:
    if (width, height) == image.size:
        return image, label_map
    resized = resize_label_map(np.ascontiguousarray(label_map, dtype=np.int32), height, width)
    return image.resize((width, height), Image.Resampling.BILINEAR), resized


@dataclass(frozen=True)
class ResizeShortSide:
    """Resize so that the short side has a random length, keeping the aspect ratio.

    The rule for the new sides is the image processor's (`image_processing.resized_size`).

    Args:
        sizes: the lengths to choose from, each as likely.
        size_range: or the smallest and the largest length, every integer between them as likely.
        max_size: cap of the long side; both are scaled down to keep it.
    """

    sizes: list[int] | None = None
    size_range: tuple[int, int] | None = None
    max_size: int = 2560

    def __post_init__(self) -> None:
        if (self.sizes is None) == (self.size_range is None):
            raise RecipeError("resize_short_side takes either sizes or size_range.")
        if self.sizes is not None and not self.sizes:
            raise RecipeError("resize_short_side.sizes is empty.")

    def __call__(
        self, image: Image.Image, label_map: np.ndarray, generator: np.random.Generator
    ) -> tuple[Image.Image, np.ndarray]:
        """Resize both; see `Augmentation`."""
        if self.sizes is not None:
            size = self.sizes[generator.integers(len(self.sizes))]
        else:
            size = int(generator.integers(self.size_range[0], self.size_range[1] + 1))
        goal = SizeDict(shortest_edge=size, longest_edge=self.max_size)
        return _resize(image, label_map, *resized_size((image.height, image.width), goal))


@dataclass(frozen=True)
class RandomScale:
    """Scale both sides by one random factor, keeping the aspect ratio.

    Args:
        scale: smallest and largest factor; uniform.
        max_size: cap of the long side.
    """

    scale: tuple[float, float]
    max_size: int = 2560

    def __call__(
        self, image: Image.Image, label_map: np.ndarray, generator: np.random.Generator
    ) -> tuple[Image.Image, np.ndarray]:
        """Resize both; see `Augmentation`."""
        factor = min(generator.uniform(*self.scale), self.max_size / max(image.size))
        width, height = (max(1, int(side * factor + 0.5)) for side in image.size)
        return _resize(image, label_map, height, width)


@dataclass(frozen=True)
class RandomCrop:
    """Cut a random window of `height` x `width`; a picture that is smaller keeps that side.

    Args:
        height, width: size of the window.
        single_category_max_area: windows in which one class covers more than this share of the labelled pixels, or
            which hold only one class, are drawn again, up to ten times. 1.0 switches that off.
    """

    height: int
    width: int
    single_category_max_area: float = 1.0

    def __call__(
        self, image: Image.Image, label_map: np.ndarray, generator: np.random.Generator
    ) -> tuple[Image.Image, np.ndarray]:
        """Crop both; see `Augmentation`."""
        height, width = min(self.height, image.height), min(self.width, image.width)
        for _ in range(10 if self.single_category_max_area < 1 else 1):
            top = int(generator.integers(image.height - height + 1))
            left = int(generator.integers(image.width - width + 1))
            window = label_map[top : top + height, left : left + width]
            if self.single_category_max_area >= 1 or self._is_varied(window):
                break
        return image.crop((left, top, left + width, top + height)), window

    def _is_varied(self, window: np.ndarray) -> bool:
        areas = np.unique(window[window >= 0], return_counts=True)[1]
        return len(areas) > 1 and areas.max() < areas.sum() * self.single_category_max_area


@dataclass(frozen=True)
class RandomResizedCrop:
    """Cut a window of random area and shape and resize it to `height` x `width` (Szegedy et al., 2015).

    Args:
        height, width: size of the result.
        scale: smallest and largest share of the picture's area.
        ratio: smallest and largest width / height of the window; uniform on a logarithmic scale.
        keep_label: windows without a labelled pixel are drawn again. After ten windows that do not fit, or hold none,
            the whole picture is taken.
    """

    height: int
    width: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    keep_label: bool = True

    def __call__(
        self, image: Image.Image, label_map: np.ndarray, generator: np.random.Generator
    ) -> tuple[Image.Image, np.ndarray]:
        """Crop and resize both; see `Augmentation`."""
        low, high = np.log(self.ratio)
        for _ in range(10):
            area = image.width * image.height * generator.uniform(*self.scale)
            ratio = np.exp(generator.uniform(low, high))
            width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if not (0 < width <= image.width and 0 < height <= image.height):
                continue
            top = int(generator.integers(image.height - height + 1))
            left = int(generator.integers(image.width - width + 1))
            window = label_map[top : top + height, left : left + width]
            if not self.keep_label or (window >= 0).any():
                return _resize(image.crop((left, top, left + width, top + height)), window, self.height, self.width)
        return _resize(image, label_map, self.height, self.width)


@dataclass(frozen=True)
class ColourJitter:
    """Brightness, contrast, saturation and hue as in SSD (Liu et al., 2016): each with probability `probability`.

    Brightness first; contrast before or after saturation and hue, as likely. Values are clipped to 0..255 and cut to
    integers after each change. Saturation and hue are changed in PIL's 8-bit HSV.

    Args:
        brightness: largest shift of all channels, in 0..255 units.
        contrast, saturation: smallest and largest factor.
        hue: largest shift, in steps of two degrees (0..179).
        probability: of each of the four.
    """

    brightness: float = 32.0
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: int = 18
    probability: float = 0.5

    def __call__(
        self, image: Image.Image, label_map: np.ndarray, generator: np.random.Generator
    ) -> tuple[Image.Image, np.ndarray]:
        """Recolour the picture; the label map is returned as it is."""
        if self._hit(generator):
            image = _scale_and_shift(image, 1.0, generator.uniform(-self.brightness, self.brightness))
        contrast_first = generator.random() < 0.5
        if contrast_first:
            image = self._contrast(image, generator)
        image = self._saturation_and_hue(image, generator)
        if not contrast_first:
            image = self._contrast(image, generator)
        return image, label_map

    def _hit(self, generator: np.random.Generator) -> bool:
        return bool(generator.random() < self.probability)

    def _contrast(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        return _scale_and_shift(image, generator.uniform(*self.contrast)) if self._hit(generator) else image

    def _saturation_and_hue(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        factor = generator.uniform(*self.saturation) if self._hit(generator) else None
        shift = int(generator.integers(-self.hue, self.hue + 1)) if self._hit(generator) else None
        if factor is None and shift is None:
            return image
        hue, saturation, value = image.convert("HSV").split()
        if factor is not None:
            saturation = _scale_and_shift(saturation, factor)
        if shift is not None:
            turned = (np.asarray(hue, dtype=np.int16) + round(shift * 256 / HUE_STEPS)) % 256
            hue = Image.fromarray(turned.astype(np.uint8))
        return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _scale_and_shift(image: Image.Image, factor: float, shift: float = 0.0) -> Image.Image:
    """factor * x + shift for every 8-bit value, clipped and cut to integers (by a table of the 256 values)."""
    table = np.clip(np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(shift), 0, 255)
    return image.point(list(table.astype(np.uint8)) * len(image.getbands()))


@dataclass(frozen=True)
class HorizontalFlip:
    """Mirror left and right with probability `probability`."""

    probability: float = 0.5

    def __call__(
        self, image: Image.Image, label_map: np.ndarray, generator: np.random.Generator
    ) -> tuple[Image.Image, np.ndarray]:
        """Flip both or none; see `Augmentation`."""
        if generator.random() >= self.probability:
            return image, label_map
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), label_map[:, ::-1]


@dataclass(frozen=True)
class PadToSize:
    """Pad right and bottom to `height` x `width`: the picture with grey `value`, the label map with ignored pixels.

    Padding comes before normalisation here, as in the originals (`value` 128), while inference pads with 0 after it.

    Args:
        height, width: the size; a larger side is left as it is, or cut with `cut`.
        value: of all three channels, 0..255.
        cut: cut larger sides right and bottom (DeOP's effective behaviour).
    """

    height: int
    width: int
    value: int = 128
    cut: bool = False

    def __call__(
        self, image: Image.Image, label_map: np.ndarray, generator: np.random.Generator
    ) -> tuple[Image.Image, np.ndarray]:
        """Pad both; see `Augmentation`."""
        if self.cut:
            image = image.crop((0, 0, min(image.width, self.width), min(image.height, self.height)))
            label_map = label_map[: self.height, : self.width]
        width, height = max(image.width, self.width), max(image.height, self.height)
        if (width, height) == image.size:
            return image, label_map
        canvas = Image.new("RGB", (width, height), (self.value,) * 3)
        canvas.paste(image, (0, 0))
        padding = ((0, height - label_map.shape[0]), (0, width - label_map.shape[1]))
        return canvas, np.pad(label_map, padding, constant_values=IGNORED)


AUGMENTATIONS: dict[str, Callable[..., Augmentation]] = {
    "resize_short_side": ResizeShortSide,
    "random_scale": RandomScale,
    "random_crop": RandomCrop,
    "random_resized_crop": RandomResizedCrop,
    "colour_jitter": ColourJitter,
    "horizontal_flip": HorizontalFlip,
    "pad_to_size": PadToSize,
}
"""Names in recipes."""


def build_augmentations(entries: Sequence[dict[str, Any]]) -> list[Augmentation]:
    """The augmentations of a recipe's list of `{name: ..., argument: value, ...}`, in its order.

    Raises:
        RecipeError: no or an unknown name, unknown or wrong arguments.
    """
    built = []
    for index, entry in enumerate(entries):
        where = f"augmentation.{index}"
        arguments = {key: value for key, value in entry.items() if key != "name"}
        name = entry.get("name")
        if name not in AUGMENTATIONS:
            raise RecipeError(unknown_key(f"{where}.name: {name}", str(name), AUGMENTATIONS))
        built.append(from_mapping(AUGMENTATIONS[name], arguments, where))
    return built


def augment(
    image: Image.Image, label_map: np.ndarray, augmentations: Sequence[Augmentation], generator: np.random.Generator
) -> tuple[Image.Image, np.ndarray]:
    """Run all augmentations in order; the label map comes back contiguous, int32."""
    for augmentation in augmentations:
        image, label_map = augmentation(image, label_map, generator)
    return image, np.ascontiguousarray(label_map, dtype=np.int32)
