"""What all image processors share: resize rules, normalisation, padding, label maps."""

# no `from __future__ import annotations`: it would hide the argument types from the validation of calls
from typing import Any, TypedDict

import numpy as np
import PIL.Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, SizeDict

from .image_reading import flatten, load_each, read_image
from .label_maps import IGNORED, ignore_ids, read_label_map, resize_label_map


class OpenVocabularySegmentationImagesKwargs(TypedDict, total=False):
    """Arguments of an image processor's constructor and call.

    do_convert_rgb: turn pictures of any mode into RGB; False: they must be.
    do_resize, size, resample: `size` is {"shortest_edge": s, "longest_edge": l} (the cap is optional), an integer s, or
        {"height": h, "width": w}, which does not keep the aspect ratio; `resample` is PIL's filter.
    default_to_square: whether an integer `size` means a square.
    do_rescale, rescale_factor: multiply the 0..255 values (float pictures that come as 0..1 stay so without it).
    do_normalize, image_mean, image_std: per channel, after rescaling.
    do_pad, pad_multiple: zeros right and bottom up to the batch's largest height and width, each rounded up to a
        multiple of `pad_multiple` (None: not rounded). Without padding the pictures must have one size.
    ignore_index: ids of label-map pixels to ignore: one, several or None.
    input_data_format: "channels_first" or "channels_last" for arrays whose shape is ambiguous.
    return_tensors: "pt" or "np".
    """

    do_convert_rgb: bool | None
    do_resize: bool | None
    size: int | list[int] | tuple[int, ...] | dict[str, int] | SizeDict | None
    resample: int | None
    default_to_square: bool | None
    do_rescale: bool | None
    rescale_factor: float | int | None
    do_normalize: bool | None
    image_mean: float | int | list[float | int] | tuple[float | int, ...] | None
    image_std: float | int | list[float | int] | tuple[float | int, ...] | None
    do_pad: bool | None
    pad_multiple: int | None
    ignore_index: int | list[int] | tuple[int, ...] | None
    input_data_format: str | None
    return_tensors: str | None


