"""What `torch.compile` makes of the models: seconds of a forward as it is and compiled, and of the compilation.

    python benchmarks/compiled.py --threads 2 --ledger results/compiled.jsonl

Every row is a fresh process with random weights and ready class embeddings, as in `speed.py`, without the label map.
The compiler (inductor) is told that weights do not change, which lets it arrange them for oneDNN beforehand; it needs a
C++ compiler.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import Rows, timed
from benchmarks.rows import SIZES, build, forced

METHODS = ("san", "deop", "cat_seg")
CLASSES = 150


def measure_row(name: str, classes: int, repeats: int) -> dict[str, Any]:
    """The figures of a row; in a process of its own."""
    import torch
    from torch._inductor import config

    config.freezing = True
    model, image_processor, pictures, text_embeds = build(name, classes, "float32")
    inputs = {**image_processor(images=pictures, return_tensors="pt"), "text_embeds": text_embeds}
    inputs |= SIZES[name].switches
    compiled = torch.compile(model)
    times: dict[str, list[float]] = {"seconds": [], "compiled_seconds": []}
    with torch.no_grad(), forced(name, model, classes):
        plain = model(**inputs)
        start = time.perf_counter()
        found = compiled(**inputs)
        first = time.perf_counter() - start
        for _ in range(repeats):
            for kind, call in zip(times, (model, compiled)):
                times[kind].append(timed(lambda call=call: call(**inputs))[0])
    pairs = [(one, found[key]) for key, one in plain.items() if torch.is_tensor(one) and one.is_floating_point()]
    medians = {kind: statistics.median(of) for kind, of in times.items()}
    return {
        **medians,
        "ratio": medians["compiled_seconds"] / medians["seconds"],
        "compilation_seconds": first - medians["compiled_seconds"],
        "largest_difference": max(float((one - other).abs().max()) for one, other in pairs),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the chosen rows; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(SIZES), default=METHODS, metavar="ROW", help=str([*SIZES]))
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each kind")
    Rows.add_options(parser)
    options = parser.parse_args(arguments)
    if options.here:
        print(json.dumps(measure_row(**json.loads(options.here))))
        return 0
    rows = Rows(__file__, arguments, options)
    for name in options.methods:
        start, row = time.perf_counter(), {"name": name, "classes": CLASSES}
        figures = rows.known(row)
        if figures is None:
            figures = rows.measure(name, {**row, "repeats": options.repeats})
            if figures is None:
                continue
            rows.record(start, figures, **row, title=SIZES[name].title)
        print(
            f"{name:<10} {figures['seconds']:.2f} s, compiled {figures['compiled_seconds']:.2f} s "
            f"({figures['ratio']:.2f} x), after {figures['compilation_seconds']:.0f} s of compilation; largest "
            f"difference {figures['largest_difference']:.0e}",
            flush=True,
        )
    return int(rows.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
