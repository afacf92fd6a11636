"""All benchmarks, one after the other: `make bench`.

    python benchmarks/all.py --minutes 45
    python benchmarks/all.py --resume          # what the ledgers do not have yet of this commit

Nothing else should run meanwhile. What the targets are about comes first; when the minutes are over, no further row
starts, and `--resume` measures the rest another time. Every row is a fresh process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.training_sizes import LARGE_SCENES, PAIRS, ROOT, SCENES

# benchmark, its options, its ledger
STEPS: tuple[tuple[str, Sequence[str], str], ...] = (
    ("speed", ("--dtypes", "float32", "--classes", "150", "--repeats", "3", "--budget", "12"), "speed"),
    ("overhead", ("--repeats", "2"), "overhead"),
    ("speed", ("--dtypes", "float32", "--repeats", "2", "--budget", "8"), "speed"),
    ("speed", ("--dtypes", "bfloat16", "--repeats", "2", "--budget", "8"), "speed"),
    ("precision", ("--data", "{folder}/" + SCENES), "precision"),
    ("compiled", (), "compiled"),
    ("growth", ("--tables", "windows"), "growth"),
    ("growth", ("--tables", "classes", "crops"), "growth"),
    ("training", ("--data", "{folder}"), "training_speed"),
    ("growth", ("--tables", "batches", "pictures"), "growth"),
)


def prepare(folder: Path) -> None:
    """Scenes to train and to evaluate on, and pairs of crop and noun; what is there stays."""
    scenes = [sys.executable, str(ROOT / "examples" / "make_scenes.py")]
    for name, options in (
        (SCENES, ("--train", "200", "--evaluation", "40")),
        (LARGE_SCENES, ("--train", "12", "--evaluation", "1", "--size", "480")),
    ):
        if not (folder / name).exists():
            subprocess.run([*scenes, "--output", str(folder / name), *options], check=True)
    if not (folder / PAIRS).exists():
        mine = [sys.executable, str(ROOT / "examples" / "mine_mask_pairs.py"), "--masks", "annotation"]
        mine += ["--nouns", "classes", "--model", str(ROOT / "assets" / "ovseg_scenes_small"), "--cpu"]
        data = ["--data", str(folder / SCENES / "train"), "--output", str(folder / PAIRS)]
        subprocess.run([*mine, *data], check=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them; the number of benchmarks that failed or were not finished in time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=45, help="no row starts after so many")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench", help="for scenes and pairs")
    parser.add_argument("--ledgers", type=Path, default=ROOT / "results", help="folder of the ledgers")
    parser.add_argument("--resume", action="store_true", help="leave out rows of this commit that the ledgers have")
    options = parser.parse_args(arguments)
    begin = time.time()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    prepare(options.folder)
    failed = 0
    for number, (name, given, ledger) in enumerate(STEPS):
        print(f"\n[{(time.time() - begin) / 60:.1f} min] {name} {' '.join(given)}", flush=True)
        command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py")]
        # the ledgers record the command: no path of this machine
        folder = os.path.relpath(options.folder, ROOT)
        command += [one.format(folder=folder) for one in given]
        file = os.path.relpath(options.ledgers / f"{ledger}.jsonl", ROOT)
        command += ["--threads", str(options.threads), "--ledger", file]
        command += ["--until", str(begin + 60 * options.minutes)]
        # a later step of the same benchmark does not repeat rows of an earlier one
        seen = any(earlier == name for earlier, _, _ in STEPS[:number])
        command += ["--resume"] if options.resume or seen else []
        failed += subprocess.run(command, cwd=ROOT).returncode != 0
    print(f"\n{(time.time() - begin) / 60:.1f} minutes; {failed} benchmarks with a row that failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
