"""A model's outputs picture by picture, as a user gets them, and the mean IoU of a split.

In full precision also when training is not, as the originals evaluate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from ..data.labelled_pictures import LabelledPictures
from ..metrics import Averaging, ConfusionMatrix, SegmentationScores
from ..modeling_outputs import OpenVocabularySegmentationOutput
from ..vocabulary import Vocabulary
from .pictures import PictureShare, Sample

Progress = Callable[[Iterable], Iterable]


@torch.no_grad()
def predictions(
    model: Any,
    text_embeds: torch.Tensor,
    samples: Dataset,
    device: torch.device,
    *,
    switches: Mapping[str, Any] | None = None,
    num_workers: int = 0,
    progress: Progress = iter,
) -> Iterator[tuple[Sample, OpenVocabularySegmentationOutput]]:
    """The outputs for one picture at a time, so that none depends on another's padding.

    Args:
        model: not wrapped for several processes, in evaluation mode.
        text_embeds: of the class names, from `model.encode_vocabulary`.
        samples: a `PictureShare` or `PictureStream`.
        switches: inference switches of `forward`.
        num_workers: processes that read pictures.
        progress: wraps the loader, for a bar.
    """
    loader = DataLoader(samples, batch_size=None, num_workers=num_workers, generator=torch.Generator().manual_seed(0))
    for sample in progress(loader):
        inputs = {key: value.to(device) for key, value in sample.inputs.items()}
        # the class's forward: accelerate replaces the instance's by one that autocasts
        yield sample, type(model).forward(model, **inputs, text_embeds=text_embeds, **(switches or {}))


@torch.no_grad()
def evaluate(
    model: Any,
    processor: Any,
    pictures: LabelledPictures,
    accelerator: Accelerator,
    *,
    averaging: Averaging = "ground_truth",
    seen: Sequence[int] | None = None,
    num_workers: int = 0,
    progress: Progress = iter,
) -> SegmentationScores:
    """Scores of `model` on `pictures`, exact under several processes.

    Args:
        model: not wrapped for several processes. It is left in the mode it was in.
        processor: the model's.
        pictures: a split; its vocabulary is what the model is asked for.
        accelerator: pictures are shared between its processes, counts are summed.
        averaging, seen: see `ov_segmentation.metrics.ConfusionMatrix.compute`.
        num_workers: processes that read pictures.
        progress: wraps the loader, for a bar.
    """
    was_training = model.training
    model.eval()
    vocabulary: Vocabulary = pictures.data.vocabulary
    text = processor(text=vocabulary, return_tensors="pt").to(accelerator.device)
    matrix = ConfusionMatrix(len(vocabulary))
    mine = range(accelerator.process_index, len(pictures), accelerator.num_processes)
    share = PictureShare(pictures, processor.image_processor, mine)
    text_embeds = model.encode_vocabulary(**text)
    for sample, outputs in predictions(
        model, text_embeds, share, accelerator.device, num_workers=num_workers, progress=progress
    ):
        maps = processor.post_process_semantic_segmentation(outputs, target_sizes=[tuple(sample.label_map.shape)])
        matrix.update(maps, [sample.label_map])
    model.train(was_training)
    return matrix.reduce(accelerator).compute(averaging, seen)
