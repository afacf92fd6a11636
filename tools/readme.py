"""Writes the measured tables and numbers into README.md and model_cards/*.md.

`make readme` writes; `python -m tools.readme --check` only compares.

Documents mark what is generated: `<!-- table:NAME -->` ... `<!-- /table -->` around a table, and inside a sentence
`<!-- value:KEY -->31.2 %<!-- /value -->`. The numbers come from the ledger (results/*.jsonl); which entry and which
column stand where is said in readme_tables.py.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from tools.readme_tables import TABLES, VALUES

ROOT = Path(__file__).resolve().parents[1]
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
            raise ValueError(f"tools/readme_tables.py knows no {kind} {name!r}; it knows {sorted(known)}.")
        content = known[name].render(results)
        content = f"\n{content}\n" if kind == "table" else content
        return f"<!-- {kind}:{name} -->{content}<!-- /{kind} -->"

    return BLOCK.sub(render, document)


def documents() -> list[Path]:
    """What is generated into."""
    return [
        ROOT / "README.md",
        *sorted((ROOT / "model_cards").glob("*.md")),
        # the other pages of docs/ have generators of their own
        *(ROOT / "docs").glob("speed.md"),
    ]


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
