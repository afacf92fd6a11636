"""Counts ESC-Net's parameters and multiply-adds part by part, beside what its paper reports.

`python benchmarks/count_esc_net.py --record`: ViT-B/16 at 384 and ViT-L/14 at 336 pixels with 150 classes, for one view
and for the five of the sliding window (five times as much). `--record` appends to results/counts.jsonl. The paper's
Table 4 has ViT-L/14: 451.3 M parameters and 2,203.5 G multiply-adds. Expected for the model as our decisions fix
it: 438 to 443 M parameters, and at most about 650 G multiply-adds for one view.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

from transformers import CLIPConfig

from ov_segmentation import ledger
from ov_segmentation.models.esc_net.configuration_esc_net import ESCNetConfig
from ov_segmentation.models.esc_net.modeling_esc_net import ESCNetForOpenVocabularySegmentation
from ov_segmentation.profiling import build_empty, count_parts

ROOT = Path(__file__).resolve().parents[1]
VIEWS = 5
PAPER = {"vit_l_14_336": {"parameters": 451.3e6, "multiply_adds": 2203.5e9}}
# of the model as our decisions fix it
EXPECTED = {"vit_l_14_336": "438 to 443 M   at most about 650 G"}
PARTS = {
    r"clip\.(vision_model|visual_projection)": "CLIP image tower",
    r"clip\.": "CLIP text tower",
    r"(prompt_encoder|text_token)": "prompt encoder",
    r"blocks\.\d+\.sam": "SAM blocks",
    r"(cost_embedding|text_projection|sam_neck|blocks\.\d+\.(prompt_map|refinement))": "projections",
    r"blocks\.\d+\.spatial": "spatial fusion",
    r"blocks\.\d+\.classes": "class attention",
    r"(skips|decoder|head)": "decoder",
}


def configurations() -> dict[str, ESCNetConfig]:
    """The two published sizes."""
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 336,
        "projection_dim": 768,
    }
    large = CLIPConfig(projection_dim=768, text_config=text, vision_config=vision)
    settings = ESCNetForOpenVocabularySegmentation.config_for_clip(large)
    return {
        "vit_b_16_384": ESCNetConfig(),
        "vit_l_14_336": ESCNetConfig(clip_config=large.to_dict(), **settings),
    }


def main() -> None:
    """Count, print, and append to the ledger if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--record", action="store_true", help="append to results/counts.jsonl")
    options = parser.parse_args()
    for name, config in configurations().items():
        start = time.perf_counter()
        size = (config.image_size, config.image_size)
        model, inputs = build_empty(ESCNetForOpenVocabularySegmentation, config, size, options.classes)
        parts = count_parts(model, inputs, PARTS)
        parameters, multiply_adds = (sum(counts) for counts in zip(*parts.values(), strict=True))
        print(f"{name}, {options.classes} classes{'':<20}parameters   multiply-adds of a view")
        for part, counts in [*parts.items(), ("all", (parameters, multiply_adds))]:
            print(f"  {part:<40}{counts[0] / 1e6:8.2f} M{counts[1] / 1e9:14.1f} G")
        print(f"  {f'{VIEWS} views':<40}{'':10}{VIEWS * multiply_adds / 1e9:14.1f} G")
        paper = PAPER.get(name)
        if paper:
            print(f"  {'expected, one view':<37}{EXPECTED[name]}")
            print(f"  {'paper (five views, most likely)':<40}{paper['parameters'] / 1e6:8.1f} M", end="")
            print(f"{paper['multiply_adds'] / 1e9:14.1f} G")
        if options.record:
            ledger.append(
                ROOT / "results" / "counts.jsonl",
                command=shlex.join(["python", "benchmarks/count_esc_net.py", *sys.argv[1:]]),
                seed=None,
                seconds=time.perf_counter() - start,
                figures={
                    "parameters": parameters,
                    "multiply_adds_of_a_view": multiply_adds,
                    "multiply_adds_of_five_views": VIEWS * multiply_adds,
                    "parameters_by_part": {part: counts[0] for part, counts in parts.items()},
                    "multiply_adds_by_part": {part: counts[1] for part, counts in parts.items()},
                    "paper": paper or {},
                },
                method="esc_net",
                variant=name,
                classes=options.classes,
            )


if __name__ == "__main__":
    main()
