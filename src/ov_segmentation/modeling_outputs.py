"""What the models return: the output class and the encoded picture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch.utils._pytree import tree_map
from transformers.utils import ModelOutput


@dataclass
class ImageState(ModelOutput):
    """A picture batch after `encode_image`: everything that does not depend on the class names.

    Methods subclass it and add their own tensors. Sizes are `[B, 2]` (height, width) in pixels.

    Args:
        original_sizes: the pictures as the caller gave them.
        reshaped_input_sizes: after the resize, without padding.
        padded_sizes: of `pixel_values`, padding included.
        view_boxes: `[V, 4]` (x0, y0, x1, y1) in canvas pixels when a sliding window is used.
        canvas_size: (height, width) that `view_boxes` refers to.
        hidden_states, attentions, maps: of the picture side, on request; they are handed on to the output.
        model_type, switches: of the model, and what shaped its picture side.
    """

    original_sizes: torch.Tensor | None = None
    reshaped_input_sizes: torch.Tensor | None = None
    padded_sizes: torch.Tensor | None = None
    view_boxes: torch.Tensor | None = None
    canvas_size: tuple[int, int] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    maps: dict[str, torch.Tensor] | None = None
    model_type: str | None = None
    switches: dict[str, Any] | None = None


def join_states(states: Iterable[ImageState], count: int) -> ImageState:
    """The state of several pictures, or views, from the states of each.

    Without gradients each is written to its place as it comes, so that nothing is held twice.

    Args:
        states: of one picture each.
        count: how many they are.
    """
    states = iter(states)
    first = next(states)
    # as dicts: fields of a state stand in the order in which they were set
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        whole = tree_map(lambda *rows: torch.cat(rows), dict(first), *map(dict, states))
    else:
        whole = tree_map(lambda row: row.new_empty(count, *row.shape[1:]), dict(first))
        for index, state in enumerate(chain([first], states)):
            tree_map(lambda rows, row, place=index: _write_row(rows, place, row), whole, dict(state))
    return type(first)(**whole)


def _write_row(rows: torch.Tensor, place: int, row: torch.Tensor) -> None:
    if row.shape != rows[:1].shape:  # copying would repeat a single one to fit
        raise ValueError(f"Encoded pictures of different shapes, {list(row.shape[1:])} and {list(rows.shape[1:])}.")
    rows[place].copy_(row[0])


@dataclass
class OpenVocabularySegmentationOutput(ModelOutput):
    """Output of every `<X>ForOpenVocabularySegmentation`. B pictures, K classes, N mask queries, V sliding views.

    With a sliding window every field that has a row for each picture has B*V rows, row b*V + v; sizes keep B.

    Args:
        loss: scalar, when `labels` were given.
        loss_dict: the weighted terms that `loss` sums.
        class_queries_logits: `[B, N, K+1]`, mask family; the last column is "no object".
        masks_queries_logits: `[B, N, h, w]`, mask family.
        class_queries_scores: `[B, N, K]`, mask family: non-negative weights of the semantic merge.
        mask_threshold: None, or the number that sigmoid(mask) must exceed to count as 1 in the merge.
        logits: `[B, K, h, w]`, per-class family.
        score_function: "sigmoid" or "softmax", per-class family.
        kept_classes: bool `[B, K]`; False scores exactly 0 in post-processing.
        view_boxes: `[V, 4]` (x0, y0, x1, y1) in canvas pixels.
        canvas_size: (height, width) of the canvas.
        text_embeds: `[K, D]` or `[K, P, D]`, L2-normalised.
        original_sizes: `[B, 2]`, see `ImageState`.
        reshaped_input_sizes: `[B, 2]`.
        padded_sizes: `[B, 2]`.
        hidden_states: on request.
        attentions: on request.
        maps: on request, name -> tensor: what the method looked at; the model's class says what it has.
    """

    loss: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    class_queries_logits: torch.Tensor | None = None
    masks_queries_logits: torch.Tensor | None = None
    class_queries_scores: torch.Tensor | None = None
    mask_threshold: float | None = None
    logits: torch.Tensor | None = None
    score_function: str | None = None
    kept_classes: torch.Tensor | None = None
    view_boxes: torch.Tensor | None = None
    canvas_size: tuple[int, int] | None = None
    text_embeds: torch.Tensor | None = None
    original_sizes: torch.Tensor | None = None
    reshaped_input_sizes: torch.Tensor | None = None
    padded_sizes: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    maps: dict[str, torch.Tensor] | None = None
