"""Nouns of captions, for mining pairs of mask and category (Liang et al., OVSeg, 2023, section 3.2).

The authors used NLTK's tagger, whose data has to be downloaded; so has a spaCy model. The tagger in textblob's wheel
needs nothing but the wheel: it is the default where neither of the others is complete.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

TaggerName = Literal["auto", "nltk", "spacy", "textblob"]
TaggedWord = tuple[str, str]
Tagger = Callable[[str], list[TaggedWord]]
"""A lower-cased caption to its words with their Penn Treebank tags."""

NOUN_TAGS = frozenset({"NN", "NNS", "NNP", "NNPS"})
MODIFIER_TAGS = frozenset({"JJ", "JJR", "JJS", "VBN"})
PHRASE_OPENERS = frozenset({"DT", "PRP$", "CD", "JJ", "JJR", "JJS"})
BARE_VERB_TAGS = frozenset({"VB", "VBP"})


def find_tagger(name: TaggerName = "auto") -> tuple[str, Tagger]:
    """The tagger asked for; "auto": the first of NLTK, spaCy and textblob whose data is there.

    Returns:
        Its name (with spaCy's model) and the function.

    Raises:
        ImportError: the package, or its data, is missing; the message says how to get it.
    """
    builders = {"nltk": _nltk_tagger, "spacy": _spacy_tagger, "textblob": _textblob_tagger}
    if name != "auto":
        if name not in builders:
            raise ValueError(f"Unknown tagger {name!r}: choose one of auto, {', '.join(builders)}.")
        return builders[name]()
    errors = []
    for build in builders.values():
        try:
            return build()
        except ImportError as error:
            errors.append(str(error))
    raise ImportError("No part-of-speech tagger is installed. " + " ".join(errors))


def _nltk_tagger() -> tuple[str, Tagger]:
    if find_spec("nltk") is None:
        raise ImportError("NLTK: pip install nltk, then python -m nltk.downloader averaged_perceptron_tagger_eng.")
    nltk = import_module("nltk")
    words = nltk.tokenize.TreebankWordTokenizer()  # which needs no data
    try:
        nltk.pos_tag(["word"])
    except LookupError as error:
        raise ImportError(
            "NLTK's tagger has no data: python -m nltk.downloader averaged_perceptron_tagger_eng."
        ) from error
    return "nltk", lambda caption: nltk.pos_tag(words.tokenize(caption))


def _spacy_tagger() -> tuple[str, Tagger]:
    if find_spec("spacy") is None:
        raise ImportError("spaCy: pip install spacy, then python -m spacy download en_core_web_sm.")
    spacy = import_module("spacy")
    models = sorted(model for model in spacy.util.get_installed_models() if model.startswith("en_"))
    if not models:
        raise ImportError("spaCy has no English model: python -m spacy download en_core_web_sm.")
    tag = spacy.load(models[0], disable=["parser", "ner", "lemmatizer"])
    return f"spacy {models[0]}", lambda caption: [(token.text, token.tag_) for token in tag(caption)]


def _textblob_tagger() -> tuple[str, Tagger]:
    if find_spec("textblob") is None:
        raise ImportError("textblob, whose tagger needs no further data: pip install ov_segmentation[mining].")
    tag = import_module("textblob.en").tag
    return "textblob", lambda caption: _verbs_in_noun_phrases(tag(caption))


def _verbs_in_noun_phrases(words: Iterable[TaggedWord]) -> list[TaggedWord]:
    """Words that a lexicon knows as bare verbs are nouns after a determiner, a number or modifiers: "a red cross".

    A bare verb cannot stand there, and textblob's tagger, which looks words up one by one, has it in captions often.
    """
    corrected, inside = [], False
    for word, tag in words:
        if inside and tag in BARE_VERB_TAGS:
            tag = "NN"
        inside = tag in PHRASE_OPENERS or (inside and tag in MODIFIER_TAGS)
        corrected.append((word, tag))
    return corrected


def extract_nouns(caption: str, tagger: Tagger, phrases: bool = False, singular: bool = False) -> list[str]:
    """The distinct nouns of a caption in the order in which they stand, lower-cased.

    Args:
        caption: any text; one without nouns gives an empty list.
        tagger: from [`find_tagger`].
        phrases: nouns with the adjectives, participles and nouns right before them ("red striped circle") as one.
        singular: plural nouns become singular.
    """
    # capitals make taggers take everything for a name, and CLIP does not see them
    words = tagger(caption.lower()) if caption.strip() else []
    words = [(_singular(word) if singular and tag in ("NNS", "NNPS") else word, tag) for word, tag in words]
    found = _phrases(words) if phrases else [word for word, tag in words if tag in NOUN_TAGS]
    return list(dict.fromkeys(noun for noun in found if re.search(r"[^\W\d_]", noun)))


def _phrases(words: Iterable[TaggedWord]) -> list[str]:
    """Runs of modifiers and nouns, up to their last noun."""
    found, run = [], []
    for word, tag in [*words, ("", "")]:
        if tag in NOUN_TAGS or tag in MODIFIER_TAGS:
            run.append((word, tag))
            continue
        while run and run[-1][1] not in NOUN_TAGS:
            run.pop()
        if run:
            found.append(" ".join(word for word, _ in run))
        run = []
    return found


def _singular(word: str) -> str:
    if find_spec("textblob") is None:
        raise ImportError("Singular forms come from textblob: pip install ov_segmentation[mining].")
    return import_module("textblob.en.inflect").singularize(word)
