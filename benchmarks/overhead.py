"""What is paid around the model: pictures in and maps out, new names for an encoded picture, and the text side.

    python benchmarks/overhead.py --threads 2 --ledger results/overhead.jsonl

Three kinds of rows, each in a fresh process with random weights of the published base size:

- `pipeline`: the second call on a 1280 x 960 picture with ADE20K's 150 names: seconds outside the model's forward
  (picture in, look-up of the names, label map and confidences out) as a share of those inside. Target: 15 %.
- `names`: a new list of 150 names on an encoded picture, as a share of the first call (mask family). Target: 5 %.
- `text`: prompts of ADE20K-847 with 80 templates through the ViT-B text tower, against the same prompts at the full
  length of 77 tokens; a sample of the names. Target: a fifth.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import Rows, timed
from benchmarks.rows import METHOD_BY_TYPE, build, forced, like_trained
from ov_segmentation import Vocabulary
from ov_segmentation.auto import load_class

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("san", "deop", "ovseg-20", "sed", "sed-top8", "cat_seg", "esc_net")
MASK_FAMILY = METHODS[:3]
PICTURE = (960, 1280)
CLASSES = 150
TEMPLATES = 80
TARGETS = {"pipeline": 0.15, "names": 0.05, "text": 0.2}
# names of which the prompts are encoded, evenly spaced over the vocabulary
NAMES = 6


def measure_pipeline(name: str, tokenizer: str, repeats: int) -> dict[str, Any]:
    """The share of time outside the model, after a first call that encodes the names."""
    import torch
    from PIL import Image
    from transformers import CLIPTokenizer

    from ov_segmentation import OpenVocabularySegmentationPipeline

    model, image_processor, (picture,), _ = build(name, CLASSES, "float32", PICTURE)
    processor_class = load_class(METHOD_BY_TYPE[model.config.model_type].processor)
    processor = processor_class(image_processor, CLIPTokenizer.from_pretrained(tokenizer))
    segment = OpenVocabularySegmentationPipeline(model, processor=processor)
    names = Vocabulary.from_benchmark("ade20k_150", model.config.model_type)
    inside: list[tuple[float, float]] = []
    fakes: list[tuple[float, float]] = []
    forward = model.forward
    encoded: list[int] = []  # prompts of each call

    def timed_forward(**inputs: Any) -> Any:
        found = {}
        inside.append(timed(lambda: found.update(outputs=forward(**inputs))))
        fakes.append(timed(lambda: like_trained(found["outputs"])))
        return found["outputs"]

    def random_features(input_ids: Any, ends: Any) -> Any:
        encoded[-1] += len(input_ids)
        return torch.randn(len(input_ids), model.embedding_size)

    calls = []
    # the first call's text side is another row's subject
    with mock.patch.object(model, "_text_features", random_features), forced(name, model, CLASSES):
        model.forward = timed_forward
        for _ in range(repeats + 1):
            image = Image.fromarray(picture)
            encoded.append(0)
            calls.append(timed(lambda image=image: segment(image, candidate_labels=names, output_type="map")))
    outside = [[call[i] - model_[i] - fake[i] for call, model_, fake in zip(calls, inside, fakes)][1:] for i in (0, 1)]
    model_seconds, model_cpu = (statistics.median(one[i] for one in inside[1:]) for i in (0, 1))
    return {
        "share": statistics.median(outside[0]) / model_seconds,
        "cpu_share": statistics.median(outside[1]) / model_cpu,
        "seconds": statistics.median(outside[0]),
        "model_seconds": model_seconds,
        "prompts_of_first_call": encoded[0],
        "prompts_of_later_calls": sum(encoded[1:]),
    }


def measure_names(name: str, tokenizer: str, repeats: int) -> dict[str, Any]:
    """New class embeddings on an encoded picture; label maps are not in it."""
    import torch

    model, image_processor, pictures, text_embeds = build(name, CLASSES, "float32", PICTURE)
    inputs = image_processor(images=pictures, return_tensors="pt")
    with torch.no_grad(), forced(name, model, CLASSES):
        whole = timed(lambda: model(**inputs, text_embeds=text_embeds))
        state = model.encode_image(**inputs)
        others = text_embeds.flip(0)
        again = [timed(lambda: model(image_state=state, text_embeds=others)) for _ in range(5 * repeats)]
    seconds, cpu_seconds = (statistics.median(one[i] for one in again) for i in (0, 1))
    return {"share": seconds / whole[0], "cpu_share": cpu_seconds / whole[1], "seconds": seconds}


def measure_text(name: str, tokenizer: str, repeats: int) -> dict[str, Any]:
    """Prompts trimmed as `encode_vocabulary` does it, and the same ones at full length."""
    import torch
    from transformers import CLIPTokenizer

    model, image_processor, _, _ = build(name, 1, "float32", (64, 64))
    processor = load_class("SEDProcessor")(image_processor, CLIPTokenizer.from_pretrained(tokenizer))
    labels = sorted(Vocabulary.from_benchmark("ade20k_847", "sed").labels, key=len)
    chosen = [labels[(2 * i + 1) * len(labels) // (2 * NAMES)] for i in range(NAMES)]
    text = processor(text=chosen, return_tensors="pt")
    if text["input_ids"].shape[1] != TEMPLATES:
        raise RuntimeError(f"{TEMPLATES} templates were expected, got {text['input_ids'].shape[1]}.")
    with torch.no_grad():
        trimmed = timed(lambda: model.encode_vocabulary(**text))
        longest = model.text_tower[0].config.max_position_embeddings
        ids = text["input_ids"][text["attention_mask"].any(-1)]  # without the rows of absent synonyms
        ids = torch.nn.functional.pad(ids, (0, longest - ids.shape[-1]), value=int(ids[0, -1]))
        ends = torch.full((len(ids),), longest - 1)
        full = timed(lambda: [model._text_features(*some) for some in zip(ids.split(64), ends.split(64))])
    return {
        "share": trimmed[0] / full[0],
        "cpu_share": trimmed[1] / full[1],
        "seconds": trimmed[0],
        "prompts": len(ids),
        "seconds_of_all": trimmed[0] / NAMES * len(labels),
    }


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "pipeline": measure_pipeline,
    "names": measure_names,
    "text": measure_text,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the chosen rows; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tokenizer", help="folder or Hub id of CLIP's (default: CLIP_TOKENIZER, ../shared/tokenizer)")
    Rows.add_options(parser)
    options = parser.parse_args(arguments)
    if options.here:
        task = json.loads(options.here)
        print(json.dumps(KINDS[task.pop("kind")](**task)))
        return 0
    tokenizer = options.tokenizer or os.environ.get("CLIP_TOKENIZER") or str(ROOT.parent / "shared" / "tokenizer")
    chosen = {"pipeline": METHODS, "names": MASK_FAMILY, "text": ("san",)}
    rows = Rows(__file__, arguments, options)
    for kind in options.kinds:
        for name in (name for name in chosen[kind] if name in options.methods):
            start, row = time.perf_counter(), {"kind": kind, "name": name}
            figures = rows.known(row)
            if figures is None:
                figures = rows.measure(f"{kind} {name}", {**row, "tokenizer": tokenizer, "repeats": options.repeats})
                if figures is None:
                    continue
                rows.record(start, figures, **row, target=TARGETS[kind])
            met = "meets" if figures["share"] <= TARGETS[kind] else "misses"
            print(
                f"{kind:<10}{name:<10} {100 * figures['share']:6.1f} % (cpu {100 * figures['cpu_share']:.1f} %), {met} "
                f"{100 * TARGETS[kind]:.0f} %: {figures}",
                flush=True,
            )
    return int(rows.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
