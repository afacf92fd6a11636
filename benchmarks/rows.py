"""What `speed.py` measures: published base sizes with random weights, one picture each, and what the originals need.

A row is a size, a number of classes and a precision. Random weights would decide how many crops and classes a method
looks at: `forced` says it instead, as the comparison with the originals has it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import SamConfig

from ov_segmentation import AutoModelForOpenVocabularySegmentation
from ov_segmentation.auto import METHODS, load_class
from ov_segmentation.models.cat_seg.configuration_cat_seg import CATSegConfig
from ov_segmentation.models.deop.configuration_deop import DeOPConfig
from ov_segmentation.models.deop.plain_clip import TRAINING_FREE
from ov_segmentation.models.esc_net.configuration_esc_net import ESCNetConfig
from ov_segmentation.models.ovseg.convert_ovseg import VARIANTS, image_processor_values
from ov_segmentation.models.san.configuration_san import SANConfig
from ov_segmentation.models.sed import chunks, decoder
from ov_segmentation.models.sed.configuration_sed import SEDConfig

METHOD_BY_TYPE = {method.model_type: method for method in METHODS}
CLASSES = (20, 150, 847)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """A method at a published size, on one picture.

    Args:
        title: what tables call it.
        config: makes its configuration.
        picture: (height, width) of the picture, and of its label map.
        image_processor: values that differ from the method's own.
        switches: of `forward`.
        crops: proposals that are not empty (OVSeg, SimBaseline).
        keeps_classes: as many classes stay as `kept_classes` says (SED with early rejection).
        original_units: number of classes -> seconds of the original, float32, in units.
        original_gigabytes: number of classes -> peak memory of the original.
        target: share of the original's units.
        classes: numbers of classes that it is measured with unless told otherwise.
    """

    title: str
    config: Callable[[], Any]
    picture: tuple[int, int]
    image_processor: Mapping[str, Any] = field(default_factory=dict)
    switches: Mapping[str, Any] = field(default_factory=dict)
    crops: int | None = None
    keeps_classes: bool = False
    original_units: Mapping[int, float] = field(default_factory=dict)
    original_gigabytes: Mapping[int, float] = field(default_factory=dict)
    target: float | None = None
    classes: Sequence[int] = CLASSES


def ovseg_config() -> Any:
    """The published size around ResNet-101c and ViT-B/16."""
    return VARIANTS["ovseg_R101c_vitB16_ft_mpt"]()


def simbaseline_config() -> Any:
    """SimBaseline's only size."""
    return VARIANTS["simbaseline_coco156"]()


SLIDING = {"sliding_window": True}

