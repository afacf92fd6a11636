"""Layers in pieces, whose intermediate results stay in the processor's caches, and results that come in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

ELEMENTS_PER_PIECE = 2**21


def in_pieces(
    function: Callable[..., torch.Tensor], elements_per_item: int, *tensors: torch.Tensor | None
) -> torch.Tensor:
    """`function(*tensors)`, on a CPU and without gradients computed for some items of the first dimension at a time.

    There it is two to three times faster for layers that widen large maps: fresh memory and main memory cost more than
    the arithmetic. Elsewhere the function is called once.

    Args:
        function: treats the items of the first dimension independently.
        elements_per_item: size of the largest intermediate result for one item.
        tensors: arguments of equal length in the first dimension, or None.
    """
    first = next(tensor for tensor in tensors if tensor is not None)
    at_once = items_at_once(first, elements_per_item)
    # a compiler has no pieces: the number of items may be one that it keeps open
    if at_once is None or len(first) <= at_once:
        return function(*tensors)
    pieces = (slice(start, start + at_once) for start in range(0, len(first), at_once))
    arguments = ((None if tensor is None else tensor[piece] for tensor in tensors) for piece in pieces)
    return joined((function(*some) for some in arguments), len(first))


def items_at_once(tensor: torch.Tensor, elements_per_item: int) -> int | None:
    """Items of a piece, see `in_pieces`; None where layers do not run in pieces: on other devices than the CPU of
    `tensor`, with gradients, in a compiler."""
    return max(1, ELEMENTS_PER_PIECE // elements_per_item) if runs_in_pieces(tensor) else None


def runs_in_pieces(tensor: torch.Tensor) -> bool:
    """Whether it pays to treat a large `tensor` in pieces: on a CPU, without gradients, not in a compiler."""
    return not torch.compiler.is_compiling() and tensor.device.type == "cpu" and not torch.is_grad_enabled()


def row_slices(rows: int, num_classes: int, chunk_size: int | None) -> Iterator[slice]:
    """Rows that run together: as many as have `chunk_size` classes between them, at least one."""
    at_once = max(1, chunk_size // num_classes) if chunk_size else rows
    for start in range(0, rows, at_once):
        yield slice(start, start + at_once)


def joined(parts: Iterable[torch.Tensor], length: int) -> torch.Tensor:
    """`torch.cat` of parts that are made one after the other: without gradients each is written to its place as it
    comes, so that nothing is held twice.

    Args:
        parts: at least one tensor.
        length: of the result's first dimension, the sum of theirs.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return torch.cat(list(parts))
    result, stop = None, 0
    for part in parts:
        if len(part) == length:
            return part
        if result is None:
            result = part.new_empty(length, *part.shape[1:])
        start, stop = stop, stop + len(part)
        result[start:stop] = part
    return result
