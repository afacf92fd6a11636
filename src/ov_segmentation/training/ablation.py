"""Ablations: which rows a study has, what the ledger says about them, and whether a difference is one.

A study shortens a recipe and changes it row by row. A claim names two rows, the one that the paper finds better and the
one that it finds worse; it is judged by the differences of the seeds that both rows have.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..data.scene_vocabulary import TIERS
from ..strict_mapping import RecipeError, from_mapping

Entry = dict[str, Any]
TIER_FIGURES = tuple(f"{kind}_{tier}" for kind in ("things", "stuff") for tier in TIERS)
JUDGED = "miou"
"""The figure that claims are judged by: mean IoU over the classes of all tiers."""


@dataclass(frozen=True)
class Row:
    """One row of a study.

    Args:
        name: of the row.
        change: assignments to the recipe; with `of`, to the configuration of a model that is trained already.
        of: the row whose model it is.
        same_as: "study/row" whose measurements it shares.
        recorded: fields of the ledger line in which another command measures it.
        paper: the paper's figure.
    """

    name: str
    change: list[str] = field(default_factory=list)
    of: str | None = None
    same_as: str | None = None
    recorded: dict[str, Any] | None = None
    paper: float | None = None


@dataclass(frozen=True)
class Claim:
    """What the paper concludes: row `better` is better than row `worse`."""

    better: str
    worse: str


@dataclass(frozen=True)
class Study:
    """Rows that are compared with one another.

    Args:
        name: of the study, a word.
        method: the method's model type.
        title: what is asked, and where in the paper.
        recipe: file, relative to the file of studies; None: other commands measure all rows.
        budget: assignments to the recipe, for every row.
        scenes: evaluated on the first so many evaluation scenes.
        paper_figure: what `paper` of the rows is.
        measured_by: the command that measures rows with `recorded`.
    """

    name: str
    method: str
    title: str
    rows: list[Row]
    claims: list[Claim]
    recipe: str | None = None
    budget: list[str] = field(default_factory=list)
    scenes: int | None = None
    paper_figure: str | None = None
    measured_by: str | None = None

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        if len(set(names)) < len(names):
            raise RecipeError(f"Study {self.name} has two rows of one name: {names}.")
        wanted = {name for claim in self.claims for name in (claim.better, claim.worse)}
        wanted |= {row.of for row in self.rows if row.of is not None}
        if unknown := wanted - set(names):
            raise RecipeError(f"Study {self.name} has no rows {sorted(unknown)}, only {names}.")

    def row(self, name: str) -> Row:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)


@dataclass(frozen=True)
class Studies:
    """The file of studies."""

    studies: list[Study]


def load_studies(path: str | Path) -> dict[str, Study]:
    """Studies by name; `RecipeError` with the place of what is wrong."""
    studies = from_mapping(Studies, yaml.safe_load(Path(path).read_text(encoding="utf-8"))).studies
    return {study.name: study for study in studies}


def measurements(
    study: Study, row: Row, entries: Sequence[Entry], studies: dict[str, Study]
) -> dict[int | None, Entry]:
    """Seed -> the newest measurement of a row made with the budget and the changes that it has now."""
    if row.same_as is not None:
        other, name = row.same_as.split("/")
        return measurements(studies[other], studies[other].row(name), entries, studies)
    match = row.recorded if row.recorded is not None else _identity(study, row)
    return {entry["seed"]: entry for entry in entries if all(entry.get(key) == match[key] for key in match)}


def describe(study: Study, row: Row) -> Entry:
    """What the ledger's line about a row says beside its figures."""
    return {**_identity(study, row), "method": study.method, "paper": row.paper}


def _identity(study: Study, row: Row) -> Entry:
    return {
        "study": study.name,
        "row": row.name,
        "recipe": study.recipe,
        "change": list(row.change),
        "budget": list(study.budget),
    }


@dataclass(frozen=True)
class Judgement:
    """A claim against the measurements.

    Args:
        differences: better row minus worse row, of each seed that both have.
        verdict: "confirmed", "contradicted", "no difference", "one seed" or "not run".
    """

    claim: Claim
    differences: list[float]
    verdict: str

    @property
    def mean(self) -> float:
        """Mean difference."""
        return statistics.mean(self.differences)

    @property
    def deviation(self) -> float:
        """Standard deviation of the differences; at least two."""
        return statistics.stdev(self.differences)


