"""Seconds, memory and multiply-adds of a call, and what the machine can do at the same moment.

The machine's pace is measured alternately with the call, so that what else it does meanwhile cancels: one *unit* is one
forward of transformers' `CLIPVisionModel`, ViT-B/16, 640 x 640, float32; and for each kind of operation the
multiply-adds per second of a large one. The *floor* of a call is what its multiply-adds would take at these rates.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import conv2d, scaled_dot_product_attention
from transformers import CLIPVisionConfig, CLIPVisionModel

from ov_segmentation import ledger
from ov_segmentation.layers.attention import prefers_tiles, tiled_attention
from ov_segmentation.layers.products import linear
from ov_segmentation.profiling import ATTENTION, CONVOLUTION, MATRIX_PRODUCT, MultiplyAddCounter

MEBIBYTE = 2**20
UNIT_PIXELS = 640


def status(field: str) -> float:
    """A field of this process's /proc status, in MiB: "VmRSS" now, "VmHWM" at the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / MEBIBYTE
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only.")


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor seconds of a call."""
    start, start_cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - start_cpu


def first_call(call: Callable[[], Any]) -> dict[str, Any]:
    """Multiply-adds of a call by kind, and MiB of memory before it and at the process's peak. Call it first."""
    before = status("VmRSS")
    with MultiplyAddCounter() as counter:
        call()
    return {"multiply_adds": counter.multiply_adds, "before_mib": round(before), "peak_mib": round(status("VmHWM"))}


def unit_call() -> Callable[[], Any]:
    """What one unit is."""
    config = CLIPVisionConfig(patch_size=16, image_size=UNIT_PIXELS, hidden_size=768, num_hidden_layers=12)
    model = CLIPVisionModel(config).eval()
    pixels = torch.randn(1, 3, UNIT_PIXELS, UNIT_PIXELS)
    return lambda: model(pixels)


