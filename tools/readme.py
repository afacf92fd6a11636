"""Writes the measured tables and numbers into README.md and model_cards/*.md.

`make readme` writes; `python tools/readme.py --check` only compares.

Documents mark what is generated: `<!-- table:NAME -->` ... `<!-- /table -->` around a table, and inside a sentence
`<!-- value:KEY -->31.2 %<!-- /value -->`. The numbers come from the ledger (results/*.jsonl); which entry and which
column stand where is said here, in TABLES and VALUES.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ov_segmentation import ledger
from ov_segmentation.auto import METHODS

ROOT = Path(__file__).resolve().parents[1]
Entry = dict[str, Any]
Form = Callable[[Any], str]


def text(value: Any) -> str:
    """As it is; pipes would end a table's cell."""
    return str(value).replace("|", "\\|")


def code(value: Any) -> str:
    """A command or a name."""
    return f"`{text(value)}`"


def percent(value: float) -> str:
    """A share in [0, 1] as a percentage."""
    return f"{100 * value:.1f}"


def count(value: float) -> str:
    """A whole number with thousands separators."""
    return f"{value:,.0f}"


def minutes(value: float) -> str:
    """Seconds as minutes."""
    return f"{value / 60:.1f}"


def two_digits(value: float) -> str:
    """A number to two places."""
    return f"{value:.2f}"


def three_digits(value: float) -> str:
    """A number to three places."""
    return f"{value:.3f}"


def scientific(value: float) -> str:
    """A deviation."""
    return f"{value:.0e}"


def gibibytes(value: float) -> str:
    """MiB as GiB."""
    return f"{value / 1024:.1f}"


def millions(value: float) -> str:
    """To one place."""
    return f"{value / 1e6:,.1f}"


def billions(value: float) -> str:
    """To one place."""
    return f"{value / 1e9:,.1f}"


def commit(value: str | None) -> str:
    """A commit's short name."""
    return f"`{value[:8]}`" if value else "unknown"


@dataclass(frozen=True)
class Column:
    """One column: its title, where its cell stands in a ledger entry ("figures.miou"), and how it is written."""

    title: str
    path: str
    form: Form = text


@dataclass(frozen=True)
class LedgerTable:
    """The newest entry of each kind in one ledger.

    Attributes:
        file: name in results/.
        columns: what is shown of an entry.
        key: the fields that tell kinds of entries apart; kinds stand in the order of their first entry.
        match: only entries with these fields.
    """

    file: str
    columns: Sequence[Column]
    key: Sequence[str]
    match: Entry = field(default_factory=dict)

    def render(self, results: Path) -> str:
        """The table as Markdown, or a line that says that there is nothing yet."""
        newest: dict[tuple[Any, ...], Entry] = {}
        for entry in ledger.read(results / self.file) if (results / self.file).exists() else []:
            if all(entry.get(name) == value for name, value in self.match.items()):
                newest[tuple(str(look_up(entry, name)) for name in self.key)] = entry
        if not newest:
            return "*Nothing measured yet.*"
        rows = [[column.form(look_up(entry, column.path)) for column in self.columns] for entry in newest.values()]
        return markdown([column.title for column in self.columns], rows)


@dataclass(frozen=True)
class MethodFacts:
    """What is known about a method whether or not it is here yet: title, paper, and the licence of code and weights."""

    title: str
    paper: str
    family: str
    licence: str


FACTS = {
    "san": MethodFacts("SAN", "Side Adapter Network, CVPR 2023", "mask classification", "MIT"),
    "ovseg": MethodFacts("OVSeg", "Mask-adapted CLIP, CVPR 2023", "mask classification", "CC BY-NC 4.0"),
    "deop": MethodFacts("DeOP", "Decoupled One-Pass Network, ICCV 2023", "mask classification", "none stated"),
    "sed": MethodFacts("SED", "Simple Encoder-Decoder, CVPR 2024", "per-class maps", "Apache-2.0"),
    "cat_seg": MethodFacts("CAT-Seg", "Cost Aggregation, CVPR 2024", "per-class maps", "MIT"),
    "esc_net": MethodFacts("ESC-Net", "Effective SAM Combination, CVPR 2025", "per-class maps", "no public code"),
}


class MethodTable:
    """One row a method: from the auto table if it is here, else planned. Parity is the newest entry of parity.jsonl."""

    def render(self, results: Path) -> str:
        """The table as Markdown."""
        here = {method.model_type for method in METHODS}
        if unknown := here - set(FACTS):
            raise SystemExit(f"tools/readme.py: FACTS lacks {sorted(unknown)}, which ov_segmentation/auto.py has.")
        rows = []
        for model_type, facts in FACTS.items():
            state = "here" if model_type in here else "planned"
            rows.append(
                [facts.title, facts.paper, facts.family, facts.licence, state, self._parity(results, model_type)]
            )
        titles = ["Method", "Paper", "Kind", "Licence of the original", "State", "Largest difference from the original"]
        return markdown(titles, rows)

    def _parity(self, results: Path, model_type: str) -> str:
        try:
            entry = ledger.latest(results / "parity.jsonl", method=model_type)
        except (FileNotFoundError, LookupError):
            return "-"
        return f"{scientific(entry['figures']['scores'])} in scores ({entry['protocol']})"


