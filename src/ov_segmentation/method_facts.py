"""What is known about each method beside its code: names, paper, licences, published scores, limits.

README, `model_cards/` and the card of every checkpoint take it from here. Limits, licence and citation are Markdown, in
`cards/<model_type>.md`; the published scores are `data/paper_scores.json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CARDS = Path(__file__).parent / "cards"
PAPER_SCORES = Path(__file__).parent / "data" / "paper_scores.json"


@dataclass(frozen=True)
class MethodFacts:
    """One method.

    Args:
        title: as the paper spells it.
        paper: short name and venue.
        family: how it labels a picture.
        licence: of the original's code and weights, as a reader would say it.
        base_models: pretrained models that the published checkpoints hold.
        training_data: what the published checkpoints were trained on.
    """

    title: str
    paper: str
    family: str
    licence: str
    base_models: str
    training_data: str


COCO = "COCO-Stuff-164k, its 171 classes"
FACTS = {
    "san": MethodFacts(
        "SAN",
        "Side Adapter Network, CVPR 2023",
        "mask classification",
        "MIT",
        "CLIP ViT-B/16 or ViT-L/14 (OpenAI)",
        COCO,
    ),
    "ovseg": MethodFacts(
        "OVSeg",
        "Mask-adapted CLIP, CVPR 2023",
        "mask classification",
        "CC BY-NC 4.0",
        "CLIP ViT-L/14 or ViT-B/16 (OpenAI); Swin-B or ResNet-101 (ImageNet)",
        f"{COCO}; pairs of crop and noun from COCO's captions",
    ),
    "deop": MethodFacts(
        "DeOP",
        "Decoupled One-Pass Network, ICCV 2023",
        "mask classification",
        "none stated",
        "CLIP ViT-B/16 (OpenAI); ResNet-101 (ImageNet)",
        "COCO-Stuff-164k, 156 of its 171 classes",
    ),
    "sed": MethodFacts(
        "SED",
        "Simple Encoder-Decoder, CVPR 2024",
        "per-class maps",
        "Apache-2.0",
        "CLIP ConvNeXt-B or ConvNeXt-L (OpenCLIP)",
        COCO,
    ),
    "cat_seg": MethodFacts(
        "CAT-Seg",
        "Cost Aggregation, CVPR 2024",
        "per-class maps",
        "MIT",
        "CLIP ViT-B/16 or ViT-L/14 (OpenAI)",
        COCO,
    ),
    "esc_net": MethodFacts(
        "ESC-Net",
        "Effective SAM Combination, CVPR 2025",
        "per-class maps",
        "no public code",
        "CLIP ViT-B/16 or ViT-L/14 (OpenAI); SAM ViT-B (Meta)",
        COCO,
    ),
}
BENCHMARK_TITLES = {
    "ade20k_847": "ADE-847",
    "pascal_context_459": "PC-459",
    "ade20k_150": "ADE-150",
    "pascal_context_59": "PC-59",
    "pascal_voc_20": "VOC-20",
    "pascal_voc_20b": "VOC-20b",
    "coco_stuff_171": "COCO-Stuff",
}


def closing_sections(model_type: str) -> str:
    """The sections "Limits" and "Licence and citation" of a method's cards, as Markdown."""
    return (CARDS / f"{model_type}.md").read_text(encoding="utf-8").strip()


def paper_table(model_type: str) -> str | None:
    """The mIoU that a method's authors report, as a Markdown table that says so; None where none is on record."""
    rows: dict[tuple[str, str, str], dict[str, float]] = {}
    for score in json.loads(PAPER_SCORES.read_text(encoding="utf-8")):
        if score["method"] == model_type:
            row = rows.setdefault((score["variant"], score["source"], score["averaging"]), {})
            row[score["benchmark"]] = score["miou"]
    if not rows:
        return None
    columns = [name for name in BENCHMARK_TITLES if any(name in scores for scores in rows.values())]
    titles = ["Variant", "Source", "IoU averaged over classes in", *(BENCHMARK_TITLES[name] for name in columns)]
    table = [
        [variant, source, averaging.replace("_", " "), *(str(scores[c]) if c in scores else "-" for c in columns)]
        for (variant, source, averaging), scores in rows.items()
    ]
    title = FACTS[model_type].title
    return (
        f"mIoU in percent as reported by the authors of {title}, for their own weights and code. **None of these "
        f"numbers was measured here.**\n\n{markdown_table(titles, table)}"
    )


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; cells hold no line breaks, and pipes in them are escaped."""
    lines = (titles, ["---"] * len(titles), *([cell.replace("|", "\\|") for cell in row] for row in rows))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