def reference_operations(dtype: torch.dtype) -> dict[str, tuple[Callable[[], Any], int]]:
    """Kind -> a large operation of it, and its multiply-adds; by the fastest way known here."""
    tokens, width, heads, channels, side = 1601, 768, 12, 256, 64
    x, weight = torch.randn(tokens, width, dtype=dtype), torch.randn(4 * width, width, dtype=dtype)
    features = torch.randn(1, channels, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(channels, channels, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    query = torch.randn(1, heads, tokens, width // heads, dtype=dtype)
    attend = tiled_attention if prefers_tiles(query) else scaled_dot_product_attention
    return {
        MATRIX_PRODUCT: (lambda: linear(x, weight), tokens * width * 4 * width),
        CONVOLUTION: (lambda: conv2d(features, kernel, padding=1), side * side * channels * channels * 9),
        ATTENTION: (lambda: attend(query, query, query), 2 * tokens * tokens * width),
    }


@torch.no_grad()
def measure(call: Callable[[], Any], dtype: torch.dtype, repeats: int, budget: float) -> dict[str, Any]:
    """Everything about a call, in a fresh process.

    Args:
        call: goes from preprocessed pixels to the label map.
        dtype: of its operations.
        repeats: how often it is timed, after the call that is counted; medians are returned.
        budget: seconds after which no further repeat starts.

    Returns:
        Figures of the ledger: `seconds`, `cpu_seconds`, `unit_seconds`, `units` and `cpu_units` (wall time and
        processor time of the call over the unit's), `floor_seconds`, `over_floor`, `rates` (multiply-adds per second by
        kind), `multiply_adds` (by kind), `before_mib`, `peak_mib`, `repeats`.
    """
    figures = first_call(call)
    gc.collect()
    unit, operations = unit_call(), reference_operations(dtype)
    timed(unit)
    for operation, _ in operations.values():
        timed(operation)
    calls: dict[str, list[tuple[float, float]]] = {"call": [], "unit": [], **{kind: [] for kind in operations}}
    start = time.perf_counter()
    while len(calls["call"]) < repeats and (not calls["call"] or time.perf_counter() - start < budget):
        calls["unit"].append(timed(unit))
        for kind, (operation, _) in operations.items():
            calls[kind] += [timed(operation) for _ in range(3)]
        calls["call"].append(timed(call))
    calls["unit"].append(timed(unit))
    wall, processor = (
        {name: statistics.median(of[i] for of in times) for name, times in calls.items()} for i in (0, 1)
    )
    rates = {kind: count / wall[kind] for kind, (_, count) in operations.items()}
    floor = sum(count / rates[kind] for kind, count in figures["multiply_adds"].items())
    # with few repeats a median of many short operations is steadier than that of the call: compare processor time too
    processor_floor = sum(
        count / (operations[kind][1] / processor[kind]) for kind, count in figures["multiply_adds"].items()
    )
    return {
        **figures,
        "seconds": wall["call"],
        "cpu_seconds": processor["call"],
        "unit_seconds": wall["unit"],
        "units": wall["call"] / wall["unit"],
        "cpu_units": processor["call"] / processor["unit"],
        "floor_seconds": floor,
        "over_floor": wall["call"] / floor,
        "cpu_over_floor": processor["call"] / processor_floor,
        "rates": rates,
        "repeats": len(calls["call"]),
    }


def run_fresh(script: str, task: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """What `script --here JSON` prints as its last line: a measurement in a process of its own.

    The process has as many threads as it says, the system's own memory allocation, and no network.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, script, "--here", json.dumps(dict(task))], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{script} {dict(task)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class Rows:
    """The rows of one benchmark: leaves out those that are known or come too late, measures the others in fresh
    processes, and writes them to the ledger.

    Args:
        script: the benchmark's `__file__`.
        arguments: of its command line.
        options: parsed by a parser with `add_options`.
    """

    def __init__(self, script: str, arguments: Sequence[str] | None, options: argparse.Namespace) -> None:
        self.script, self.options = script, options
        name = Path(script).name
        self.command = shlex.join(["python", f"benchmarks/{name}", *(sys.argv[1:] if arguments is None else arguments)])
        self.machine, self.code = ledger.describe_machine(), ledger.revision()
        self.failed, self.late = 0, 0

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """The options of every benchmark."""
        parser.add_argument("--threads", type=int, default=2)
        parser.add_argument("--ledger", type=Path, help="JSON-lines file to append the figures to")
        parser.add_argument("--resume", action="store_true", help="leave out rows of this commit that the ledger has")
        parser.add_argument("--until", type=float, help="start no row after this time (seconds since the epoch)")
        parser.add_argument("--here", help=argparse.SUPPRESS)

    def known(self, fields: Mapping[str, Any]) -> dict[str, Any] | None:
        """Figures of a row that need not be measured again."""
        path = self.options.ledger
        if not self.options.resume or path is None or not path.exists():
            return None
        wanted = {**fields, "machine": self.machine, "threads": self.options.threads, "commit": self.code["commit"]}
        fitting = [one for one in ledger.read(path) if all(one.get(key) == value for key, value in wanted.items())]
        return fitting[-1]["figures"] if fitting else None

    def measure(self, title: str, task: Mapping[str, Any]) -> dict[str, Any] | None:
        """What a fresh process measures; None, and a line that says so, if it failed or it is too late to start."""
        if self.options.until is not None and time.time() > self.options.until:
            self.late += 1
            print(f"{title}: not started, the time is over", flush=True)
            return None
        try:
            return run_fresh(self.script, task, self.options.threads)
        except RuntimeError as error:
            self.failed += 1
            print(f"{title}: {error}", flush=True)
            return None

    def record(self, start: float, figures: Mapping[str, Any], seed: int | None = 0, **fields: Any) -> None:
        """Append a row that was begun at `start` (`time.perf_counter`), if there is a ledger."""
        if self.options.ledger is not None:
            ledger.append(
                self.options.ledger,
                command=self.command,
                seed=seed,
                seconds=time.perf_counter() - start,
                figures=figures,
                machine=self.machine,
                code=self.code,
                threads=self.options.threads,
                **fields,
            )


def bfloat16_matrix_instructions() -> bool:
    """Whether the processor multiplies tiles of bfloat16 (AMX), several times as fast as float32."""
    return "amx_bf16" in Path("/proc/cpuinfo").read_text()
