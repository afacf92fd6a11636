"""Small real things for tests: a byte-pair tokenizer, CLIP configurations, pictures, class embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn.functional import normalize
from transformers import CLIPTokenizer


def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with every byte and a few merges; start and end are the two highest ids, as in the real one."""
    letters = sorted(ByteLevel.alphabet())
    words = letters + [letter + "</w>" for letter in letters]
    merges = [("t", "h"), ("i", "n"), ("th", "e</w>"), ("o", "f</w>"), ("in", "g</w>")]
    words += [left + right for left, right in merges] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=merges, pad_token="!", model_max_length=77
    )


TOKENIZER = tiny_tokenizer()


def tiny_clip_config(**vision: Any) -> dict[str, Any]:
    """A CLIP with a ViT of 4 blocks, width 32, patch 8, and a text tower for `tiny_tokenizer`; as a dict.

    Args:
        vision: changes of the vision configuration.
    """
    return {
        "projection_dim": 16,
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "projection_dim": 16,
            **vision,
        },
        "text_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "projection_dim": 16,
            "vocab_size": len(TOKENIZER),
            "max_position_embeddings": 77,
            "pad_token_id": 0,
            "bos_token_id": TOKENIZER.bos_token_id,
            "eos_token_id": TOKENIZER.eos_token_id,
        },
    }


def tiny_pictures(*sizes: tuple[int, int], seed: int = 0) -> list[PIL.Image.Image]:
    """Noise pictures of the given (height, width)."""
    random = np.random.default_rng(seed)
    return [PIL.Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def random_embeddings(*shape: int, seed: int = 0) -> torch.Tensor:
    """L2-normalised vectors."""
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)
