"""Puts the result of a finished training run into the ledger.

`python tools/record_training.py runs/san_tiny_camvid results/camvid.jsonl --protocol "camvid_11, 240 px, 11 ignored"`
takes command, seed, commit and figures from what the run wrote (`result.json`, the metadata of its weights), not from
the command line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ov_segmentation import ledger

NOT_FIGURES = {"seconds", "averaging", "command", "commit", "dirty", "recipe_hash", "seed", "format"}


def record(run: Path, path: Path, protocol: str) -> ledger.Entry:
    """Append the run's entry to the ledger `path`; FileNotFoundError if the run has not finished."""
    weights = run / "model" / "model.safetensors"
    with safe_open(weights, framework="pt") as opened:
        metadata = opened.metadata()
    result: dict[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
    config = json.loads((run / "model" / "config.json").read_text(encoding="utf-8"))
    figures = {name: value for name, value in result.items() if name not in NOT_FIGURES}
    return ledger.append(
        path,
        command=metadata["command"],
        seed=int(metadata["seed"]),
        seconds=result["seconds"],
        figures={**figures, "megabytes": round(weights.stat().st_size / 2**20, 2)},
        protocol=f"{protocol}; IoU averaged over {result['averaging']} classes" if "averaging" in result else protocol,
        code={name: json.loads(metadata[name]) if name == "dirty" else metadata[name] for name in ("commit", "dirty")},
        method=config["model_type"],
        recipe_hash=metadata["recipe_hash"],
    )


def main() -> None:
    """Record one run and print its entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder, as examples/train.py left it")
    parser.add_argument("ledger", type=Path, help="results/NAME.jsonl")
    parser.add_argument("--protocol", required=True, help="name list, resolution, ignored ids")
    options = parser.parse_args()
    print(json.dumps(record(options.run, options.ledger, options.protocol), indent=1))


if __name__ == "__main__":
    main()
