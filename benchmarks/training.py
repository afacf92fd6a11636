"""Step time, memory and the share of data loading of training recipes.

    python benchmarks/training.py examples/recipes/san_scenes.yaml --threads 2 --ledger results/training_speed.jsonl
    python benchmarks/training.py examples/recipes/san_vit_b_16_coco.yaml --set batch_size=1 model.from_clip=null ...

Each recipe is a fresh process that runs a few optimizer steps of the training loop itself, pictures loaded in the same
process so that nothing hides behind the model, and no evaluation. `--set` makes a recipe fit a machine without its
data, its weights or its memory. Medians over the steps after the first.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import run_fresh, status
from ov_segmentation import ledger

TARGET = 0.1


def measure_recipe(recipe: str, changes: Sequence[str], steps: int, threads: int) -> dict[str, Any]:
    """The figures of a recipe; in a process of its own."""
    from ov_segmentation.training.loop import SegmentationRun
    from ov_segmentation.training.recipe import load_recipe

    class TimedRun(SegmentationRun):
        """Notes how long each step, and the loading of its pictures, took."""

        def _batches(self) -> Iterator[Any]:
            batches = super()._batches()
            while True:
                start = time.perf_counter(), time.process_time()
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                loading[-1][0] += time.perf_counter() - start[0]
                loading[-1][1] += time.process_time() - start[1]
                yield batch

        def _optimizer_step(self, batches: Iterator[Any]) -> None:
            loading.append([0.0, 0.0])
            start = time.perf_counter(), time.process_time()
            super()._optimizer_step(batches)
            whole.append((time.perf_counter() - start[0], time.process_time() - start[1]))

    loading: list[list[float]] = []
    whole: list[tuple[float, float]] = []
    fixed = [f"steps={steps + 1}", f"threads={threads}", "num_workers=0"]
    loaded = load_recipe(Path(recipe), [*changes, *fixed])
    with tempfile.TemporaryDirectory() as folder:
        run = TimedRun(loaded, Path(folder) / "run", "never")
        run.evaluates = False
        run.store.save = lambda *given: None
        before = status("VmRSS")
        run.train([False])
    seconds, cpu_seconds = (statistics.median(step[i] for step in whole[1:]) for i in (0, 1))
    data_seconds, data_cpu = (statistics.median(step[i] for step in loading[1:]) for i in (0, 1))
    return {
        "step_seconds": seconds,
        "step_cpu_seconds": cpu_seconds,
        "data_share": data_seconds / seconds,
        "data_cpu_share": data_cpu / cpu_seconds,
        "before_mib": round(before),
        "peak_mib": round(status("VmHWM")),
        "batch_size": loaded.batch_size,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the recipes; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="YAML files")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="for all of them")
    parser.add_argument("--steps", type=int, default=3, help="timed optimizer steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ledger", type=Path, help="JSON-lines file to append the figures to")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.here:
        print(json.dumps(measure_recipe(**json.loads(options.here))))
        return 0
    failed = 0
    for recipe in options.recipes:
        start = time.perf_counter()
        task = {"recipe": recipe, "changes": options.set, "steps": options.steps, "threads": options.threads}
        try:
            figures = run_fresh(__file__, task, options.threads)
        except RuntimeError as error:
            failed += 1
            print(f"{recipe}: {error}", flush=True)
            continue
        met = "meets" if figures["data_share"] < TARGET else "misses"
        print(
            f"{Path(recipe).stem:<28}{figures['step_seconds']:8.2f} s a step of {figures['batch_size']} "
            f"(cpu {figures['step_cpu_seconds']:.2f}), data {100 * figures['data_share']:.1f} % "
            f"(cpu {100 * figures['data_cpu_share']:.1f} %), {met} {100 * TARGET:.0f} %, "
            f"peak {figures['peak_mib']} MiB",
            flush=True,
        )
        if options.ledger is not None:
            given = sys.argv[1:] if arguments is None else arguments
            ledger.append(
                options.ledger,
                command=shlex.join(["python", "benchmarks/training.py", *given]),
                seed=0,
                seconds=time.perf_counter() - start,
                figures=figures,
                name=Path(recipe).stem,
                changes=options.set,
                threads=options.threads,
            )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
