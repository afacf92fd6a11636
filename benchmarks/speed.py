"""Speed and memory of every method beside the original's: `make bench`.

    python benchmarks/speed.py --threads 2 --ledger results/speed.jsonl
    python benchmarks/speed.py --methods san sed-top8 --classes 150 --dtypes float32 --repeats 1

Every row is a fresh process with random weights and ready class embeddings: from preprocessed pixels to the label map
at the picture's size. `units` is the row's time divided by that of one forward of CLIP's ViT-B/16 at 640 x 640 in
float32, measured alternately with it; `floor` is what its multiply-adds would take at the rates of large operations,
likewise (`measuring.py`). `rows.py` has the sizes, the originals' figures and the targets.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import Rows, bfloat16_matrix_instructions, measure
from benchmarks.rows import CLASSES, DTYPES, EXTRA_SIZES, SIZES, build, forced, like_trained

FLOOR_TARGET = 1.3
MEMORY_TARGET = 0.5
MEMORY_TARGET_CLASSES = 847
# of bfloat16, in float32's units
BFLOAT16_TARGET = 0.5
TITLES = ("row", "K", "dtype", "s", "CPU s", "units", "original", "target", "x floor", "GMAC", "GB", "original", "")
FORMAT = "{:<16}{:>4} {:<9}{:>8}{:>8}{:>8}{:>9}{:>8}{:>8}{:>8}{:>7}{:>9}  {}"


def measure_row(name: str, classes: int, dtype: str, repeats: int, budget: float) -> dict[str, Any]:
    """The figures of a row; in a process of its own."""
    import torch

    model, image_processor, pictures, text_embeds = build(name, classes, dtype)
    inputs, size = image_processor(images=pictures, return_tensors="pt"), SIZES[name]

    @torch.no_grad()
    def call() -> None:
        outputs = model(**inputs, text_embeds=text_embeds, **size.switches)
        outputs = like_trained(outputs)
        (label_map,) = image_processor.post_process_semantic_segmentation(outputs, target_sizes=[size.picture])
        if label_map.shape != size.picture:
            raise RuntimeError(f"The label map of {name} has the shape {tuple(label_map.shape)}.")

    with forced(name, model, classes):
        return measure(call, DTYPES[dtype], repeats, budget)


def compare(name: str, classes: int, dtype: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """The original's figures of a row and the target in units; None where there is none."""
    size = SIZES[name]
    original, target = size.original_units.get(classes), None
    if original is not None:
        target = original * (size.target or 1)
        if dtype == "bfloat16":
            target = target * BFLOAT16_TARGET if bfloat16_matrix_instructions() else original
    gigabytes = size.original_gigabytes.get(classes)
    has_limit = gigabytes is not None and classes == MEMORY_TARGET_CLASSES
    return {
        "original_units": original,
        "target_units": target,
        "original_gigabytes": gigabytes,
        "target_gigabytes": MEMORY_TARGET * gigabytes if has_limit else None,
        "gigabytes": figures["peak_mib"] * 2**20 / 1e9,
    }


def missed(figures: Mapping[str, Any]) -> list[str]:
    """The targets that a row misses."""
    found = []
    if figures["target_units"] is not None and figures["units"] > figures["target_units"]:
        slower = figures["units"] > figures["original_units"]
        found.append("slower than the original" if slower else "units")
    if figures["over_floor"] > FLOOR_TARGET:
        found.append("floor")
    if figures["target_gigabytes"] is not None and figures["gigabytes"] > figures["target_gigabytes"]:
        found.append("memory")
    return found


def line(name: str, classes: int, dtype: str, figures: Mapping[str, Any]) -> str:
    """A row of the table."""

    def digits(key: str, places: int = 2) -> str:
        return "-" if figures[key] is None else f"{figures[key]:.{places}f}"

    multiply_adds = f"{sum(figures['multiply_adds'].values()) / 1e9:.0f}"
    cells = [digits("seconds"), digits("cpu_seconds"), digits("units"), digits("original_units")]
    cells += [digits("target_units"), digits("over_floor"), multiply_adds, digits("gigabytes", 1)]
    misses = ", ".join(missed(figures))
    return FORMAT.format(
        name, classes, dtype, *cells, digits("original_gigabytes", 1), f"misses {misses}" if misses else "meets all"
    )


def summarise(table: Mapping[tuple[str, int, str], Mapping[str, Any]]) -> list[str]:
    """What needs several rows: classes in the mask family, and many passes against one."""
    found = []
    for (name, classes, dtype), figures in table.items():
        few = table.get((name, 20, dtype))
        if classes == 847 and few is not None and name.split("-")[0] in ("san", "deop", "ovseg", "simbaseline"):
            ratio = figures["seconds"] / few["seconds"]
            found.append(f"{name}, {dtype}: 847 classes take {ratio:.2f} x the time of 20 (target 1.3)")
        single = table.get(("deop", classes, dtype))
        if name.startswith("simbaseline") and single is not None:
            ratio = figures["units"] / single["units"]
            target = " (target 2.1)" if name == "simbaseline-20" else ""
            found.append(f"{name}, {dtype}, {classes} classes: {ratio:.2f} x the time of DeOP{target}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the chosen rows; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [name for name in SIZES if name not in EXTRA_SIZES]
    parser.add_argument("--methods", nargs="+", choices=list(SIZES), default=default, metavar="ROW", help=str([*SIZES]))
    parser.add_argument("--classes", type=int, nargs="+", choices=CLASSES, help="default: those of the size's table")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=3, help="timed calls per row")
    parser.add_argument("--budget", type=float, default=40, help="seconds after which a row starts no further repeat")
    Rows.add_options(parser)
    options = parser.parse_args(arguments)
    if options.here:
        print(json.dumps(measure_row(**json.loads(options.here))))
        return 0
    rows = Rows(__file__, arguments, options)
    chosen = [
        {"name": name, "classes": k, "dtype": dtype}
        for dtype in options.dtypes
        for k in options.classes or CLASSES
        for name in options.methods
        if options.classes or k in SIZES[name].classes
    ]
    table: dict[tuple[str, int, str], dict[str, Any]] = {}
    print(FORMAT.format(*TITLES), flush=True)
    for number, row in enumerate(chosen, start=1):
        figures, title = rows.known(row), " ".join(map(str, row.values()))
        if figures is None:
            print(f"[{number}/{len(chosen)}] {title} ...", end="\r", file=sys.stderr, flush=True)
            start = time.perf_counter()
            figures = rows.measure(title, {**row, "repeats": options.repeats, "budget": options.budget})
            if figures is None:
                continue
            figures |= compare(**row, figures=figures)
            size = SIZES[row["name"]]
            rows.record(start, figures, **row, title=size.title, picture=list(size.picture))
        table[tuple(row.values())] = figures
        print(line(**row, figures=figures), flush=True)
    print(*summarise(table), sep="\n")
    return int(rows.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
