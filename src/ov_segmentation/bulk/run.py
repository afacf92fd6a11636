"""A bulk run: parts are shared between processes, written as they are done, and not done again."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import DataLoader, Dataset

from ..atomic_files import TEMPORARY, remove_leftovers, write_atomically
from ..cli_options import check_switches
from ..vocabulary import Vocabulary, resolve_background
from .pictures import Pictures, upright
from .results import BulkError, Results, Segmented, write_classes

SETTINGS_FILE, REPORT_FILE = "settings.json", "report.json"


@dataclass(frozen=True)
class Segmentation:
    """How pictures are segmented.

    Args:
        vocabulary: the class names.
        background: see `post_process_semantic_segmentation`; default: the vocabulary's own.
        threshold: confidence below which a pixel is unlabelled.
        switches: inference switches of the model's `forward`.
    """

    vocabulary: Vocabulary
    background: Any = None
    threshold: float | None = None
    switches: Mapping[str, Any] = field(default_factory=dict)

    def check(self, model: Any) -> None:
        """Find mistakes before anything is written.

        Raises:
            ValueError: a background that the vocabulary does not have, or a switch that the model does not have.
        """
        _ = self.background_classes
        check_switches(model, self.switches)

    @property
    def _background(self) -> Any:
        return self.vocabulary.background if self.background is None else self.background

    @property
    def background_classes(self) -> Any:
        """The background as `post_process_semantic_segmentation` takes it."""
        return resolve_background(self._background, self.vocabulary.labels)

    def settings(self) -> dict[str, Any]:
        """Plain values that tell one way of segmenting from another."""
        return {
            "labels": self.vocabulary.synonyms,
            "background": self._background,
            "threshold": self.threshold,
            "switches": dict(self.switches),
        }


@dataclass(frozen=True)
class BulkReport:
    """What a run did.

    Attributes:
        pictures: how many there are.
        before: how many of them an earlier, interrupted run had done.
        problems: `{"picture": name, "problem": reason}` of those that could not be segmented.
        seconds: of this run, wall clock.
    """

    pictures: int
    before: int
    problems: list[dict[str, str]]
    seconds: float


class BulkFolder:
    """The folder of a run, which belongs to one way of segmenting.

    Args:
        path: the folder.
        settings: plain values that determine the results.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))

    def claim(self, vocabulary: Vocabulary, resume: bool = True) -> None:
        """Make the folder this run's, or find that it is; one process does it before the others begin.

        Raises:
            BulkError: it holds results of other settings, or something else.
        """
        file = self.path / SETTINGS_FILE
        if self.path.exists() and not self.path.is_dir():
            raise BulkError(f"{self.path} is a file; give a folder with --output.")
        if file.is_file():
            other = json.loads(file.read_text(encoding="utf-8"))
            changed = sorted(key for key in {*other, *self.settings} if other.get(key) != self.settings.get(key))
            if not resume:
                self._empty()
            elif changed:
                raise BulkError(
                    f"{self.path} holds results of another {', '.join(changed)}. Give another --output, or "
                    f"--resume never to replace them."
                )
        elif self.path.is_dir() and {item.name for item in self.path.iterdir()} - {SETTINGS_FILE + TEMPORARY}:
            raise BulkError(f"{self.path} is not empty and holds no run of this command: give another --output.")
        self.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path)
        write_atomically(file, json.dumps(self.settings, ensure_ascii=False, indent=1) + "\n")
        write_classes(self.path, vocabulary)

    def _empty(self) -> None:
        """Remove everything but the settings: after a kill the folder is still known as a run's."""
        for item in self.path.iterdir():
            if item.is_dir():
                shutil.rmtree(item)
            elif item.name != SETTINGS_FILE:
                item.unlink()

    def write_report(self, report: BulkReport) -> None:
        """Write `report.json`."""
        write_atomically(self.path / REPORT_FILE, json.dumps(vars(report), ensure_ascii=False, indent=1) + "\n")


