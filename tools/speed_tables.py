"""Which entries of the ledger stand where in docs/speed.md, and README's short table of speed."""

from __future__ import annotations

from typing import Any

from tools.ledger_tables import (
    Column,
    Form,
    LedgerTable,
    Value,
    billions,
    commit,
    count,
    gibibytes,
    percent,
    text,
    two_digits,
)


def measured(form: Form) -> Form:
    """As `form` writes it; "-" where there is nothing to write."""
    return lambda value: "-" if value is None else form(value)


def one_digit(value: float) -> str:
    """A number to one place."""
    return f"{value:.1f}"


def pixels(size: Any) -> str:
    """Height x width."""
    return " x ".join(map(str, size))


def summed_billions(parts: dict[str, float]) -> str:
    """The sum of all kinds."""
    return billions(sum(parts.values()))


def mark(flag: bool) -> str:
    """What is not measured."""
    return "extrapolated" if flag else "measured"


UNITS = (
    Column("Seconds", "figures.seconds", two_digits),
    Column("Units", "figures.units", two_digits),
    Column("Original, units", "figures.original_units", measured(two_digits)),
    Column("Target, units", "figures.target_units", measured(two_digits)),
)
MEMORY = (
    Column("Peak memory, GB", "figures.gigabytes", one_digit),
    Column("Original, GB", "figures.original_gigabytes", measured(one_digit)),
)
WHOLE = (
    Column("Method", "title"),
    Column("Picture", "picture", pixels),
    Column("Names", "classes", count),
    *UNITS,
    Column("Times the floor", "figures.over_floor", two_digits),
    Column("Multiply-adds, G", "figures.multiply_adds", summed_billions),
    *MEMORY,
    Column("Commit", "commit", commit),
)
ROW = ("name", "classes", "dtype", "threads")
COMMON: dict[str, Any] = {"file": "speed.jsonl", "key": ROW, "order": ("name", "classes")}


def growth(table: str, varied: str, title: str, form: Form = count) -> LedgerTable:
    """A table of `benchmarks/growth.py`: what varies, and what it costs."""
    return LedgerTable(
        "growth.jsonl",
        (
            Column("Method", "task.name"),
            Column(title, f"task.{varied}", form),
            Column("Seconds", "figures.seconds", two_digits),
            Column("Units", "figures.units", measured(two_digits)),
            Column("Peak memory, GiB", "figures.peak_mib", measured(gibibytes)),
            Column("", "figures.extrapolated", mark),
        ),
        key=("task", "threads"),
        match={"table": table},
        order=("task.name", f"task.{varied}"),
    )


SPEED_TABLES: dict[str, LedgerTable] = {
    "speed": LedgerTable(
        columns=(Column("Method", "title"), Column("Picture", "picture", pixels), *UNITS, *MEMORY),
        match={"dtype": "float32", "classes": 150},
        **COMMON,
    ),
    "speed_float32": LedgerTable(columns=WHOLE, match={"dtype": "float32"}, **COMMON),
    "speed_bfloat16": LedgerTable(columns=WHOLE, match={"dtype": "bfloat16"}, **COMMON),
    "growth_classes": growth("classes", "classes", "Names"),
    "growth_pictures": growth("pictures", "picture", "Side of the picture", text),
    "growth_batches": growth("batches", "batch", "Pictures"),
    "growth_crops": growth("crops", "crops", "Crops"),
    "growth_windows": growth("windows", "windows", "Windows along a side"),
    "overhead": LedgerTable(
        "overhead.jsonl",
        (
            Column("What", "kind"),
            Column("Method", "name"),
            Column("Share, %", "figures.share", percent),
            Column("Target, %", "target", percent),
            Column("Seconds", "figures.seconds", two_digits),
            Column("Commit", "commit", commit),
        ),
        key=("kind", "name", "threads"),
    ),
    "compiled": LedgerTable(
        "compiled.jsonl",
        (
            Column("Method", "title"),
            Column("Names", "classes", count),
            Column("Seconds", "figures.seconds", two_digits),
            Column("Compiled", "figures.compiled_seconds", two_digits),
            Column("Ratio", "figures.ratio", two_digits),
            Column("Compilation, s", "figures.compilation_seconds", one_digit),
            Column("Commit", "commit", commit),
        ),
        key=("name", "classes", "threads"),
    ),
    "precision": LedgerTable(
        "precision.jsonl",
        (
            Column("Checkpoint", "name"),
            Column("Same label, % of pixels", "figures.agreement", percent),
            Column("Worst picture, %", "figures.worst_picture", percent),
            Column("Pictures", "protocol"),
            Column("Commit", "commit", commit),
        ),
        key=("name", "protocol"),
    ),
    "training_speed": LedgerTable(
        "training_speed.jsonl",
        (
            Column("Recipe", "name"),
            Column("Changes", "changes", lambda changes: text(", ".join(changes)) or "-"),
            Column("Pictures a step", "figures.batch_size", count),
            Column("Seconds a step", "figures.step_seconds", two_digits),
            Column("Loading of data, %", "figures.data_share", percent),
            Column("Peak memory, GiB", "figures.peak_mib", gibibytes),
            Column("Commit", "commit", commit),
        ),
        key=("name", "changes", "threads"),
        order=("name",),
    ),
}

SPEED_VALUES: dict[str, Value] = {
    "speed_machine": Value("speed.jsonl", "machine", text, {"dtype": "float32"}),
    "speed_threads": Value("speed.jsonl", "threads", count, {"dtype": "float32"}),
    "unit_seconds": Value("speed.jsonl", "figures.unit_seconds", two_digits, {"dtype": "float32"}),
}
