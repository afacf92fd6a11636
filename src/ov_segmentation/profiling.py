"""Counting what a model computes, without computing it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from .layers.attention import TILED_ATTENTION
from .modeling_base import OpenVocabularySegmentationModel

MATRIX_PRODUCT, CONVOLUTION, ATTENTION = KINDS = ("matrix product", "convolution", "attention")


class MultiplyAddCounter(TorchDispatchMode):
    """Counts multiply-adds while it is entered, by kind of operation, of calls that compute or run on the meta device.

    `multiply_adds`: kind -> half its floating point operations. What papers of this field call FLOPs are multiply-adds.
    Attention in tiles counts as attention, attention that is written out otherwise as matrix products.
    """

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds: dict[str, int] = dict.fromkeys(KINDS, 0)
        # names of the profiler's regions that the call is in
        self._regions: list[str] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: tuple = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count it."""
        keywords = keywords or {}
        result = operation(*arguments, **keywords)
        packet = operation._overloadpacket
        if packet is torch.ops.profiler._record_function_enter_new:
            name, multiply_adds = arguments
            self._regions.append(name)
            if name == TILED_ATTENTION:
                self.multiply_adds[ATTENTION] += int(multiply_adds)
        elif packet is torch.ops.profiler._record_function_exit:
            self._regions.pop()
        elif TILED_ATTENTION in self._regions:
            pass  # its products are counted
        elif "attention" in str(packet) and "backward" not in str(packet):
            # torch's own table lacks the fused kernels of processors
            self.multiply_adds[ATTENTION] += _attention_multiply_adds(*arguments[:3])
        elif str(packet).startswith("mkldnn._"):  # see layers/products.py and layers/fused_convolution.py
            weight = next(one for one in reversed(arguments[:3]) if isinstance(one, torch.Tensor) and one.ndim > 1)
            kind = CONVOLUTION if "convolution" in str(packet) else MATRIX_PRODUCT
            self.multiply_adds[kind] += result.numel() * weight.shape[1:].numel()
        elif packet in flop_registry:
            kind = CONVOLUTION if "conv" in str(packet) else MATRIX_PRODUCT
            self.multiply_adds[kind] += flop_registry[packet](*arguments, **keywords, out_val=result) // 2
        return result


def _attention_multiply_adds(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """Queries times keys, and weights times values: tensors `[..., length, channels]`."""
    return query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def count_multiply_adds(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> int:
    """Multiply-adds of matrix products, convolutions and attention in a call."""
    with MultiplyAddCounter() as counter, torch.no_grad():
        function(*arguments, **keywords)
    return sum(counter.multiply_adds.values())


def build_empty(
    model_class: type[OpenVocabularySegmentationModel], config: Any, size: tuple[int, int], num_classes: int
) -> tuple[OpenVocabularySegmentationModel, dict[str, torch.Tensor]]:
    """A model on the meta device, and its inputs for one picture of `size` (height, width) with ready class embeddings.

    So any size can be counted anywhere; attention is written out, because fused kernels are counted on some devices
    only.
    """
    with torch.device("meta"):
        model = model_class(config).eval()
        pixel_values = torch.empty(1, 3, *size)
        prompts = (1,) if model.keeps_prompts else ()
        text_embeds = torch.empty(num_classes, *prompts, model.embedding_size)
    model.set_attn_implementation("eager")
    return model, {"pixel_values": pixel_values, "text_embeds": text_embeds}


def count_model(
    model_class: type[OpenVocabularySegmentationModel], config: Any, size: tuple[int, int], num_classes: int
) -> int:
    """Multiply-adds of one picture of `size` (height, width) with ready class embeddings."""
    model, inputs = build_empty(model_class, config, size, num_classes)
    return count_multiply_adds(model, **inputs)


def count_parts(
    model: OpenVocabularySegmentationModel, inputs: Mapping[str, torch.Tensor], parts: Mapping[str, str]
) -> dict[str, tuple[int, int]]:
    """Parameters and multiply-adds of each part of a model in a call.

    Args:
        model, inputs: from `build_empty`.
        parts: pattern of module and parameter names (`re.match`) -> the part's name; the first that fits counts.

    Returns:
        part -> (parameters, multiply-adds), in the order of `parts`, then "rest".
    """

    def part_of(name: str) -> str:
        return next((part for pattern, part in parts.items() if re.match(pattern, name)), "rest")

    parameters: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parameters[part_of(name)] += parameter.numel()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    root = type(model).__name__
    counts = {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}
    totals = {name.removeprefix(f"{root}.") if name != root else "": count for name, count in counts.items()}
    operations: Counter[str] = Counter()
    for name, module in model.named_modules():
        # what a module computes itself: its total less that of the modules it called; CLIP's blocks are called one by
        # one, so a part of a model may run without its parent
        inside = sum(totals.get(f"{name}.{child}" if name else child, 0) for child in _called(name, module, totals))
        own = totals.get(name, 0) - inside
        if name in totals:
            operations[part_of(name)] += own // 2
    return {part: (parameters[part], operations[part]) for part in dict.fromkeys([*parts.values(), "rest"])}


def _called(name: str, module: nn.Module, totals: Mapping[str, int]) -> list[str]:
    """The nearest counted descendants of a module, by their names below it."""
    found = []
    for child, below in module.named_children():
        full = f"{name}.{child}" if name else child
        if full in totals:
            found.append(child)
        else:
            found += [f"{child}.{deeper}" for deeper in _called(full, below, totals)]
    return found
