"""Mean IoU of a model on a split, exact under several processes, as a user gets it: processor, model, post-processing.

In full precision also when training is not, as the originals evaluate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from ..data.datasets import LabelledPictures
from ..metrics import Averaging, ConfusionMatrix, SegmentationScores
from ..vocabulary import Vocabulary


class _Pictures(Dataset):
    """Every R-th picture, processed: an (inputs, label map) pair each."""

    def __init__(self, pictures: LabelledPictures, image_processor: Any, process: int, num_processes: int) -> None:
        self.pictures, self.image_processor = pictures, image_processor
        self.indices = range(process, len(pictures), num_processes)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        image, label_map = self.pictures[self.indices[position]]
        return dict(self.image_processor(images=image, return_tensors="pt")), torch.from_numpy(label_map)


@torch.no_grad()
def evaluate(
    model: Any,
    processor: Any,
    pictures: LabelledPictures,
    accelerator: Accelerator,
    *,
    averaging: Averaging = "ground_truth",
    num_workers: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> SegmentationScores:
    """Scores of `model` on `pictures`, one at a time, so that none depends on another's padding.

    Args:
        model: not wrapped for several processes. It is left in the mode it was in.
        processor: the model's.
        pictures: a split; its vocabulary is what the model is asked for.
        accelerator: pictures are shared between its processes, counts are summed.
        averaging: see `ov_segmentation.metrics.ConfusionMatrix.compute`.
        num_workers: processes that read pictures.
        progress: wraps the loader, for a bar.
    """
    was_training = model.training
    model.eval()
    vocabulary: Vocabulary = pictures.data.vocabulary
    text = processor(text=vocabulary, return_tensors="pt").to(accelerator.device)
    matrix = ConfusionMatrix(len(vocabulary))
    share = _Pictures(pictures, processor.image_processor, accelerator.process_index, accelerator.num_processes)
    loader = DataLoader(
        share,
        batch_size=None,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(0),
    )
    text_embeds = model.encode_vocabulary(**text)
    for inputs, label_map in progress(loader):
        inputs = {key: value.to(accelerator.device) for key, value in inputs.items()}
        # the class's forward: accelerate replaces the instance's by one that autocasts
        outputs = type(model).forward(model, **inputs, text_embeds=text_embeds)
        maps = processor.post_process_semantic_segmentation(outputs, target_sizes=[tuple(label_map.shape)])
        matrix.update(maps, [label_map])
    model.train(was_training)
    return matrix.reduce(accelerator).compute(averaging)
