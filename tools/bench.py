"""Measures the time of a call with a method's released size and random weights: `make bench`.

`python tools/bench.py san --classes 150 --record`: medians over a few pictures for the picture side, the whole model
with text embeddings at hand, the map at the picture's size, and a prompt's share of the text side. `--record` writes
them into results/speed.jsonl.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from ov_segmentation import AutoModelForOpenVocabularySegmentation, ledger
from ov_segmentation.auto import METHODS, load_class

ROOT = Path(__file__).resolve().parents[1]
METHOD_BY_TYPE = {method.model_type: method for method in METHODS}


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median wall time of `repeats` calls after one that warms up."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@torch.no_grad()
def measure(method: str, size: tuple[int, int], classes: int, prompts: int, repeats: int) -> dict[str, float]:
    """Seconds of each part for one picture of `size` (height, width) and `classes` names, as figures of the ledger."""
    config = AutoConfig.for_model(method)
    model = AutoModelForOpenVocabularySegmentation.from_config(config).eval()
    image_processor = load_class(METHOD_BY_TYPE[method].image_processor)()
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    generator = torch.Generator().manual_seed(0)

    def encode_prompts(number: int) -> torch.Tensor:
        """Start token, eight tokens of text, end token: a usual prompt's length; new ones each time, past the cache."""
        token_ids = torch.randint(1, 1000, (number, 1, 10), generator=generator)
        token_ids[..., -1] = model.text_tower[0].config.eos_token_id
        return model.encode_vocabulary(input_ids=token_ids)

    text_embeds = encode_prompts(classes)
    inputs = image_processor(images=picture, return_tensors="pt")
    outputs = model(**inputs, text_embeds=text_embeds)
    return {
        "preprocess": median_seconds(lambda: image_processor(images=picture, return_tensors="pt"), repeats),
        "encode_image": median_seconds(lambda: model.encode_image(**inputs), repeats),
        "forward": median_seconds(lambda: model(**inputs, text_embeds=text_embeds), repeats),
        "map": median_seconds(
            lambda: image_processor.post_process_semantic_segmentation(outputs, target_sizes=[size]), repeats
        ),
        "text_per_prompt": median_seconds(lambda: encode_prompts(prompts), repeats) / prompts,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def main() -> None:
    """Measure, print, and append to the ledger if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=sorted(METHOD_BY_TYPE))
    parser.add_argument("--size", type=int, nargs=2, default=(640, 640), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="append to results/speed.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    start = time.perf_counter()
    figures = measure(options.method, tuple(options.size), options.classes, options.prompts, options.repeats)
    print(json.dumps({name: round(value, 5) for name, value in figures.items()}))
    if options.record:
        ledger.append(
            ROOT / "results" / "speed.jsonl",
            command=shlex.join(["python", "tools/bench.py", *sys.argv[1:]]),
            seed=0,
            seconds=time.perf_counter() - start,
            figures=figures,
            method=options.method,
            size=list(options.size),
            classes=options.classes,
            threads=options.threads,
        )


if __name__ == "__main__":
    main()
