"""How cost grows with classes, picture sizes, batches, crops and sliding windows.

    python benchmarks/growth.py --threads 2 --ledger results/growth.jsonl
    python benchmarks/growth.py --tables classes --methods san

Every row is a fresh process with random weights and random class embeddings: seconds of the image processor, of the
model and of the label map at the picture's size, and the peak of memory. A row that would take more than three minutes,
judged by the two before it, is extrapolated along their line and marked: it has no memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import Rows, status, timed, unit_call
from benchmarks.rows import SIZES, build, forced, like_trained

LIMIT = 180.0
METHODS = ("san", "deop", "ovseg-20", "sed-top8", "cat_seg", "esc_net")
CLASSES = (20, 150, 847, 3000, 10_000)
PICTURES = (320, 640, 1280, 2048, 4096)
BATCHES = (1, 2, 4, 8)
CROPS = (1, 5, 20, 50, 100)
# windows along a side of the canvas
WINDOWS = (2, 4)
LARGE_PICTURE = {"san": 4096}
LARGE_PICTURE_ELSEWHERE = 2048
# a repeat is taken where the first call, which also allocates, was shorter than this
SHORT = 3.0


def measure_row(
    name: str,
    classes: int,
    picture: int | None = None,
    batch: int = 1,
    crops: int | None = None,
    windows: int | None = None,
) -> dict[str, Any]:
    """The figures of a row, in a process of its own. `picture`: side of a square; `windows`: along a side."""
    import torch

    changes = geometry(SIZES[name].config(), windows) if windows else {}
    resize = {"do_resize": False} if windows else {}
    model, image_processor, pictures, text_embeds = build(
        name, classes, "float32", (picture, picture) if picture else None, batch, changes, resize
    )
    sizes = [one.shape[:2] for one in pictures]
    switches = {**SIZES[name].switches, **({"sliding_window": True} if windows else {})}

    @torch.no_grad()
    def once() -> dict[str, float]:
        found: dict[str, Any] = {}

        def run(part: str, call: Any) -> None:
            found[part], found[f"{part}_cpu"] = timed(lambda: found.update(result=call()))

        run("processor", lambda: image_processor(images=pictures, return_tensors="pt"))
        inputs = found.pop("result")
        run("model", lambda: model(**inputs, text_embeds=text_embeds, **switches))
        outputs = like_trained(found.pop("result"))
        run("map", lambda: image_processor.post_process_semantic_segmentation(outputs, target_sizes=sizes))
        found.pop("result")
        return found

    before = status("VmRSS")
    with forced(name, model, classes, crops):
        found = once()
        peak = status("VmHWM")
        if sum(found[part] for part in ("processor", "model", "map")) < SHORT:
            found = once()
    with torch.no_grad():
        unit = unit_call()
        unit()
        unit_seconds, unit_cpu_seconds = timed(unit)
    seconds = sum(found[part] for part in ("processor", "model", "map"))
    cpu_seconds = sum(found[f"{part}_cpu"] for part in ("processor", "model", "map"))
    return {
        **{f"{part}_seconds": found[part] for part in ("processor", "model", "map")},
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "units": seconds / unit_seconds,
        "cpu_units": cpu_seconds / unit_cpu_seconds,
        "unit_seconds": unit_seconds,
        "before_mib": round(before),
        "peak_mib": round(peak),
        "extrapolated": False,
    }


def geometry(config: Any, along: int) -> dict[str, Any]:
    """Configuration values of a canvas with so many windows of the method's own size along a side."""
    side = config.window_pixels + (along - 1) * config.window_stride
    return {"canvas_size": (side, side)} if hasattr(config, "canvas_size") else {"canvas_pixels": side}


def rows(table: str, methods: Sequence[str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(what varies, its rows in ascending order) for each method of a table."""
    for name in methods:
        if table == "classes":
            yield "classes", [{"name": name, "classes": classes} for classes in CLASSES]
        elif table == "pictures":
            yield "picture", [{"name": name, "classes": 150, "picture": side} for side in PICTURES]
        elif table == "batches":
            yield "batch", [{"name": name, "classes": 150, "batch": batch} for batch in BATCHES]
        elif table == "crops" and name.startswith("ovseg"):
            yield "crops", [{"name": name, "classes": 150, "crops": crops} for crops in CROPS]
        elif table == "windows":
            side = LARGE_PICTURE.get(name, LARGE_PICTURE_ELSEWHERE)
            yield "windows", [{"name": name, "classes": 150, "picture": side, "windows": along} for along in WINDOWS]


TABLES = ("classes", "pictures", "batches", "crops", "windows")


def predicted(varied: str, done: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], task: Mapping[str, Any]) -> Any:
    """Seconds of a row by the line through the two before it, or in proportion to the only one; None without any."""
    if not done:
        return None
    if len(done) == 1:
        return done[0][1]["seconds"] * task[varied] / done[0][0][varied]
    (first, of_first), (second, of_second) = done[-2:]
    slope = (of_second["seconds"] - of_first["seconds"]) / (second[varied] - first[varied])
    return of_second["seconds"] + max(0.0, slope) * (task[varied] - second[varied])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the chosen tables; 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--methods", nargs="+", choices=list(SIZES), default=list(METHODS), metavar="ROW")
    parser.add_argument("--largest", type=int, help="leave out rows beyond this value of what varies")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds beyond which a row is extrapolated")
    Rows.add_options(parser)
    options = parser.parse_args(arguments)
    if options.here:
        print(json.dumps(measure_row(**json.loads(options.here))))
        return 0
    kept = Rows(__file__, arguments, options)
    for table in options.tables:
        for varied, tasks in rows(table, options.methods):
            done: list[tuple[dict[str, Any], dict[str, Any]]] = []
            for task in tasks:
                if options.largest and task[varied] > options.largest:
                    continue
                figures = kept.known({"table": table, "task": task})
                if figures is None:
                    start, seconds = time.perf_counter(), predicted(varied, done, task)
                    if seconds is not None and seconds > options.limit:
                        figures = {"seconds": seconds, "units": None, "peak_mib": None, "extrapolated": True}
                    else:
                        figures = kept.measure(f"{table} {task}", task)
                    if figures is None:
                        continue
                    kept.record(start, figures, table=table, task=task)
                done.append((task, figures))
                print(line(varied, task, figures), flush=True)
    return int(kept.failed > 0)


def line(varied: str, task: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """A row as it is shown."""
    start = f"{task['name']:<12}{varied:>9} {task[varied]:>6}"
    if figures["extrapolated"]:
        return f"{start}{figures['seconds']:>9.1f} s, extrapolated"
    parts = ", ".join(f"{part} {figures[f'{part}_seconds']:.2f}" for part in ("processor", "model", "map"))
    return (
        f"{start}{figures['seconds']:>9.2f} s ({parts}) {figures['units']:.2f} units, cpu {figures['cpu_units']:.2f}, "
        f"peak {figures['peak_mib']} MiB"
    )


if __name__ == "__main__":
    sys.exit(main())
