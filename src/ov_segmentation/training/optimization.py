"""Optimizer, parameter groups by name, and learning-rate schedules in closed form."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..strict_mapping import RecipeError
from .recipe import OptimizerRecipe, ScheduleRecipe


def parameter_settings(names: Iterable[str], recipe: OptimizerRecipe) -> dict[str, tuple[float, float]]:
    """Parameter name -> (learning rate, weight decay), by the first group of the recipe whose pattern is found in it.

    Raises:
        RecipeError: a pattern that no parameter fits (a misspelt one would otherwise go unnoticed), or an invalid one.
    """
    try:
        groups = [(re.compile(group.pattern), group) for group in recipe.groups]
    except re.error as error:
        raise RecipeError(f"optimizer.groups: {error.pattern!r} is no regular expression: {error}.") from error
    used = [False] * len(groups)
    settings = {}
    for name in names:
        settings[name] = (recipe.lr, recipe.weight_decay)
        for index, (pattern, group) in enumerate(groups):
            if pattern.search(name):
                decay = recipe.weight_decay if group.weight_decay is None else group.weight_decay
                settings[name] = (recipe.lr * group.lr_multiplier, decay)
                used[index] = True
                break
    idle = [group.pattern for seen, (_, group) in zip(used, groups) if not seen]
    if idle:
        raise RecipeError(
            f"optimizer.groups: {idle[0]!r} is the first fit of no trained parameter. Their names: "
            f"{', '.join(list(settings)[:10])}, ... ({len(settings)})."
        )
    return settings


def build_optimizer(model: nn.Module, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    """AdamW or SGD over the parameters that require gradients, grouped by learning rate and weight decay.

    Each group keeps its undecayed rate as `base_lr`, which `set_learning_rates` scales.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise RecipeError("Nothing to train: no parameter requires a gradient. See model.trainable.")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, setting in parameter_settings(parameters, recipe).items():
        groups.setdefault(setting, []).append(parameters[name])
    members = [{"params": group, "lr": lr, "base_lr": lr, "weight_decay": wd} for (lr, wd), group in groups.items()]
    if recipe.name == "sgd":
        return torch.optim.SGD(members, lr=recipe.lr, momentum=recipe.momentum)
    return torch.optim.AdamW(members, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps)


def learning_rate_factor(recipe: ScheduleRecipe, step: int, steps: int) -> float:
    """Factor of the learning rate for optimizer step `step` (from 0) of `steps`."""
    progress = step / steps
    if recipe.name == "poly":
        factor = (1 - progress) ** recipe.power
    elif recipe.name == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        factor = 1.0 if progress < recipe.decay_from else (1 - progress) / (1 - recipe.decay_from)
    if recipe.warmup_factor is not None and step < recipe.warmup_steps:
        return recipe.warmup_factor
    warmup = min(1.0, (step + 1) / (recipe.warmup_steps + 1)) if recipe.warmup_factor is None else 1.0
    return factor * warmup


def set_learning_rates(optimizer: Any, factor: float) -> None:
    """Set the rate of every group to `factor` times its base."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