SIZES = {
    "san": Size(
        "SAN ViT-B/16",
        SANConfig,
        (640, 640),
        original_units={150: 0.70, 847: 1.03},
        original_gigabytes={150: 2.2, 847: 4.4},
        target=0.6,
    ),
    "deop": Size(
        "DeOP R101c + ViT-B/16",
        DeOPConfig,
        (480, 640),
        original_units={150: 1.37, 847: 2.14},
        original_gigabytes={150: 2.6, 847: 5.2},
        target=0.9,
    ),
    "ovseg-20": Size(
        "OVSeg R101c + ViT-B/16, 20 crops",
        ovseg_config,
        (512, 683),
        crops=20,
        original_units={150: 2.41},
        original_gigabytes={150: 2.4},
        target=0.85,
    ),
    "ovseg-100": Size(
        "OVSeg R101c + ViT-B/16, 100 crops",
        ovseg_config,
        (512, 683),
        crops=100,
        original_units={150: 12.5},
        original_gigabytes={150: 3.5},
        target=0.85,
        classes=(150,),
    ),
    "simbaseline-20": Size(
        "SimBaseline, 20 crops",
        simbaseline_config,
        (480, 640),
        crops=20,
        original_units={150: 2.95},
        original_gigabytes={150: 3.1},
        classes=(150,),
    ),
    "simbaseline-100": Size("SimBaseline, 100 crops", simbaseline_config, (480, 640), crops=100, classes=(150,)),
    "sed": Size(
        "SED ConvNeXt-B, all classes",
        SEDConfig,
        (768, 768),
        original_units={150: 8.73},
        original_gigabytes={150: 4.5},
        target=0.45,
    ),
    "sed-top8": Size(
        "SED ConvNeXt-B, top 8",
        SEDConfig,
        (768, 768),
        switches={"rejection_top_k": 8},
        keeps_classes=True,
        original_units={150: 2.34, 847: 6.84},
        original_gigabytes={150: 2.9, 847: 5.7},
        target=0.7,
    ),
    "cat_seg": Size(
        "CAT-Seg ViT-B/16",
        CATSegConfig,
        (384, 384),
        original_units={150: 4.6, 847: 6.2},
        original_gigabytes={150: 2.1},
        target=0.6,
    ),
    "cat_seg-sliding": Size(
        "CAT-Seg ViT-B/16, 5 views",
        CATSegConfig,
        (640, 640),
        switches=SLIDING,
        original_units={150: 25.0},
        original_gigabytes={150: 6.5},
        target=0.5,
        classes=(150,),
    ),
    "cat_seg-all": Size("CAT-Seg ViT-B/16, all classes", CATSegConfig, (384, 384), switches={"max_classes": None}),
    "esc_net": Size("ESC-Net ViT-B/16", ESCNetConfig, (384, 384)),
    "esc_net-sliding": Size("ESC-Net ViT-B/16, 5 views", ESCNetConfig, (640, 640), switches=SLIDING),
    "deop-patches": Size(
        "DeOP without training, patches", lambda: DeOPConfig(proposals="none", **TRAINING_FREE), (480, 640),
        {"pad_multiple": None},
    ),
    "deop-sam": Size(
        "DeOP without training, SAM's masks",
        # random scores: every mask is computed, which is the most that SAM does, and none is kept
        lambda: DeOPConfig(
            proposals="sam",
            sam_config=SamConfig(),
            sam_score_threshold=-1000.0,
            sam_stability_threshold=2.0,
            **TRAINING_FREE,
        ),
        (480, 640),
        {"pad_multiple": None},
    ),
}  # fmt: skip
# minutes a picture, or no row of the comparison
EXTRA_SIZES = ("cat_seg-all", "esc_net-sliding", "deop-patches", "deop-sam")


def build(
    name: str,
    classes: int,
    dtype: str,
    picture: tuple[int, int] | None = None,
    batch: int = 1,
    config: Mapping[str, Any] | None = None,
    image_processor: Mapping[str, Any] | None = None,
) -> tuple[Any, Any, list[np.ndarray], torch.Tensor]:
    """The model of a size, its image processor, random pictures, and random class embeddings.

    Args:
        name: of `SIZES`.
        classes: K.
        dtype: of `DTYPES`.
        picture: another (height, width).
        batch: number of pictures.
        config, image_processor: other values.
    """
    size = SIZES[name]
    torch.manual_seed(0)
    made = size.config()
    for field_name, value in (config or {}).items():
        setattr(made, field_name, value)
    made.validate()
    values = image_processor_values(made) if made.model_type == "ovseg" else {}
    values |= {**size.image_processor, **(image_processor or {})}
    model = AutoModelForOpenVocabularySegmentation.from_config(made, dtype=DTYPES[dtype]).eval()
    processor = load_class(METHOD_BY_TYPE[made.model_type].image_processor)(**values)
    shape = (batch, *(picture or size.picture), 3)
    pictures = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return model, processor, list(pictures), random_text(model, classes)


def random_text(model: Any, classes: int) -> torch.Tensor:
    """Normalised embeddings as `model.encode_vocabulary` returns them."""
    prompts = (model.config.num_templates,) if model.keeps_prompts else ()
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(classes, *prompts, model.embedding_size, generator=generator)
    # in place, here and below: what a process needs at its peak must be the model's
    return text.div_(text.norm(dim=-1, keepdim=True)).to(model.dtype)


