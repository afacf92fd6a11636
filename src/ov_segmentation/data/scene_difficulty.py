"""What makes scenes harder than the project's standard ones: crowding, lighting, blur, noise, JPEG.

Off by default, and drawn from a random generator of their own: a scene of the standard difficulty stays what it was,
and a harsh one shows the same objects as the standard one of its number, unless it is crowded.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

MAX_BLUR = 3.0


@dataclass(frozen=True)
class SceneDifficulty:
    """How scenes are made harder.

    Args:
        crowded: every scene has five objects, each at a place drawn without regard to the others, which it may hide.
        gradient: the largest relative change of brightness, across the picture and down, beside the standard lighting.
        blur: largest standard deviation of a Gaussian blur, in pixels, at most 3.
        noise: largest standard deviation of further sensor noise, in [0, 1].
        jpeg_quality: lowest and highest quality of a JPEG encoding, 1 to 95; None: none.
    """

    crowded: bool = False
    gradient: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    jpeg_quality: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.gradient < 1 or not 0 <= self.blur <= MAX_BLUR or not 0 <= self.noise <= 1:
            raise ValueError(f"gradient is in [0, 1), blur in [0, {MAX_BLUR:g}], noise in [0, 1]; got {self}.")
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality[0] <= self.jpeg_quality[1] <= 95:
            raise ValueError(f"jpeg_quality holds the lowest and the highest, 1 to 95, got {self.jpeg_quality}.")

    def spoil(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Pictures uint8 `[B, 3, S, S]` with lighting, blur, noise and JPEG, each drawn for every picture."""
        if self in (SceneDifficulty(), SceneDifficulty(crowded=True)):
            return images
        count, size = len(images), images.shape[-1]
        draws = torch.rand(count, 5, 1, 1, 1, generator=generator)
        pictures = images.float() / 255
        if self.gradient:
            axis = torch.linspace(-1, 1, size)
            across, down = ((2 * draws[:, index] - 1) * self.gradient / 2 for index in (0, 1))
            pictures = pictures * (1 + across * axis + down * axis[:, None])
        if self.blur:
            pictures = _blurred(pictures, draws[:, 2].flatten() * self.blur)
        if self.noise:
            noise = torch.randn(pictures.shape, generator=generator)
            pictures = pictures + noise * draws[:, 3] * self.noise
        spoilt = (pictures * 255).round().clamp(0, 255).to(torch.uint8)
        if self.jpeg_quality is None:
            return spoilt
        low, high = self.jpeg_quality
        qualities = (low + draws[:, 4].flatten() * (high - low + 1)).long().clamp(max=high)
        encoded = [_through_jpeg(picture, int(quality)) for picture, quality in zip(spoilt, qualities, strict=True)]
        return torch.stack(encoded)


STANDARD = SceneDifficulty()
DIFFICULTIES = {
    "standard": STANDARD,
    "crowded": SceneDifficulty(crowded=True),
    "harsh": SceneDifficulty(gradient=0.6, blur=1.2, noise=0.06, jpeg_quality=(20, 60)),
    "crowded_harsh": SceneDifficulty(crowded=True, gradient=0.6, blur=1.2, noise=0.06, jpeg_quality=(20, 60)),
}
"""By name, as `examples/make_scenes.py --difficulty` takes them."""


def _blurred(pictures: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Pictures `[B, 3, S, S]`, each with a Gaussian of its own standard deviation."""
    radius = math.ceil(3 * MAX_BLUR)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernels = torch.exp(-0.5 * (offsets / sigmas.clamp(min=1e-3)[:, None]) ** 2)
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(3, dim=0)[:, None]
    planes = pictures.flatten(0, 1)[None]
    for kernel, padding in (
        (kernels[:, :, None], (radius, radius, 0, 0)),
        (kernels[..., None], (0, 0, radius, radius)),
    ):
        planes = F.conv2d(F.pad(planes, padding, mode="replicate"), kernel, groups=planes.shape[1])
    return planes[0].unflatten(0, pictures.shape[:2])


def _through_jpeg(picture: torch.Tensor, quality: int) -> torch.Tensor:
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, format="JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)