class OpenVocabularySegmentationImageProcessor(PilBackend):
    """Base of the six image processors; a method overrides class attributes only.

    The evaluation resize of the originals: the short side becomes `shortest_edge`, then both are scaled down if the
    long side exceeds `longest_edge`; each side is int(x + 0.5), at least 1; PIL's filter (anti-aliased) on 8-bit RGB.

    Class attributes beside the arguments listed in `OpenVocabularySegmentationImagesKwargs`:
        resizes_mask_logits: mask family: whether mask logits (SAN) or mask probabilities (OVSeg, DeOP) are interpolated
            from the network's input size to the target size.
    """

    valid_kwargs = OpenVocabularySegmentationImagesKwargs
    model_input_names = ["pixel_values", "pixel_mask", "original_sizes", "reshaped_input_sizes", "padded_sizes"]

    do_convert_rgb = True
    do_resize = True
    size = {"shortest_edge": 640, "longest_edge": 2560}
    default_to_square = False
    resample = PILImageResampling.BILINEAR
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_pad = True
    pad_multiple = None
    ignore_index = None
    resizes_mask_logits = True

    def _set_attributes(self, **kwargs: Any) -> None:
        super()._set_attributes(**kwargs)
        # transformers takes None for "not given", which would bring a class default back on loading
        for name in set(kwargs) & set(self._valid_kwargs_names):
            if kwargs[name] is None:
                setattr(self, name, None)

    def preprocess(self, images: Any, segmentation_maps: Any = None, **kwargs: Any) -> BatchFeature:
        """Pictures, and optionally their label maps, to model inputs.

        Args:
            images: one or a list of paths, URLs, base64 strings, bytes of files, PIL pictures of any mode, arrays or
                tensors (see `image_reading.read_image`). They are never modified.
            segmentation_maps: one label map per picture, of its size (see `label_maps.read_label_map`).
            kwargs: overrides of the attributes for this call, see `OpenVocabularySegmentationImagesKwargs`.

        Returns:
            `pixel_values` `[B, 3, H, W]`; `pixel_mask` `[B, H, W]` (1 = picture) when padding is on; `original_sizes`,
            `reshaped_input_sizes` (after the resize), `padded_sizes` `[B, 2]` (height, width); with
            `segmentation_maps`, `labels` `[B, H, W]` int64, ignored and padded pixels -100.

        Raises:
            ValueError: a picture or label map that cannot be used; the message starts with its index.
            TypeError: an argument that does not exist.
        """
        unknown = sorted(set(kwargs) - set(self._valid_kwargs_names))
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no argument {', '.join(unknown)}. It takes: images, segmentation_maps, "
                f"{', '.join(self._valid_kwargs_names)}."
            )
        return super().preprocess(images, segmentation_maps, **kwargs)

    def _preprocess_image_like_inputs(
        self,
        images: Any,
        segmentation_maps: Any,
        do_convert_rgb: bool | None,
        do_resize: bool | None,
        size: SizeDict,
        resample: int,
        do_pad: bool | None,
        pad_multiple: int | None,
        ignore_index: int | list[int] | tuple[int, ...] | None,
        input_data_format: str | None,
        return_tensors: str | None,
        **value_rules: Any,
    ) -> BatchFeature:
        pictures = load_each(
            "picture", flatten(images, 3), lambda one: read_image(one, input_data_format, bool(do_convert_rgb))
        )
        if not pictures:
            raise ValueError("Give at least one picture.")
        originals = [picture.shape[:2] for picture, _ in pictures]
        targets = [resized_size(shape, size) if do_resize else shape for shape in originals]
        frame = _frame_size(targets, bool(do_pad), pad_multiple)
        pixel_values = np.zeros((len(pictures), 3, *frame), dtype=np.float32)
        rules = {kind: _mean_and_std(kind, **value_rules) for kind in {fractions for _, fractions in pictures}}
        for (picture, fractions), (height, width), row in zip(pictures, targets, pixel_values):
            if picture.shape[:2] != (height, width):
                picture = np.asarray(PIL.Image.fromarray(picture).resize((width, height), resample))
            out, (mean, std) = row[:, :height, :width], rules[fractions]
            np.subtract(picture.transpose(2, 0, 1), mean, out=out)
            np.divide(out, std, out=out)
        data: dict[str, np.ndarray] = {"pixel_values": pixel_values}
        if do_pad:
            data["pixel_mask"] = np.zeros((len(pictures), *frame), dtype=np.int64)
            for (height, width), mask in zip(targets, data["pixel_mask"]):
                mask[:height, :width] = 1
        data["original_sizes"] = np.array(originals, dtype=np.int64)
        data["reshaped_input_sizes"] = np.array(targets, dtype=np.int64)
        data["padded_sizes"] = np.array([frame] * len(pictures), dtype=np.int64)
        if segmentation_maps is not None:
            data["labels"] = _prepare_labels(segmentation_maps, originals, targets, frame, ignore_index)
        return BatchFeature(data=data, tensor_type=return_tensors)

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Any = None,
        return_segmentation_scores: bool = False,
        return_confidence: bool = False,
        background: Any = None,
        threshold: float | None = None,
    ) -> list[Any]:
        """Label maps, and optionally scores and confidence, from a model's outputs: see
        `post_processing.post_process_semantic_segmentation`."""
        from .post_processing import post_process_semantic_segmentation  # torch, which reading pictures does not need

        return post_process_semantic_segmentation(
            outputs,
            target_sizes=target_sizes,
            return_segmentation_scores=return_segmentation_scores,
            return_confidence=return_confidence,
            background=background,
            threshold=threshold,
            resizes_mask_logits=self.resizes_mask_logits,
        )


