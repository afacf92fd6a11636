"""What fully sharded data parallel (torch's FSDP2) asks for: no scalar parameters, whole weights in other passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..strict_mapping import RecipeError


def make_shardable(model: nn.Module) -> None:
    """Turn scalar parameters that are not trained (CLIP's temperature) into buffers of the same name, so that the state
    dict stays as it is: FSDP2 cannot share a single number out.

    Raises:
        RecipeError: one that is trained.
    """
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(prefix, recurse=False)):
            if parameter.ndim:
                continue
            if parameter.requires_grad:
                raise RecipeError(
                    f"{name} is a single number, which FSDP2 cannot share out between processes: leave it out of "
                    f"model.trainable, or train without FSDP."
                )
            own = name.rpartition(".")[2]
            delattr(module, own)
            module.register_buffer(own, parameter.detach())


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """A context in which every process holds all weights of a sharded model, for passes that are not its own forward.
    Every process enters it; a model that is not sharded is left alone."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


__all__ = ["make_shardable", "whole_weights"]
