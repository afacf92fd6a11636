"""Does a model read the names? Mean IoU on scenes by tier, things and stuff apart, and floors beside it."""

from __future__ import annotations

import dataclasses
import random
import string
from collections.abc import Collection, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from ..data.labelled_pictures import LabelledPictures
from ..data.scene_vocabulary import TIERS, SceneVocabulary
from ..evaluation.prediction import evaluate
from ..metrics import ConfusionMatrix, SegmentationScores
from ..vocabulary import Vocabulary

FLOORS = ("shuffled", "random")


def evaluate_scenes(
    model: Any,
    processor: Any,
    pictures: LabelledPictures,
    scenes: SceneVocabulary,
    seed: int = 0,
    floors: Collection[str] = FLOORS[:1],
    distractors: Sequence[str] = (),
    synonyms: bool = False,
    **options: Any,
) -> dict[str, float]:
    """Figures of a model on scenes of all tiers, asked for all names.

    Args:
        pictures: `evaluation` of [`ov_segmentation.data.scene_folders.write_scenes`].
        scenes: the vocabulary that the scenes were made with.
        seed: of the permutation of names, and of names that mean nothing.
        floors: "shuffled": the names permuted among things and among stuff, which is what a model reaches that does not
            read them; "random": made-up words in the place of the names. A whole evaluation each.
        distractors: further names that are asked for, and that no scene shows; another protocol.
        synonyms: every class is asked for in two wordings, see [`with_synonyms`]; another protocol.
        options: for [`evaluate`].

    Returns:
        `{things,stuff}_{a,b,c}`: mean IoU over the classes of a tier; `hiou`: harmonic mean of tiers a and b + c, all
        classes; `miou`, `pixel_accuracy`; the same under `shuffled_` and `random_`. A class that no scene shows counts
        as 0 in its tier and in `hiou` if it is predicted (the recorded figures were measured so), and not in `miou`.
    """
    _check_names(pictures, scenes)
    if unknown := set(floors) - set(FLOORS):
        raise ValueError(f"floors are among {list(FLOORS)}, got {sorted(unknown)}.")
    accelerator = Accelerator()
    worded = with_synonyms if synonyms else list
    changed = bool(distractors) or synonyms
    wanted = _with_names(pictures, worded([*scenes.names, *distractors])) if changed else pictures
    figures = scene_figures(evaluate(model, processor, wanted, accelerator, **options), scenes)
    names = {"shuffled": shuffled_names, "random": meaningless_names}
    for floor in floors:
        asked = _with_names(pictures, worded([*names[floor](scenes, seed), *distractors]))
        found = scene_figures(evaluate(model, processor, asked, accelerator, **options), scenes)
        figures |= {f"{floor}_{name}": value for name, value in found.items()}
    return figures


def majority_floor(pictures: LabelledPictures, scenes: SceneVocabulary) -> dict[str, float]:
    """Figures of the answer that every pixel is of the class with the most pixels of these pictures.

    As [`evaluate_scenes`] has them; who does not read the names scores the same when they are shuffled.
    """
    _check_names(pictures, scenes)
    counts = torch.zeros(len(scenes.names), dtype=torch.int64)
    for picture in (pictures[index] for index in range(len(pictures))):
        counts += torch.bincount(torch.from_numpy(picture.label_map).flatten(), minlength=len(counts))
    most = int(counts.argmax())
    matrix = ConfusionMatrix(len(counts))
    matrix.counts[:, most] = counts
    figures = scene_figures(matrix.compute(), scenes)
    return figures | {f"shuffled_{name}": value for name, value in figures.items()}


def shuffled_names(scenes: SceneVocabulary, seed: int) -> list[str]:
    """The names, permuted among things and among stuff."""
    generator = random.Random(seed)
    things, stuff = list(scenes.things), list(scenes.stuff)
    generator.shuffle(things)
    generator.shuffle(stuff)
    return things + stuff


def meaningless_names(scenes: SceneVocabulary, seed: int) -> list[str]:
    """As many different names as there are classes, each of as many made-up words as the name that it replaces has."""
    generator, names = random.Random(seed), []
    while len(names) < len(scenes.names):
        words = len(scenes.names[len(names)].split())
        name = " ".join("".join(generator.choices(string.ascii_lowercase, k=6)) for _ in range(words))
        if name not in names:
            names.append(name)
    return names


def with_synonyms(names: Sequence[str]) -> list[list[str]]:
    """Every name with a second wording that no caption of scenes has: its first two words the other way round."""
    return [[name, " ".join([*name.split()[1::-1], *name.split()[2:]])] for name in names]


def absent_names(scenes: SceneVocabulary, count: int, seed: int) -> list[str]:
    """Names of the full vocabulary that `scenes` has not: things of another shape, colour or pattern.

    Raises:
        ValueError: there are not so many.
    """
    others = [name for name in SceneVocabulary.full().names if name not in set(scenes.names)]
    if count > len(others):
        raise ValueError(f"The full vocabulary has {len(others)} names more than this one, {count} are asked for.")
    return random.Random(seed).sample(others, count)


def scene_figures(scores: SegmentationScores, scenes: SceneVocabulary) -> dict[str, float]:
    """Means over the classes of each tier, see [`evaluate_scenes`]."""

    def mean(tiers: tuple[str, ...], kind: str) -> float:
        values = scores.iou_per_class[scenes.classes_of(tiers, kind)]
        return float(values.nanmean())

    figures = {f"{kind}_{tier}": mean((tier,), kind) for kind in ("things", "stuff") for tier in TIERS}
    seen, unseen = mean(("a",), "all"), mean(("b", "c"), "all")
    figures["hiou"] = 2 * seen * unseen / (seen + unseen) if seen + unseen else 0.0
    return figures | {"miou": scores.miou, "pixel_accuracy": scores.pixel_accuracy}


def _check_names(pictures: LabelledPictures, scenes: SceneVocabulary) -> None:
    if pictures.data.vocabulary.labels != list(scenes.names):
        raise ValueError(
            f"These pictures have {len(pictures.data.vocabulary)} class names that are not the {len(scenes.names)} of "
            f"the scene vocabulary: evaluate on the folder 'evaluation' that examples/make_scenes.py writes, with the "
            f"same --vocabulary."
        )


def _with_names(pictures: LabelledPictures, names: Sequence[str | list[str]]) -> LabelledPictures:
    data = dataclasses.replace(pictures.data, vocabulary=Vocabulary(names))
    return LabelledPictures(data, pictures.split, pictures.rows)
