"""Does a model read the names? Mean IoU on scenes by tier, things and stuff apart, and with the names shuffled."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from accelerate import Accelerator

from ..data.labelled_pictures import LabelledPictures
from ..data.scene_vocabulary import TIERS, SceneVocabulary
from ..evaluation.prediction import evaluate
from ..metrics import SegmentationScores
from ..vocabulary import Vocabulary


def evaluate_scenes(
    model: Any, processor: Any, pictures: LabelledPictures, scenes: SceneVocabulary, seed: int = 0, **options: Any
) -> dict[str, float]:
    """Figures of a model on scenes of all tiers, asked for all names.

    Args:
        pictures: `evaluation` of [`ov_segmentation.data.scene_folders.write_scenes`].
        scenes: the vocabulary that the scenes were made with.
        seed: of the permutation of names.
        options: for [`evaluate`].

    Returns:
        `{things,stuff}_{a,b,c}`: mean IoU over the classes of a tier; `hiou`: harmonic mean of tiers a and b + c, all
        classes; `miou`, `pixel_accuracy`; the same under `shuffled_` with the names permuted among things and among
        stuff: what a model reaches that does not read them.
    """
    if pictures.data.vocabulary.labels != list(scenes.names):
        raise ValueError(
            f"These pictures have {len(pictures.data.vocabulary)} class names that are not the {len(scenes.names)} of "
            f"the scene vocabulary: evaluate on the folder 'evaluation' that examples/make_scenes.py writes, with the "
            f"same --vocabulary."
        )
    accelerator = Accelerator()
    figures = _figures(evaluate(model, processor, pictures, accelerator, **options), scenes)
    shuffled = _with_names(pictures, _shuffled(scenes, seed))
    floor = _figures(evaluate(model, processor, shuffled, accelerator, **options), scenes)
    return figures | {f"shuffled_{name}": value for name, value in floor.items()}


def _shuffled(scenes: SceneVocabulary, seed: int) -> list[str]:
    generator = random.Random(seed)
    things, stuff = list(scenes.things), list(scenes.stuff)
    generator.shuffle(things)
    generator.shuffle(stuff)
    return things + stuff


def _with_names(pictures: LabelledPictures, names: list[str]) -> LabelledPictures:
    data = dataclasses.replace(pictures.data, vocabulary=Vocabulary(names))
    return LabelledPictures(data, pictures.split, pictures.rows)


def _figures(scores: SegmentationScores, scenes: SceneVocabulary) -> dict[str, float]:
    def mean(tiers: tuple[str, ...], kind: str) -> float:
        values = scores.iou_per_class[scenes.classes_of(tiers, kind)]
        return float(values.nanmean())

    figures = {f"{kind}_{tier}": mean((tier,), kind) for kind in ("things", "stuff") for tier in TIERS}
    seen, unseen = mean(("a",), "all"), mean(("b", "c"), "all")
    figures["hiou"] = 2 * seen * unseen / (seen + unseen) if seen + unseen else 0.0
    return figures | {"miou": scores.miou, "pixel_accuracy": scores.pixel_accuracy}
