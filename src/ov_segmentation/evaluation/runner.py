"""One benchmark: every picture once, counted, on the disk, summed over processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from ..data.benchmarks import EvaluationProtocol
from ..data.labelled_pictures import LabelledPictures, LabelledStream, SegmentationData
from ..metrics import ConfusionMatrix
from ..proposal_recall import ProposalScores
from ..text_encoding import hash_tensors
from .oracle import Oracle, with_oracle_classes, with_oracle_masks
from .pictures import PictureShare, PictureStream
from .prediction import predictions
from .proposals import count_proposals
from .state import EvaluationError, EvaluationState, Record

PLAIN = "plain"


@dataclass(frozen=True)
class Counts:
    """What an evaluation counted.

    Attributes:
        matrices: by mode: "plain" and the oracles.
        pictures: how many.
        seconds: spent on them, summed over processes and over the pieces of an interrupted run.
        proposals: by definition and threshold, see `proposals.count_proposals`; empty where not asked for.
    """

    matrices: dict[str, ConfusionMatrix]
    pictures: int
    seconds: float
    proposals: dict[str, ProposalScores] = field(default_factory=dict)


def weights_digest(model: Any) -> str:
    """Which weights a model has."""
    return hash_tensors(tensor for _, tensor in sorted(model.state_dict().items()))[:16]


@torch.no_grad()
def count_pixels(
    model: Any,
    processor: Any,
    protocol: EvaluationProtocol,
    data: SegmentationData,
    accelerator: Accelerator,
    folder: Path,
    *,
    place: str,
    columns: Mapping[str, Any] | None = None,
    oracles: Sequence[Oracle] = (),
    proposal_recall: bool = False,
    streaming: bool = False,
    max_samples: int | None = None,
    num_workers: int = 0,
    restart: bool = False,
    text_cache: str | None = None,
    progress: Callable[[Any, int | None, int], Any] = lambda loader, total, done: loader,
) -> Counts:
    """Run a model over a benchmark's split; every process calls it.

    Args:
        model: in evaluation mode, on the accelerator's device, not wrapped.
        folder: of this evaluation; what it holds of the same one is not done again.
        place, columns: where the data set came from and how it was read, to recognise the evaluation by.
        oracles: also count with perfect masks or perfect names.
        proposal_recall: also count proposals that fit, see `proposals.count_proposals`.
        max_samples: only the first so many pictures.
        num_workers: processes that read pictures, per process.
        restart: forget what `folder` holds.
        text_cache: folder for text embeddings.
        progress: wraps the loader, given this process's number of pictures (None: unknown) and of those done before.

    Raises:
        ValueError: no such split, or an empty one; nothing has been written then.
        EvaluationError: `folder` holds another evaluation; pictures were lost (a stream that changed).
    """
    modes = (PLAIN, *oracles)
    # first of all: a split that is not there shall claim no folder, nor empty one
    split = data.stream(protocol.split) if streaming else data.split(protocol.split, max_samples)
    state = EvaluationState(folder, accelerator.process_index)
    before: dict[int, Record] = {}
    if accelerator.is_main_process:
        if restart:
            state.remove()
        before = state.open(_identity(model, protocol, place, columns, modes, proposal_recall, max_samples))
    accelerator.wait_for_everyone()
    done = set(broadcast_object_list([sorted(before)])[0])
    share, total = _share(processor, protocol, split, accelerator, done, max_samples)
    if isinstance(share, PictureShare):
        _check_names(before, share)
    matrices = {mode: ConfusionMatrix(len(protocol.class_names)) for mode in modes}
    mine = []
    for record in _records(
        model,
        processor,
        protocol,
        share,
        accelerator.device,
        modes,
        proposal_recall,
        num_workers,
        text_cache,
        lambda loader: progress(loader, len(share) if isinstance(share, PictureShare) else None, len(done)),
    ):
        state.append(record)
        record.add_to(matrices)
        mine.append((record.index, record.seconds, record.proposals))
    return _gather(accelerator, matrices, mine, before.values(), total)


def _identity(
    model: Any,
    protocol: EvaluationProtocol,
    place: str,
    columns: Mapping[str, Any] | None,
    modes: Sequence[str],
    proposal_recall: bool,
    max_samples: int | None,
) -> dict[str, Any]:
    """What an evaluation is recognised by when it goes on."""
    identity = {
        "protocol": protocol.id,
        "model": weights_digest(model),
        "data": str(Path(place).resolve()) if Path(place).is_dir() else place,
        "modes": list(modes),
        "max_samples": max_samples,
    }
    if proposal_recall:
        identity["proposal_recall"] = True
    if columns:
        identity["columns"] = dict(columns)
    return identity


def _records(
    model: Any,
    processor: Any,
    protocol: EvaluationProtocol,
    share: PictureShare | PictureStream,
    device: torch.device,
    modes: Sequence[str],
    proposal_recall: bool,
    num_workers: int,
    text_cache: str | None,
    progress: Callable[[Any], Any],
) -> Iterator[Record]:
    """Predict and count this process's pictures, one after the other."""
    if isinstance(share, PictureShare) and not len(share):
        return
    text = processor(text=protocol.vocabulary, return_tensors="pt").to(device)
    text_embeds = model.encode_vocabulary(**text, cache_folder=text_cache)
    start = time.perf_counter()
    for sample, outputs in predictions(
        model,
        text_embeds,
        share,
        device,
        switches=protocol.switches,
        num_workers=num_workers,
        progress=progress,
    ):
        maps = _maps(outputs, sample.label_map, processor, protocol, modes)
        matrices = {mode: ConfusionMatrix(len(protocol.class_names)) for mode in modes}
        for mode, label_map in maps.items():
            matrices[mode].update(label_map, sample.label_map)
        proposals = {}
        if proposal_recall:
            proposals = count_proposals(outputs, maps[PLAIN], sample.label_map, protocol.seen)
        now = time.perf_counter()
        record = Record.of(sample.index, sample.name, now - start, matrices, proposals)
        start = now
        yield record


