"""Benchmark registry: what has to be the same for a score to be comparable with a method's published one.

Per benchmark and method: name list, templates and comma rule (`vocabulary.py`), resolution, averaged classes, inference
switches, folding of predicted classes, and the scores that were reported. Facts come from the methods' papers and
released evaluations; where they disagree the default is what the paper's table was made with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..metrics import Averaging
from ..vocabulary import BENCHMARKS, Vocabulary, unseen_classes
from .label_sets import LabelSet, label_set

METHODS = ("san", "ovseg", "deop", "sed", "cat_seg", "esc_net")

# "union": the evaluators of that time. SAN's logs have the newer rule, its paper's numbers fit the older one.
_AVERAGING: dict[str, Averaging] = {
    "san": "union",
    "ovseg": "union",
    "deop": "union",
    "sed": "ground_truth",
    "cat_seg": "ground_truth",
    "esc_net": "ground_truth",
}
# (short side, cap of the long side) of the published evaluation; what runs is the checkpoint's image processor
_SIZES = dict.fromkeys(METHODS, ((640, 2560),)) | {
    "ovseg": ((640, 2560), (512, 2048)),  # Swin-B, R101c
    "deop": ((512, 2560),),
}
# ADE20K-847 is shrunk before anything else and scored at that size
_ANNOTATION_SHORT_SIDE = {("ade20k_847", method): 512 for method in ("sed", "cat_seg", "esc_net")}
_SWITCHES: dict[str, dict[str, Any]] = {
    "san": {},
    # of the configs; the documented commands differ by benchmark, see below
    "ovseg": {"ensemble_weight": 0.7},
    "deop": {},
    # the paper's main table; its training evaluates with pooling 2, the published script with 1
    "sed": {"class_attention_pooling": 1, "rejection_top_k": 8},
    "cat_seg": {"sliding_window": True, "class_attention_pooling": 1, "max_classes": 256},
    "esc_net": {"sliding_window": True},
}
_BENCHMARK_SWITCHES: dict[tuple[str, str], dict[str, Any]] = {
    ("pascal_context_59", "ovseg"): {"ensemble_weight": 0.6},
    ("pascal_context_459", "ovseg"): {"ensemble_weight": 0.6},
    ("pascal_voc_20", "ovseg"): {"ensemble_weight": 0.45},  # the commands' number; the paper's appendix says 0.6
}
_SPLIT = "validation"  # of every published score
_ZERO_SHOT = ("coco_stuff_171", "pascal_voc_20")
# the names behind the 20 of VOC all stand for its background, class 20 of the label maps
_FOLDED_FROM = {"pascal_voc_20b": 20}


@dataclass(frozen=True)
class ReportedScore:
    """A published mean IoU, in percent.

    Args:
        method, variant, benchmark: whose.
        miou: percent.
        averaging: the rule it was computed under.
        source: where it stands.
        settings: switches that it was measured with, where a method has published several.
    """

    method: str
    variant: str
    benchmark: str
    miou: float
    averaging: Averaging
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationProtocol:
    """Everything that decides about a score, beside weights and pictures.

    Args:
        benchmark, method: whose protocol.
        split: of the data set.
        names: key of the packaged name list, or a digest of names that a user gave.
        vocabulary: the names themselves, with templates and comma rule (without: those of the checkpoint).
        class_names: the classes of the label maps.
        label_of_class: id in the label maps that stands for each name of the vocabulary.
        ignore_index: ids of the label maps that are not scored.
        label_transform: from the official files' ids, in words.
        annotation_short_side: pictures and label maps are first shrunk to this short side; None: never.
        sizes: (short side, cap of the long side) of the published evaluation.
        averaging: the rule of the headline score; both are always computed.
        switches: inference switches of the method.
        seen: classes of the zero-shot split that training may know; None: no split.
    """

    benchmark: str
    method: str
    split: str
    names: str
    vocabulary: Vocabulary
    class_names: tuple[str, ...]
    label_of_class: tuple[int, ...]
    ignore_index: tuple[int, ...]
    label_transform: str
    annotation_short_side: int | None
    sizes: tuple[tuple[int, int], ...]
    averaging: Averaging
    switches: Mapping[str, Any]
    seen: tuple[int, ...] | None

    def __post_init__(self) -> None:
        if len(self.label_of_class) != len(self.vocabulary):
            raise ValueError(
                f"{self.benchmark}: the vocabulary has {len(self.vocabulary)} names, but the label maps need "
                f"{len(self.label_of_class)}: name k of the vocabulary is class k of the label maps."
            )

    def describe(self) -> dict[str, Any]:
        """All fields as plain values, names and templates in full."""
        vocabulary = self.vocabulary
        return {
            **{key: value for key, value in vars(self).items() if key != "vocabulary"},
            "vocabulary": vocabulary.synonyms,
            "templates": vocabulary.templates,
            "comma_rule": vocabulary.comma_rule,
            "switches": dict(self.switches),
        }

    @property
    def id(self) -> str:
        """`benchmark/method/digest`: equal exactly where everything of `describe` is."""
        digest = hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()
        return f"{self.benchmark}/{self.method}/{digest[:8]}"

    def reported_scores(self) -> list[ReportedScore]:
        """The method's published scores on this benchmark that were measured on this split with these switches.

        A switch of the published evaluation that is not among these (`evaluation.as_run` leaves out what a model has
        not) counts as unchanged.
        """
        if self.split != _SPLIT:
            return []
        published = published_switches(self.benchmark, self.method)
        unchanged = {key: value for key, value in published.items() if key in self.switches}
        return [
            score
            for score in paper_scores()
            if (score.method, score.benchmark) == (self.method, self.benchmark)
            and all(self.switches.get(key) == value for key, value in {**unchanged, **score.settings}.items())
        ]

    def with_changes(
        self,
        averaging: Averaging | None = None,
        switches: Mapping[str, Any] | None = None,
        split: str | None = None,
        names: Sequence[str | Sequence[str]] | None = None,
    ) -> EvaluationProtocol:
        """The same with another averaging rule, some other switches, another split or own names for the classes.

        Raises:
            ValueError: another number of names than the label maps have classes.
        """
        changed = replace(self, switches={**self.switches, **(switches or {})})
        changed = replace(changed, averaging=averaging or self.averaging, split=split or self.split)
        if names is None:
            return changed
        vocabulary = Vocabulary(names, self.vocabulary.templates, comma_rule=self.vocabulary.comma_rule)
        digest = hashlib.sha256(json.dumps(vocabulary.synonyms).encode()).hexdigest()[:8]
        identity = tuple(range(len(self.class_names)))
        return replace(changed, vocabulary=vocabulary, names=f"given:{digest}", label_of_class=identity)


def evaluation_protocol(benchmark: str, method: str) -> EvaluationProtocol:
    """The protocol of a method's published evaluation on a benchmark.

    Raises:
        ValueError: an unknown benchmark or method, or a method that was not evaluated on it (its names are unknown).
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"There is no benchmark {benchmark!r}. There are: {', '.join(BENCHMARKS)}.")
    _check_method(method)
    vocabulary = Vocabulary.from_benchmark(benchmark, method)
    labels = label_set(benchmark)
    unseen = unseen_classes(benchmark) if benchmark in _ZERO_SHOT else None
    return EvaluationProtocol(
        benchmark=benchmark,
        method=method,
        split=_SPLIT,
        names=BENCHMARKS[benchmark][method],
        # a fold is done after the argmax, not by post-processing
        vocabulary=Vocabulary(vocabulary.synonyms, vocabulary.templates, comma_rule=vocabulary.comma_rule),
        class_names=labels.class_names,
        label_of_class=_label_of_class(benchmark, vocabulary, labels),
        ignore_index=(labels.ignore_index,),
        label_transform=_in_words(labels),
        annotation_short_side=_ANNOTATION_SHORT_SIDE.get((benchmark, method)),
        sizes=_SIZES[method],
        averaging=_AVERAGING[method],
        switches=published_switches(benchmark, method),
        seen=None if unseen is None else tuple(k for k in range(len(labels.class_names)) if k not in unseen),
    )


