"""Captions of scene crops and the tokenizer that reads them.

The tokenizer is a `CLIPTokenizer` with an own, tiny byte-pair vocabulary: every word of the captions is one token, any
other word falls apart into known pieces, down to single bytes, so that no text is refused. Captions now and then hold
made-up words, which teaches the text tower not to mind them.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterable

from transformers import CLIPTokenizer

from .scene_vocabulary import (
    STUFF_COLOURS,
    STUFF_NOUN,
    STUFF_TEXTURES,
    THING_COLOURS,
    THING_PATTERNS,
    THING_SHAPES,
    SceneVocabulary,
)
from .word_tokenizer import build_word_tokenizer, split_into_words

ANY_THING = "object"
QUALITIES = (
    "good", "bad", "bright", "dark", "blurry", "cropped", "close-up", "low resolution", "pixelated", "black and white",
    "jpeg corrupted", "clean", "dirty", "nice", "cool", "weird",
)  # fmt: skip
MEDIA = (
    "photo", "picture", "image", "drawing", "painting", "rendering", "sketch", "sculpture", "doodle", "cartoon", "toy",
    "tattoo", "rendition", "embroidery", "graffiti", "art",
)  # fmt: skip
SIZES = ("small", "medium", "large", "hard to see", "plastic", "plushie", "origami", "embroidered")
OPENINGS = ("a", "the", "this is a", "there is a", "one", "my", "an", "itap")
ARTICLES = ("a", "the", "one", "my", "many")
TAILS = (".", " in the scene", " in the scene.", " in a video game.", "")
JOINTS = ("on", "and", "of", "in")
MADE_UP_WORDS = 0.06


def write_caption(phrase: str, generator: random.Random) -> str:
    """A sentence around a phrase such as "red striped circle": bare, with an article, or as a picture of it."""
    draw = generator.random()
    if draw < 0.15:
        return phrase
    if draw < 0.4:
        return f"{generator.choice(ARTICLES)} {phrase}{generator.choice(TAILS)}"
    words = [generator.choice(OPENINGS)]
    if generator.random() < 0.4:
        words.append(generator.choice(QUALITIES))
    if generator.random() < MADE_UP_WORDS:
        words.append("".join(generator.choices(string.ascii_lowercase, k=generator.randint(3, 8))))
    if generator.random() < 0.85:
        words += [generator.choice(MEDIA) if generator.random() < 0.5 else "photo", "of", generator.choice(ARTICLES)]
    if generator.random() < 0.25:
        words.append(generator.choice(SIZES))
    return f"{' '.join(words)} {phrase}{generator.choice(TAILS)}"


def thing_phrase(vocabulary: SceneVocabulary, attributes: tuple[int, int, int], kept: Iterable[str]) -> str:
    """Words of a thing; attributes that are not in `kept` ("colour", "pattern", "shape") are dropped."""
    kept = set(kept)
    colour, pattern, shape = attributes
    words = [vocabulary.colours[colour]] if "colour" in kept else []
    words += [vocabulary.patterns[pattern]] if "pattern" in kept else []
    return " ".join([*words, vocabulary.shapes[shape] if "shape" in kept else ANY_THING])


def stuff_phrase(vocabulary: SceneVocabulary, attributes: tuple[int, int], kept: Iterable[str]) -> str:
    """Words of a stuff class; attributes that are not in `kept` ("colour", "texture") are dropped."""
    kept = set(kept)
    words = [vocabulary.stuff_colours[attributes[0]]] if "colour" in kept else []
    words += [vocabulary.stuff_textures[attributes[1]]] if "texture" in kept else []
    return " ".join([*words, STUFF_NOUN])


def caption_words() -> list[str]:
    """All words of the captions of any scene vocabulary, sorted; each is one token."""
    names = (*THING_COLOURS, *THING_PATTERNS, *THING_SHAPES, *STUFF_COLOURS, *STUFF_TEXTURES, STUFF_NOUN, ANY_THING)
    grammar = (*QUALITIES, *MEDIA, *SIZES, *OPENINGS, *ARTICLES, *TAILS, *JOINTS)
    return split_into_words([*names, *grammar])


def build_scene_tokenizer(model_max_length: int = 77) -> CLIPTokenizer:
    """The tokenizer of the scene CLIPs, which knows the words of their captions (see `word_tokenizer`)."""
    return build_word_tokenizer(caption_words(), model_max_length)
