"""Class names: synonyms, prompt templates, background classes, and the name lists behind published numbers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .vocabulary_checks import checked_names

FOLDER = Path(__file__).parent / "vocabularies"

SYNONYM_SEPARATOR = ", "
COMMA_RULES = ("keep", "split", "first")
NO_OBJECT = "no_object"


class Protocol(NamedTuple):
    """How a method turns a name into texts: a key of prompt_templates.json, and its rule for commas inside a name."""

    templates: str | None
    comma_rule: str


PROTOCOLS = {
    "san": Protocol("vild_14", "keep"),
    "ovseg": Protocol("vild_14", "keep"),
    "deop": Protocol("bare_1", "keep"),
    "sed": Protocol("imagenet_80", "split"),
    "cat_seg": Protocol("single_1", "first"),
    "esc_net": Protocol("single_1", "first"),
    # its long synonym lists for ADE20K-847; none of our methods was evaluated on them
    "fc_clip": Protocol(None, "split"),
}
_MASK_METHODS, _CLASS_METHODS = ("san", "ovseg", "deop"), ("sed", "cat_seg", "esc_net")
_ALL_METHODS = _MASK_METHODS + _CLASS_METHODS

# benchmark -> protocol -> name list, spelled as in the originals: with the wrong list a published number can't be had
BENCHMARKS: dict[str, dict[str, str]] = {
    "coco_stuff_171": dict.fromkeys(_ALL_METHODS, "coco_stuff_171"),
    "ade20k_150": dict.fromkeys(_MASK_METHODS, "ade20k_150.synonyms")
    | dict.fromkeys(_CLASS_METHODS, "ade20k_150.short"),
    "ade20k_847": dict.fromkeys(_ALL_METHODS, "ade20k_847") | {"fc_clip": "ade20k_847.extended"},
    "pascal_context_59": dict.fromkeys(_ALL_METHODS, "pascal_context_59") | {"ovseg": "pascal_context_59.ovseg_order"},
    "pascal_context_459": dict.fromkeys(_MASK_METHODS, "pascal_context_459.spaced")
    | dict.fromkeys(_CLASS_METHODS, "pascal_context_459.glued"),
    "pascal_voc_20": dict.fromkeys(_ALL_METHODS, "pascal_voc_20") | {"san": "pascal_voc_20.san"},
    "pascal_voc_20b": dict.fromkeys(_CLASS_METHODS, "pascal_voc_20b"),
    "camvid_11": dict.fromkeys(_ALL_METHODS, "camvid_11"),
}
# VOC-20b: the names behind the 20 VOC classes stand for the background, label 20
_BACKGROUND_FROM = {"pascal_voc_20b": 20}


@cache
def _read(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def _choose(kind: str, name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    if name not in known:
        raise ValueError(f"Unknown {kind} {name!r}. There are: {', '.join(known)}.")
    return name


def load_prompt_templates(templates: str | Iterable[str]) -> tuple[str, ...]:
    """Templates by name ("vild_14", "imagenet_80", "single_1", ...), or the given ones; checked.

    Raises:
        ValueError: an unknown name, no template, or one that does not hold `{}` exactly once.
        TypeError: neither a name nor templates.
    """
    if isinstance(templates, str):
        templates = (templates,) if "{}" in templates else _read("prompt_templates")[_choose_templates(templates)]
    if not isinstance(templates, Iterable):
        raise TypeError(f"Prompt templates are a list of texts, or the name of a set of them, got {templates!r}.")
    templates = tuple(templates)
    if not templates:
        raise ValueError("Give at least one prompt template, for example 'a photo of a {}.'.")
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(f"A prompt template holds {{}} exactly once, where the class name goes, got {template!r}.")
    return templates


def _choose_templates(name: str) -> str:
    return _choose("set of prompt templates", name, _read("prompt_templates"))


def unseen_classes(benchmark: str) -> list[int]:
    """Indices of the classes that the zero-shot split of a benchmark keeps out of training: the 15 of COCO-Stuff
    ("coco_stuff_171") and the 5 of VOC ("pascal_voc_20")."""
    return list(_read("unseen_classes")[_choose("zero-shot split", benchmark, _read("unseen_classes"))])


def split_names(names: str) -> list[str]:
    """Class names from a comma-separated string: "road, car" -> ["road", "car"]."""
    return [name.strip() for name in names.split(",")]


class Vocabulary:
    """An ordered list of classes, each with one name or several synonyms. Class k is always the k-th that was given.

    Args:
        names: per class a name, or a list of synonyms whose first is the class's label.
        templates: prompt templates (or the name of a set of them). None: those of the processor that it is given to.
        background: labels or indices of classes that are folded into one, and "no_object" (`resolve_background`).
        comma_rule: what ", " inside one name means: "keep" (nothing), "split" (synonyms), "first" (only the first
            synonym counts). None: the rule of the processor that it is given to ("keep" without one). The label
            stays as given under every rule.

    Attributes:
        labels: K labels.
        synonyms: K lists of names as given.
        background: indices, and "no_object" if it was given; or None.

    Raises:
        TypeError: names that are not text, or whose order is not defined (a set); templates that are no list.
        ValueError: no class, a blank name, a label or a synonym of one class given twice, two classes with the same
            names. A name that classes share beside others, and labels that differ only in case or blanks, give a
            warning.
    """

    def __init__(
        self,
        names: Iterable[str | Sequence[str]],
        templates: str | Iterable[str] | None = None,
        background: str | int | Iterable[str | int] | None = None,
        comma_rule: str | None = None,
    ) -> None:
        self.synonyms = checked_names(names)
        self.labels = [synonyms[0] for synonyms in self.synonyms]
        self.templates = None if templates is None else load_prompt_templates(templates)
        self.comma_rule = None if comma_rule is None else _choose("comma rule", comma_rule, COMMA_RULES)
        self.background = resolve_background(background, self.labels)

    @classmethod
    def from_benchmark(cls, benchmark: str, protocol: str | None = None) -> Vocabulary:
        """The name list, templates, comma rule and background behind a method's published numbers.

        Args:
            benchmark: "coco_stuff_171", "ade20k_150", "ade20k_847", "pascal_context_59", "pascal_context_459",
                "pascal_voc_20", "pascal_voc_20b" or "camvid_11".
            protocol: "san", "ovseg", "deop", "sed", "cat_seg", "esc_net"; "fc_clip" for its long synonym lists. May be
                left out where all methods use the same names; templates and comma rule are then the processor's.
        """
        lists = BENCHMARKS[_choose("benchmark", benchmark, BENCHMARKS)]
        if protocol is None:
            if len(set(lists.values())) > 1:
                raise ValueError(f"The names of {benchmark} depend on the protocol. Give one of: {', '.join(lists)}.")
            texts, name_list = Protocol(None, None), next(iter(lists.values()))
        else:
            texts, name_list = PROTOCOLS[_choose(f"protocol of {benchmark}", protocol, lists)], lists[protocol]
        names = _read(name_list)
        first = _BACKGROUND_FROM.get(benchmark, len(names))
        return cls(names, texts.templates, range(first, len(names)), texts.comma_rule)

    def with_texts(self, templates: str | Iterable[str] | None, comma_rule: str | None) -> Vocabulary:
        """The same classes with other templates and another comma rule; None: those of the processor."""
        changed = copy.copy(self)
        changed.templates = None if templates is None else load_prompt_templates(templates)
        changed.comma_rule = None if comma_rule is None else _choose("comma rule", comma_rule, COMMA_RULES)
        return changed

    @property
    def prompts(self) -> list[list[list[str]]]:
        """`[K][P][S]`: per class and template the text of each synonym; the bare names where there is no template."""
        return self.prompts_with(("{}",), "keep")

    def prompts_with(self, templates: Sequence[str], comma_rule: str) -> list[list[list[str]]]:
        """`prompts` with these templates and comma rule where the vocabulary has none of its own."""
        templates = self.templates or templates
        names = self.names_with(comma_rule)
        return [[[_fill(template, name) for name in row] for template in templates] for row in names]

    def names_with(self, comma_rule: str) -> list[list[str]]:
        """`[K][S]`: the names that go into the templates, commas treated by the vocabulary's own rule or this one."""
        rule = self.comma_rule or comma_rule
        return [[part for name in synonyms for part in _apply(rule, name)] for synonyms in self.synonyms]

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[str]:
        return iter(self.labels)

    def __getitem__(self, index: int) -> str:
        return self.labels[index]

    @property
    def _key(self) -> tuple:
        background = None if self.background is None else tuple(self.background)
        return tuple(map(tuple, self.synonyms)), self.templates, self.comma_rule, background

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self.labels[:5])) + (", ..." if len(self) > 5 else "")
        return f"Vocabulary({len(self)} classes: {shown})"


