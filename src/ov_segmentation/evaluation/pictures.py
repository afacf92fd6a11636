"""The pictures that one process evaluates, as a data loader reads them: processed one by one, none twice."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..data.labelled_pictures import LabelledPicture, LabelledPictures, LabelledStream


class Sample(NamedTuple):
    """One picture, ready for the model.

    Attributes:
        index: its place in the split.
        name: its file's name.
        inputs: the image processor's keys, batch of one.
        label_map: `[H, W]` int32 class ids, -100 = not scored.
    """

    index: int
    name: str
    inputs: dict[str, torch.Tensor]
    label_map: torch.Tensor


class PictureShare(Dataset):
    """Some pictures of a split with random access.

    Args:
        pictures: the split.
        image_processor: the model's.
        indices: which of its pictures.
        short_side: shrink pictures and label maps to this short side first (`shrink`); None: never.
    """

    def __init__(
        self, pictures: LabelledPictures, image_processor: Any, indices: Sequence[int], short_side: int | None = None
    ) -> None:
        self.pictures, self.image_processor, self.indices = pictures, image_processor, indices
        self.short_side = short_side

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Sample:
        index = self.indices[position]
        name = self.pictures.file_name(index)
        return _sample(index, name, self.pictures[index], self.image_processor, self.short_side)


class PictureStream(IterableDataset):
    """Every R-th picture of a stream that is not done yet; R counts processes and their data-loading workers.

    Every process reads the whole stream, but decodes its own pictures only: no picture is lost or taken twice however
    the stream is stored.

    Args:
        stream: the split.
        done: indices to leave out.
        process, num_processes: whose share.
        max_samples: only the first so many pictures; None: all.
    """

    def __init__(
        self,
        stream: LabelledStream,
        image_processor: Any,
        done: Collection[int],
        process: int,
        num_processes: int,
        short_side: int | None = None,
        max_samples: int | None = None,
    ) -> None:
        self.stream, self.image_processor, self.done = stream, image_processor, frozenset(done)
        self.process, self.num_processes = process, num_processes
        self.short_side, self.max_samples = short_side, max_samples

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        workers, worker = (1, 0) if info is None else (info.num_workers, info.id)
        shares, mine = self.num_processes * workers, self.process * workers + worker

        def wanted(index: int) -> bool:
            return index % shares == mine and index not in self.done

        for index, name, picture in self.stream.samples(wanted, self.max_samples):
            yield _sample(index, name, picture, self.image_processor, self.short_side)


def shrink(picture: LabelledPicture, short_side: int) -> LabelledPicture:
    """Picture and label map with the short side at most `short_side`, as ADE20K-847 is prepared for SED and CAT-Seg.

    The picture bilinearly without anti-aliasing (half-pixel centres), labels by the pixel at floor(position x scale):
    OpenCV's INTER_LINEAR and INTER_NEAREST. OpenCV rounds 8-bit weights, so a value may differ by 1.
    """
    height, width = picture.label_map.shape
    if min(height, width) <= short_side:
        return picture
    new_height, new_width = (
        short_side if side == min(height, width) else round(side / float(min(height, width)) * short_side)
        for side in (height, width)
    )
    values = torch.from_numpy(np.array(picture.image)).permute(2, 0, 1)[None].float()
    values = torch.nn.functional.interpolate(values, (new_height, new_width), mode="bilinear", align_corners=False)
    image = PIL.Image.fromarray(values[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy())
    rows, columns = (
        np.minimum((np.arange(new) * (old / new)).astype(np.int64), old - 1)
        for new, old in ((new_height, height), (new_width, width))
    )
    return LabelledPicture(image, picture.label_map[np.ix_(rows, columns)])


def _sample(index: int, name: str, picture: LabelledPicture, image_processor: Any, short_side: int | None) -> Sample:
    if short_side is not None:
        picture = shrink(picture, short_side)
    inputs = dict(image_processor(images=picture.image, return_tensors="pt"))
    return Sample(index, name, inputs, torch.from_numpy(np.ascontiguousarray(picture.label_map)))