def judge(claim: Claim, better: dict[Any, Entry], worse: dict[Any, Entry]) -> Judgement:
    """A sign counts when the mean difference exceeds the standard deviation of the differences."""
    seeds = [seed for seed in better if seed in worse]
    differences = [better[seed]["figures"][JUDGED] - worse[seed]["figures"][JUDGED] for seed in seeds]
    if len(differences) < 2:
        return Judgement(claim, differences, "one seed" if differences else "not run")
    found = Judgement(claim, differences, "")
    if abs(found.mean) <= found.deviation:
        return Judgement(claim, differences, "no difference")
    return Judgement(claim, differences, "confirmed" if found.mean > 0 else "contradicted")


def render(studies: dict[str, Study], entries: Sequence[Entry]) -> str:
    """All studies as a Markdown document."""
    parts = [
        "# The papers' ablations in small",
        "<!-- Written by `make readme`; a test compares. -->",
        "Short trainings on synthetic scenes, around small CLIPs that know the words of scenes: what is compared is "
        "the sign, never the size. IoU in percent, means over the seeds, of tier a (trained on), b (CLIP has met the "
        "names) and c (nobody has), things and stuff. A class that is predicted but that no scene shows counts as 0 in "
        "its tier and in hIoU, and not in mIoU. A claim of a paper counts as confirmed or contradicted when the mean "
        "difference in mIoU over the seeds exceeds the standard deviation of the differences; otherwise there is no "
        "difference, and with one seed no judgement. `examples/ablations.yaml` has the recipes' changes.",
    ]
    parts += [_render_study(study, entries, studies) for study in studies.values()]
    return "\n\n".join(parts) + "\n"


def _render_study(study: Study, entries: Sequence[Entry], studies: dict[str, Study]) -> str:
    found = {row.name: measurements(study, row, entries, studies) for row in study.rows}
    paper = any(row.paper is not None for row in study.rows)
    titles = ["Row", "Seeds", *(name.replace("_", " ") for name in TIER_FIGURES), "mIoU", "hIoU", "pAcc", "CPU minutes"]
    lines = [_table_line(titles + ["Paper"] * paper), _table_line(["---"] * (len(titles) + paper))]
    for row in study.rows:
        cells = _cells(list(found[row.name].values()))
        lines.append(_table_line([row.name, *cells] + ["-" if row.paper is None else f"{row.paper}"] * paper))
    source = f"`{study.recipe}`" if study.recipe else f"`{study.measured_by}`"
    budget = f" with `{' '.join(study.budget)}`" if study.budget else ""
    scenes = f", the first {study.scenes} evaluation scenes" if study.scenes else ""
    figure = f" Paper: {study.paper_figure}." if study.paper_figure else " The paper's figures are not at hand."
    claims = [_claim_line(judge(c, found[c.better], found[c.worse]), study) for c in study.claims]
    return "\n\n".join([f"## {study.title}", f"{source}{budget}{scenes}.{figure}", "\n".join(lines), "\n".join(claims)])


def _cells(entries: list[Entry]) -> list[str]:
    if not entries:
        return ["not run", *["-"] * (len(TIER_FIGURES) + 4)]
    seeds = ", ".join(str(entry["seed"]) for entry in sorted(entries, key=lambda entry: entry["seed"] or 0))
    figures = [_percent(entry["figures"].get(name) for entry in entries) for name in TIER_FIGURES]
    values = [entry["figures"][JUDGED] for entry in entries]
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    figures.append(_percent(values) + spread)
    figures += [_percent(entry["figures"].get(name) for entry in entries) for name in ("hiou", "pixel_accuracy")]
    cpu = [entry["figures"]["cpu_seconds"] for entry in entries if "cpu_seconds" in entry["figures"]]
    return [seeds, *figures, f"{statistics.mean(cpu) / 60:.1f}" if cpu else "-"]


def _percent(values: Iterable[float | None]) -> str:
    there = [value for value in values if value is not None]
    return f"{100 * statistics.mean(there):.1f}" if there else "-"


def _claim_line(judgement: Judgement, study: Study) -> str:
    claim, verdict = judgement.claim, judgement.verdict
    said = f"- **{claim.better}** better than **{claim.worse}**: "
    paper = [study.row(name).paper for name in (claim.better, claim.worse)]
    there = "" if None in paper else f" (the paper's difference: {paper[0] - paper[1]:+.1f})"
    if verdict == "not run":
        return f"{said}not run{there}."
    if verdict == "one seed":
        return f"{said}{100 * judgement.mean:+.1f} with one seed, no judgement{there}."
    size = f"{100 * judgement.mean:+.1f} ± {100 * judgement.deviation:.1f} over {len(judgement.differences)} seeds"
    return f"{said}{verdict}, {size}{there}."


def _table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
