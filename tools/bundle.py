"""Makes a bundled checkpoint: `python tools/bundle.py runs/sed_scenes/model assets/sed_scenes --ledger scenes.jsonl`.

Weights in bfloat16, with what the training wrote into their metadata (command, seed, commit, recipe, its figures) and,
under "scenes", the ledger's newest figures of that name. For a CLIP the ledger is foundations.jsonl, and command, seed
and commit come from its line. Trained on drawings from scratch, the weights have this project's licence. More than
4 MiB are refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ov_segmentation import ledger

MAX_BYTES = 4 * 1024**2
RESULTS = Path(__file__).resolve().parents[1] / "results"
SCENES, STANDARD = "scenes.jsonl", "scenes-small-400"
PROVENANCE = ("command", "seed", "commit")
LICENCE = "apache-2.0"
# of a training run's folder
WEIGHTS, CONFIG = "model.safetensors", "config.json"
BESIDE = ("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")


class BundleError(Exception):
    """What cannot be bundled, and why."""


def bundle(source: Path, target: Path, entry: ledger.Entry, max_bytes: int = MAX_BYTES) -> int:
    """Write the checkpoint `source` to `target` in bfloat16; returns the bytes.

    Args:
        entry: the ledger's line about it.

    Raises:
        BundleError: it is too large, or nobody knows where it comes from.
    """
    with safe_open(source / WEIGHTS, framework="pt") as opened:
        metadata = {"format": "pt", **(opened.metadata() or {})}
    for name in PROVENANCE:
        metadata.setdefault(name, str(entry[name]))
    metadata["scenes"] = json.dumps(entry["figures"])
    weights = {name: _half(value) for name, value in load_file(source / WEIGHTS).items()}
    config: dict[str, Any] = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    files = {name: (source / name).read_bytes() for name in BESIDE if (source / name).exists()}
    if "weights_license" in config:
        config["weights_license"] = LICENCE
    files[CONFIG] = (json.dumps({**config, "dtype": "bfloat16"}, indent=2) + "\n").encode()
    size = sum(value.numel() * value.element_size() for value in weights.values()) + sum(map(len, files.values()))
    if size > max_bytes:
        raise BundleError(
            f"{source} has {size / 2**20:.1f} MiB in bfloat16, at most {max_bytes / 2**20:.0f} are bundled."
        )
    target.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (target / name).write_bytes(content)
    save_file(weights, target / WEIGHTS, metadata=metadata)
    return sum(file.stat().st_size for file in target.iterdir())


def _half(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.bfloat16) if value.is_floating_point() else value


def main() -> None:
    """Bundle one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the checkpoint")
    parser.add_argument("target", type=Path, help="folder to write; its name is the ledger's, unless --name says it")
    parser.add_argument("--ledger", default=SCENES, help="file in results/ that has its figures")
    parser.add_argument("--name", help="what the ledger calls it")
    parser.add_argument("--seed", type=int, default=0, help="of the training run")
    parser.add_argument("--protocol", default=STANDARD, help="of the figures in scenes.jsonl")
    options = parser.parse_args()
    name = options.name or options.target.name
    # a CLIP's line has its name in the place of a method's
    entries = [
        entry
        for entry in ledger.read(RESULTS / options.ledger)
        if name in (entry.get("name"), entry.get("method"))
        and entry["seed"] == options.seed
        and (options.ledger != SCENES or entry["protocol"] == options.protocol)
    ]
    if not entries:
        wanted = f"{name} with seed {options.seed}"
        sys.exit(f"results/{options.ledger} has no line about {wanted}: evaluate it first, with --ledger.")
    try:
        size = bundle(options.source, options.target, entries[-1])
    except BundleError as error:
        sys.exit(f"bundle.py: {error}")
    print(f"{options.target}: {size:,} bytes")


if __name__ == "__main__":
    main()
