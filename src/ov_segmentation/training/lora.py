"""Low-rank updates of linear layers by peft, and their merging into the weights, which needs no peft.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022), equation 3:
W' = W + (alpha / r) B A, where A `[r, in]` starts random and B `[out, r]` at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..strict_mapping import RecipeError

ADAPTER = "default"
BASE, FIRST, SECOND = ".base_layer.", f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


@dataclass(frozen=True)
class LoRARecipe:
    """Low-rank updates.

    Args:
        rank: r; of each update.
        alpha: the update is scaled by alpha / rank; None: 2 rank.
        dropout: of the updates' inputs.
        targets: regular expressions (`re.search`) of names of linear layers; None: the method's (`trainable_parts`).
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RecipeError(f"model.lora.rank must be at least 1, got {self.rank}.")

    @property
    def scaling(self) -> float:
        """Factor of B A."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


def add_lora(model: nn.Module, targets: Sequence[str], recipe: LoRARecipe) -> None:
    """Put updates into the linear layers of these names; everything else is frozen.

    Raises:
        ImportError: without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(
            'model.trainable: lora needs the package peft: pip install "ov_segmentation[lora]", or pip install peft.'
        ) from error
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.rank * recipe.scaling,
        lora_dropout=recipe.dropout,
        # exact names: peft takes a list for endings
        target_modules="|".join(name.replace(".", r"\.") for name in targets),
    )
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    inject_adapter_in_model(config, model, adapter_name=ADAPTER, low_cpu_mem_usage=on_meta)


def is_lora_parameter(name: str) -> bool:
    """Whether a parameter of this name is one of an update."""
    return name.endswith((FIRST, SECOND))


def name_without_lora(name: str) -> str:
    """A parameter's name before updates were put in."""
    return name.replace(BASE, ".")


def merge_lora(weights: dict[str, torch.Tensor], scaling: float) -> dict[str, torch.Tensor]:
    """Weights of the model without updates that computes the same.

    Args:
        weights: state dict of a model with updates, or of one without, which comes back as it is.
        scaling: `LoRARecipe.scaling`.
    """
    merged = {}
    for name, value in weights.items():
        if is_lora_parameter(name):
            continue
        layer = name.removesuffix(f"{BASE}weight")
        if layer != name:
            update = weights[layer + SECOND].float() @ weights[layer + FIRST].float()
            value = (value.float() + scaling * update).to(value.dtype)
        merged[name_without_lora(name)] = value
    return merged


__all__ = ["LoRARecipe", "add_lora", "is_lora_parameter", "merge_lora", "name_without_lora"]
