"""One pass against many: DeOP and SimBaseline with the sizes of their releases and random weights, on one picture.

    python benchmarks/deop_speed.py --crops 20 100 [--ledger results/speed.jsonl]

SimBaseline runs CLIP once per proposal; `--crops` says how many proposals are not empty. Each model gets its own test
size (short side 512 and 640). Medians over calls of the model, embeddings at hand: seconds of processor time, which do
not depend on what else the machine does, divided by the number of threads.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize
from transformers import SamConfig

from ov_segmentation import AutoModelForOpenVocabularySegmentation, ledger
from ov_segmentation.models.deop.configuration_deop import DeOPConfig
from ov_segmentation.models.deop.image_processing_deop import DeOPImageProcessor
from ov_segmentation.models.deop.plain_clip import TRAINING_FREE
from ov_segmentation.models.ovseg.convert_ovseg import VARIANTS
from ov_segmentation.models.ovseg.image_processing_ovseg import OVSegImageProcessor

PICTURE = (480, 640)
CLASSES = 150


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--sam", action="store_true", help="also DeOP without training on SAM ViT-B's masks (slow)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ledger", type=Path, help="JSON-lines file to append the figures to")
    options = parser.parse_args(arguments)
    figures = {"deop_seconds": median_seconds(deop_call(), options.repeats)}
    print(f"DeOP: {figures['deop_seconds']:.2f} s", flush=True)
    for name, call in training_free_calls(options.sam).items():
        figures[f"{name}_seconds"] = median_seconds(call, options.repeats)
        print(f"DeOP without training, {name}: {figures[f'{name}_seconds']:.2f} s", flush=True)
    for crops in options.crops:
        seconds = median_seconds(simbaseline_call(crops), options.repeats)
        ratio = seconds / figures["deop_seconds"]
        figures |= {f"simbaseline_{crops}_seconds": seconds, f"ratio_{crops}": ratio}
        print(f"SimBaseline, {crops} crops: {seconds:.2f} s, {ratio:.2f} x DeOP's", flush=True)
    if options.ledger is not None:
        ledger.append(
            options.ledger,
            command=shlex.join(["python", "benchmarks/deop_speed.py", *(arguments or sys.argv[1:])]),
            seed=0,
            seconds=sum(value for name, value in figures.items() if name.endswith("_seconds")),
            figures=figures,
            protocol=f"{PICTURE[0]} x {PICTURE[1]}, {CLASSES} classes, {torch.get_num_threads()} threads",
            method="deop",
            name="DeOP against SimBaseline",
        )


def deop_call() -> Callable[[], Any]:
    """The released size."""
    return forward(DeOPConfig(), DeOPImageProcessor())


def training_free_calls(with_sam: bool) -> dict[str, Callable[[], Any]]:
    """Around CLIP ViT-B/16 of random weights: patches alone, and on request SAM's masks from 32 x 32 points."""
    pictures = DeOPImageProcessor(pad_multiple=None)
    calls = {"patches": forward(DeOPConfig(proposals="none", **TRAINING_FREE), pictures)}
    if with_sam:
        calls["sam"] = forward(DeOPConfig(proposals="sam", sam_config=SamConfig(), **TRAINING_FREE), pictures)
    return calls


def simbaseline_call(crops: int) -> Callable[[], Any]:
    """The released size; proposals beyond `crops` are empty."""
    image_processor = OVSegImageProcessor(size={"shortest_edge": 640, "longest_edge": 2560}, pad_multiple=32)
    return forward(VARIANTS["simbaseline_coco156"](), image_processor, crops)


def forward(config: Any, image_processor: Any, crops: int | None = None) -> Callable[[], Any]:
    """A call of the model on one picture."""
    torch.manual_seed(0)
    model = AutoModelForOpenVocabularySegmentation.from_config(config).eval()
    picture = np.random.default_rng(0).integers(0, 256, (*PICTURE, 3), dtype=np.uint8)
    inputs = image_processor(images=picture, return_tensors="pt")
    text = normalize(torch.randn(CLASSES, model.embedding_size, generator=torch.Generator().manual_seed(0)), dim=-1)
    if crops is not None:
        # masks of random weights are random too: say which are empty
        model.proposal_network.register_forward_hook(
            lambda module, given, proposals: [
                one._replace(mask_logits=set_masks(one.mask_logits, crops)) for one in proposals
            ]
        )

    @torch.no_grad()
    def call() -> Any:
        return model(**inputs, text_embeds=text)

    return call


def set_masks(mask_logits: torch.Tensor, crops: int) -> torch.Tensor:
    """The first `crops` masks cover the left half, the others nothing."""
    masks = torch.full_like(mask_logits, -10.0)
    masks[:, :crops, :, : masks.shape[-1] // 2] = 10.0
    return masks


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """After one call that warms up, unless there is to be only one."""
    if repeats > 1:
        call()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        seconds.append((time.process_time() - start) / torch.get_num_threads())
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
