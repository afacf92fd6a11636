"""Measures the largest difference from an original implementation, end to end through the public API, into the ledger.

`python tools/measure_parity.py san ../shared/fixtures/san/case_a`: converts the folder's small checkpoint (random
weights), embeds its token ids, segments its picture and compares the scores with the recorded ones. The tests compare
every stage; this gives the one number of README's table.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ov_segmentation import ledger

ROOT = Path(__file__).resolve().parents[1]
# An interpreter that runs a script has the script's folder on its path, not the project's root.
sys.path.insert(0, str(ROOT))

Prompts = tuple[Tensor, Tensor]


def prompts_first(token_ids: str) -> Callable[[dict[str, Tensor]], Prompts]:
    """Token ids recorded as `[P, K, L]`."""
    return lambda inputs: with_mask(inputs[token_ids].transpose(0, 1).contiguous())


def classes_first(token_ids: str) -> Callable[[dict[str, Tensor]], Prompts]:
    """Token ids recorded as `[K, P, L]`, or `[K, L]` with one prompt a class."""
    return lambda inputs: with_mask(inputs[token_ids].reshape(len(inputs[token_ids]), -1, inputs[token_ids].shape[-1]))


def listed(inputs: dict[str, Tensor]) -> Prompts:
    """SED's flat list of prompts, with the class and the template of each; a pair that comes again is a synonym."""
    classes, templates = inputs["test_prompt_class_index"].tolist(), inputs["test_prompt_template_index"].tolist()
    cells: dict[tuple[int, int], list[int]] = {}
    for row, cell in enumerate(zip(classes, templates, strict=True)):
        cells.setdefault(cell, []).append(row)
    token_ids = inputs["test_token_ids"]
    shape = (max(classes) + 1, max(templates) + 1, max(map(len, cells.values())), token_ids.shape[-1])
    ids, mask = token_ids.new_zeros(shape), token_ids.new_zeros(shape)
    for (class_id, template), rows in cells.items():
        ids[class_id, template, : len(rows)] = token_ids[rows]
        mask[class_id, template, : len(rows)] = 1
    return ids, mask


def with_mask(token_ids: Tensor) -> Prompts:
    """Every prompt is there."""
    return token_ids, torch.ones_like(token_ids)


@dataclass(frozen=True)
class Recorded:
    """What a method's fixtures call the picture `[H, W, 3]`, the prompts, the embeddings and the scores `[K, H, W]`."""

    picture: str
    prompts: Callable[[dict[str, Tensor]], Prompts]
    embeddings: str
    scores: str
    switches: dict[str, Any] = field(default_factory=dict)


RECORDED = {
    "san": Recorded(
        "image",
        prompts_first("token_ids"),
        "text/embedding_per_class",
        "final/masked_self_attention/sem_seg_scores",
    ),
    "ovseg": Recorded("image_rgb_uint8", prompts_first("token_ids"), "text_features_ensembled", "semantic_scores"),
    "deop": Recorded(
        "image_uint8_rgb", classes_first("class_token_ids"), "text.class_features_l2", "final.semantic_scores"
    ),
    "sed": Recorded(
        "image_raw_rgb_hwc",
        listed,
        "text/test_features",
        "full/scores/final",
        {"rejection_top_k": None, "class_attention_pooling": 1},
    ),
    "cat_seg": Recorded(
        "image_raw_rgb_hwc",
        classes_first("test_token_ids"),
        "text/test_features",
        "sliding/scores/final",
        {"sliding_window": True, "class_attention_pooling": 1},
    ),
}


@torch.no_grad()
def differences(method: str, case: Path) -> dict[str, float]:
    """Largest absolute differences of text embeddings and of final scores."""
    names = RECORDED[method]
    inputs, recorded = load_file(case / "inputs.safetensors"), load_file(case / "outputs.safetensors")
    build = importlib.import_module("tests.parity.hparams").build
    config, image_processor = build(method, json.loads((case / "hparams.json").read_text()))
    convert = importlib.import_module(f"conversion.convert_{method}").convert
    model = convert(str(case / "original.pth"), config).eval()
    input_ids, attention_mask = names.prompts(inputs)
    text_embeds = model.encode_vocabulary(input_ids=input_ids, attention_mask=attention_mask)
    picture = inputs[names.picture].numpy()
    batch = image_processor(images=picture, return_tensors="pt")
    outputs = model(**batch, text_embeds=text_embeds, **names.switches)
    (result,) = image_processor.post_process_semantic_segmentation(
        outputs, target_sizes=[picture.shape[:2]], return_segmentation_scores=True
    )
    pairs = {
        "text": (text_embeds, recorded[names.embeddings]),
        "scores": (result.segmentation_scores, recorded[names.scores]),
    }
    found = {}
    for name, (ours, theirs) in pairs.items():
        if ours.shape != theirs.shape:
            raise SystemExit(f"{name}: {list(ours.shape)} here, {list(theirs.shape)} in {case}.")
        found[name] = float((ours - theirs).abs().max())
    return found


def main() -> None:
    """Measure, print, append to results/parity.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=sorted(RECORDED))
    parser.add_argument("case", type=Path, help="a fixture's folder: original.pth, hparams.json, in- and outputs")
    options = parser.parse_args()
    start = time.perf_counter()
    figures = differences(options.method, options.case)
    ledger.append(
        ROOT / "results" / "parity.jsonl",
        command=f"python tools/measure_parity.py {options.method} {options.case}",
        seed=None,
        seconds=time.perf_counter() - start,
        figures=figures,
        protocol=options.case.resolve().name,
        method=options.method,
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
