"""Tables of fine-tuning: what each option trains, and what twenty pictures are worth."""

from __future__ import annotations

from ov_segmentation.training.trainable import OPTIONS
from tools.ledger_tables import Column, LedgerTable, code, commit, count, minutes, percent


def millions_of_any_size(value: float) -> str:
    """Parameters in millions, to three digits; "-" for none."""
    return f"{value / 1e6:.3g}" if value else "-"


TRAINING_TABLES = {
    "trainable": LedgerTable(
        "counts.jsonl",
        (
            Column("Method", "method"),
            Column("Size", "variant", code),
            *(Column(f"`{option}`", f"figures.{option}", millions_of_any_size) for option in OPTIONS),
            Column("Whole model", "figures.parameters", millions_of_any_size),
        ),
        key=("method", "variant"),
        match={"kind": "trainable"},
    ),
    "finetuning": LedgerTable(
        "finetuning.jsonl",
        (
            Column("Trained", "trainable", code),
            Column("Parameters", "figures.trainable_parameters", count),
            Column("Labelled pictures", "pictures"),
            Column("Steps", "figures.steps"),
            Column("CPU minutes", "figures.cpu_seconds", minutes),
            Column("mIoU before", "figures.test_miou_before", percent),
            Column("mIoU after", "figures.test_miou", percent),
            Column("Pixel accuracy after", "figures.test_pixel_accuracy", percent),
            Column("Scored on", "protocol"),
            Column("Seed", "seed"),
            Column("Commit", "commit", commit),
        ),
        key=("command",),
    ),
}
