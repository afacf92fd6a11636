"""How many pixels get the same label in bfloat16 as in float32, with trained models: target above 99 %.

    python benchmarks/precision.py --model runs/san_scenes/model --data scenes --ledger results/precision.jsonl

Text and picture side both run in the lower precision; pictures and names are those of the synthetic scenes' evaluation
split (`examples/make_scenes.py`).
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import pipeline

from ov_segmentation import ledger
from ov_segmentation.data.datasets import load_segmentation_data
from ov_segmentation.data.scene_folders import EVALUATION_FOLDER

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the models; 1 if one is below the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", required=True, help="folders or Hub ids of checkpoints")
    parser.add_argument("--data", required=True, type=Path, help="folder that examples/make_scenes.py wrote")
    parser.add_argument("--max-samples", type=int, default=40, help="number of scenes")
    parser.add_argument("--ledger", type=Path, help="JSON-lines file to append the figures to")
    options = parser.parse_args(arguments)
    split = load_segmentation_data(options.data / EVALUATION_FOLDER).split("validation", options.max_samples)
    pictures = [split[index].image for index in range(len(split))]
    names = split.data.vocabulary
    lowest = 1.0
    for model in options.model:
        start = time.perf_counter()
        figures = agreement(model, pictures, names)
        lowest = min(lowest, figures["agreement"])
        print(f"{model}: {100 * figures['agreement']:.2f} %, worst picture {100 * figures['worst_picture']:.2f} %")
        if options.ledger is not None:
            ledger.append(
                options.ledger,
                command=shlex.join(
                    ["python", "benchmarks/precision.py", *(sys.argv[1:] if arguments is None else arguments)]
                ),
                seed=None,
                seconds=time.perf_counter() - start,
                figures=figures,
                protocol=f"scenes, {len(pictures)} pictures, {len(names)} names",
                name=model,
            )
    return int(lowest <= TARGET)


if __name__ == "__main__":
    sys.exit(main())
