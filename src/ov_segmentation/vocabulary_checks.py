"""What class names may be."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set


def checked_names(names: Iterable[str | Sequence[str]]) -> list[list[str]]:
    """The synonyms of each class, the label first; errors and warnings: see `vocabulary.Vocabulary`."""
    if isinstance(names, (str, bytes)):
        raise TypeError(
            f"Class names must be a list, got the text {names!r}. "
            f"ov_segmentation.vocabulary.split_names cuts it at its commas; the pipeline does so itself."
        )
    if isinstance(names, (Set, Mapping)) or not isinstance(names, Iterable):
        raise TypeError(
            f"Class names must be an ordered list, since class k is the k-th name; got {type(names).__name__}."
        )
    classes = [[entry] if isinstance(entry, str) else _synonyms(k, entry) for k, entry in enumerate(names)]
    if not classes:
        raise ValueError("There are no class names: give at least one.")
    for k, synonyms in enumerate(classes):
        for name in synonyms:
            if not isinstance(name, str):
                raise TypeError(f"Class names must be text, class {k} has {name!r} ({type(name).__name__}).")
            if not name.strip():
                raise ValueError(f"The name of class {k} is blank: {name!r}.")
        if twice := _repeated(synonyms):
            raise ValueError(f"Class {k} has synonyms given more than once: {', '.join(map(repr, twice))}.")
    labels = [synonyms[0] for synonyms in classes]
    if twice := _repeated(labels):
        raise ValueError(f"Class names given more than once: {', '.join(map(repr, twice))}.")
    if alike := _grouped(classes, lambda synonyms: [frozenset(synonyms)]):
        shown = "; ".join(", ".join(map(repr, group)) for group in alike.values())
        raise ValueError(f"Classes with the same names, which no model can tell apart: {shown}.")
    # names that ADE20K's classes share, for example: "bag" is three of them
    if shared := _grouped(classes, lambda synonyms: synonyms):
        shown = "; ".join(f"{name!r} of {', '.join(map(repr, group))}" for name, group in [*shared.items()][:5])
        shown += "; ..." if len(shared) > 5 else ""
        warnings.warn(f"Names of several classes make these alike to the model: {shown}.", stacklevel=3)
    if alike := _grouped(classes, lambda synonyms: [" ".join(synonyms[0].casefold().split())]):
        shown = "; ".join(", ".join(map(repr, group)) for group in alike.values())
        warnings.warn(
            f"Class names that differ only in case or blanks are the same text to the model: {shown}.", stacklevel=3
        )
    return classes


def _synonyms(k: int, entry: object) -> list[str]:
    if isinstance(entry, (Set, Mapping, bytes)) or not isinstance(entry, Iterable):
        raise TypeError(
            f"Class {k} must be a name or a list of synonyms, whose first is the label; got {entry!r} "
            f"({type(entry).__name__})."
        )
    synonyms = list(entry)
    if not synonyms:
        raise ValueError(f"Class {k} is an empty list of synonyms.")
    return synonyms


def _grouped(classes: list[list[str]], keys: Callable[[list[str]], Iterable[Hashable]]) -> dict[Hashable, list[str]]:
    """Labels of the classes by those keys that several of them have."""
    groups = defaultdict(list)
    for synonyms in classes:
        for key in keys(synonyms):
            groups[key].append(synonyms[0])
    return {key: group for key, group in groups.items() if len(group) > 1}


def _repeated(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]
