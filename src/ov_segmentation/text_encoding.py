"""From token ids to class embeddings: trimmed, de-duplicated chunks, averages over synonyms and templates, caches.

With a causal text tower, what stands behind the end token cannot change its feature. Prompts are therefore cut behind
their end token, repeated ones are run once, and the rest run in chunks of similar length: exact, and several times
cheaper than length 77 throughout.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

TOKENS_PER_CHUNK = 16_384
CACHED_VOCABULARIES = 8
SAMPLES_PER_WEIGHT = 32

# (input_ids [n, l], end positions [n]) -> projected, unnormalised features [n, D]
TextFeatures = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def end_positions(input_ids: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Position of the first end token of each row of `input_ids` `[n, L]`; a row without one is an error."""
    is_end = input_ids == eos_token_id
    missing = (~is_end.any(dim=-1)).nonzero().flatten()
    if missing.numel():
        raise ValueError(
            f"{missing.numel()} of {len(input_ids)} prompts hold no end token (eos_token_id {eos_token_id}), the first "
            f"is row {missing[0].item()}. Tokenize with the checkpoint's own processor: processor(text=names)."
        )
    return is_end.int().argmax(dim=-1)


def encode_prompts(input_ids: torch.Tensor, eos_token_id: int, features: TextFeatures) -> torch.Tensor:
    """L2-normalised embedding `[n, D]` of each prompt `[n, L]`, each distinct prompt run once."""
    ends = end_positions(input_ids, eos_token_id)
    positions = torch.arange(input_ids.shape[-1], device=input_ids.device)
    trimmed = input_ids.masked_fill(positions > ends[:, None], 0)
    distinct, inverse = torch.unique(trimmed, dim=0, return_inverse=True)
    ends = end_positions(distinct, eos_token_id)
    order = ends.argsort(stable=True)
    lengths = (ends[order] + 1).tolist()
    embeds, start = [], 0
    while start < len(lengths):
        stop = start + 1
        while stop < len(lengths) and (stop + 1 - start) * lengths[stop] <= TOKENS_PER_CHUNK:
            stop += 1
        rows = order[start:stop]
        embeds.append(features(distinct[rows, : lengths[stop - 1]], ends[rows]))
        start = stop
    in_order = nn.functional.normalize(torch.cat(embeds), dim=-1)
    return in_order[order.argsort()][inverse]


def encode_vocabulary(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    eos_token_id: int,
    features: TextFeatures,
    keep_prompts: bool,
) -> torch.Tensor:
    """Class embeddings of token ids `[K, P, L]` or `[K, P, S, L]`.

    Per template, the normalised embeddings of a class's synonyms are averaged and normalised again; then, unless
    `keep_prompts`, the same over its templates. A row whose mask is all 0 is absent.

    Returns:
        `[K, D]`, or `[K, P, D]` with `keep_prompts`; L2-normalised.
    """
    if input_ids.ndim not in (3, 4):
        raise ValueError(
            "input_ids must be [K, P, L] or [K, P, S, L] (classes, prompts, synonyms, tokens), got "
            f"{list(input_ids.shape)}. processor(text=names) makes them."
        )
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask {list(attention_mask.shape)} and input_ids {list(input_ids.shape)} must have one shape."
        )
    if input_ids.ndim == 3:
        input_ids, attention_mask = input_ids[:, :, None], attention_mask[:, :, None]
    present = attention_mask.any(dim=-1)
    empty = (~present.any(dim=-1)).nonzero()
    if len(empty):
        raise ValueError(
            f"Class {empty[0, 0].item()} has no text for prompt {empty[0, 1].item()}: its masks are all 0."
        )
    prompts = encode_prompts(input_ids[present], eos_token_id, features)
    grid = prompts.new_zeros(*present.shape, prompts.shape[-1])
    grid = grid.masked_scatter(present[..., None].expand_as(grid), prompts)
    # a sum has the direction of the mean, and absent rows add nothing
    embeds = nn.functional.normalize(grid.sum(dim=2), dim=-1)
    return embeds if keep_prompts else nn.functional.normalize(embeds.mean(dim=1), dim=-1)


class TextEmbeddingCache:
    """Embeddings of whole vocabularies, in memory (the most recent few) and, when a folder is given, on disk.

    Memory entries are bound to the state of the weights: an optimizer step or a loaded checkpoint makes them miss.
    Files are keyed by a hash of the weights' bytes, of what is computed with them, and of the token ids.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[str, tuple[tuple, torch.Tensor]] = OrderedDict()
        self._digest: tuple[tuple, str] | None = None

    def get(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        parameters: Iterable[torch.Tensor],
        compute: Callable[[], torch.Tensor],
        folder: str | os.PathLike | None = None,
        recipe: str = "",
    ) -> torch.Tensor:
        """The cached embeddings of these ids under these weights, or `compute()`, kept for the next time.

        `recipe` names what `compute` does with the weights (two models may hold the same ones), for the files.
        """
        parameters = list(parameters)
        state = _weights_state(parameters)
        key = hash_tensors([input_ids] if attention_mask is None else [input_ids, attention_mask])
        if key in self._entries and self._entries[key][0] == state:
            self._entries.move_to_end(key)
            return self._entries[key][1]
        # an inference tensor would be of no use to a later training step
        with torch.inference_mode(False), torch.no_grad():
            if folder:
                embeds = self._from_disk(key, state, parameters, compute, Path(folder), recipe)
            else:
                embeds = compute()
        self._entries[key] = (state, embeds)
        self._entries.move_to_end(key)
        while len(self._entries) > CACHED_VOCABULARIES:
            self._entries.popitem(last=False)
        return embeds

    def clear(self) -> None:
        """Forget all embeddings held in memory."""
        self._entries.clear()

    def _from_disk(
        self,
        key: str,
        state: tuple,
        parameters: list[torch.Tensor],
        compute: Callable[[], torch.Tensor],
        folder: Path,
        recipe: str,
    ) -> torch.Tensor:
        if self._digest is None or self._digest[0] != state:
            self._digest = (state, hash_tensors(parameters))
        name = hashlib.sha256(f"{self._digest[1]} {key} {_autocast_dtype(parameters)} {recipe}".encode()).hexdigest()
        path = folder / f"{name}.safetensors"
        device = parameters[0].device
        if path.exists():
            try:
                return load_file(path)["text_embeds"].to(device)
            except (SafetensorError, KeyError):
                path.unlink(missing_ok=True)  # written by a process that died: make it again
        embeds = compute()
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"text_embeds": embeds.detach().cpu().contiguous()}, partial)
        partial.replace(path)
        return embeds


def _weights_state(parameters: list[torch.Tensor]) -> tuple:
    """Changes whenever the weights, or the precision they are used at, do.

    Versions count changes in place, but not those made through `.data`, and a freed address may be taken again:
    hence the samples.
    """
    samples = torch.cat([p.detach().flatten()[:: max(1, p.numel() // SAMPLES_PER_WEIGHT)].float() for p in parameters])
    counters = tuple(
        (p.data_ptr(), None if p.is_inference() else p._version, p.dtype, str(p.device)) for p in parameters
    )
    return counters, samples.cpu().numpy().tobytes(), _autocast_dtype(parameters)


def _autocast_dtype(parameters: list[torch.Tensor]) -> torch.dtype | None:
    kind = parameters[0].device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def hash_tensors(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of types, shapes and bytes, hexadecimal."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
