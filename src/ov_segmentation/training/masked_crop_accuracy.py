"""Zero-shot accuracy of OVSeg's CLIP on masked crops of known classes: what mask adaptation is selected by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import PIL.Image
import torch
from accelerate import Accelerator

from ..data.mask_pairs import MaskPairs
from ..vocabulary import Vocabulary


@torch.no_grad()
def masked_crop_accuracy(
    model: Any,
    processor: Any,
    pairs: MaskPairs,
    vocabulary: Vocabulary,
    accelerator: Accelerator,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, float]:
    """Accuracy of CLIP's choice among all names, each crop seen as at inference.

    Args:
        model: OVSeg, with the prompts that it is to be judged with. It is left in the mode it was in.
        processor: its processor; its templates embed the names.
        pairs: crops whose nouns are names of the vocabulary.
        vocabulary: what is chosen from.
        accelerator: crops are shared between its processes, counts are summed.
        progress: wraps the indices, for a bar.

    Returns:
        `top1`, `top5`: shares of crops whose name is the best, among the best five; `macro`: mean over the classes of
        `top1`; `crops`, `classes`: how many there are.

    Raises:
        ValueError: a noun that is no name of the vocabulary.
    """
    numbers = {name: k for k, name in enumerate(vocabulary.labels)}
    if unknown := sorted(set(pairs.nouns) - set(numbers)):
        raise ValueError(
            f"{len(unknown)} nouns of the evaluation's crops are no class names ({', '.join(unknown[:5])}, ...): give "
            f"the class_names that they were mined with."
        )
    was_training = model.training
    model.eval()
    texts = model.encode_vocabulary(**processor(text=vocabulary, return_tensors="pt"))
    counts = torch.zeros(3, len(numbers), device=accelerator.device, dtype=torch.float64)  # crops, top 1, top 5
    for index in progress(range(accelerator.process_index, len(pairs), accelerator.num_processes)):
        crop, mask, noun = pairs[index]
        inputs = processor.image_processor(
            images=PIL.Image.fromarray(crop), do_resize=False, do_pad=False, return_tensors="pt"
        )
        features, _ = model.encode_masks(inputs["pixel_values"], [torch.tensor(mask)[None]])
        best = (features[0, 0] @ texts.to(features.dtype).T).topk(min(5, len(numbers))).indices.tolist()
        k = numbers[noun]
        counts[:, k] += torch.tensor([1, best[0] == k, k in best], device=counts.device)
    model.train(was_training)
    crops, top1, top5 = accelerator.reduce(counts).cpu()
    present = crops > 0
    total = crops.sum()
    return {
        "top1": (top1.sum() / total).item(),
        "top5": (top5.sum() / total).item(),
        "macro": (top1[present] / crops[present]).mean().item(),
        "crops": int(total),
        "classes": int(present.sum()),
    }