@dataclass(frozen=True)
class Value:
    """One number in a sentence: the newest entry that matches, a field of it, how it is written."""

    file: str
    path: str
    form: Form
    match: Entry = field(default_factory=dict)

    def render(self, results: Path) -> str:
        """The number; LookupError or FileNotFoundError if it was not measured."""
        return self.form(look_up(ledger.latest(results / self.file, **self.match), self.path))


TABLES: dict[str, LedgerTable | MethodTable] = {
    "methods": MethodTable(),
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
    "scenes": LedgerTable(
        "scenes.jsonl",
        (
            Column("Checkpoint", "name"),
            *(Column(f"Things {tier}", f"figures.things_{tier}", percent) for tier in "abc"),
            *(Column(f"Stuff {tier}", f"figures.stuff_{tier}", percent) for tier in "abc"),
            Column("mIoU", "figures.miou", percent),
            Column("hIoU", "figures.hiou", percent),
            Column("mIoU, names shuffled", "figures.shuffled_miou", percent),
            Column("Protocol", "protocol"),
            Column("Seed", "seed"),
            Column("Commit", "commit", commit),
        ),
        key=("name", "protocol", "seed"),
    ),
    "speed": LedgerTable(
        "speed.jsonl",
        (
            Column("Method", "method"),
            Column("Parameters", "figures.parameters", count),
            Column("Picture", "size", lambda size: " x ".join(map(str, size))),
            Column("Names", "classes", count),
            Column("Picture side, s", "figures.encode_image", two_digits),
            Column("Whole model, s", "figures.forward", two_digits),
            Column("Map, s", "figures.map", two_digits),
            Column("Text, s a prompt", "figures.text_per_prompt", three_digits),
            Column("Machine", "machine"),
            Column("Threads", "threads"),
        ),
        key=("method", "size", "classes", "threads", "machine"),
    ),
}

# of ESC-Net, as its paper counts it
LARGE_ESC_NET = {"method": "esc_net", "variant": "vit_l_14_336", "classes": 150}
# switches of a run in which no class is rejected
ALL_CLASSES = {"max_classes": None}

VALUES: dict[str, Value] = {
    # ESC-Net has no original to compare with
    f"{model_type}_parity": Value("parity.jsonl", "figures.scores", scientific, {"method": model_type})
    for model_type in FACTS
    if model_type != "esc_net"
} | {
    "cat_seg_memory": Value(
        "memory.jsonl", "figures.peak_mib", gibibytes, {"method": "cat_seg", "classes": 847, "switches": ALL_CLASSES}
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
    "esc_net_parameters": Value("counts.jsonl", "figures.parameters", millions, LARGE_ESC_NET),
    "esc_net_view": Value("counts.jsonl", "figures.multiply_adds_of_a_view", billions, LARGE_ESC_NET),
    "esc_net_views": Value("counts.jsonl", "figures.multiply_adds_of_five_views", billions, LARGE_ESC_NET),
}


def look_up(entry: Entry, path: str) -> Any:
    """A field by its dotted path; LookupError with the path if an entry lacks it."""
    value: Any = entry
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            raise LookupError(f"The entry of {entry.get('date')} ({entry.get('command')}) has no field {path!r}.")
        value = value[name]
    return value


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows))


BLOCK = re.compile(r"<!-- (table|value):(\S+) -->(.*?)<!-- /\1 -->", re.DOTALL)
MARKER = re.compile(r"<!-- /?(?:table|value)\b[^>]*-->")


def fill(document: str, results: Path) -> str:
    """The document with every marked block written anew.

    Raises:
        ValueError: a marker without its partner, or a name that TABLES or VALUES lacks.
    """
    if rest := MARKER.search(BLOCK.sub("", document)):
        raise ValueError(f"{rest.group()} has no partner.")

    def render(block: re.Match[str]) -> str:
        kind, name, _ = block.groups()
        known = TABLES if kind == "table" else VALUES
        if name not in known:
            raise ValueError(f"tools/readme.py knows no {kind} {name!r}; it knows {sorted(known)}.")
        content = known[name].render(results)
        content = f"\n{content}\n" if kind == "table" else content
        return f"<!-- {kind}:{name} -->{content}<!-- /{kind} -->"

    return BLOCK.sub(render, document)


def documents() -> list[Path]:
    """What is generated into."""
    return [ROOT / "README.md", *sorted((ROOT / "model_cards").glob("*.md"))]


def main() -> int:
    """0 if the documents are (now) as the ledger says; 1 if `--check` found one that is not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a document is out of date")
    check = parser.parse_args().check
    stale = []
    for path in documents():
        before = path.read_text(encoding="utf-8")
        after = fill(before, ROOT / "results")
        if after != before:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(after, encoding="utf-8")
    if stale:
        print(f"{'Out of date, run `make readme`' if check else 'Written'}: {', '.join(stale)}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
