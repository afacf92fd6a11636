"""The data set card: names, ids and counts, in a header that `datasets` and the evaluation read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...atomic_files import write_atomically
from ..label_sets import LabelSet

CARD = "README.md"
KEY = "ov_segmentation"


def write_card(folder: Path, labels: LabelSet, counts: Mapping[str, int], pixels: Mapping[str, Sequence[int]]) -> None:
    """Write `README.md` into a data set's folder.

    Args:
        counts: rows by split.
        pixels: pixels of every class, by split.
    """
    header = {
        "pretty_name": labels.title,
        "task_categories": ["image-segmentation"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in counts],
            }
        ],
        KEY: {
            "data_set": labels.name,
            "ignore_index": labels.ignore_index,
            "num_classes": len(labels.class_names),
            "pictures": dict(counts),
        },
    }
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {labels.title}",
        "",
        "Columns: `image`, `annotation` (class ids; "
        f"{labels.ignore_index} = not scored), `file_name`, `classes` (the classes in the label map; its feature holds "
        "their names)." + (" `captions` are COCO's." if labels.name == "coco_captions" else ""),
        "",
        f"Made by `examples/prepare_dataset.py {labels.name}` from the official download. Pictures and annotations are "
        "under their owners' terms.",
        "",
        f"| id | class | {' | '.join(f'pixels, {split}' for split in counts)} |",
        f"| --- | --- | {' | '.join('---' for _ in counts)} |",
    ]
    for k, name in enumerate(labels.class_names):
        lines.append(f"| {k} | {name} | {' | '.join(str(int(pixels[split][k])) for split in counts)} |")
    write_atomically(folder / CARD, "\n".join(lines) + "\n")


def read_card(folder: Path) -> dict[str, Any] | None:
    """What `write_card` noted under our key; None for a folder without such a card."""
    file = folder / CARD
    if not file.is_file():
        return None
    header = re.match(r"---\n(.*?)\n---\n", file.read_text(encoding="utf-8"), re.DOTALL)
    content = yaml.safe_load(header.group(1)) if header else None
    return content.get(KEY) if isinstance(content, dict) else None
