"""Text prompts with learned context vectors: start, context, name, full stop, end.

Context optimisation (CoOp) comes from Zhou et al., "Learning to Prompt for Vision-Language Models" (2022), section 3.2.
SimBaseline (Xu et al., 2022, section 3.3) and DeOP (Han et al., 2023, section 3.3) learn them on region crops.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import CLIPTextModel
from transformers.masking_utils import create_causal_mask
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from ..tensor_arguments import check_tensors

CONTEXT = "text_prompt.context"


class LearnedPrompt(nn.Module):
    """Context vectors put between the start token and the class name, and a full stop behind it.

    Args:
        num_vectors: M context vectors.
        hidden_size: width of the text transformer.
        dot_token_id: token of the full stop.
    """

    def __init__(self, num_vectors: int, hidden_size: int, dot_token_id: int) -> None:
        super().__init__()
        self.dot_token_id = dot_token_id
        self.context = nn.Parameter(torch.zeros(num_vectors, hidden_size))

    def encode(
        self, text_model: CLIPTextModel, projection: nn.Module, input_ids: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor:
        """Projected features `[n, D]`, not normalised, of bare names `[n, l]` whose end tokens stand at `ends` `[n]`.

        A name that leaves no room for the context is cut at its end.
        """
        num_vectors = len(self.context)
        room = text_model.config.max_position_embeddings - num_vectors - 1
        rows = torch.arange(len(input_ids), device=input_ids.device)
        end_ids = input_ids[rows, ends]
        input_ids, ends = input_ids[:, :room], ends.clamp(max=room - 1)
        ids = torch.cat(
            [input_ids[:, :1].expand(-1, 1 + num_vectors), input_ids[:, 1:], torch.zeros_like(input_ids[:, :1])], dim=1
        )
        ids[rows, ends + num_vectors] = self.dot_token_id
        ends = ends + num_vectors + 1
        ids[rows, ends] = end_ids
        embeds = text_model.embeddings.token_embedding(ids)
        context = self.context.to(embeds.dtype).expand(len(ids), -1, -1)
        embeds = torch.cat([embeds[:, :1], context, embeds[:, 1 + num_vectors :]], dim=1)
        return projection(_run_text_model(text_model, embeds)[rows, ends])


def read_learned_prompt(source: str | os.PathLike) -> tuple[torch.Tensor, int]:
    """The context vectors `[M, W]` of a saved model, and the token of its full stop.

    Args:
        source: folder or Hub id of a model of ours with a `text_prompt`, for instance of DeOP's first training stage.

    Raises:
        ValueError: the model has none.
        OSError: there is no such model.
    """
    config = json.loads(Path(cached_file(source, CONFIG_NAME)).read_text(encoding="utf-8"))
    with safe_open(cached_file(source, SAFE_WEIGHTS_NAME), "pt") as weights:
        if CONTEXT not in weights.keys():  # noqa: SIM118 - not a mapping
            raise ValueError(f"{source} has no learned text prompt (no {CONTEXT} among its weights).")
        return weights.get_tensor(CONTEXT).float(), config["dot_token_id"]


class LearnedPromptMixin:
    """The text side of a model whose `text_prompt` is a `LearnedPrompt`, or None: then templates are all there is."""

    text_prompt: LearnedPrompt | None

    @torch.no_grad()
    def load_text_prompt(self, context: torch.Tensor) -> None:
        """Take over context vectors `[M, W]` that were learned around the same CLIP.

        Raises:
            ValueError: another number or width than the model's.
        """
        own = None if self.text_prompt is None else self.text_prompt.context
        if own is None or own.shape != context.shape:
            found = "none" if own is None else f"{own.shape[0]} of width {own.shape[1]}"
            raise ValueError(
                f"The learned prompt has {context.shape[0]} context vectors of width {context.shape[1]}, the model "
                f"takes {found}: it has to be learned around the same CLIP."
            )
        own.copy_(context)

    def encode_vocabulary(self, input_ids: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """As the base class has it, of bare names where the prompt is learned.

        Raises:
            ValueError: several texts a name, which can only come from templates.
        """
        check_tensors(input_ids=input_ids)
        if self.text_prompt is not None and input_ids.shape[1] > 1:
            raise ValueError(
                f"The text prompt of this {type(self).__name__} is learned: it takes bare names, not names in "
                f'{input_ids.shape[1]} templates. Give its processor prompt_templates=["{{}}"].'
            )
        return super().encode_vocabulary(input_ids, *arguments, **options)

    def _text_parameters(self) -> list[nn.Parameter]:
        own = [] if self.text_prompt is None else [self.text_prompt.context]
        return super()._text_parameters() + own

    def _text_features(
        self, input_ids: torch.Tensor, ends: torch.Tensor, tower: tuple[nn.Module, ...] | None = None
    ) -> torch.Tensor:
        if self.text_prompt is None:
            return super()._text_features(input_ids, ends, tower)
        return self.text_prompt.encode(*(tower or self.text_tower), input_ids, ends)


def _run_text_model(text_model: CLIPTextModel, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """`CLIPTextModel.forward` from token embeddings `[n, l, W]` on, which it does not offer itself."""
    hidden = text_model.embeddings(inputs_embeds=inputs_embeds)
    mask = create_causal_mask(config=text_model.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None)
    hidden = text_model.encoder(inputs_embeds=hidden, attention_mask=mask, is_causal=True).last_hidden_state
    return text_model.final_layer_norm(hidden)
