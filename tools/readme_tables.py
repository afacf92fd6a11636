"""Which entries of the ledger stand where in README.md and model_cards/*.md: TABLES and VALUES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ov_segmentation.auto import METHODS
from ov_segmentation.method_facts import FACTS, closing_sections, paper_table
from tools.ledger_tables import (
    Column,
    LedgerTable,
    SeedsTable,
    Value,
    billions,
    code,
    commit,
    gibibytes,
    markdown,
    millions,
    minutes,
    percent,
    scientific,
)
from tools.speed_tables import SPEED_TABLES, SPEED_VALUES
from tools.training_tables import TRAINING_TABLES


@dataclass(frozen=True)
class MethodText:
    """What the card of a checkpoint says about its method too; the text lies in `ov_segmentation.method_facts`."""

    write: Callable[[str], str | None]
    model_type: str

    def render(self, results: Path) -> str:
        """The text, whatever was measured."""
        return self.write(self.model_type) or "Scores that the authors report are not on record here; see the paper."


STANDARD = "scenes-small-400"
# DeOP's own training freezes CLIP, as its paper does; on scenes it is the other one that learns
_BEST_ON_SCENES = {"deop": "deop_scenes_small"}


class MethodTable:
    """One row a method: what is known about it, and the newest measurement of each kind; "-" is not measured."""

    def render(self, results: Path) -> str:
        """The table as Markdown."""
        here = {method.model_type for method in METHODS}
        if wrong := here ^ set(FACTS):
            raise SystemExit(f"{sorted(wrong)}: FACTS of method_facts.py and METHODS of auto.py differ.")
        titles = ["Method", "Paper", "Kind", "Licence of the original", *self._measured("")]
        rows = []
        for model_type, facts in FACTS.items():
            measured = [_or_dash(value, results) for value in self._measured(model_type).values()]
            rows.append([facts.title, facts.paper, facts.family, facts.licence, *measured])
        return markdown(titles, rows)

    def _measured(self, model_type: str) -> dict[str, Value]:
        name = _BEST_ON_SCENES.get(model_type, f"{model_type}_scenes")
        scenes = {"name": name, "seed": 0, "protocol": STANDARD}
        return {
            "Largest difference from the original's scores": Value(
                "parity.jsonl", "figures.scores", scientific, {"method": model_type}
            ),
            "mIoU on scenes, things never named": Value("scenes.jsonl", "figures.things_c", percent, scenes),
            "the same, names shuffled (all classes)": Value("scenes.jsonl", "figures.shuffled_miou", percent, scenes),
            "mIoU on CamVid, from nothing": Value("camvid.jsonl", "figures.miou", percent, {"method": model_type}),
        }


def _or_dash(value: Value, results: Path) -> str:
    try:
        return value.render(results)
    except (FileNotFoundError, LookupError):
        return "-"


_SCENE_COLUMNS = (
    *(Column(f"Things {tier}", f"figures.things_{tier}", percent) for tier in "abc"),
    *(Column(f"Stuff {tier}", f"figures.stuff_{tier}", percent) for tier in "abc"),
    Column("mIoU", "figures.miou", percent),
    Column("hIoU", "figures.hiou", percent),
    Column("mIoU, names shuffled", "figures.shuffled_miou", percent),
    Column("Protocol", "protocol"),
)

# the same pictures as the standard protocol's first, spoilt; and the standard ones under more names and other wordings
HARDER = ("scenes-small-200-crowded_harsh", "scenes-small-200-and-100-absent-names-synonyms")

TABLES: dict[str, LedgerTable | MethodTable | MethodText] = {
    "methods": MethodTable(),
    **{f"{model_type}_authors": MethodText(paper_table, model_type) for model_type in FACTS},
    **{f"{model_type}_closing": MethodText(closing_sections, model_type) for model_type in FACTS},
    "camvid": LedgerTable(
        "camvid.jsonl",
        (
            Column("Method", "method"),
            Column("Command", "command", code),
            Column("Minutes", "seconds", minutes),
            # the machine was shared: wall time says less than the processors' time
            Column("CPU minutes", "figures.cpu_seconds", minutes),
            Column("mIoU", "figures.miou", percent),
            Column("Pixel accuracy", "figures.pixel_accuracy", percent),
            Column("Protocol", "protocol"),
            Column("Machine", "machine"),
            Column("Commit", "commit", commit),
        ),
        key=("method", "command", "protocol"),
    ),
    "scenes": SeedsTable(
        "scenes.jsonl",
        (
            Column("Checkpoint", "name"),
            *_SCENE_COLUMNS[:-1],
            Column("Pixel accuracy", "figures.pixel_accuracy", percent),
            Column("mIoU, made-up names", "figures.random_miou", percent),
            Column("Seeds", "seed"),
            Column("Newest commit", "commit", commit),
        ),
        key=("name", "protocol", "seed"),
        match={"protocol": STANDARD},
    ),
    "scenes_harder": LedgerTable(
        "scenes.jsonl",
        (Column("Checkpoint", "name"), *_SCENE_COLUMNS, Column("Commit", "commit", commit)),
        key=("name", "protocol"),
        match={"protocol": HARDER},
        order=("protocol",),
    ),
    "adaptation": LedgerTable(
        "adaptation.jsonl",
        (
            Column("Checkpoint", "name"),
            Column("Masked crops, top-1", "figures.crops_top1", percent),
            *_SCENE_COLUMNS,
            Column("Seed", "seed"),
            Column("Commit", "commit", commit),
        ),
        key=("name", "protocol", "seed"),
    ),
    "deop_rows": LedgerTable(
        "deop.jsonl",
        (Column("Row", "name"), *_SCENE_COLUMNS, Column("Commit", "commit", commit)),
        key=("name", "protocol"),
    ),
    **SPEED_TABLES,
    **TRAINING_TABLES,
}

# of ESC-Net, as its paper counts it
LARGE_ESC_NET = {"method": "esc_net", "variant": "vit_l_14_336", "classes": 150}
UNCHUNKED_ESC_NET = {"method": "esc_net", "classes": 847, "against": {"class_chunk_size": None}}
# switches of a run in which no class is rejected
ALL_CLASSES = {"max_classes": None}

VALUES: dict[str, Value] = (
    {
        # ESC-Net has no original to compare with
        f"{model_type}_parity": Value("parity.jsonl", "figures.scores", scientific, {"method": model_type})
        for model_type in FACTS
        if model_type != "esc_net"
    }
    | {
        "cat_seg_memory": Value(
            "memory.jsonl",
            "figures.peak_mib",
            gibibytes,
            {"method": "cat_seg", "classes": 847, "switches": ALL_CLASSES},
        ),
        "sed_memory": Value(
            "memory.jsonl", "figures.peak_mib", gibibytes, {"method": "sed", "classes": 847, "switches": {}}
        ),
        "sed_memory_top_8": Value(
            "memory.jsonl",
            "figures.peak_mib",
            gibibytes,
            {"method": "sed", "classes": 847, "switches": {"rejection_top_k": 8}},
        ),
        "esc_net_memory": Value(
            "memory.jsonl", "figures.peak_mib", gibibytes, {"method": "esc_net", "classes": 847, "switches": {}}
        ),
        "esc_net_memory_unchunked": Value("memory.jsonl", "figures.peak_mib_against", gibibytes, UNCHUNKED_ESC_NET),
        "esc_net_chunk_difference": Value("memory.jsonl", "figures.largest_difference", scientific, UNCHUNKED_ESC_NET),
        "scenes_made_up_names": Value(
            "scenes.jsonl", "figures.random_miou", percent, {"name": "san_scenes", "seed": 0, "protocol": STANDARD}
        ),
        **{
            f"sam_{name}": Value(
                "foundations.jsonl", f"figures.{figure}", percent, {"method": "sam", "name": "sam_scenes"}
            )
            for name, figure in {"point": "iou", "box": "box", "mask": "mask", "disc": "disc"}.items()
        },
        "sam_minutes": Value(
            "foundations.jsonl", "figures.cpu_seconds", minutes, {"method": "sam", "name": "sam_scenes"}
        ),
        "esc_net_parameters": Value("counts.jsonl", "figures.parameters", millions, LARGE_ESC_NET),
        "esc_net_view": Value("counts.jsonl", "figures.multiply_adds_of_a_view", billions, LARGE_ESC_NET),
        "esc_net_views": Value("counts.jsonl", "figures.multiply_adds_of_five_views", billions, LARGE_ESC_NET),
    }
    | SPEED_VALUES
)
