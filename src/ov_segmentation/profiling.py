"""Counting what a model computes, without computing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .modeling_base import OpenVocabularySegmentationModel


def count_multiply_adds(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> int:
    """Multiply-adds of matrix products and convolutions in a call: half the floating point operations.

    What papers of this field call FLOPs are multiply-adds.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*arguments, **keywords)
    return counter.get_total_flops() // 2


def count_model(
    model_class: type[OpenVocabularySegmentationModel], config: Any, size: tuple[int, int], num_classes: int
) -> int:
    """Multiply-adds of one picture of `size` (height, width) with ready class embeddings.

    The model is built on the meta device, so any size can be counted anywhere; attention is written out, because fused
    kernels are counted on some devices only.
    """
    with torch.device("meta"):
        model = model_class(config).eval()
        pixel_values = torch.empty(1, 3, *size)
        prompts = (1,) if model.keeps_prompts else ()
        text_embeds = torch.empty(num_classes, *prompts, model.embedding_size)
    model.set_attn_implementation("eager")
    return count_multiply_adds(model, pixel_values=pixel_values, text_embeds=text_embeds)
