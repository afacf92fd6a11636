"""OVSeg's CLIP: what it sees in masked crops, and the visual prompts that adapt it to them (section 3.3)."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch.nn.functional import normalize
from transformers import CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ...layers.mask_crops import CropGrid, crop_for_clip, mask_boxes
from ...layers.mask_prompts import DeepPrompts, MaskPrompts, encode_crops
from ...offloading import with_weights_at_hand
from .configuration_ovseg import OVSegConfig


class MaskedCropsMixin:
    """The part of the model that shows CLIP masked crops."""

    config: OVSegConfig
    clip: CLIPModel
    visual_prompts: MaskPrompts | DeepPrompts | None

    def _build_visual_prompts(self) -> MaskPrompts | DeepPrompts | None:
        config, vision = self.config, self.config.clip_config.vision_config
        if config.prompt_type == "mask":
            return MaskPrompts(config.prompt_depth, (config.crop_size // vision.patch_size) ** 2, vision.hidden_size)
        if config.prompt_type == "deep":
            return DeepPrompts(config.prompt_depth, config.num_deep_prompts, vision.hidden_size)
        return None

    def set_visual_prompts(
        self, prompt_type: str, depth: int | None = None, num_deep_prompts: int | None = None
    ) -> None:
        """Take the visual prompts off ("none"), or put new, randomly initialised ones in their place.

        Args:
            prompt_type: "mask", "deep" or "none".
            depth, num_deep_prompts: see the configuration, whose values they replace; None keeps those.

        Raises:
            ValueError: values that do not fit CLIP. The model is then as it was.
        """
        changes = {"prompt_type": prompt_type, "prompt_depth": depth, "num_deep_prompts": num_deep_prompts}
        changes = {name: value for name, value in changes.items() if value is not None}
        tried = copy.deepcopy(self.config)
        for config in (tried, self.config):
            for name, value in changes.items():
                setattr(config, name, value)
            config.validate()
        prompts = self._build_visual_prompts()
        if prompts is not None:
            prompts.to(self.device, self.dtype)
            self._init_weights(prompts)
        self.visual_prompts = prompts
        self.freeze_pretrained()

    @with_weights_at_hand
    def encode_masks(
        self, pixel_values: torch.Tensor, masks: list[torch.Tensor], crop_batch_size: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What CLIP sees in given masks.

        Args:
            pixel_values: `[B, 3, H, W]` from the image processor.
            masks: bool `[N, h, w]` for each picture, at the size of the resized picture; the same N for all.
            crop_batch_size: masks that go through CLIP at once; None: all.

        Returns:
            Features `[B, N, D]` float32, L2-normalised, zero for empty masks; and which masks are not empty, `[B, N]`.
        """
        pictures = self._clip_pixels(pixel_values.to(self.device, self.dtype))
        masks = [m.to(self.device) for m in masks]
        sizes = [list(m.shape[-2:]) for m in masks]
        valid = torch.stack([m.flatten(1).any(dim=1) for m in masks])
        features = torch.zeros(*valid.shape, self.embedding_size, device=valid.device)
        which = valid.nonzero()
        chunk = crop_batch_size or max(len(which), 1)
        found = [
            self._encode_crops(*self._crop_chunk(pictures, masks, sizes, rows))
            for rows in which.split(chunk)
            if len(rows)
        ]
        if found:
            features[which.unbind(1)] = torch.cat(found)
        return features, valid

    def _clip_pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values` with CLIP's normalisation in place of MaskFormer's."""
        values = (self.config.image_mean, self.config.image_std, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        constants = torch.tensor(values, device=pixel_values.device, dtype=torch.float32)[..., None, None]
        mean, std, clip_mean, clip_std = constants
        return ((pixel_values.float() * std + mean - clip_mean) / clip_std).to(pixel_values.dtype)

    def _crop_chunk(
        self, pictures: torch.Tensor, masks: list[torch.Tensor], sizes: list[list[int]], rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Crops and their masks of the proposals `rows` `[n, 2]` (picture, query)."""
        parts = [self._crop(pictures[i], masks[i][queries], sizes[i]) for i, queries in _by_picture(rows)]
        return torch.cat([crops for crops, _ in parts]), torch.cat([crop_masks for _, crop_masks in parts])

    def _crop(self, picture: torch.Tensor, masks: torch.Tensor, size: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        boxes = mask_boxes(masks, self.config.mask_expand_ratio)
        picture = picture[:, : size[0], : size[1]]
        return crop_for_clip(picture, masks, CropGrid.of(boxes, self.config.crop_size), self.config.mask_fill)

    def _encode_crops(self, crops: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        features = encode_crops(self.clip.vision_model, self.clip.visual_projection, crops, masks, self.visual_prompts)
        # float32: logits are a hundred times these, which half precision would blur
        return normalize(features.float(), dim=-1)


def _by_picture(rows: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Split rows (picture, query), sorted by picture, into (picture, queries)."""
    pictures, counts = rows[:, 0].unique_consecutive(return_counts=True)
    yield from zip(pictures.tolist(), rows[:, 1].split(counts.tolist()), strict=True)
