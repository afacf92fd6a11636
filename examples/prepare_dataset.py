"""Turn an official download into a data set: `python examples/prepare_dataset.py ade20k_150 --source DIR --output DIR`.

The output is a folder that `datasets.load_dataset(DIR)` reads (parquet; columns image, annotation, file_name, classes),
for training and for `examples/evaluate.py`. Start the same command again after a kill: it continues.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
from tqdm import tqdm

from ov_segmentation.data.label_sets import label_sets
from ov_segmentation.data.preparation import BUILDERS, PreparationError, prepare
from ov_segmentation.data.preparation.building import ROWS_PER_FILE
from ov_segmentation.data.preparation.card import read_card
from ov_segmentation.hub import HubError, push_folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and prepare."""
    needs = "\n".join(f"  {name}: {label_sets()[name].source}" for name in BUILDERS)
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nWhat --source has to hold:\n{needs}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=list(BUILDERS), metavar="NAME", help="one of the list above")
    parser.add_argument("--source", required=True, type=Path, help="folder with the unpacked download")
    parser.add_argument("--output", required=True, type=Path, help="the data set's folder")
    parser.add_argument("--splits", nargs="+", choices=("train", "validation"), help="default: both")
    parser.add_argument(
        "--expect-counts", choices=("on", "off"), default="on", help="off: a part of the data set will do"
    )
    parser.add_argument("--rows-per-file", type=int, default=ROWS_PER_FILE, help="pictures per parquet file")
    parser.add_argument("--workers", type=int, default=0, help="processes that read and encode")
    parser.add_argument("--push-to-hub", metavar="ID", help="also upload it, as a private repository, to this Hub id")
    options = parser.parse_args(arguments)
    datasets.disable_progress_bars()  # one bar is enough
    try:
        folder = prepare(
            options.name,
            options.source,
            options.output,
            splits=options.splits,
            expect_counts=options.expect_counts == "on",
            rows_per_file=options.rows_per_file,
            workers=options.workers,
            progress=_bar,
        )
    except (PreparationError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"{folder}: {', '.join(f'{split} {count}' for split, count in read_card(folder)['pictures'].items())}")
    if options.push_to_hub:
        try:
            print(push_folder(folder, options.push_to_hub, repo_type="dataset", private=True))
        except HubError as error:
            sys.exit(f"HubError: {error} {folder} is complete: the same command goes on with the upload.")


def _bar(items: Iterable[Any], total: int, title: str) -> Iterable[Any]:
    return tqdm(items, total=total, desc=title, unit="picture")


if __name__ == "__main__":
    main()
