"""A protocol as a checkpoint runs it, and what then is not as published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..data.benchmarks import EvaluationProtocol, published_switches


def as_run(
    protocol: EvaluationProtocol, model: Any, processor: Any, published_templates: bool = False
) -> tuple[EvaluationProtocol, list[str]]:
    """The protocol with what the checkpoint decides: picture size, prompt templates, which switches there are, and on a
    user's data set their values.

    Args:
        protocol: of a benchmark, or, without templates and with changed switches only, of a user's data set.
        model, processor: the checkpoint's.
        published_templates: ask with the protocol's templates even where the checkpoint has others, if it can take
            them.

    Returns:
        the protocol, and in words what makes its score not comparable with the published ones.
    """
    size = processor.image_processor.size
    actual = tuple(size.get(key) for key in ("shortest_edge", "longest_edge") if size.get("shortest_edge"))
    actual = actual or (size.get("height"), size.get("width"))
    notes = []
    if actual not in protocol.sizes:
        published = " or ".join(f"{short} (at most {long})" for short, long in protocol.sizes)
        notes.append(f"pictures are resized to {dict(size)}, published: short side {published}")
    vocabulary, own = protocol.vocabulary, tuple(processor.prompt_templates)
    known, asked = model.switches | model.picture_switches, protocol.switches
    if vocabulary.templates is None:
        vocabulary = vocabulary.with_texts(own, processor.comma_rule)
        published = published_switches(protocol.benchmark, protocol.method)
        asked = {name: getattr(model.config, name) for name in published if name in known} | asked
    elif vocabulary.templates != own and not (published_templates and _takes(model, vocabulary.templates)):
        notes.append(
            f"names go into {_in_words(own)} of the checkpoint, published: {_in_words(vocabulary.templates)}"
            + (" (the checkpoint takes no other number)" if published_templates else "")
        )
        vocabulary = vocabulary.with_texts(own, vocabulary.comma_rule)
    switches = {name: value for name, value in asked.items() if name in known}
    if left_out := sorted(set(asked) - set(switches)):
        notes.append(f"{type(model).__name__} has no {', '.join(left_out)}, which {protocol.method}'s protocol sets")
    return replace(protocol, sizes=(actual,), vocabulary=vocabulary, switches=switches), notes


def _takes(model: Any, templates: Sequence[str]) -> bool:
    """Whether a model that keeps its prompts apart was made for so many."""
    return getattr(model.config, "num_templates", len(templates)) == len(templates)


def _in_words(templates: Sequence[str]) -> str:
    return f"the template {templates[0]!r}" if len(templates) == 1 else f"{len(templates)} templates"
