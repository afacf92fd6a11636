"""A small CLIP tokenizer made from a list of words, for models that start from nothing.

It is a `CLIPTokenizer` with a byte-pair vocabulary of its own: every given word is one token, any other word falls
apart into known pieces, down to single bytes, so that no text is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

from transformers import CLIPTokenizer

from ..vocabulary import Vocabulary, load_prompt_templates

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def build_word_tokenizer(words: Iterable[str], model_max_length: int = 77) -> CLIPTokenizer:
    """A tokenizer that lower-cases text, sets it between start and end token and pads with the end token.

    The merges are built word by word: what the merges so far leave of a word is joined, left to right, by new merges.
    A new merge ranks below all earlier ones, so it cannot change how an earlier word is joined.

    Args:
        words: in the order in which they get their tokens; letters, or punctuation without letters, no blanks.
        model_max_length: longest text in tokens.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    pieces = alphabet + [f"{symbol}</w>" for symbol in alphabet]
    merges: list[tuple[str, str]] = []
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        left = _apply_merges([*word[:-1], f"{word[-1]}</w>"], ranks)
        while len(left) > 1:
            pair = (left[0], left[1])
            ranks[pair] = len(merges)
            merges.append(pair)
            pieces.append("".join(pair))
            left = ["".join(pair), *left[2:]]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, BOS, EOS])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=model_max_length)


def split_into_words(texts: Iterable[str]) -> list[str]:
    """The distinct words and punctuation marks of lower-cased `texts`, sorted."""
    return sorted({word for text in texts for word in re.findall(r"[a-z]+|[^\sa-z]+", text.lower())})


def words_of(templates: str | Iterable[str], vocabularies: Iterable[Vocabulary]) -> list[str]:
    """The words of prompt templates (or a set of them by name) and of all class names and synonyms."""
    names = [name for vocabulary in vocabularies for synonyms in vocabulary.synonyms for name in synonyms]
    return split_into_words([*(template.replace("{}", " ") for template in load_prompt_templates(templates)), *names])


def _apply_merges(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one word: always the pair of lowest rank next."""
    while True:
        pairs = [(ranks[pair], index) for index, pair in enumerate(pairwise(symbols)) if pair in ranks]
        if not pairs:
            return symbols
        index = min(pairs)[1]
        symbols = [*symbols[:index], symbols[index] + symbols[index + 1], *symbols[index + 2 :]]