def own_protocol(
    name: str, method: str, names: Sequence[str | Sequence[str]], ignore_index: Sequence[int], split: str
) -> EvaluationProtocol:
    """A protocol for a user's data set, whose class names come with it: the method's resolution.

    It has no templates and no switches: no published score depends on them, so that they are those of the checkpoint.
    """
    _check_method(method)
    vocabulary = Vocabulary(names)
    return EvaluationProtocol(
        benchmark=name,
        method=method,
        split=split,
        names="of the data set",
        vocabulary=vocabulary,
        class_names=tuple(vocabulary.labels),
        label_of_class=tuple(range(len(vocabulary))),
        ignore_index=tuple(ignore_index),
        label_transform="none",
        annotation_short_side=None,
        sizes=_SIZES[method],
        averaging="ground_truth",
        switches={},
        seen=None,
    )


@cache
def paper_scores() -> tuple[ReportedScore, ...]:
    """Every published score that is known here (`paper_scores.json`). There are none of OVSeg and DeOP."""
    rows = json.loads((Path(__file__).parent / "paper_scores.json").read_text(encoding="utf-8"))
    return tuple(ReportedScore(**row) for row in rows)


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"There is no evaluation protocol of {method!r}. There are those of: {', '.join(METHODS)}.")


def published_switches(benchmark: str, method: str) -> dict[str, Any]:
    """The inference switches of a method's published evaluation on a benchmark; on any other data set, of the most."""
    return {**_SWITCHES[method], **_BENCHMARK_SWITCHES.get((benchmark, method), {})}


def _label_of_class(benchmark: str, vocabulary: Vocabulary, labels: LabelSet) -> tuple[int, ...]:
    if benchmark in _FOLDED_FROM:
        return tuple(min(index, _FOLDED_FROM[benchmark]) for index in range(len(vocabulary)))
    # OVSeg lists the classes of PASCAL Context 59 in another order, and "diningtable" as "table"
    spelled = ["diningtable" if benchmark == "pascal_context_59" and n == "table" else n for n in vocabulary.labels]
    if sorted(spelled) == sorted(labels.class_names):
        return tuple(labels.class_names.index(name) for name in spelled)
    return tuple(range(len(labels.class_names)))


def _in_words(labels: LabelSet) -> str:
    if labels.transform is None:
        return f"ids of the download's index, by name; the rest {labels.ignore_index}"
    ids = labels.transform.classes
    numbers = f"{ids[0]}..{ids[-1]}" if list(ids) == list(range(ids[0], ids[0] + len(ids))) else f"{len(ids)} ids"
    return f"official ids {numbers} -> 0..{len(ids) - 1}; the rest {labels.ignore_index}"