def resolve_background(
    background: str | int | Iterable[str | int] | None, labels: Sequence[str] | None
) -> list[int | str] | None:
    """Background classes given by label or index as indices in increasing order, "no_object" behind them; None stays.

    "no_object" always means the method's own no-object score; a class of that name is given by its index.

    Raises:
        ValueError: a name that is not a label, an index that is none, or names without `labels` to look them up in.
        TypeError: something else.
    """
    if background is None:
        return None
    if isinstance(background, (str, int)):
        background = [background]
    if not isinstance(background, Iterable):
        raise TypeError(f"background must be labels, indices or {NO_OBJECT!r}, got {background!r}.")
    entries = list(background)
    indices = {_background_index(entry, labels) for entry in entries if not _is_no_object(entry)}
    return [*sorted(indices), *([NO_OBJECT] if any(map(_is_no_object, entries)) else [])] or None


def _is_no_object(entry: object) -> bool:
    return isinstance(entry, str) and entry == NO_OBJECT


def _background_index(entry: str | int, labels: Sequence[str] | None) -> int:
    if isinstance(entry, str):
        if labels is None:
            raise ValueError(f"The background class {entry!r} is given by name: give labels= too, or its index.")
        if entry not in labels:
            raise ValueError(f"The background class {entry!r} is not one of the {len(labels)} labels.")
        return list(labels).index(entry)
    if isinstance(entry, bool) or not hasattr(entry, "__index__"):
        raise TypeError(f"A background class is a label or an index, got {entry!r}.")
    index = entry.__index__()
    if index < 0 or (labels is not None and index >= len(labels)):
        limit = "" if labels is None else f" ({len(labels)} labels)"
        raise ValueError(f"There is no class with index {index} for the background{limit}.")
    return index


def _fill(template: str, name: str) -> str:
    # not str.format: braces in a name are part of the name
    return template.replace("{}", name)


def _apply(comma_rule: str, name: str) -> list[str]:
    if comma_rule == "keep":
        return [name]
    parts = [part for part in name.split(SYNONYM_SEPARATOR) if part.strip()] or [name]
    return parts if comma_rule == "split" else parts[:1]
