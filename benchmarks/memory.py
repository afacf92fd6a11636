"""Measures the peak resident memory of a fresh process that segments one picture: released size, random weights.

`python benchmarks/memory.py sed --classes 847 --templates 80 --set rejection_top_k=8 --record`: the process imports
torch and the package, makes the model, and goes from a picture to its label map with text embeddings at hand.
`--against class_chunk_size=null` segments it once more with other switches, after the peak is read, and says how far
the logits are apart. `--record` appends to results/memory.jsonl.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MEBIBYTE = 2**20


def segment(options: argparse.Namespace) -> dict[str, float]:
    """Segment one random picture in this process: MiB at the peak, and before the forward pass; with
    `options.against`, the largest difference and size of logits, and the peak of that second run."""
    import numpy as np
    import torch
    from torch.nn.functional import normalize
    from transformers import AutoConfig

    from ov_segmentation import AutoModelForOpenVocabularySegmentation
    from ov_segmentation.auto import METHODS, load_class

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    method = next(method for method in METHODS if method.model_type == options.method)
    with torch.no_grad():
        model = AutoModelForOpenVocabularySegmentation.from_config(AutoConfig.for_model(options.method)).eval()
        image_processor = load_class(method.image_processor)()
        picture = np.random.default_rng(0).integers(0, 256, (*options.size, 3), dtype=np.uint8)
        prompts = (options.templates,) if model.keeps_prompts else ()
        text_embeds = normalize(torch.randn(options.classes, *prompts, model.embedding_size), dim=-1)
        before = _status("VmRSS")
        start = time.perf_counter()
        inputs = {**image_processor(images=picture, return_tensors="pt"), "text_embeds": text_embeds}
        outputs = model(**inputs, **options.set)
        (label_map,) = image_processor.post_process_semantic_segmentation(outputs, target_sizes=[tuple(options.size)])
        seconds = time.perf_counter() - start
        figures = {
            "peak_mib": round(_status("VmHWM")),
            "before_forward_mib": round(before),
            "seconds": round(seconds, 1),
        }
        if options.against:
            other = model(**inputs, **{**options.set, **options.against}).logits
            figures["largest_difference"] = (other - outputs.logits).abs().max().item()
            figures["largest_logit"] = other.abs().max().item()
            figures["peak_mib_against"] = round(_status("VmHWM"))
    kept = 1.0 if outputs.kept_classes is None else outputs.kept_classes.float().mean().item()
    if label_map.shape != tuple(options.size):
        raise RuntimeError(f"The label map has the shape {tuple(label_map.shape)}.")
    return {**figures, "kept_classes": round(kept * options.classes)}


def _status(field: str) -> float:
    """A field of this process's /proc status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / MEBIBYTE
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only.")


def _assignment(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


def main() -> None:
    """Measure in a fresh process, print, and append to the ledger if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method")
    parser.add_argument("--classes", type=int, default=847)
    parser.add_argument("--templates", type=int, default=80, help="prompts per class, where the method keeps them")
    parser.add_argument("--size", type=int, nargs=2, default=(768, 768), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--set", type=_assignment, action="append", default=[], metavar="SWITCH=JSON")
    parser.add_argument(
        "--against", type=_assignment, action="append", default=[], metavar="SWITCH=JSON", help="compare the logits"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="append to results/memory.jsonl")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.set, options.against = dict(options.set), dict(options.against)
    if options.here:
        print(json.dumps(segment(options)))
        return
    result = subprocess.run([sys.executable, *sys.argv, "--here"], check=True, capture_output=True, text=True)
    figures = json.loads(result.stdout.splitlines()[-1])
    print(json.dumps(figures))
    if options.record:
        from ov_segmentation import ledger

        ledger.append(
            ROOT / "results" / "memory.jsonl",
            command=shlex.join(["python", "benchmarks/memory.py", *sys.argv[1:]]),
            seed=0,
            seconds=figures.pop("seconds"),
            figures=figures,
            method=options.method,
            size=list(options.size),
            classes=options.classes,
            templates=options.templates,
            switches=options.set,
            **({"against": options.against} if options.against else {}),
        )


if __name__ == "__main__":
    main()
