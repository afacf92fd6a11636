"""Counts what each option of `model.trainable` trains, at the published sizes, without weights.

`python benchmarks/count_trainable.py --record` appends one line a model to results/counts.jsonl. Low-rank updates are
those of rank 8 in the method's usual places. 0: the method does not have this option.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.count_esc_net import configurations as esc_net_sizes
from ov_segmentation import ledger
from ov_segmentation.auto import METHODS, load_class
from ov_segmentation.training.trainable import OPTIONS, available_options, select_trainable

ROOT = Path(__file__).resolve().parents[1]
# parts of a training that are no method of their own, and a second vocabulary of the same size
LEFT_OUT = ("simbaseline_coco156", "voc15_r101c_vitb16", "stage1_prompt_coco156", "stage2_proposal_coco156")


def sizes(method: str) -> dict[str, Any]:
    """Name -> configuration of a method's published sizes."""
    if method == "esc_net":
        return esc_net_sizes()
    variants = import_module(f"ov_segmentation.models.{method}.convert_{method}").VARIANTS
    return {name: make() for name, make in variants.items() if name not in LEFT_OUT}


def count(model: torch.nn.Module) -> int:
    """Numbers that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def measure() -> Iterator[tuple[str, str, dict[str, int]]]:
    """Method, size, and trained parameters by option, with those of the whole model as "parameters"."""
    for method in METHODS:
        for name, config in sizes(method.model_type).items():
            figures = {}
            for option in OPTIONS:
                # anew each time: an option leaves the model changed
                with torch.device("meta"):
                    model = load_class(method.model)(config)
                figures.setdefault("parameters", sum(parameter.numel() for parameter in model.parameters()))
                has = option in available_options(model)
                if has:
                    select_trainable(model, option)
                figures[option] = count(model) if has else 0
            yield method.model_type, name, figures


def main() -> None:
    """Count, print, and append to the ledger if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="append to results/counts.jsonl")
    record, code = parser.parse_args().record, ledger.revision()
    started = time.monotonic()
    for method, variant, figures in measure():
        print(f"{method:8} {variant:30} {figures}")
        if record:
            ledger.append(
                ROOT / "results" / "counts.jsonl",
                command="python benchmarks/count_trainable.py --record",
                seed=None,
                seconds=time.monotonic() - started,
                figures=figures,
                code=code,
                kind="trainable",
                method=method,
                variant=variant,
            )
        started = time.monotonic()


if __name__ == "__main__":
    main()