def _gather(
    accelerator: Accelerator,
    matrices: dict[str, ConfusionMatrix],
    mine: list[tuple[int, float, dict[str, dict[str, int]]]],
    before: Collection[Record],
    total: int | None,
) -> Counts:
    """The sum over processes and what was counted before, if each picture is in it once.

    Args:
        matrices: of this process's pictures.
        mine: index, seconds and proposals of each of them.
        before: of the main process.
        total: number of pictures; None: unknown.
    """
    everyone = gather_object(mine)
    matrices = {mode: matrix.reduce(accelerator) for mode, matrix in matrices.items()}
    for record in before:
        record.add_to(matrices)
    indices = [*(record.index for record in before), *(index for index, _, _ in everyone)]
    if accelerator.is_main_process and (
        sorted(indices) != list(range(len(indices))) or len(indices) != (total or len(indices))
    ):
        raise EvaluationError(
            f"{len(indices)} results for {total or 'an unknown number of'} pictures: the data set changed during the "
            f"evaluation. --resume never starts anew."
        )
    seconds = sum(record.seconds for record in before) + sum(seconds for _, seconds, _ in everyone)
    found = [*(record.proposals for record in before), *(proposals for _, _, proposals in everyone)]
    return Counts(matrices, len(indices), seconds, _sum_proposals(found))


def _sum_proposals(found: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, ProposalScores]:
    total: dict[str, ProposalScores] = {}
    for picture in found:
        for name, counts in picture.items():
            total.setdefault(name, ProposalScores())
            total[name] += ProposalScores(**counts)
    return total


def _share(
    processor: Any,
    protocol: EvaluationProtocol,
    split: LabelledPictures | LabelledStream,
    accelerator: Accelerator,
    done: set[int],
    max_samples: int | None,
) -> tuple[PictureShare | PictureStream, int | None]:
    """Pictures of this process, and how many the split has (None: a stream does not say)."""
    process, num_processes = accelerator.process_index, accelerator.num_processes
    short_side = protocol.annotation_short_side
    if isinstance(split, LabelledStream):
        share = PictureStream(split, processor.image_processor, done, process, num_processes, short_side, max_samples)
        return share, None
    rest = [index for index in range(len(split)) if index not in done]
    share = PictureShare(split, processor.image_processor, rest[process::num_processes], short_side)
    return share, len(split)


def _check_names(before: Mapping[int, Record], share: PictureShare) -> None:
    for record in before.values():
        if record.index >= len(share.pictures) or record.name != share.pictures.file_name(record.index):
            raise EvaluationError(
                f"Picture {record.index} was {record.name} when this evaluation began: the data set has changed. "
                f"--resume never starts anew."
            )


def _maps(
    outputs: Any, label_map: torch.Tensor, processor: Any, protocol: EvaluationProtocol, modes: Sequence[str]
) -> Mapping[str, torch.Tensor]:
    """Per mode the map of predicted label ids `[H, W]`."""
    size = [tuple(label_map.shape)]
    prediction = processor.post_process_semantic_segmentation(outputs, target_sizes=size)[0].cpu()
    label_of_class = torch.tensor(protocol.label_of_class)
    maps = {PLAIN: label_of_class[prediction]}
    if "masks" in modes:
        names = with_oracle_masks(outputs, label_map, processor.image_processor.resizes_mask_logits)
        maps["masks"] = torch.where(names >= 0, label_of_class[names.clamp(min=0)], names)
    if "classes" in modes:
        maps["classes"] = with_oracle_classes(prediction, label_map, label_of_class)
    return maps
