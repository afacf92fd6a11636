"""The papers' ablations in small: `python examples/ablate.py --resume`.

Trains and evaluates the rows of examples/ablations.yaml that results/ablations.jsonl lacks, for seed 0 first, then for
the seeds 1 and 2 of the rows that a paper's claim rests on. It needs scenes, small CLIPs and a small SAM:

    python examples/make_scenes.py --output scenes --train 6000
    python examples/train_clip.py --recipe examples/recipes/clip_vit_scenes.yaml --output clip_vit_scenes
    python examples/train_clip.py --recipe examples/recipes/clip_convnext_scenes.yaml --output clip_convnext_scenes
    python examples/train_sam.py --recipe examples/recipes/sam_scenes.yaml --output sam_scenes

`--table docs/ablations.md` writes what the ledgers say, also about rows that other commands measure, without training
when `--limit 0` is given.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor

from ov_segmentation import AutoModelForOpenVocabularySegmentation, ledger
from ov_segmentation.data.datasets import load_segmentation_data
from ov_segmentation.data.scene_folders import EVALUATION_FOLDER, world_suffix
from ov_segmentation.data.scene_vocabulary import SceneVocabulary
from ov_segmentation.strict_mapping import override
from ov_segmentation.training.ablation import Row, Study, describe, load_studies, measurements, render
from ov_segmentation.training.scene_evaluation import evaluate_scenes

EXAMPLES = Path(__file__).resolve().parent
LEDGER = Path("results/ablations.jsonl")
# rows that other commands measure
OTHER_LEDGERS = ("adaptation.jsonl", "deop.jsonl")
CLAIM_SEEDS = (1, 2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line; train, evaluate and record what is missing; write the table."""
    options = parse(arguments)
    try:
        studies = load_studies(options.studies)
        if options.table is not None and not options.table.parent.is_dir():
            raise FileNotFoundError(f"There is no folder {options.table.parent} to write {options.table.name} to.")
    except (OSError, ValueError) as error:
        sys.exit(f"ablate.py: {type(error).__name__}: {error}")
    if unknown := {name.split("/")[0] for name in options.only} - set(studies):
        sys.exit(f"ablate.py: there are no studies {sorted(unknown)}, only {sorted(studies)}.")
    if options.limit and not options.data.is_dir():
        made = f"python examples/make_scenes.py --output {options.data}"
        sys.exit(f"ablate.py: there is no folder {options.data}. Make it with: {made}")
    done = 0
    for study, row, seed in wanted(studies, options.only, options.seeds):
        if done >= options.limit:
            break
        present = measurements(study, row, read(options.ledger), studies)
        if seed in present and options.resume:
            continue
        try:
            measure(study, row, seed, options)
        except subprocess.CalledProcessError as error:
            # the other rows do not depend on it
            print(f"ablate.py: {study.name}/{row.name}, seed {seed}: failed with status {error.returncode}.")
            if options.stop_at_errors:
                raise
        done += 1
        write_table(studies, options)
    write_table(studies, options)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=Path, default=EXAMPLES / "ablations.yaml", help="file of studies")
    parser.add_argument("--only", nargs="+", default=[], metavar="STUDY[/ROW]", help="these alone")
    parser.add_argument("--seeds", nargs="+", type=int, help="these alone, for all rows")
    parser.add_argument("--data", type=Path, default=Path("scenes"), help="folder of examples/make_scenes.py")
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"), help="folder of the runs")
    parser.add_argument("--ledger", type=Path, default=LEDGER, help="JSON-lines file that is appended to")
    parser.add_argument("--resume", action="store_true", help="skip what the ledger has")
    parser.add_argument("--limit", type=int, default=sys.maxsize, help="at most so many rows")
    parser.add_argument("--stop-at-errors", action="store_true")
    parser.add_argument("--table", type=Path, help="write what is known as Markdown")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="for every recipe")
    return parser.parse_args(arguments)


def wanted(
    studies: dict[str, Study], only: Sequence[str], seeds: Sequence[int] | None
) -> Iterator[tuple[Study, Row, int]]:
    """What is to be measured, in that order: seed 0 of everything, then the other seeds of the rows of claims."""
    for seed in seeds if seeds is not None else (0, *CLAIM_SEEDS):
        for study in studies.values():
            claimed = {name for claim in study.claims for name in (claim.better, claim.worse)}
            for row in study.rows:
                if row.recorded is not None or row.same_as is not None:
                    continue
                if only and not {study.name, f"{study.name}/{row.name}"} & set(only):
                    continue
                if seeds is not None or seed == 0 or row.name in claimed:
                    yield study, row, seed


def measure(study: Study, row: Row, seed: int, options: argparse.Namespace) -> None:
    """Train, unless the row takes another row's model; evaluate; append to the ledger."""
    code = ledger.revision()
    trained = row if row.of is None else study.row(row.of)
    folder = options.output / f"{study.name}-{trained.name}-{seed}".replace(" ", "_")
    if not (folder / "result.json").exists():
        changes = [*study.budget, *trained.change, *options.set, f"seed={seed}"]
        recipe = options.studies.parent / study.recipe
        # a process of its own: what one training leaves behind must not change the next
        command = [EXAMPLES / "train.py", "--recipe", recipe, "--output", folder, "--set", *changes]
        subprocess.run([sys.executable, *map(str, command)], check=True)
    result = json.loads((folder / "result.json").read_text())
    figures = evaluated(folder / "model", {} if row.of is None else values(row.change), study, options)
    entry = ledger.append(
        options.ledger,
        command=f'python examples/ablate.py --resume --only "{study.name}/{row.name}" --seeds {seed}',
        seed=seed,
        seconds=result["seconds"],
        figures={**figures, "cpu_seconds": result["cpu_seconds"]},
        protocol=f"scenes-small-{study.scenes}{world_suffix(options.data)}",
        code=code,
        **describe(study, row),
    )
    shown = "  ".join(f"{name} {100 * entry['figures'][name]:.1f}" for name in ("miou", "hiou", "things_a", "things_c"))
    print(f"{study.name}/{row.name}, seed {seed}: {shown}", flush=True)


def evaluated(folder: Path, config: dict[str, Any], study: Study, options: argparse.Namespace) -> dict[str, float]:
    """Figures by tier, with changes of the model's configuration."""
    model = AutoModelForOpenVocabularySegmentation.from_pretrained(folder, dtype=torch.float32, **config)
    pictures = load_segmentation_data(options.data / EVALUATION_FOLDER).split("validation", study.scenes)
    processor = AutoProcessor.from_pretrained(folder)
    return evaluate_scenes(model, processor, pictures, SceneVocabulary.small(), floors=())


def values(assignments: Sequence[str]) -> dict[str, Any]:
    """`key=value` assignments as a mapping."""
    found: dict[str, Any] = {}
    for assignment in assignments:
        override(found, assignment)
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """A ledger's lines, none where there is no ledger."""
    return ledger.read(path) if path.exists() else []


def write_table(studies: dict[str, Study], options: argparse.Namespace) -> None:
    """All studies as Markdown, from this ledger and those beside it."""
    if options.table is not None:
        options.table.write_text(render(studies, all_measurements(options.ledger)), encoding="utf-8")


def all_measurements(path: Path) -> list[dict[str, Any]]:
    """The lines of a ledger, and of those of `OTHER_LEDGERS` beside it."""
    return [entry for file in (path, *map(path.with_name, OTHER_LEDGERS)) for entry in read(file)]


if __name__ == "__main__":
    main()
