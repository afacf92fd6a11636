"""What is trained: a part of the method by its name, low-rank updates, or parameters by regular expressions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..strict_mapping import RecipeError
from .lora import LoRARecipe, add_lora, is_lora_parameter, name_without_lora

METHOD, ALL, LORA = "method", "all", "lora"
PARTS = ("adapter", "prompts", "attention")
OPTIONS = (METHOD, *PARTS, ALL, LORA)
"""`PARTS` and "lora" are a method's own (`trainable_parts` of its model); the other two every method has."""


def select_trainable(model: nn.Module, trainable: str | Sequence[str], lora: LoRARecipe | None = None) -> None:
    """Set `requires_grad` of every parameter, and put low-rank updates in where they are asked for.

    Args:
        model: a method's, with `requires_grad` as its `freeze_pretrained` left it.
        trainable: names out of `OPTIONS`, regular expressions (`re.search`) of parameter names, or a list of both:
            what one of them means is trained. See `ModelRecipe.trainable`.
        lora: rank and place of the low-rank updates.

    Raises:
        RecipeError: an option that the model does not have, or an expression that finds no parameter or is none.
        ImportError: "lora" without the package peft.
    """
    wanted = [trainable] if isinstance(trainable, str) else list(trainable)
    if lora is not None and LORA not in wanted:
        raise RecipeError("model.lora says how low-rank updates look, but model.trainable does not ask for them: lora.")
    names = [name for name, _ in model.named_parameters()]
    chosen = set().union(*(parameters_of(model, option, names) for option in wanted if option != LORA))
    if LORA in wanted:
        add_lora(model, lora_targets(model, lora), lora or LoRARecipe())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_lora_parameter(name) or name_without_lora(name) in chosen)


def parameters_of(model: Any, option: str, names: Sequence[str]) -> set[str]:
    """Those of `names` that an option or expression trains; "lora" trains none of them.

    Raises:
        RecipeError: see [`select_trainable`].
    """
    if option == METHOD:
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if option not in OPTIONS:
        return _found(option, names)
    patterns = (".",) if option == ALL else model.trainable_parts.get(option, ())
    found = {name for name in names if _any(patterns, name) and not _any(model.unread_parameters, name)}
    if not found:
        raise RecipeError(
            f"model.trainable: {type(model).__name__} with this configuration has no {option!r} to train. It has: "
            f"{', '.join(available_options(model))}."
        )
    return found


def available_options(model: Any) -> list[str]:
    """The options that a model has, in the order of `OPTIONS`."""
    names = [name for name, _ in model.named_parameters()]

    def has(option: str) -> bool:
        if option == LORA:
            return bool(_modules(model, model.trainable_parts.get(LORA, ())))
        found = (name for name in names if _any(model.trainable_parts.get(option, ()), name))
        return any(not _any(model.unread_parameters, name) for name in found)

    return [option for option in OPTIONS if option in (METHOD, ALL) or has(option)]


def lora_targets(model: Any, recipe: LoRARecipe | None) -> list[str]:
    """Names of the modules that get low-rank updates.

    Raises:
        RecipeError: none.
    """
    own = recipe.targets if recipe is not None else None
    targets = _modules(model, model.trainable_parts.get(LORA, ()) if own is None else own)
    if not targets and own is not None:
        raise RecipeError(f"model.lora.targets: {', '.join(own)} find no linear layer of {type(model).__name__}.")
    if not targets:
        raise RecipeError(
            f"model.trainable: {type(model).__name__} with this configuration has no layers of its own for 'lora'. "
            f"Name linear layers in model.lora.targets, or train {', '.join(available_options(model))}."
        )
    return targets


def _modules(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if _any(patterns, name) and not _any(model.unread_parameters, f"{name}.weight")]


def _found(pattern: str, names: Sequence[str]) -> set[str]:
    try:
        found = {name for name in names if re.search(pattern, name)}
    except re.error as error:
        raise RecipeError(f"model.trainable: {pattern!r} is no regular expression: {error}.") from error
    if not found:
        raise RecipeError(
            f"model.trainable: {pattern!r} is no option ({', '.join(OPTIONS)}) and finds none of the {len(names)} "
            f"parameters ({names[0]}, ...)."
        )
    return found


def _any(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
