"""Encoded pictures, joined from those of each."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from ov_segmentation.modeling_outputs import ImageState, join_states


@dataclass
class TinyState(ImageState):
    """Tensors, also in a tuple."""

    features: torch.Tensor | None = None
    layers: tuple[torch.Tensor, ...] | None = None


@pytest.mark.parametrize("gradients", [False, True])
def test_states_are_joined(gradients: bool) -> None:
    """Without gradients, a state is given up before the next one but one is made, the first excepted."""
    rows, layers = torch.randn(5, 3), torch.randn(2, 5, 4)
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def states() -> Iterator[ImageState]:
        for index in range(5):
            alive.append(sum(one() is not None for one in made))
            state = TinyState()
            state.maps = {"bias": layers[0, index : index + 1]}
            state.features, state.layers = rows[index : index + 1].clone(), tuple(layers[:, index : index + 1])
            made.append(weakref.ref(state.features))
            yield state

    with torch.set_grad_enabled(gradients):
        joined = join_states(states(), 5)
    assert isinstance(joined, TinyState)
    assert joined.features.equal(rows)
    assert all(one.equal(other) for one, other in zip(joined.layers, layers, strict=True))
    assert joined.maps["bias"].equal(layers[0])
    assert gradients or max(alive) <= 2


@torch.no_grad()
def test_states_of_different_shapes_are_not_made_to_fit() -> None:
    states = [TinyState(features=torch.ones(1, number, 4)) for number in (3, 1)]
    with pytest.raises(ValueError, match=r"different shapes, \[1, 4\] and \[3, 4\]"):
        join_states(states, 2)
