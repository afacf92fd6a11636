"""Which measurements belong to a checkpoint, and how a model card states them.

A measurement is a line of the ledger (see `ledger`). Training writes its own evaluation beside the exported weights,
as `results.jsonl`; other lines belong to a checkpoint if they carry the digest of its weights, or the recipe's hash,
seed and commit that its weights carry too. A line that has neither names its checkpoint only, and belongs to it if the
caller says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult
from safetensors import safe_open

from . import ledger
from .ledger import Entry
from .text_encoding import hash_tensors

RESULTS_FILE = "results.jsonl"
DIGEST_LENGTH = 16

METRICS = {
    "miou": ("mean_iou", "mean IoU"),
    "miou_ground_truth": ("mean_iou", "mean IoU over the classes in the ground truth"),
    "miou_union": ("mean_iou", "mean IoU over the classes in ground truth or prediction"),
    "hiou": ("mean_iou", "harmonic mean of seen and unseen classes' mean IoU"),
    **{
        f"{kind}_{tier}": ("mean_iou", f"mean IoU, {kind} of tier {tier}")
        for kind in ("things", "stuff")
        for tier in "abc"
    },
    "pixel_accuracy": ("accuracy", "pixel accuracy"),
    "mean_accuracy": ("accuracy", "mean accuracy of the classes"),
    "frequency_weighted_iou": ("mean_iou", "frequency-weighted IoU"),
}
"""Figure of the ledger -> metric's type and name in a card; other figures stay in the ledger."""


def weights_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint's folder; FileNotFoundError where there is none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors file: save a model there with save_pretrained.")
    return files


def saved_weights_digest(folder: Path) -> str:
    """Which weights a folder holds: the `weights_digest` of the model that is loaded from it in float32.

    One tensor at a time is in memory. The type that the weights were saved in does not matter, their values do.
    """
    places = {}
    for file in weights_files(folder):
        with safe_open(file, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), file)

    def tensors() -> Iterable[torch.Tensor]:
        for name, file in sorted(places.items()):
            with safe_open(file, framework="pt") as opened:
                tensor = opened.get_tensor(name)
            yield tensor.float() if tensor.is_floating_point() else tensor

    return hash_tensors(tensors())[:DIGEST_LENGTH]


def weights_metadata(folder: Path) -> dict[str, str]:
    """What training noted in the weights' header: command, seed, commit, recipe's hash, figures; empty if nothing."""
    with safe_open(weights_files(folder)[0], framework="pt") as opened:
        return opened.metadata() or {}


def results_of(folder: Path, ledgers: Sequence[Path], model_type: str, name: str | None = None) -> list[Entry]:
    """The measurements of a checkpoint: its own `results.jsonl`, and what belongs to it in `ledgers`; no line twice.

    Args:
        folder: the checkpoint.
        ledgers: files of `results/*.jsonl`.
        model_type: its method; lines of another one never belong to it.
        name: what lines that carry neither digest nor recipe call it.

    Raises:
        FileNotFoundError: a ledger that is not there.
        LookupError: ledgers without a line of this checkpoint; says what was looked for.
    """
    own = folder / RESULTS_FILE
    found = ledger.read(own) if own.is_file() else []
    if not (found or ledgers):
        return []
    digest, metadata = saved_weights_digest(folder), weights_metadata(folder)
    if foreign := [entry for entry in found if entry.get("weights", digest) != digest]:
        raise LookupError(
            f"{own} holds {len(foreign)} measurements of other weights (digest {foreign[0]['weights']}) than lie there "
            f"now ({digest}): remove that file, and evaluate again."
        )
    entries = [entry for path in ledgers for entry in ledger.read(path)]
    mine = [entry for entry in entries if _belongs(entry, digest, metadata, model_type, name)]
    if ledgers and not mine:
        called = "" if name is None else f", and none calls it {name!r}"
        names = sorted({entry["name"] for entry in entries if isinstance(entry.get("name"), str)})
        raise LookupError(
            f"There is no line of {folder} in {', '.join(map(str, ledgers))}: none of the {len(entries)} lines is of "
            f"method {model_type!r} with the digest of these weights ({digest}) or their recipe, seed and "
            f"commit{called}. Names there: {', '.join(names) or 'none'}."
        )
    for entry in mine:
        if entry not in found:
            found.append(entry)
    return found


def _belongs(entry: Entry, digest: str, metadata: Mapping[str, str], model_type: str, name: str | None) -> bool:
    if entry.get("method") != model_type:
        return False
    if "weights" in entry:
        return entry["weights"] == digest
    if "recipe_hash" in entry:
        keys = ("recipe_hash", "seed", "commit")
        return all(key in metadata and str(entry.get(key)) == metadata[key] for key in keys)
    # runs of several seeds may go by one name
    seeds = {str(seed) for seed in (entry.get("seed"), metadata.get("seed")) if seed is not None}
    return name is not None and entry.get("name") == name and len(seeds) < 2


def dataset_of(entry: Entry) -> tuple[str, str | None]:
    """Name and split of the data that a line was measured on; where it has no such field, its protocol begins so."""
    if "benchmark" in entry:
        return entry["benchmark"], entry.get("split", "validation")
    if "dataset" in entry:
        return entry["dataset"], entry.get("split")
    return re.split(r"[ ,;]", entry.get("protocol") or "unknown", maxsplit=1)[0], entry.get("split")


def measured_figures(entry: Entry) -> dict[str, float]:
    """The figures of a line that a card shows, in METRICS' order."""
    figures = entry["figures"]
    return {name: figures[name] for name in METRICS if isinstance(figures.get(name), (int, float))}


def newest(entries: Sequence[Entry]) -> list[Entry]:
    """The last line of each data set, split and protocol: a measurement that was repeated replaces the one before."""
    return list({(*dataset_of(entry), entry.get("protocol")): entry for entry in entries}.values())


def eval_results(entries: Sequence[Entry]) -> list[EvalResult]:
    """The lines as results for a card's `model-index`; values are the ledger's, shares in [0, 1]."""
    results = []
    for entry in entries:
        dataset, split = dataset_of(entry)
        origin = {key: entry.get(key) for key in ("protocol", "commit", "seed", "date")}
        for figure, value in measured_figures(entry).items():
            kind, title = METRICS[figure]
            results.append(
                EvalResult(
                    task_type="image-segmentation",
                    task_name="Open-vocabulary semantic segmentation",
                    dataset_type=dataset,
                    dataset_name=dataset,
                    dataset_split=split,
                    metric_type=kind,
                    metric_name=title,
                    metric_value=value,
                    metric_args={key: value for key, value in origin.items() if value is not None},
                )
            )
    return results


def finite_figures(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the values: what the ledger takes."""
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }
