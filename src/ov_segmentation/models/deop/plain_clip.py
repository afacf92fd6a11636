"""DeOP without training: severed patches of a plain CLIP, classified one by one, or pooled over SAM's masks.

What the original's demo does (SAM's masks, identity severance in the last block, a fifth of the residual), and the same
without masks.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from transformers import CLIPConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ...layers.clip_stem import load_clip, split_clip_config
from .configuration_deop import DeOPConfig
from .proposals import load_sam

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPProcessor

TRAINING_FREE = {
    "severance": "identity",
    "severed_layers": (-1,),
    "severance_residual_scale": 0.2,
    "pooling": "mask",
    "visual_prompts": "none",
    "num_context_vectors": 0,
    "image_mean": tuple(OPENAI_CLIP_MEAN),
    "image_std": tuple(OPENAI_CLIP_STD),
}
"""Configuration values with which DeOP needs no weights beside CLIP's (and SAM's)."""

HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "use_safetensors",
    "variant",
)
# what the auto class and the pipeline add, without meaning for CLIP's weights
IGNORED_ARGUMENTS = (
    "adapter_kwargs",
    "trust_remote_code",
    "_from_auto",
    "_from_pipeline",
    "task",
)


def plain_clip_config(clip_config: CLIPConfig) -> DeOPConfig:
    """The configuration of the training-free model around a CLIP."""
    clip_config, clip_stem = split_clip_config(clip_config)
    return DeOPConfig(clip_config=clip_config, clip_stem=clip_stem, proposals="none", **TRAINING_FREE)


def load_plain_clip(model_class: Any, source: str | os.PathLike, clip_config: CLIPConfig, **arguments: Any) -> Any:
    """The training-free model around the CLIP in `source`.

    Args:
        model_class: `DeOPForOpenVocabularySegmentation`.
        source: folder or Hub id of a `CLIPModel`.
        clip_config: its configuration.
        arguments: of `from_pretrained` (`dtype`, `attn_implementation`, `revision`, ...) and fields of `DeOPConfig`.

    Raises:
        TypeError: an argument that is neither.
        ValueError: `device_map` or `quantization_config`; a CLIP of which weights are missing.
    """
    hub = {name: arguments.pop(name) for name in HUB_ARGUMENTS if name in arguments}
    dtype = arguments.pop("dtype", arguments.pop("torch_dtype", None))
    attention = arguments.pop("attn_implementation", None) or clip_config._attn_implementation
    wants_info = arguments.pop("output_loading_info", False)
    allow_missing_keys = arguments.pop("allow_missing_keys", False)
    for name in IGNORED_ARGUMENTS:
        arguments.pop(name, None)
    for name in ("device_map", "quantization_config"):
        if arguments.pop(name, None) is not None:
            raise ValueError(
                f"{name} works for checkpoints of ours: load this CLIP without it, save_pretrained, reload."
            )
    known = {field.name for field in fields(DeOPConfig)} - {"clip_config", "clip_stem"}
    if unknown := sorted(set(arguments) - known):
        raise TypeError(f"A plain CLIP is loaded as {model_class.__name__}, which does not take {', '.join(unknown)}.")
    if dtype is not None:
        hub["dtype"] = dtype
    clip, info = load_clip(source, allow_missing_keys, True, config=clip_config, **hub)
    model = model_class.from_clip(clip, **{"proposals": "none", **TRAINING_FREE, **arguments}).to(clip.dtype).eval()
    if attention is not None:
        model.set_attn_implementation(attention)
    warnings.warn(
        f"{source} is a plain CLIP, which was not trained to segment: DeOP is built around it with severed patches in "
        f"the last block and without proposals, so that every patch is classified by itself. It needs no training and "
        f"is far less accurate than a trained model. Its processor: DeOPProcessor.from_clip({str(source)!r}).",
        stacklevel=3,
    )
    return (model, info) if wants_info else model


class TrainingFreeMixin:
    """Ways to a model that needs no training."""

    @classmethod
    def from_clip_and_sam(cls, clip: str | os.PathLike | CLIPModel, sam: Any, **config: Any) -> Any:
        """DeOP without training on Segment Anything's masks, as in the original's demo.

        Args:
            clip: a Hub id or folder of a `CLIPModel`, or the model itself.
            sam: the same of a `SamModel`.
            config: values for `DeOPConfig`; the defaults are `TRAINING_FREE`.
        """
        sam = load_sam(sam)
        values = {"proposals": "sam", "sam_config": sam.config, **TRAINING_FREE, **config}
        model = cls.from_clip(clip, **values)
        model.sam.load_state_dict(sam.state_dict())
        return model

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As of every model; the auto class hands the configuration of a plain CLIP here, see `load_plain_clip`."""
        if not isinstance(kwargs.get("config"), CLIPConfig):
            return super().from_pretrained(*args, **kwargs)
        source = args[0] if args else kwargs.pop("pretrained_model_name_or_path")
        return load_plain_clip(cls, source, kwargs.pop("config"), **kwargs)

    @classmethod
    def _from_config(cls, config: DeOPConfig | CLIPConfig, **kwargs: Any) -> Any:
        return super()._from_config(plain_clip_config(config) if isinstance(config, CLIPConfig) else config, **kwargs)

    def processor_for_clip(self, processor: CLIPProcessor) -> Any:
        """The processor that goes with a plain CLIP's own; None where the model was trained with another."""
        from .processing_deop import DeOPProcessor

        untrained = self.text_prompt is None and self.config.proposals != "maskformer"
        return DeOPProcessor.from_clip(processor) if untrained else None
