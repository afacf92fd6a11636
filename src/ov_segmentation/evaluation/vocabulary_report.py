"""What may be wrong with a list of class names, before anybody waits for a model: spelling, length, near-synonyms."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from ..vocabulary import Vocabulary
from .similarity import label_set_similarity, one_vector_per_class

Names = Sequence[str | Sequence[str]]


def check_spelling(names: Names) -> dict[str, Any]:
    """What needs no model.

    Returns:
        `blank`: ids of classes with a blank name or synonym. `duplicates`: labels and whole lists of names of several
        classes, and names several times in one, with the ids. `same_text`: groups of ids whose labels differ in case
        or blanks only. `shared_synonyms`: synonyms of several classes, with the ids. `edges`: ids of names with blanks
        at an end.
    """
    classes = [[entry] if isinstance(entry, str) else list(entry) for entry in names]
    places, folded = defaultdict(list), defaultdict(list)
    for k, synonyms in enumerate(classes):
        for name in synonyms:
            places[name].append(k)
        if synonyms:
            folded[" ".join(synonyms[0].casefold().split())].append(k)
    labels = Counter(synonyms[0] for synonyms in classes if synonyms)
    lists = Counter(frozenset(synonyms) for synonyms in classes)
    equal = {name for synonyms, count in lists.items() if count > 1 for name in synonyms}
    repeated = {name: ids for name, ids in places.items() if len(ids) > 1 and name.strip()}
    within = {name for name, ids in repeated.items() if len(set(ids)) < len(ids)}
    duplicates = {
        name: sorted(set(ids)) for name, ids in repeated.items() if labels[name] > 1 or name in within or name in equal
    }
    return {
        "blank": [
            k for k, synonyms in enumerate(classes) if not synonyms or any(not name.strip() for name in synonyms)
        ],
        "duplicates": duplicates,
        "same_text": [ids for text, ids in folded.items() if text and len({classes[k][0] for k in ids}) > 1],
        "shared_synonyms": {name: sorted(set(ids)) for name, ids in repeated.items() if name not in duplicates},
        "edges": [k for k, synonyms in enumerate(classes) if any(n.strip() and n != n.strip() for n in synonyms)],
    }


def usable(names: Names) -> tuple[list[str | list[str]], list[int]]:
    """The classes that can be asked for (no blank name, no label or list a second time), and their ids in `names`."""
    kept, ids, labels, lists = [], [], set(), set()
    for k, entry in enumerate(names):
        synonyms = [entry] if isinstance(entry, str) else [*dict.fromkeys(entry)]
        if not synonyms or any(not name.strip() for name in synonyms):
            continue
        if synonyms[0] in labels or frozenset(synonyms) in lists:
            continue
        labels.add(synonyms[0])
        lists.add(frozenset(synonyms))
        kept.append(synonyms[0] if len(synonyms) == 1 else synonyms)
        ids.append(k)
    return kept, ids


def check_vocabulary(
    names: Names,
    model: Any,
    processor: Any,
    training: Vocabulary,
    threshold: float = 0.95,
    cache_folder: str | None = None,
) -> dict[str, Any]:
    """The report on a list of class names, ids being places in it.

    Args:
        model, processor: whose text tower and templates are asked.
        training: the names that the model was trained on.
        threshold: cosine from which two classes are reported as near-synonyms.
        cache_folder: of text embeddings.

    Returns:
        `check_spelling`'s entries; `too_long`: ids whose texts are cut at the model's context; `near_synonyms`: pairs
        with their cosine, the highest first; `training`: per class its nearest training name with the cosine, the
        most foreign first; `similarity`: figures of the two lists.

    Raises:
        ValueError: not one usable name.
    """
    spelling = check_spelling(names)
    kept, ids = usable(names)
    if not kept:
        raise ValueError("There is no usable class name in this list: every one is blank.")
    with warnings.catch_warnings():  # what they say stands in the report
        warnings.simplefilter("ignore")
        vocabulary = Vocabulary(kept)
        embeds = _embed(vocabulary, model, processor, cache_folder)
        known = _embed(training, model, processor, cache_folder)
    vectors = one_vector_per_class(embeds)
    cosines = (vectors @ vectors.t()).triu(diagonal=1)
    pairs = (cosines >= threshold).nonzero()
    similarity = label_set_similarity(embeds, known)
    order = similarity.cosines.argsort()
    return {
        "classes": len(names),
        **spelling,
        "too_long": [ids[k] for k in too_long(vocabulary, processor)],
        "near_synonyms": sorted(
            ({"ids": [ids[a], ids[b]], "cosine": float(cosines[a, b])} for a, b in pairs.tolist()),
            key=lambda pair: -pair["cosine"],
        ),
        "training": [
            {
                "id": ids[k],
                "nearest": training.labels[int(similarity.nearest[k])],
                "cosine": float(similarity.cosines[k]),
            }
            for k in order.tolist()
        ],
        "similarity": similarity.figures(),
    }


def too_long(vocabulary: Vocabulary, processor: Any) -> list[int]:
    """Classes of which a text does not fit into the model's context and is cut."""
    limit = min(processor.tokenizer.model_max_length, processor.context_length)
    prompts = vocabulary.prompts_with(processor.prompt_templates, processor.comma_rule)
    texts = [[text for synonyms in by_template for text in synonyms] for by_template in prompts]
    lengths = processor.tokenizer([text for row in texts for text in row], verbose=False, return_attention_mask=False)
    tokens = iter(lengths["input_ids"])
    longest = [max(len(next(tokens)) for _ in row) for row in texts]
    return [k for k, length in enumerate(longest) if length > limit]


def markdown(report: dict[str, Any], names: Names) -> str:
    """The report as a document."""

    def label(k: int) -> str:
        entry = names[k]
        return f"{k} ({entry if isinstance(entry, str) else ', '.join(entry)!r})"

    lines = [f"# {report['classes']} class names", ""]
    findings = [
        ("Blank: they cannot be asked for", [label(k) for k in report["blank"]]),
        ("Given more than once", [f"{name!r}: classes {ids}" for name, ids in report["duplicates"].items()]),
        ("One text to the model (case or blanks)", [", ".join(map(label, ids)) for ids in report["same_text"]]),
        (
            "A synonym of several classes",
            [f"{name!r}: classes {ids}" for name, ids in report["shared_synonyms"].items()],
        ),
        ("Blanks at an end", [label(k) for k in report["edges"]]),
        ("Longer than the model's context: cut", [label(k) for k in report["too_long"]]),
        (
            "Near-synonyms: pixels may go to either",
            [f"{', '.join(map(label, pair['ids']))}: {pair['cosine']:.3f}" for pair in report["near_synonyms"]],
        ),
    ]
    for title, found in findings:
        lines += [f"## {title}", "", *([f"- {entry}" for entry in found] or ["None."]), ""]
    similarity = report["similarity"]
    lines += [
        "## Training names",
        "",
        f"Hausdorff distance {similarity['hausdorff_distance']:.3f}, mean cosine to the nearest training name "
        f"{similarity['mean_nearest']:.3f}. The most foreign first:",
        "",
        *(f"- {label(row['id'])}: {row['nearest']!r}, {row['cosine']:.3f}" for row in report["training"]),
        "",
    ]
    return "\n".join(lines)


def _embed(vocabulary: Vocabulary, model: Any, processor: Any, cache_folder: str | None) -> torch.Tensor:
    tokens = processor(text=vocabulary, return_tensors="pt").to(model.device)
    with torch.no_grad():
        return model.encode_vocabulary(**tokens, cache_folder=cache_folder)