def like_trained(outputs: Any) -> Any:
    """The outputs, whose masks and class scores become such as trained models have them, in place of random ones.

    Random weights give every query nearly the same mask and classes, so that next to no class could win a pixel and
    label maps cost nothing: here each query has a region of its own, with soft borders, and classes of its own. The
    maps of the per-class family, which hardly differ from each other either, so that every class could win everywhere,
    get a region for each class that the model kept.
    """
    if outputs.logits is not None:
        for row, logits in enumerate(outputs.logits):
            kept = torch.arange(len(logits)) if outputs.kept_classes is None else outputs.kept_classes[row].nonzero()
            shape = (kept.numel(), *logits.shape[1:])
            logits.index_copy_(0, kept.flatten(), drawn_regions(shape, 60.0, 8.0, 12.0, logits.dtype))
        return outputs
    masks, generator = outputs.masks_queries_logits, torch.Generator().manual_seed(0)
    # proposals of a random SAM: there may be none that pass its filters, and then there is nothing to give a region
    if masks is None or masks.shape[1] < 2:
        return outputs
    masks.copy_(drawn_regions(tuple(masks.shape[1:]), 200.0, 20.0, 20.0, masks.dtype))
    scores = outputs.class_queries_scores
    peaked = (4 * torch.randn(scores.shape, generator=generator)).softmax(-1)
    outputs.class_queries_scores = peaked.to(scores.dtype)
    return outputs


@functools.cache  # what is timed must not contain it
def drawn_regions(
    shape: tuple[int, int, int], slope: float, highest: float, lowest: float, dtype: torch.dtype
) -> torch.Tensor:
    """Logits `[n, h, w]` of n regions that share a picture among them, between `-lowest` and `highest`.

    `slope`: of the logits at a region's border, per side of the picture.
    """
    number, height, width = shape
    rows, columns = (torch.linspace(0, 1, side) for side in (height, width))
    centres = torch.rand(number, 2, generator=torch.Generator().manual_seed(0))
    drawn = (rows[:, None] - centres[:, :1, None]).square() + (columns - centres[:, 1:, None]).square()
    drawn.sqrt_()
    nearest, second = torch.full((2, height, width), torch.inf)
    for distance in drawn:
        second = torch.minimum(second, torch.maximum(nearest, distance))
        nearest = torch.minimum(nearest, distance)
    for distance in drawn:
        others = torch.where(distance > nearest, nearest, second)
        distance.copy_(others.sub_(distance).mul_(slope).clamp_(-lowest, highest))
    return drawn.to(dtype)


@contextmanager
def forced(name: str, model: Any, classes: int, crops: int | None = None) -> Iterator[None]:
    """While entered, the model looks at as many crops and classes as the size says; its work is otherwise its own.

    `crops`: another number of them.
    """
    size = SIZES[name]
    crops = crops or size.crops
    if crops is not None:
        hook = model.proposal_network.register_forward_hook(
            lambda module, given, proposals: [
                one._replace(mask_logits=set_masks(one.mask_logits, crops)) for one in proposals
            ]
        )
        try:
            yield
        finally:
            hook.remove()
    elif size.keeps_classes:
        keep = keeping(kept_classes(classes))
        with mock.patch.object(decoder, "best_classes", keep), mock.patch.object(chunks, "best_classes", keep):
            yield
    else:
        yield


def kept_classes(classes: int) -> tuple[int, ...]:
    """How many of SED's classes stay before each decoder layer: the comparison's numbers."""
    return tuple(min(number, classes) for number in ((60, 40, 30) if classes <= 150 else (100, 60, 40)))


def set_masks(mask_logits: torch.Tensor, crops: int) -> torch.Tensor:
    """The first `crops` masks cover the left half, the others nothing."""
    masks = torch.full_like(mask_logits, -10.0)
    masks[:, :crops, :, : masks.shape[-1] // 2] = 10.0
    return masks


def keeping(kept: Sequence[int]) -> Callable[..., torch.Tensor]:
    """In place of SED's `best_classes`: looks for them, and then keeps the first so many of each row."""
    look = chunks.best_classes

    def best_classes(logits: torch.Tensor, counts: Sequence[int], top_k: int) -> torch.Tensor:
        look(logits, counts, top_k)
        # each layer has fewer than the one before
        number = next((number for number in kept if number < counts[0]), kept[-1])
        return torch.cat([torch.arange(count, device=logits.device) < number for count in counts])

    return best_classes
