"""How many pixels get the same label in bfloat16 as in float32, with trained models: target above 99 %.

    python benchmarks/precision.py --data scenes --ledger results/precision.jsonl
    python benchmarks/precision.py --model runs/deop_scenes/model --data scenes

Without `--model`: the checkpoints in assets/, and with its CLIP DeOP without training. Text and picture side both run
in the lower precision; pictures and names are those of the evaluation split of synthetic scenes
(`examples/make_scenes.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import pipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import Rows
from ov_segmentation.data.datasets import load_segmentation_data
from ov_segmentation.data.scene_folders import EVALUATION_FOLDER

ROOT = Path(__file__).resolve().parents[1]
TARGET = 0.99


def agreement(model: str, pictures: Iterable[Any], names: Any) -> dict[str, Any]:
    """Figures of a checkpoint's label maps in both precisions.

    Args:
        model: folder or Hub id.
        pictures: what the pipeline takes.
        names: its `candidate_labels`.

    Returns:
        `agreement`, the share of pixels with the same label; `worst_picture`, the lowest of a picture; `pictures`.
    """
    pictures = list(pictures)
    maps = []
    for dtype in (torch.float32, torch.bfloat16):
        segment = pipeline("open-vocabulary-segmentation", model=model, dtype=dtype)
        found = segment(pictures, candidate_labels=names, output_type="map")
        maps.append([one["segmentation"] for one in found])
    shares = [(full == half).mean() for full, half in zip(*maps, strict=True)]
    pixels = [full.size for full in maps[0]]
    return {
        "agreement": float(np.average(shares, weights=pixels)),
        "worst_picture": float(min(shares)),
        "pictures": len(pictures),
    }


def measure_row(model: str, data: str, max_samples: int) -> dict[str, Any]:
    """The figures of a checkpoint on scenes; in a process of its own."""
    folder = str(ROOT / model) if (ROOT / model).is_dir() else model
    split = load_segmentation_data(Path(data) / EVALUATION_FOLDER).split("validation", max_samples)
    names = split.data.vocabulary
    pictures = [split[index].image for index in range(len(split))]
    return {**agreement(folder, pictures, names), "names": len(names)}


def bundled() -> list[str]:
    """The checkpoints that come with the project."""
    return [str(path.parent.relative_to(ROOT)) for path in sorted((ROOT / "assets").glob("*/config.json"))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the models; 1 if one is below the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", help="folders or Hub ids of checkpoints (default: those in assets/)")
    parser.add_argument("--data", type=Path, help="folder that examples/make_scenes.py wrote")
    parser.add_argument("--max-samples", type=int, default=40, help="number of scenes")
    Rows.add_options(parser)
    options = parser.parse_args(arguments)
    if options.here:
        print(json.dumps(measure_row(**json.loads(options.here))))
        return 0
    if options.data is None:
        parser.error("--data is needed: a folder that examples/make_scenes.py wrote.")
    rows = Rows(__file__, arguments, options)
    lowest = 1.0
    for model in options.model or bundled():
        start, row = time.perf_counter(), {"name": Path(model).name, "max_samples": options.max_samples}
        figures = rows.known(row)
        if figures is None:
            task = {"model": model, "data": str(options.data), "max_samples": options.max_samples}
            figures = rows.measure(model, task)
            if figures is None:
                continue
            protocol = f"scenes, {figures['pictures']} pictures, {figures['names']} names"
            rows.record(start, figures, seed=None, protocol=protocol, model=model, **row)
        lowest = min(lowest, figures["agreement"])
        print(
            f"{model}: {100 * figures['agreement']:.2f} %, worst picture {100 * figures['worst_picture']:.2f} %",
            flush=True,
        )
    return int(lowest <= TARGET or rows.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