def resized_size(shape: tuple[int, int], size: SizeDict) -> tuple[int, int]:
    """Height and width after the resize; `shape` is the picture's (height, width).

    Raises:
        ValueError: `size` names neither a short side nor a height and a width, or a side of no pixel.
    """
    given = dict(size)
    if any(side < 1 for side in given.values()) or not ("shortest_edge" in given or {"height", "width"} <= set(given)):
        raise ValueError(
            f'size must be {{"shortest_edge": s, "longest_edge": l}} (the cap is optional) or '
            f'{{"height": h, "width": w}}, in pixels; got {given}.'
        )
    if size.height and size.width:
        return size.height, size.width
    scale = size.shortest_edge / min(shape)
    sides = [float(size.shortest_edge) if side == min(shape) else scale * side for side in shape]
    if size.longest_edge and max(sides) > size.longest_edge:
        shrink = size.longest_edge / max(sides)
        sides = [side * shrink for side in sides]
    height, width = (max(1, int(side + 0.5)) for side in sides)
    return height, width


def _frame_size(sizes: list[tuple[int, int]], do_pad: bool, pad_multiple: int | None) -> tuple[int, int]:
    if not do_pad:
        if len(set(sizes)) > 1:
            raise ValueError(
                f"Pictures of different sizes after the resize ({', '.join(map(str, sorted(set(sizes))))}) make a "
                f"batch only with do_pad=True."
            )
        return sizes[0]
    multiple = 1 if pad_multiple is None else pad_multiple
    if multiple < 1:
        raise ValueError(f"pad_multiple must be at least 1, or None, got {pad_multiple}.")
    height, width = (-(-max(sides) // multiple) * multiple for sides in zip(*sizes))
    return height, width


def _mean_and_std(
    fractions: bool,
    do_rescale: bool | None,
    rescale_factor: float,
    do_normalize: bool | None,
    image_mean: Any,
    image_std: Any,
    **unused: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """What rescales and normalises uint8 pictures `[3, h, w]`: float32 `[3, 1, 1]`, to subtract and to divide by."""
    if do_rescale and not rescale_factor > 0:
        raise ValueError(f"rescale_factor must be positive, got {rescale_factor}.")
    scale = rescale_factor if do_rescale else 1 / 255 if fractions else 1.0
    mean = _per_channel("image_mean", image_mean if do_normalize else 0.0)
    std = _per_channel("image_std", image_std if do_normalize else 1.0)
    if not (std > 0).all():
        raise ValueError(f"image_std must be positive, got {image_std}.")
    # the originals normalise 0..255 values with constants multiplied by 255: same rounding
    mean, std = ((x / scale).astype(np.float32)[:, None, None] for x in (mean, std))
    return mean, std


def _per_channel(name: str, value: Any) -> np.ndarray:
    """float64 `[3]` from one number, or one for each channel."""
    numbers = np.asarray(value, np.float64)
    if numbers.shape not in ((), (1,), (3,)) or not np.isfinite(numbers).all():
        raise ValueError(f"{name} must be one number, or three (red, green, blue), got {value}.")
    return np.broadcast_to(numbers, 3)


def _prepare_labels(
    segmentation_maps: Any,
    originals: list[tuple[int, int]],
    targets: list[tuple[int, int]],
    frame: tuple[int, int],
    ignore_index: int | list[int] | tuple[int, ...] | None,
) -> np.ndarray:
    label_maps = load_each(
        "label map", flatten(segmentation_maps, 2), lambda one: ignore_ids(read_label_map(one), ignore_index)
    )
    if len(label_maps) != len(originals):
        raise ValueError(
            f"{len(originals)} pictures but {len(label_maps)} segmentation maps were given (arrays are [H, W], or "
            f"[B, H, W] for several)."
        )
    labels = np.full((len(label_maps), *frame), IGNORED, dtype=np.int64)
    for index, (label_map, original, (height, width)) in enumerate(zip(label_maps, originals, targets)):
        if label_map.shape != original:
            raise ValueError(
                f"label map {index} is {label_map.shape[0]} x {label_map.shape[1]} (height x width), its picture "
                f"{original[0]} x {original[1]}. A picture turned by its EXIF tag needs a label map turned alike."
            )
        labels[index, :height, :width] = resize_label_map(label_map.astype(np.int32), height, width)
    return labels
