"""The text side of the models: from token ids to class embeddings."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from .offloading import with_weights_at_hand
from .precision import is_half_precision
from .tensor_arguments import check_tensors
from .text_encoding import TextEmbeddingCache, encode_vocabulary


class TextSideMixin:
    """`encode_vocabulary` for users and what it is made of; part of the models' base class.

    `keeps_prompts`: class embeddings are `[K, P, D]`, one for each prompt, instead of `[K, D]`.
    """

    keeps_prompts: ClassVar[bool] = False
    _text_cache: TextEmbeddingCache

    @property
    def text_tower(self) -> tuple[nn.Module, nn.Module]:
        """The text transformer and its projection."""
        return self.clip.text_model, self.clip.text_projection

    @property
    def embedding_size(self) -> int:
        """D, the width of `text_embeds`."""
        return self.text_tower[1].out_features

    @property
    def trains_text(self) -> bool:
        """Whether any parameter of the text side is trained: then pass `input_ids` in training, not embeddings."""
        return any(p.requires_grad for p in self._text_parameters())

    def _text_parameters(self) -> list[nn.Parameter]:
        return [p for module in self.text_tower for p in module.parameters()]

    def _text_features(
        self, input_ids: torch.Tensor, ends: torch.Tensor, tower: tuple[nn.Module, ...] | None = None
    ) -> torch.Tensor:
        """Projected features `[n, D]`, not normalised, of prompts `[n, l]` that end at positions `ends` `[n]`.

        `tower` stands for `text_tower`.
        """
        text_model, projection = tower or self.text_tower
        hidden = text_model(input_ids=input_ids).last_hidden_state
        return projection(hidden[torch.arange(len(hidden), device=hidden.device), ends])

    @with_weights_at_hand
    def encode_vocabulary(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache_folder: str | os.PathLike | None = None,
    ) -> torch.Tensor:
        """Class embeddings, made once per vocabulary from `processor(text=names, return_tensors="pt")`.

        Args:
            input_ids: `[K, P, L]` or, with synonyms, `[K, P, S, L]`.
            attention_mask: same shape; a row of zeros is an absent synonym.
            cache_folder: keeps embeddings on disk too, keyed by a hash of the text weights and the token ids.

        Returns:
            L2-normalised `[K, D]`, or `[K, P, D]` where the method keeps its prompts (SED, CAT-Seg), at least float32.
            Do not modify it in place: later calls may return the same tensor.

        A text side in half precision is run in float32, on a copy, and its result is not rounded: it runs once per
        vocabulary, and rounding alone would change the label of some pixels in a hundred.

        With gradients on and a trained text side the result carries gradients and is never cached.
        """
        parameters = self._text_parameters()
        device = parameters[0].device
        check_tensors(input_ids=input_ids)
        input_ids = input_ids.to(device)
        if attention_mask is not None:
            check_tensors(attention_mask=attention_mask)
            attention_mask = attention_mask.to(device)

        def compute() -> torch.Tensor:
            eos_token_id = self.text_tower[0].config.eos_token_id
            features: Callable[..., torch.Tensor] = self._text_features
            if not torch.is_grad_enabled() and is_half_precision(self.text_tower):
                features = partial(features, tower=tuple(copy.deepcopy(part).float() for part in self.text_tower))
            embeds = encode_vocabulary(input_ids, attention_mask, eos_token_id, features, self.keeps_prompts)
            return embeds.to(torch.promote_types(parameters[0].dtype, torch.float32))

        if torch.is_grad_enabled() and self.trains_text:
            return compute()
        with torch.no_grad():
            if self.training and self.trains_text:
                return compute()
            recipe = f"{type(self).__name__} float32 unrounded {self.text_tower[0].config.to_json_string()}"
            return self._text_cache.get(input_ids, attention_mask, parameters, compute, cache_folder, recipe)

    def _class_embeddings(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        text_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        if (input_ids is None) == (text_embeds is None):
            given = "both" if text_embeds is not None else "neither"
            raise ValueError(
                f"Give the class names either as input_ids (from processor(text=names)) or as text_embeds "
                f"(from model.encode_vocabulary), got {given}."
            )
        if text_embeds is None:
            return self.encode_vocabulary(input_ids, attention_mask)
        check_tensors(text_embeds=text_embeds)
        wanted = f"[K, P, {self.embedding_size}]" if self.keeps_prompts else f"[K, {self.embedding_size}]"
        if text_embeds.ndim != (3 if self.keeps_prompts else 2) or text_embeds.shape[-1] != self.embedding_size:
            raise ValueError(
                f"text_embeds must be {wanted} for {type(self).__name__}, got {list(text_embeds.shape)}. Were they "
                f"made by another model? Use this model's encode_vocabulary."
            )
        if text_embeds.shape[0] == 0:  # len() would fix the number of classes of an exported program
            raise ValueError("text_embeds holds no class: give at least one name.")
        # not rounded: names are told apart by small differences
        return text_embeds.to(device=self.device, dtype=torch.promote_types(self.dtype, torch.float32))
