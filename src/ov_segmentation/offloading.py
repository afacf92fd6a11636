"""Weights that accelerate keeps elsewhere (`cpu_offload`, `disk_offload`, a `device_map`), at hand for a whole call.

accelerate fetches the weights of a module around its forward. Our models also use weights outside of it: embeddings
and scales that are bare parameters, weights of several layers joined for one product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


def with_weights_at_hand(method: Callable) -> Callable:
    """Decorator of a model's method: `weights_at_hand` while it runs."""

    @functools.wraps(method)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _has_hooks(self):
            return method(self, *args, **kwargs)
        with weights_at_hand(self):
            return method(self, *args, **kwargs)

    return wrapped


@contextmanager
def weights_at_hand(model: nn.Module) -> Iterator[None]:
    """All offloaded weights of a model are on the device that it runs on; within another call of this, nothing
    happens."""
    with ExitStack() as fetched:
        for module, hook in list(_offloading_hooks(model)):
            fetched.enter_context(_fetched(module, hook))
        yield


def execution_device(model: nn.Module) -> torch.device | None:
    """The device that offloaded weights are fetched to; None: none are offloaded."""
    return next((torch.device(hook.execution_device) for _, hook in _offloading_hooks(model)), None)


@contextmanager
def _fetched(module: nn.Module, hook: Any) -> Iterator[None]:
    """The weights of a module are at hand, and its hook leaves them alone."""
    weights_map = hook.weights_map
    try:
        hook.pre_forward(module)
        # without its map: a copy of the module (the text side's in float32) would copy the weights of all others
        hook.offload, hook.weights_map = False, None
        yield
    finally:
        hook.offload, hook.weights_map = True, weights_map
        hook.post_forward(module, None)


def _has_hooks(model: nn.Module) -> bool:
    """Whether accelerate has hooked the model or one of its parts. It hooks the module that it is given, so that not
    all have to be asked."""
    return any(hasattr(part, "_hf_hook") for part in (model, *model.children()))


def _offloading_hooks(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Modules whose weights are offloaded, with the `AlignDevicesHook` that does it; none within `weights_at_hand`."""
    for module in model.modules():
        hooks = [getattr(module, "_hf_hook", None)]
        while hooks:
            hook = hooks.pop()
            hooks.extend(getattr(hook, "hooks", ()))  # of a `SequentialHook`
            if getattr(hook, "offload", False):
                yield module, hook
