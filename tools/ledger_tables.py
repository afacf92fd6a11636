"""What a generated table is made of: columns of ledger entries, and single numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ov_segmentation import ledger

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
        match: only entries with these fields; a tuple holds several values that will do.
        order: fields that rows are sorted by; those of equal fields keep their order.
    """

    file: str
    columns: Sequence[Column]
    key: Sequence[str]
    match: Entry = field(default_factory=dict)
    order: Sequence[str] = ()

    def render(self, results: Path) -> str:
        """The table as Markdown, or a line that says that there is nothing yet."""
        entries = sorted(self.newest(results), key=lambda entry: [look_up(entry, name) for name in self.order])
        if not entries:
            return "*Nothing measured yet.*"
        return markdown([column.title for column in self.columns], self.rows(entries))

    def newest(self, results: Path) -> list[Entry]:
        """The newest entry of each kind, in the order of the kinds' first entries."""
        newest: dict[tuple[Any, ...], Entry] = {}
        for entry in ledger.read(results / self.file) if (results / self.file).exists() else []:
            if all(
                entry.get(name) in (value if isinstance(value, tuple) else (value,))
                for name, value in self.match.items()
            ):
                newest[tuple(str(look_up(entry, name)) for name in self.key)] = entry
        return list(newest.values())

    def rows(self, entries: Sequence[Entry]) -> list[list[str]]:
        """Cells, a row an entry."""
        return [[column.form(look_up(entry, column.path)) for column in self.columns] for entry in entries]


@dataclass(frozen=True)
class SeedsTable(LedgerTable):
    """One row for all seeds of a kind: the mean of each figure, with the standard deviation from two seeds on.

    The newest entry of each seed counts. A figure that some entries lack is averaged over the others ("-" if all lack
    it); of columns that are no figures, the seeds are listed and the others are the newest entry's.
    """

    def rows(self, entries: Sequence[Entry]) -> list[list[str]]:
        """Cells, a row a kind."""
        kinds: dict[tuple[str, ...], list[Entry]] = {}
        for entry in entries:
            kinds.setdefault(tuple(str(entry[name]) for name in self.key if name != "seed"), []).append(entry)
        return [[self._cell(column, kind) for column in self.columns] for kind in kinds.values()]

    @staticmethod
    def _cell(column: Column, kind: Sequence[Entry]) -> str:
        if column.path == "seed":
            return ", ".join(str(seed) for seed in sorted(entry["seed"] for entry in kind))
        figures, _, name = column.path.partition(".")
        if figures != "figures":
            return column.form(look_up(max(kind, key=lambda entry: entry["date"]), column.path))
        values = [entry["figures"][name] for entry in kind if name in entry["figures"]]
        if not values:
            return "-"
        spread = f" ± {column.form(statistics.stdev(values))}" if len(values) > 1 else ""
        return column.form(statistics.mean(values)) + spread


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
