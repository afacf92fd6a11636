"""A benchmark's report: scores with their protocol, classes, confusions, and the difference to what was published."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from ..atomic_files import write_atomically
from ..data.benchmarks import EvaluationProtocol
from ..metrics import Averaging, ConfusionMatrix
from .runner import PLAIN, Counts

CONFUSIONS = 20


def build_report(
    protocol: EvaluationProtocol,
    counts: Counts,
    *,
    model: str,
    model_type: str,
    notes: Sequence[str] = (),
    max_samples: int | None = None,
    similarity: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that a reader needs to believe and repeat a score, as plain values; shares in [0, 1], None for NaN.

    Args:
        notes: what makes the score not comparable with the published ones.
        similarity: of the names to those of training.
        run: command, machine, revision and the like.
    """
    scores = {mode: _scores(matrix, protocol) for mode, matrix in counts.matrices.items()}
    matrix = counts.matrices[PLAIN]
    return _plain(
        {
            "benchmark": protocol.benchmark,
            "protocol_id": protocol.id + (f"+first{max_samples}" if max_samples else ""),
            "miou": scores[PLAIN]["miou"][protocol.averaging],
            "averaging": protocol.averaging,
            "scores": scores,
            "proposals": {name: {**vars(found), **found.figures()} for name, found in counts.proposals.items()},
            "reported": _compared(protocol, scores[PLAIN]["miou"]),
            "notes": list(notes),
            "pictures": counts.pictures,
            "seconds": round(counts.seconds, 1),
            "model": model,
            "model_type": model_type,
            "protocol": protocol.describe(),
            "classes": _per_class(matrix, protocol),
            "confusions": confusions(matrix, protocol.class_names),
            "similarity_to_training": similarity,
            "run": dict(run or {}),
        }
    )


