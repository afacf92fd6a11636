"""Mining of mask-category pairs: proposals, nouns of captions, and CLIP's choice of a proposal for each noun.

Liang et al., "Open-Vocabulary Semantic Segmentation with Mask-adapted CLIP" (2023), section 3.2. The authors' code was
not released. What the paper leaves open (smallest area and score, singular forms, phrases, repeated pairs) is an option
of [`MiningOptions`] and off by default.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image as PILImage

from ..label_maps import IGNORED
from ..layers.mask_crops import mask_boxes
from .mask_pairs import mask_picture
from .nouns import Tagger, extract_nouns

COUNTS = (
    "pictures",
    "pictures_without_masks",
    "captions",
    "captions_without_nouns",
    "nouns",
    "pairs",
    "pairs_below_min_score",
)
"""What is counted of every picture, zeros too; captions only where nouns come from them."""


@dataclass(frozen=True)
class MiningOptions:
    """What is mined.

    Args:
        masks: "proposals": of the model; "annotation": one mask per class of the label map.
        nouns: "caption": by a tagger; "classes": names of the classes in the label map. With masks of the annotation
            each mask has its class's name and CLIP has nothing to choose.
        captions_per_image: how many of a picture's captions are read, from the first.
        phrases: nouns with their adjectives as one name.
        singular: plural nouns become singular.
        min_area: smallest share of the picture that a mask covers.
        min_score: smallest cosine of crop and noun.
        deduplicate: a noun that several captions of a picture name is paired once.
        crop_batch_size: crops that go through CLIP at once.
    """

    masks: Literal["proposals", "annotation"] = "proposals"
    nouns: Literal["caption", "classes"] = "caption"
    captions_per_image: int = 1
    phrases: bool = False
    singular: bool = False
    min_area: float = 0.0
    min_score: float | None = None
    deduplicate: bool = False
    crop_batch_size: int | None = 32

    def __post_init__(self) -> None:
        if self.captions_per_image < 1:
            raise ValueError(f"captions_per_image must be at least 1, got {self.captions_per_image}.")
        if not 0 <= self.min_area < 1:
            raise ValueError(f"min_area is a share of the picture in [0, 1), got {self.min_area}.")

    @property
    def needs_annotation(self) -> bool:
        """Whether label maps are read."""
        return self.masks == "annotation" or self.nouns == "classes"


class MinedPicture(NamedTuple):
    """What a picture gave: rows for [`pair_features`] without `picture`, and counts."""

    pairs: list[dict[str, Any]]
    counts: Counter


class _Wanted(NamedTuple):
    noun: str
    caption: str


class PairMiner:
    """Mines pictures with an OVSeg model, whose CLIP sees the crops as inference would show them.

    Args:
        model: `OVSegForOpenVocabularySegmentation`, in evaluation mode.
        processor: its processor; its templates embed the nouns.
        options: see [`MiningOptions`].
        tagger: from `find_tagger`; None where nouns are class names.
        class_names: of the label maps' ids, where they are read.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        options: MiningOptions,
        tagger: Tagger | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        if options.nouns == "caption" and tagger is None:
            raise ValueError("Nouns of captions need a tagger: see ov_segmentation.data.nouns.find_tagger.")
        self.model, self.processor, self.options = model, processor, options
        self.tagger, self.class_names = tagger, list(class_names)
        self.embeddings: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def mine(
        self, image: PILImage.Image, captions: Sequence[str | None] = (), label_map: np.ndarray | None = None
    ) -> MinedPicture:
        """The pairs of one picture.

        Args:
            image: RGB.
            captions: of the picture; empty ones and ones without nouns are counted and give no pair.
            label_map: int `[H, W]` of class ids, negative where ignored; only where masks or nouns need it.
        """
        counts: Counter = Counter(dict.fromkeys(COUNTS, 0), pictures=1)
        maps = {} if label_map is None else {"segmentation_maps": [label_map], "ignore_index": IGNORED}
        inputs = self.processor(images=image, return_tensors="pt", **maps)
        labels = None if label_map is None else inputs.pop("labels")[0]
        present = [] if labels is None else labels[labels >= 0].unique().tolist()
        masks, owners = self._masks(inputs, labels, present)
        counts["pictures_without_masks"] += not len(masks)
        wanted = self._wanted(captions, present if owners is None else owners, counts)
        if not len(masks) or not wanted:
            return MinedPicture([], counts)
        if owners is not None and self.options.nouns == "classes":
            chosen = [(owners.index(self.class_names.index(want.noun)), None) for want in wanted]
        else:
            chosen = list(self._match(inputs, masks, [want.noun for want in wanted]))
        picture, boxes = self._pixels(inputs), mask_boxes(masks).tolist()
        pairs = []
        for want, (index, score) in zip(wanted, chosen, strict=True):
            if score is not None and self.options.min_score is not None and score < self.options.min_score:
                counts["pairs_below_min_score"] += 1
                continue
            x0, y0, x1, y1 = boxes[index]
            crop, mask = picture[y0:y1, x0:x1], masks[index, y0:y1, x0:x1].cpu().numpy()
            pairs.append(
                {
                    "image": PILImage.fromarray(crop),
                    "mask": mask_picture(mask),
                    "noun": want.noun,
                    "caption": want.caption,
                    "box": boxes[index],
                    "score": score,
                }
            )
        counts["pairs"] += len(pairs)
        return MinedPicture(pairs, counts)

    def _masks(
        self, inputs: dict[str, torch.Tensor], labels: torch.Tensor | None, present: list[int]
    ) -> tuple[torch.Tensor, list[int] | None]:
        """Bool masks `[n, h, w]` at the size of the resized picture, and the class of each where they are annotated."""
        height, width = inputs["reshaped_input_sizes"][0].tolist()
        if self.options.masks == "proposals":
            (masks,) = self.model.propose_masks(inputs["pixel_values"], inputs["reshaped_input_sizes"])
            owners = None
        else:
            ids = torch.tensor(present, dtype=labels.dtype)
            masks, owners = labels[:height, :width] == ids[:, None, None], present
        area = masks.flatten(1).float().mean(dim=1)
        kept = (area > 0) & (area >= self.options.min_area)
        owners = None if owners is None else [owner for owner, keep in zip(owners, kept.tolist()) if keep]
        return masks[kept], owners

    def _wanted(self, captions: Sequence[str | None], present: list[int], counts: Counter) -> list[_Wanted]:
        if self.options.nouns == "classes":
            wanted = [_Wanted(self.class_names[index], "") for index in present]
        else:
            wanted = []
            for caption in list(captions)[: self.options.captions_per_image]:
                found = extract_nouns(caption or "", self.tagger, self.options.phrases, self.options.singular)
                counts["captions"] += 1
                counts["captions_without_nouns"] += not found
                wanted += [_Wanted(noun, caption) for noun in found]
            if self.options.deduplicate:
                firsts: dict[str, _Wanted] = {}
                for want in wanted:
                    firsts.setdefault(want.noun, want)
                wanted = list(firsts.values())
        counts["nouns"] += len(wanted)
        return wanted

    def _match(
        self, inputs: dict[str, torch.Tensor], masks: torch.Tensor, nouns: list[str]
    ) -> Iterator[tuple[int, float]]:
        """For each noun the mask that CLIP finds nearest, and their cosine."""
        features, _ = self.model.encode_masks(inputs["pixel_values"], [masks], self.options.crop_batch_size)
        texts = self._embed(nouns).to(features.device, features.dtype)
        best = (texts @ features[0].T).max(dim=1)
        yield from zip(best.indices.tolist(), best.values.tolist(), strict=True)

    def _embed(self, nouns: list[str]) -> torch.Tensor:
        """Text embeddings `[n, D]`; each noun is embedded once per run."""
        new = [noun for noun in dict.fromkeys(nouns) if noun not in self.embeddings]
        if new:
            embeds = self.model.encode_vocabulary(**self.processor(text=new, return_tensors="pt"))
            self.embeddings.update(zip(new, embeds, strict=True))
        return torch.stack([self.embeddings[noun] for noun in nouns])

    def _pixels(self, inputs: dict[str, torch.Tensor]) -> np.ndarray:
        """The resized picture, uint8 `[h, w, 3]`."""
        height, width = inputs["reshaped_input_sizes"][0].tolist()
        mean, std = (torch.tensor(getattr(self.model.config, f"image_{name}")) for name in ("mean", "std"))
        values = inputs["pixel_values"][0, :, :height, :width].float().permute(1, 2, 0) * std + mean
        return (values * 255).round().clamp(0, 255).to(torch.uint8).numpy()
