"""Which samples an optimizer step sees, their augmentation, and batches of them.

Training reads one endless sequence of positions: the shuffled samples of epoch 0, then of epoch 1, and so on. Position
p belongs to epoch p // N, so where a run stands is told by the number of optimizer steps alone, and nothing of a data
loader has to be saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ..data.augmentation import Augmentation, augment
from ..data.labelled_pictures import LabelledPictures
from ..label_maps import IGNORED
from ..strict_mapping import RecipeError
from .randomness import AUGMENTATION, LOSS, SampleOrder, derive_generator, derive_seed


class TrainingSample(NamedTuple):
    """An augmented picture, its int32 label map `[H, W]`, and the seed of the loss's draws for it."""

    image: Image.Image
    label_map: np.ndarray
    seed: int


class TrainingSamples(Dataset):
    """The endless training sequence, by position.

    Args:
        pictures: the split.
        augmentations: run in order on each picture.
        seed: the recipe's.
    """

    def __init__(self, pictures: LabelledPictures, augmentations: Sequence[Augmentation], seed: int) -> None:
        self.pictures, self.augmentations, self.seed = pictures, augmentations, seed
        self.order = SampleOrder(seed, len(pictures))

    def __getitem__(self, position: int) -> TrainingSample:
        epoch, index = self.order[position]
        generator = derive_generator(self.seed, AUGMENTATION, epoch, index)
        image, label_map = augment(*self.pictures[index], self.augmentations, generator)
        return TrainingSample(image, label_map, derive_seed(self.seed, LOSS, epoch, index))


class StepBatches:
    """Positions of each micro-batch that one process works on, from a given optimizer step on.

    Micro-batch m of a step holds the same samples however many processes share it: process r of R takes the r-th part.

    Args:
        first_step, last_step: optimizer steps, the last one not included.
        batch_size: samples of an optimizer step.
        accumulation: micro-batches of an optimizer step.
        process, num_processes: this process and how many there are.

    Raises:
        RecipeError: a batch that cannot be split evenly.
    """

    def __init__(
        self,
        first_step: int,
        last_step: int,
        batch_size: int,
        accumulation: int = 1,
        process: int = 0,
        num_processes: int = 1,
    ) -> None:
        if batch_size % (accumulation * num_processes):
            raise RecipeError(
                f"batch_size {batch_size} cannot be split over {num_processes} processes x {accumulation} "
                f"micro-batches (accumulation): make it a multiple of {accumulation * num_processes}."
            )
        self.first_step, self.last_step = first_step, last_step
        self.batch_size, self.accumulation = batch_size, accumulation
        self.part = batch_size // (accumulation * num_processes)
        self.process, self.num_processes = process, num_processes

    def __len__(self) -> int:
        return max(0, self.last_step - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.last_step):
            for micro_batch in range(self.accumulation):
                share = micro_batch * self.num_processes + self.process
                start = step * self.batch_size + share * self.part
                yield list(range(start, start + self.part))


class BatchMaker:
    """Turns samples into the model's inputs by the method's own image processor, without its resize.

    Normalisation and padding are thereby the ones of inference. Adds `sample_seeds` `[B]` int64.
    """

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor

    def __call__(self, samples: Sequence[TrainingSample]) -> dict[str, torch.Tensor]:
        """The image processor's keys with `labels`, and `sample_seeds`."""
        inputs = self.image_processor(
            images=[sample.image for sample in samples],
            segmentation_maps=[sample.label_map for sample in samples],
            do_resize=False,
            ignore_index=IGNORED,  # the data set's own ids have become it; what they were may be a class id by now
            return_tensors="pt",
        )
        return {**inputs, "sample_seeds": torch.tensor([sample.seed for sample in samples], dtype=torch.int64)}


def training_loader(
    samples: Dataset, batches: StepBatches, make_batch: Callable[..., Any], num_workers: int, pin_memory: bool
) -> DataLoader:
    """Batches, made by `make_batch` of lists of samples, in the order of `batches`, whatever the number of workers."""
    return DataLoader(
        samples,
        batch_sampler=batches,
        collate_fn=make_batch,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # a generator of its own: creating an iterator would otherwise advance torch's global one
        generator=torch.Generator().manual_seed(0),
    )
