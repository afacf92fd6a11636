"""Check a list of class names: `python examples/check_vocabulary.py --model MODEL --names names.json`.

Reports blank and repeated names, names that are one text to the model, texts that are cut, near-synonyms by the model's
own text embeddings, and how far each name is from those of training.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ov_segmentation import Vocabulary
from ov_segmentation.atomic_files import write_atomically
from ov_segmentation.evaluation.vocabulary_report import check_vocabulary, markdown
from ov_segmentation.loading import load_model_and_processor
from ov_segmentation.vocabulary import BENCHMARKS, split_names


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, check and print; exit with 1 if a name cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a checkpoint")
    parser.add_argument(
        "--names",
        required=True,
        help="a JSON file of a list (a list inside it: synonyms), a text file with one name a line, or names separated "
        "by commas",
    )
    parser.add_argument(
        "--training", default="coco_stuff_171", help="a packaged benchmark, or a file as --names, that was trained on"
    )
    parser.add_argument("--threshold", type=float, default=0.95, help="cosine from which names are near-synonyms")
    parser.add_argument("--text-cache", help="folder that keeps text embeddings")
    parser.add_argument("--output", type=Path, help="folder for report.json and report.md")
    options = parser.parse_args(arguments)
    try:
        names = read_names(options.names)
        model, processor = load_model_and_processor(options.model, dtype=torch.float32)
        training = (
            names_of_benchmark(options.training, model.config.model_type)
            if options.training in BENCHMARKS
            else Vocabulary(read_names(options.training))
        )
        report = check_vocabulary(names, model, processor, training, options.threshold, options.text_cache)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    document = markdown(report, names)
    print(document)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        write_atomically(options.output / "report.json", json.dumps(report, indent=1) + "\n")
        write_atomically(options.output / "report.md", document)
    if report["blank"] or report["duplicates"]:
        sys.exit(1)


def names_of_benchmark(benchmark: str, method: str) -> Vocabulary:
    """A packaged benchmark's names as a method spells them, or another one that was evaluated on it."""
    protocol = method if method in BENCHMARKS[benchmark] else next(iter(BENCHMARKS[benchmark]))
    return Vocabulary.from_benchmark(benchmark, protocol).with_texts(None, None)


def read_names(given: str) -> list[str | list[str]]:
    """Class names from a file (JSON, or one a line) or a comma-separated text, unchecked.

    Raises:
        ValueError: JSON that is no list of names.
    """
    file = Path(given)
    if not file.is_file():
        return split_names(given)
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".json":
        return text.splitlines()
    names = json.loads(text)
    if not isinstance(names, list) or not all(
        isinstance(entry, str) or (isinstance(entry, list) and all(isinstance(name, str) for name in entry))
        for entry in names
    ):
        raise ValueError(f"{file} must hold a list of names; a list inside it holds synonyms.")
    return names


if __name__ == "__main__":
    main()