def segment_pictures(
    model: Any,
    processor: Any,
    pictures: Pictures,
    segmentation: Segmentation,
    results: Results,
    process: int = 0,
    num_processes: int = 1,
    num_workers: int = 0,
    text_cache: str | os.PathLike | None = None,
    progress: Callable[[Iterable, int, int], Iterable] = lambda items, total, done: items,
) -> BulkReport:
    """Segment every picture whose part is not written; every process calls it, after one has claimed the folder.

    Pictures go through the model one by one, so that no result depends on another picture's size. One that cannot be
    read is noted and left out.

    Args:
        model: in evaluation mode, on its device.
        processor: the model's.
        pictures: what to segment.
        segmentation: how.
        results: where to.
        process, num_processes: this process's index, and how many there are.
        num_workers: processes that read and prepare pictures, per process.
        text_cache: folder for text embeddings.
        progress: wraps the pictures, given how many this process has and how many were done before.

    Raises:
        BulkError: a file could not be written.
        ValueError: a background or switch that the model does not have.
    """
    start = time.perf_counter()
    # the main process looks: another one might already see what a third has written meanwhile
    done = [part for part in range(len(results.parts)) if results.is_done(part)] if process == 0 else None
    done = set(broadcast_object_list([done])[0]) if num_processes > 1 else set(done)
    mine = [part for part in range(len(results.parts)) if part not in done][process::num_processes]
    before = sum(len(results.parts[part]) for part in done)
    own = list(
        _segment(model, processor, pictures, segmentation, results, mine, num_workers, text_cache, progress, before)
    )
    if process == 0:
        own += [problem for part in sorted(done) for problem in results.problems(part)]
    everyone = gather_object(own) if num_processes > 1 else own
    problems = sorted(everyone, key=lambda entry: entry["picture"])
    return BulkReport(len(pictures.names), before, problems, round(time.perf_counter() - start, 1))


def _segment(
    model: Any,
    processor: Any,
    pictures: Pictures,
    segmentation: Segmentation,
    results: Results,
    parts: Sequence[int],
    num_workers: int,
    text_cache: str | os.PathLike | None,
    progress: Callable[[Iterable, int, int], Iterable],
    before: int,
) -> Iterator[dict[str, str]]:
    """Write some parts; gives their problems."""
    if not parts:
        return
    vocabulary = segmentation.vocabulary
    text = processor(text=vocabulary, return_tensors="pt").to(model.device)
    with torch.no_grad():
        text_embeds = model.encode_vocabulary(**text, cache_folder=text_cache)
    indices = [index for part in parts for index in results.parts[part]]
    loader = DataLoader(_Reader(pictures, processor.image_processor, indices), batch_size=None, num_workers=num_workers)
    read = iter(progress(loader, len(indices), before))
    for part in parts:
        found = []
        for _ in results.parts[part]:
            one, inputs = next(read)
            if inputs is not None:
                one = _segment_one(model, processor, one, inputs, text_embeds, segmentation)
            found.append(results.pack(one))
            if one.problem is not None:
                yield {"picture": one.name, "problem": one.problem}
        results.write(part, found)
    next(read, None)  # lets a progress bar finish


@torch.no_grad()
def _segment_one(
    model: Any,
    processor: Any,
    one: Segmented,
    inputs: Mapping[str, torch.Tensor],
    text_embeds: torch.Tensor,
    segmentation: Segmentation,
) -> Segmented:
    moved = {key: value.to(model.device) for key, value in inputs.items()}
    size = [(one.picture.height, one.picture.width)]
    try:
        outputs = model(**moved, text_embeds=text_embeds, **segmentation.switches)
        found = processor.post_process_semantic_segmentation(
            outputs,
            target_sizes=size,
            background=segmentation.background_classes,
            threshold=segmentation.threshold,
        )[0]
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        problem = f"{size[0][1]} x {size[0][0]} pixels need more memory than the device has ({error})"
        return Segmented(one.index, one.name, problem=problem)
    return Segmented(one.index, one.name, found.cpu().numpy(), one.picture, one.encoded)


class _Reader(Dataset):
    """Pictures with the model's inputs, or with what is wrong with them."""

    def __init__(self, pictures: Pictures, image_processor: Any, indices: Sequence[int]) -> None:
        self.pictures, self.image_processor, self.indices = pictures, image_processor, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Segmented, dict[str, torch.Tensor] | None]:
        index = self.indices[position]
        name = self.pictures.names[index]
        try:
            encoded = self.pictures.encoded(index)
            picture = upright(encoded)
            inputs = dict(self.image_processor(picture, return_tensors="pt"))
        except (OSError, ValueError, TypeError) as error:
            return Segmented(index, name, problem=str(error)), None
        return Segmented(index, name, None, picture, encoded), inputs
