"""Synthetic scenes as a Hugging Face dataset, in the form in which users' own data comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from .scene_vocabulary import SceneVocabulary
from .scenes import BLOCK, REFERENCE_SIZE, SceneGenerator

PICTURE_FORMAT = "BMP"
"""Scenes are noisy: PNG makes them smaller by a quarter, and their reading, a third of a small model's step, slow."""


def scenes_dataset(
    num: int,
    seed: int = 0,
    tiers: Sequence[str] = ("a", "b", "c"),
    vocabulary: SceneVocabulary | None = None,
    size: int = REFERENCE_SIZE,
    geometry: str = "easy",
    difficulty: str = "standard",
    name_tiers_only: bool = False,
    **dataset_options: Any,
) -> Any:
    """Scenes as a Hugging Face `datasets.Dataset`, as any user's data would come.

    Columns: `image` (see `PICTURE_FORMAT`), `annotation` (PNG of class indices; 16 bit where the vocabulary has more
    than 255 classes), `file_name`, `classes` (indices of the classes in the picture; its feature holds the names, see
    [`ov_segmentation.data.class_names`]) and `caption`.

    Args:
        num: number of scenes.
        seed, tiers, size, geometry, difficulty: as for [`SceneGenerator`].
        vocabulary: default [`SceneVocabulary.small`].
        name_tiers_only: the class names (and indices) are those of `tiers` and no others: training must not meet the
            names of the other tiers, not even as wrong answers.
        dataset_options: passed to `Dataset.from_generator` (`cache_dir`, `writer_batch_size`, ...).
    """
    from datasets import Dataset, Value

    from .class_names import segmentation_features

    vocabulary = vocabulary or SceneVocabulary.small()
    classes = vocabulary.classes_of(tiers) if name_tiers_only else list(range(len(vocabulary.names)))
    options = {
        "num": num,
        "seed": seed,
        "tiers": tuple(tiers),
        "vocabulary": vocabulary,
        "size": size,
        "geometry": geometry,
        "difficulty": difficulty,
        "classes": tuple(classes),  # not a list, which `from_generator` would take for shards
        "picture_format": PICTURE_FORMAT,  # given, so that scenes in the cache are of this format too
    }
    features = segmentation_features([vocabulary.names[index] for index in classes], caption=Value("string"))
    return Dataset.from_generator(_scene_rows, features=features, gen_kwargs=options, **dataset_options)


def _scene_rows(
    num: int,
    seed: int,
    tiers: tuple[str, ...],
    vocabulary: SceneVocabulary,
    size: int,
    geometry: str,
    difficulty: str,
    classes: tuple[int, ...],
    picture_format: str,
) -> Iterator[dict[str, Any]]:
    generator = SceneGenerator(vocabulary, size=size, seed=seed, tiers=tiers, geometry=geometry, difficulty=difficulty)
    map_type = np.uint8 if len(classes) <= 255 else np.uint16
    numbers = np.full(len(vocabulary.names), -1, dtype=np.int32)
    numbers[list(classes)] = np.arange(len(classes))
    number = 0
    for batch in generator.batches(BLOCK, num):
        images = batch.images.permute(0, 2, 3, 1).numpy()
        maps = numbers[batch.label_maps.numpy()].astype(map_type)
        for image, label_map, caption in zip(images, maps, batch.captions, strict=True):
            yield {
                "image": _encoded(image, picture_format),
                "annotation": label_map,
                "file_name": f"scene_{'-'.join(tiers)}_{seed}_{number:06d}.{picture_format.lower()}",
                "classes": np.unique(label_map).tolist(),
                "caption": caption,
            }
            number += 1


def _encoded(image: np.ndarray, picture_format: str) -> dict[str, Any]:
    """A picture `[H, W, 3]` as the feature `Image` stores it."""
    file = BytesIO()
    Image.fromarray(image).save(file, format=picture_format)
    return {"path": None, "bytes": file.getvalue()}