def confusions(matrix: ConfusionMatrix, names: Sequence[str], limit: int = CONFUSIONS) -> list[dict[str, Any]]:
    """The pairs (ground truth, prediction) with the most wrong pixels."""
    wrong = matrix.counts.clone()
    wrong.fill_diagonal_(0)
    truth = matrix.counts.sum(1)
    best = wrong.flatten().topk(min(limit, wrong.numel()))
    pairs = []
    for pixels, cell in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        row, column = divmod(cell, matrix.num_classes + 1)
        if pixels:
            predicted = names[column] if column < len(names) else "(unlabelled)"
            share = pixels / float(truth[row])
            pairs.append({"ground_truth": names[row], "predicted": predicted, "pixels": pixels, "share": share})
    return pairs


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write `report.json` and `report.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    write_atomically(folder / "report.md", markdown(report))


def summary(report: Mapping[str, Any]) -> str:
    """What is printed: the score with its protocol and the difference to the published ones."""
    miou = report["scores"][PLAIN]["miou"]
    other = next(rule for rule in get_args(Averaging) if rule != report["averaging"])
    lines = [
        f"{report['benchmark']}: mIoU {_percent(report['miou'])} ({report['averaging']}), {_percent(miou[other])} "
        f"({other}); pixel accuracy {_percent(report['scores'][PLAIN]['pixel_accuracy'])}; {report['pictures']} "
        f"pictures",
        f"  protocol {report['protocol_id']}",
    ]
    protocol = report["protocol"]
    shown = ("names", "comma_rule", "sizes", "annotation_short_side", "ignore_index", "switches")
    lines.append("  " + ", ".join(f"{key} {protocol[key]}" for key in shown))
    if report["scores"][PLAIN].get("hiou") is not None:
        lines.append("  " + ", ".join(f"{k} {_percent(report['scores'][PLAIN][k])}" for k in _SPLIT_SCORES))
    for mode, scores in report["scores"].items():
        if mode != PLAIN:
            lines.append(f"  with oracle {mode}: mIoU {_percent(scores['miou'][report['averaging']])}")
    for name, values in report["proposals"].items():
        shown = ("precision", "recall", "recall_seen", "recall_unseen")
        lines.append(f"  {name}: " + ", ".join(f"{key} {_percent(values[key])}" for key in shown))
    for row in report["reported"]:
        lines.append(
            f"  {row['variant']}, {row['source']}: {row['miou']:.2f} ({row['averaging']}), difference "
            f"{'?' if row['difference'] is None else format(row['difference'], '+.2f')}"
        )
    if not report["reported"]:
        lines.append(f"  no published score of {protocol['method']} under these settings is known here")
    lines += [f"  not comparable: {note}" for note in report["notes"]]
    return "\n".join(lines)


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a document."""
    scores, protocol = report["scores"], report["protocol"]
    lines = [
        f"# {report['benchmark']}: mIoU {_percent(report['miou'])}",
        "",
        f"`{report['model']}` ({report['model_type']}), protocol `{report['protocol_id']}`, {report['pictures']} "
        f"pictures, {report['seconds']} s.",
        "",
        *(f"**Not comparable with published scores:** {note}\n" for note in report["notes"]),
        *_table(
            ["", "mIoU, classes in ground truth", "mIoU, union", "pixel accuracy", "mean accuracy", *_SPLIT_SCORES],
            [
                [
                    mode if mode == PLAIN else f"oracle {mode}",
                    *(_percent(values["miou"][rule]) for rule in ("ground_truth", "union")),
                    *(_percent(values[key]) for key in ("pixel_accuracy", "mean_accuracy")),
                    *(_percent(values.get(key)) for key in _SPLIT_SCORES),
                ]
                for mode, values in scores.items()
            ],
        ),
        *_proposals(report["proposals"]),
        "## Published",
        "",
        *_table(
            ["Variant", "Source", "Averaged classes", "mIoU", "Difference"],
            [
                [
                    row["variant"],
                    row["source"],
                    row["averaging"],
                    f"{row['miou']:.2f}",
                    "-" if row["difference"] is None else f"{row['difference']:+.2f}",
                ]
                for row in report["reported"]
            ],
        ),
        "## Protocol",
        "",
        *(
            f"- {key}: {protocol[key]}"
            for key in protocol
            if key not in ("vocabulary", "class_names", "label_of_class", "seen", "templates")
        ),
        f"- templates: {len(protocol['templates'] or ['{}'])}, the first {(protocol['templates'] or ['{}'])[0]!r}",
        "",
    ]
    if report["similarity_to_training"]:
        lines += ["## Names and training names", ""]
        lines += [f"- {key}: {value}" for key, value in report["similarity_to_training"].items()] + [""]
    lines += ["## Classes", ""]
    lines += _table(
        ["id", "class", "IoU", "accuracy", "pixels", "predicted pixels"],
        [
            [str(row["id"]), row["name"], _percent(row["iou"]), _percent(row["accuracy"]), str(row["pixels"]),
             str(row["predicted_pixels"])]
            for row in report["classes"]
        ],
    )  # fmt: skip
    lines += ["## Most confused", ""]
    lines += _table(
        ["ground truth", "predicted", "pixels", "share of the ground truth"],
        [[row["ground_truth"], row["predicted"], str(row["pixels"]), _percent(row["share"])]
         for row in report["confusions"]],
    )  # fmt: skip
    return "\n".join(lines)


_SPLIT_SCORES = ("miou_seen", "miou_unseen", "hiou")


def _scores(matrix: ConfusionMatrix, protocol: EvaluationProtocol) -> dict[str, Any]:
    by_rule = {rule: matrix.compute(rule, protocol.seen) for rule in get_args(Averaging)}
    figures = by_rule[protocol.averaging].figures()
    averaged = {rule: scores.num_averaged for rule, scores in by_rule.items()}
    return {**figures, "miou": {rule: scores.miou for rule, scores in by_rule.items()}, "num_averaged": averaged}


def _proposals(proposals: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not proposals:
        return []
    shown = ("precision", "hits_per_region_seen", "hits_per_region_unseen", "recall", "recall_seen", "recall_unseen")
    rows = [[name, *(_percent(values[key]) for key in shown)] for name, values in proposals.items()]
    note = "Ignored pixels of a picture count as one more region, as in the original evaluation."
    return ["## Proposals", "", *_table(["counted, IoU above", *shown], rows), "", note]


def _compared(protocol: EvaluationProtocol, miou: Mapping[str, float]) -> list[dict[str, Any]]:
    return [
        {**vars(score), "settings": dict(score.settings), "difference": 100 * miou[score.averaging] - score.miou}
        for score in protocol.reported_scores()
    ]


def _per_class(matrix: ConfusionMatrix, protocol: EvaluationProtocol) -> list[dict[str, Any]]:
    scores = matrix.compute()
    truth, predicted = matrix.counts.sum(1).tolist(), matrix.counts.sum(0).tolist()
    return [
        {
            "id": k,
            "name": name,
            "iou": float(scores.iou_per_class[k]),
            "accuracy": float(scores.accuracy_per_class[k]),
            "pixels": truth[k],
            "predicted_pixels": predicted[k],
        }
        for k, name in enumerate(protocol.class_names)
    ]


def _plain(value: Any) -> Any:
    """JSON's types only, None for NaN."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return ["None.", ""]
    cells = ([str(cell).replace("|", "\\|") for cell in row] for row in (titles, ["---"] * len(titles), *rows))
    return [*(f"| {' | '.join(row)} |" for row in cells), ""]
