"""Segment many pictures.

`python examples/segment_dataset.py --model MODEL --input PICTURES --labels road,car,tree --output OUT`

PICTURES is a folder of picture files (at any depth), a data set's folder, or the Hub id of one. OUT gets
`label_maps/<name>.png` of class indices (16 bits beyond 255 classes) and `classes.json`; with --format dataset parquet
files that `load_dataset` and training read. Start the same command again after a kill: nothing is done twice. Several
processes share the work: `accelerate launch --num_processes 4 examples/segment_dataset.py ...`, or on CPUs
`ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/segment_dataset.py ...`.

A picture that cannot be read is left out and named at the end. Exit code: 0, all pictures segmented; 3, all but those
named; 1, nothing or not everything could be done, the message says why.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from tqdm import tqdm

from ov_segmentation import Vocabulary
from ov_segmentation.bulk.pictures import FolderPictures, Pictures, find_pictures, output_names
from ov_segmentation.bulk.results import BulkError, LabelMapDataset, LabelMapFolder, Results
from ov_segmentation.bulk.run import BulkFolder, Segmentation, segment_pictures
from ov_segmentation.cli_options import add_label_options, at_least_one, parse_switches, vocabulary_of
from ov_segmentation.evaluation.runner import weights_digest
from ov_segmentation.loading import load_model_and_processor
from ov_segmentation.process_group import process_group_ended

SOME_UNREADABLE = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, segment, say what could not be read."""
    options = parse(arguments)
    datasets.disable_progress_bars()  # one bar is enough
    state = PartialState(cpu=options.cpu)
    try:
        problems = run(options, state)
    # the message says what to do; a traceback would bury it
    except (BulkError, OSError, ValueError, TypeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if problems and state.is_main_process:
        sys.exit(SOME_UNREADABLE)


def run(options: argparse.Namespace, state: PartialState) -> list[dict[str, str]]:
    """Segment; the pictures that could not be."""
    vocabulary = vocabulary_of(options)
    pictures = find_pictures(options.input, options.split, options.image_column, options.max_samples)
    if isinstance(pictures, FolderPictures) and options.output.resolve().is_relative_to(pictures.root.resolve()):
        raise BulkError(f"{options.output} lies in {pictures.root}: its label maps would be taken for pictures.")
    results = results_of(options, pictures, vocabulary)
    segmentation = Segmentation(vocabulary, options.background, options.threshold, parse_switches(options.set))
    model, processor = load_model_and_processor(options.model, dtype=options.dtype)
    segmentation.check(model)
    model = model.to(state.device)
    settings = {
        **segmentation.settings(),
        "model": weights_digest(model),
        "format": options.format,
        "palette": options.palette,
        "overlays": options.overlays,
        # shards are numbered by what is in them
        "pictures": list(pictures.names) if options.format == "dataset" else None,
        "shard_size": options.shard_size if options.format == "dataset" else None,
    }
    folder = BulkFolder(options.output, settings)
    with state.main_process_first():
        if state.is_main_process:
            folder.claim(vocabulary, options.resume == "auto")
    report = segment_pictures(
        model,
        processor,
        pictures,
        segmentation,
        results,
        state.process_index,
        state.num_processes,
        options.num_workers,
        options.text_cache,
        _bar(state),
    )
    if state.is_main_process:
        folder.write_report(report)
        done = report.pictures - len(report.problems)
        before = f" ({report.before} before)" if report.before else ""
        print(f"{options.output}: {done} of {report.pictures} pictures segmented{before}.", flush=True)
        for entry in report.problems:
            print(f"  {entry['picture']}: {entry['problem']}", file=sys.stderr)
    state.wait_for_everyone()
    return report.problems


def results_of(options: argparse.Namespace, pictures: Pictures, vocabulary: Vocabulary) -> Results:
    """Where the results go."""
    if options.format == "png":
        names = output_names(pictures.names)
        return LabelMapFolder(options.output, names, vocabulary, options.palette, options.overlays)
    if options.palette or options.overlays:
        raise BulkError("--palette and --overlays are for --format png.")
    return LabelMapDataset(options.output, pictures.names, vocabulary, options.shard_size)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a checkpoint")
    parser.add_argument("--input", required=True, help="folder of pictures, folder of a data set, or Hub id")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    add_label_options(parser)
    parser.add_argument("--format", choices=("png", "dataset"), default="png")
    parser.add_argument("--palette", action="store_true", help="PNGs with colours (up to 255 classes)")
    parser.add_argument("--overlays", action="store_true", help="also pictures with their map laid over, and a legend")
    parser.add_argument("--split", help="of a data set with several")
    parser.add_argument("--image-column", help="of a data set with several columns of pictures")
    parser.add_argument("--max-samples", type=at_least_one, help="only the first so many pictures")
    parser.add_argument("--shard-size", type=at_least_one, default=500, help="pictures per parquet file (default: 500)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that read pictures, per process")
    parser.add_argument("--resume", choices=("auto", "never"), default="auto", help="never: replace what is there")
    parser.add_argument("--text-cache", help="folder that keeps text embeddings")
    parser.add_argument("--cpu", action="store_true", help="even if there is a GPU")
    options = parser.parse_args(arguments)
    options.dtype = getattr(torch, options.dtype)
    return options


def _bar(state: PartialState) -> Any:
    def progress(items: Iterable, total: int, before: int) -> Iterable:
        note = f"segmenting ({before} done before)" if before else "segmenting"
        return tqdm(items, total=total, desc=note, unit="picture", disable=not state.is_local_main_process)

    return progress


if __name__ == "__main__":
    with process_group_ended():
        main()
