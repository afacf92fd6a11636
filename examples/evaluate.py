"""Evaluate a checkpoint on benchmarks: `accelerate launch examples/evaluate.py --model MODEL --benchmark ade20k_150`.

Data sets come from `examples/prepare_dataset.py` (`--data FOLDER` holds one folder per benchmark, `--data NAME=PLACE`
names a folder or a Hub id). Start the same command again after a kill: no picture is done twice. Prints the score with
its protocol, and writes report.json and report.md. Several CPU processes:
`ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/evaluate.py ...`. A --benchmark that is none of the
packaged ones is a data set of yours, whose class names come with it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ov_segmentation import Vocabulary, ledger
from ov_segmentation.cli_options import add_column_options, at_least_one, check_switches, columns_of, parse_switches
from ov_segmentation.data.benchmarks import METHODS, EvaluationProtocol
from ov_segmentation.data.label_sets import label_sets
from ov_segmentation.evaluation.as_run import as_run
from ov_segmentation.evaluation.data import load_benchmark, locate
from ov_segmentation.evaluation.oracle import ORACLES
from ov_segmentation.evaluation.report import build_report, summary, write_report
from ov_segmentation.evaluation.runner import PLAIN, count_pixels, weights_digest
from ov_segmentation.evaluation.similarity import label_set_similarity
from ov_segmentation.evaluation.state import EvaluationError
from ov_segmentation.loading import load_model_and_processor
from ov_segmentation.metrics import Averaging
from ov_segmentation.process_group import process_group_ended
from ov_segmentation.vocabulary import BENCHMARKS


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a checkpoint")
    parser.add_argument("--benchmark", required=True, nargs="+", help=f"one or more of {', '.join(BENCHMARKS)}")
    parser.add_argument("--data", required=True, nargs="+", help="FOLDER with one folder per benchmark, or NAME=PLACE")
    parser.add_argument("--output", type=Path, default=Path("runs/evaluation"), help="folder for reports and state")
    parser.add_argument("--protocol", choices=METHODS, help="whose, with its templates (default: the model's method)")
    parser.add_argument("--averaging", choices=get_args(Averaging), help="rule of the headline score")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="inference switches, JSON values")
    parser.add_argument("--vocabulary", type=Path, help="JSON list: other names for the benchmark's classes, in order")
    parser.add_argument("--split", help="default: validation")
    parser.add_argument("--ignore-index", type=int, nargs="+", default=[], help="of a data set of yours")
    add_column_options(parser)
    parser.add_argument("--oracle", nargs="+", choices=ORACLES, default=[], help="also with perfect masks or names")
    parser.add_argument("--proposal-recall", action="store_true", help="also the share of regions that proposals fit")
    parser.add_argument("--similarity", action="store_true", help="also the distance of the names to COCO-Stuff's")
    parser.add_argument("--streaming", action="store_true", help="read the data set while going")
    parser.add_argument("--max-samples", type=at_least_one, help="only the first so many pictures")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that read pictures, per process")
    parser.add_argument("--resume", choices=("auto", "never"), default="auto", help="never: start anew")
    parser.add_argument("--text-cache", help="folder that keeps text embeddings")
    parser.add_argument("--ledger", type=Path, help="JSON-lines file to append the scores to")
    parser.add_argument("--name", help="what the ledger calls the checkpoint (default: the model's path)")
    options = parser.parse_args(arguments)
    options.command = shlex.join(["accelerate", "launch", "examples/evaluate.py", *(arguments or sys.argv[1:])])
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, evaluate, print and record."""
    options = parse(arguments)
    try:
        run(options)
    except (EvaluationError, ValueError, TypeError, OSError) as error:
        # the message says what to do; a traceback would bury it
        sys.exit(f"{type(error).__name__}: {error}")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Evaluate on every benchmark of the command line; the reports."""
    switches = parse_switches(options.set)
    names = None if options.vocabulary is None else json.loads(options.vocabulary.read_text(encoding="utf-8"))
    accelerator = Accelerator()
    model, processor = load_model_and_processor(options.model, dtype=torch.float32)
    check_switches(model, switches)
    model = model.to(accelerator.device)
    method = options.protocol or model.config.model_type
    loaded = {}
    for benchmark in options.benchmark:  # all of them first: a wrong folder shall not show after hours
        place = locate(benchmark, options.data)
        protocol, data = load_benchmark(
            benchmark,
            method,
            place,
            split=options.split,
            streaming=options.streaming,
            ignore_index=options.ignore_index,
            columns=columns_of(options),
        )
        protocol = protocol.with_changes(averaging=options.averaging, switches=switches, names=names)
        loaded[benchmark] = (place, protocol, data)
    reports = []
    for benchmark, (place, protocol, data) in loaded.items():
        protocol, notes = as_run(protocol, model, processor, published_templates=options.protocol is not None)
        if options.vocabulary is not None:
            notes.append("other names than the published ones")
        if options.max_samples is not None:
            notes.append(f"only the first {options.max_samples} pictures")
        folder = options.output / benchmark
        counts = count_pixels(
            model,
            processor,
            protocol,
            data,
            accelerator,
            folder,
            place=place,
            columns=columns_of(options),
            oracles=options.oracle,
            proposal_recall=options.proposal_recall,
            streaming=options.streaming,
            max_samples=options.max_samples,
            num_workers=options.num_workers,
            restart=options.resume == "never",
            text_cache=options.text_cache,
            progress=_bar(benchmark, accelerator),
        )
        known = label_sets()[benchmark].pictures.get(protocol.split) if benchmark in label_sets() else None
        if known not in (None, counts.pictures):
            notes.append(f"{counts.pictures} pictures instead of {known}")
        if accelerator.is_main_process:
            report = build_report(
                protocol,
                counts,
                model=options.model,
                model_type=model.config.model_type,
                notes=notes,
                max_samples=options.max_samples,
                similarity=_similarity(protocol, model, processor, options) if options.similarity else None,
                run={"command": options.command, "machine": ledger.describe_machine(), **ledger.revision()},
            )
            write_report(folder, report)
            print(summary(report), flush=True)
            _record(report, options, model)
            reports.append(report)
        accelerator.wait_for_everyone()
    return reports


def _bar(title: str, accelerator: Accelerator) -> Any:
    def progress(loader: Iterable, mine: int | None, done: int) -> Iterable:
        note = f"{title} ({done} done before)" if done else title
        return tqdm(loader, total=mine, desc=note, unit="picture", disable=not accelerator.is_main_process)

    return progress


@torch.no_grad()
def _similarity(
    protocol: EvaluationProtocol, model: Any, processor: Any, options: argparse.Namespace
) -> dict[str, float]:
    asked = protocol.vocabulary
    training = Vocabulary.from_benchmark("coco_stuff_171", protocol.method)
    training = training.with_texts(asked.templates, asked.comma_rule)
    embeds = [
        model.encode_vocabulary(
            **processor(text=vocabulary, return_tensors="pt").to(model.device), cache_folder=options.text_cache
        )
        for vocabulary in (asked, training)
    ]
    return label_set_similarity(*embeds).figures()


def _record(report: dict[str, Any], options: argparse.Namespace, model: Any) -> None:
    if options.ledger is None:
        return
    scores = report["scores"][PLAIN]
    figures = {f"miou_{rule}": value for rule, value in scores["miou"].items()}
    figures |= {key: scores[key] for key in ("pixel_accuracy", "mean_accuracy", "hiou") if scores.get(key) is not None}
    for mode, values in report["scores"].items():
        if mode != PLAIN:
            figures[f"miou_oracle_{mode}"] = values["miou"][report["averaging"]]
    for name, values in report["proposals"].items():
        wanted = ("precision", "recall", "recall_seen", "recall_unseen")
        figures |= {f"{name}_{key}": values[key] for key in wanted if values[key] is not None}
    ledger.append(
        options.ledger,
        command=options.command,
        seed=None,
        seconds=report["seconds"],
        figures={"miou": report["miou"], **figures},
        protocol=report["protocol_id"],
        method=report["model_type"],
        name=options.name or options.model,
        weights=weights_digest(model),
        benchmark=report["benchmark"],
        split=report["protocol"]["split"],
        averaging=report["averaging"],
        pictures=report["pictures"],
        notes=report["notes"],
    )


if __name__ == "__main__":
    with process_group_ended():
        main()
