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
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from ov_segmentation import ledger

ROOT = Path(__file__).resolve().parents[1]
# An interpreter that runs a script has the script's folder on its path, not the project's root.
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Recorded:
    """Names of a fixture's tensors.

    Shapes: picture `[H, W, 3]`, token ids `[P, K, L]`, embeddings `[K, D]`, scores `[K, H, W]`.
    """

    picture: str
    token_ids: str
    embeddings: str
    scores: str


RECORDED = {
    "san": Recorded("image", "token_ids", "text/embedding_per_class", "final/masked_self_attention/sem_seg_scores"),
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
    token_ids = inputs[names.token_ids].transpose(0, 1).contiguous()
    text_embeds = model.encode_vocabulary(input_ids=token_ids, attention_mask=torch.ones_like(token_ids))
    picture = inputs[names.picture].numpy()
    outputs = model(**image_processor(images=picture, return_tensors="pt"), text_embeds=text_embeds)
    (result,) = image_processor.post_process_semantic_segmentation(
        outputs, target_sizes=[picture.shape[:2]], return_segmentation_scores=True
    )
    pairs = {
        "text": (text_embeds, recorded[names.embeddings]),
        "scores": (result.segmentation_scores, recorded[names.scores]),
    }
    return {name: float((ours - theirs).abs().max()) for name, (ours, theirs) in pairs.items()}


def main() -> None:
    """Measure, print, append to results/parity.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=sorted(RECORDED))
    parser.add_argument("case", type=Path, help="a fixture's folder, laid out as tests/parity/fixtures/<method>/<case>")
    options = parser.parse_args()
    start = time.perf_counter()
    figures = differences(options.method, options.case)
    entry = ledger.append(
        ROOT / "results" / "parity.jsonl",
        command=f"python tools/measure_parity.py {options.method} {options.case}",
        seed=None,
        seconds=time.perf_counter() - start,
        figures=figures,
        protocol=options.case.resolve().name,
        method=options.method,
    )
    print(json.dumps(entry["figures"]))


if __name__ == "__main__":
    main()
