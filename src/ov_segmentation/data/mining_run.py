"""A mining run: pictures in shards, each written whole or not at all, so that any number of processes can share it and
a run that was stopped continues."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from PIL import Image as PILImage

from ..atomic_files import TEMPORARY, full_disk_message, remove_leftovers, write_atomically
from .datasets import load_segmentation_data, load_splits
from .labelled_pictures import LabelledPictures, rgb_picture
from .mask_pairs import pair_features
from .mining import MiningOptions, PairMiner

SETTINGS = "mining.json"
Progress = Callable[[Iterable], Iterable]


class MiningError(RuntimeError):
    """A result that could not be written; the message says what is left and what to do."""


class SourcePicture(NamedTuple):
    """An RGB picture, its captions, and its label map where it is needed."""

    image: PILImage.Image
    captions: list[str | None]
    label_map: np.ndarray | None


class SourcePictures:
    """The pictures of a split with what the options need of them.

    Args:
        data: folder or Hub id, see `load_segmentation_data`; label maps are read only where `options` need them.
        split: its split.
        options: what is mined.
        caption_column: column of strings or lists of strings; None: "captions", as prepared data sets have it, where
            there is one, else "caption".
        image_column: column of the pictures.
        loading: further arguments of `load_segmentation_data` (`class_names`, `ignore_index`, `reduce_labels`, ...).

    Raises:
        ValueError: no such split or column.
    """

    def __init__(
        self,
        data: str | Path,
        split: str,
        options: MiningOptions,
        caption_column: str | None = None,
        image_column: str = "image",
        **loading: Any,
    ) -> None:
        self.labelled: LabelledPictures | None = None
        if options.needs_annotation:
            self.labelled = load_segmentation_data(data, image_column=image_column, **loading).split(split)
            self.rows, self.image_column = self.labelled.rows, "image"
        else:
            splits = load_splits(data)
            if split not in splits:
                raise ValueError(f"{data} has no split {split!r}. It has: {', '.join(splits)}.")
            self.rows, self.image_column = splits[split], image_column
        if caption_column is None:
            caption_column = "captions" if "captions" in self.rows.column_names else "caption"
        self.caption_column = caption_column if options.nouns == "caption" else None
        for column in filter(None, (self.image_column, self.caption_column)):
            if column not in self.rows.column_names:
                raise ValueError(f"{data} has no column {column!r}. It has: {', '.join(self.rows.column_names)}.")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> SourcePicture:
        captions = [] if self.caption_column is None else self.rows[index][self.caption_column]
        captions = captions if isinstance(captions, list) else [captions]
        if self.labelled is not None:
            image, label_map = self.labelled[index]
            return SourcePicture(image, captions, label_map)
        return SourcePicture(rgb_picture(self.rows[index][self.image_column]), captions, None)

    @property
    def class_names(self) -> Sequence[str]:
        """Of the label maps' ids; none where they are not read."""
        return [] if self.labelled is None else self.labelled.data.vocabulary.labels


class MiningRun:
    """The folder of a run: `data/train-*.parquet`, which `load_dataset` reads, counts of each shard, and its settings.

    Args:
        output: the folder.
        settings: plain values that determine the result; a folder with other settings is refused.
        num_pictures: to be mined, from the first.
        shard_size: pictures per shard.

    Raises:
        ValueError: the folder holds a run with other settings, or something else.
    """

    def __init__(self, output: str | Path, settings: dict[str, Any], num_pictures: int, shard_size: int = 500) -> None:
        self.output = Path(output)
        self.num_pictures, self.shard_size = num_pictures, shard_size
        self.num_shards = -(-num_pictures // shard_size)
        self.settings = {**settings, "num_pictures": num_pictures, "shard_size": shard_size}

    def claim(self) -> None:
        """Make the folder this run's, or find that it is; one process does it before the others begin."""
        file = self.output / SETTINGS
        if file.is_file():
            other = json.loads(file.read_text(encoding="utf-8"))
            mine = json.loads(json.dumps(self.settings))
            if changed := sorted(key for key in {*other, *mine} if other.get(key) != mine.get(key)):
                raise ValueError(
                    f"{self.output} holds a run with other settings ({', '.join(changed)}): give another folder."
                )
        elif self.output.exists() and {item.name for item in self.output.iterdir()} - {SETTINGS + TEMPORARY}:
            raise ValueError(f"{self.output} is not empty and holds no mining run: give another folder.")
        self.output.mkdir(parents=True, exist_ok=True)
        # first: a folder with anything else and without it is not ours
        write_atomically(file, json.dumps(self.settings, indent=1) + "\n")
        for folder in (self.output / "data", self.output / "counts"):
            folder.mkdir(exist_ok=True)
            remove_leftovers(folder)

    def shard(self, number: int) -> Path:
        """The file of a shard."""
        return self.output / "data" / f"train-{number:05d}-of-{self.num_shards:05d}.parquet"

    def work(
        self,
        pictures: SourcePictures,
        miner: PairMiner,
        process: int = 0,
        num_processes: int = 1,
        progress: Progress = iter,
    ) -> None:
        """Mine this process's shards that are not there yet."""
        mine = [n for n in range(process, self.num_shards, num_processes) if not self.shard(n).is_file()]
        indices = [range(n * self.shard_size, min((n + 1) * self.shard_size, self.num_pictures)) for n in mine]
        steps = iter(progress([index for part in indices for index in part]))
        for number, part in zip(mine, indices, strict=True):
            counts, rows = Counter(), []
            for _ in part:
                index = next(steps)
                found = miner.mine(*pictures[index])
                counts.update(found.counts)
                rows += [{**pair, "picture": index} for pair in found.pairs]
            self._write(number, rows, counts)
        next(steps, None)  # lets a progress bar finish

    def _write(self, number: int, rows: list[dict[str, Any]], counts: Counter) -> None:
        features = pair_features()
        columns = {name: [row[name] for row in rows] for name in features}
        nouns = Counter(columns["noun"])
        summary = {"counts": dict(counts), "nouns": dict(nouns)}
        shard = self.shard(number)
        partial = shard.with_name(f".{shard.name}{TEMPORARY}")
        try:
            write_atomically(
                self.output / "counts" / f"{number:05d}.json", json.dumps(summary, ensure_ascii=False) + "\n"
            )
            Dataset.from_dict(columns, features=features).to_parquet(partial)
            partial.replace(shard)  # last: a shard that is there is complete, and so are its counts
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise MiningError(full_disk_message(shard, error)) from error

    def summary(self) -> dict[str, Any]:
        """Counts over all complete shards: pictures, captions, nouns, pairs, what gave none, and distinct nouns."""
        counts, nouns, done = Counter(), Counter(), 0
        for number in range(self.num_shards):
            if self.shard(number).is_file():
                found = json.loads((self.output / "counts" / f"{number:05d}.json").read_text(encoding="utf-8"))
                counts.update(found["counts"])
                nouns.update(found["nouns"])
                done += 1
        return {
            **dict(sorted(counts.items())),
            "distinct_nouns": len(nouns),
            "most_common_nouns": dict(nouns.most_common(20)),
            "shards": done,
            "shards_missing": self.num_shards - done,
        }


def settings_of(options: MiningOptions, **others: Any) -> dict[str, Any]:
    """What determines a run's result, as plain values; how many crops go through CLIP at once does not."""
    values = asdict(options)
    del values["crop_batch_size"]
    return {**values, **others}
