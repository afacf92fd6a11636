"""Run a notebook's code cells and keep what they print: `python tools/run_notebook.py notebooks/NAME.ipynb`.

The cells run in one process, one after the other, from the notebook's folder. Their outputs are replaced by what was
printed on standard output; pictures that a cell ends with are not kept: those of data sets do not belong here.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any


def run_cell(source: str, namespace: dict[str, Any]) -> str:
    """What a cell prints; its last expression is computed, and shown unless it is None or a picture."""
    printed = io.StringIO()
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)  # noqa: S307 - our notebook
            if value is not None and not hasattr(value, "_repr_png_"):
                print(value)
    return printed.getvalue()


def run_notebook(notebook: dict[str, Any]) -> None:
    """Run the code cells of a notebook's content, and put their outputs and numbers in."""
    namespace: dict[str, Any] = {}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        text = run_cell("".join(cell["source"]), namespace)
        lines = text.splitlines(keepends=True)
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
        cell["execution_count"] = number


def main() -> None:
    """Run the notebook of the command line and write it back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    file = parser.parse_args().notebook.resolve()
    notebook = json.loads(file.read_text(encoding="utf-8"))
    sys.path.insert(0, "")
    os.chdir(file.parent)
    run_notebook(notebook)
    file.write_text(json.dumps(notebook, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
