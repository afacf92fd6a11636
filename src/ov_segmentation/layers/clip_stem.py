"""A small convolutional trunk in the place of CLIP's patch embedding, for CLIPs trained from nothing.

Early convolutions let a small ViT learn from little data (Xiao et al., "Early Convolutions Help Transformers See
Better", 2021); with a patch embedding alone, shape is learnt several times later. Weights from the Hub never need it.
"""

import os
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from ..download_errors import loading_explained


@strict
class CLIPStemConfig(PreTrainedConfig):
    """Configuration of [`CLIPStem`].

    Args:
        num_channels: channels of the picture.
        hidden_sizes: channels of each stage; every stage halves height and width, so the total stride is
            `2 ** len(hidden_sizes)` and has to equal CLIP's patch size. The last one is CLIP's vision width.
        depths: residual blocks of each stage.
        num_groups: groups of every GroupNorm; has to divide all `hidden_sizes`.
    """

    model_type = "ov_clip_stem"

    num_channels: int = 3
    hidden_sizes: list[int] | tuple[int, ...] = (32, 64, 128)
    depths: list[int] | tuple[int, ...] = (1, 1, 2)
    num_groups: int = 8
    initializer_range: float = 0.02

    @property
    def stride(self) -> int:
        """Pixels per position of the output map."""
        return 2 ** len(self.hidden_sizes)

    def validate_stages(self) -> None:
        """Check that the stages fit together (called by `strict` on construction)."""
        if len(self.hidden_sizes) != len(self.depths) or not self.depths:
            raise ValueError(
                f"hidden_sizes {self.hidden_sizes} and depths {self.depths} need the same, non-zero number of stages."
            )
        if any(size % self.num_groups for size in self.hidden_sizes):
            raise ValueError(f"num_groups {self.num_groups} has to divide all of hidden_sizes {self.hidden_sizes}.")


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with GroupNorm and ReLU around an identity: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(num_groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(num_groups, channels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return relu(x + f(x)), same shape as `features`."""
        hidden = F.relu(self.norm1(self.conv1(features)))
        return F.relu(features + self.norm2(self.conv2(hidden)))


class CLIPStem(PreTrainedModel):
    """Convolutional residual trunk [B, 3, H, W] -> [B, hidden_sizes[-1], H / stride, W / stride].

    It is a `PreTrainedModel` because transformers initialises each such part with its own rules, wherever it sits:
    inside a native `CLIPModel`, a plain module would get CLIP's.
    """

    config_class = CLIPStemConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: CLIPStemConfig) -> None:
        super().__init__(config)
        stages: list[nn.Module] = []
        channels = config.num_channels
        for hidden_size, depth in zip(config.hidden_sizes, config.depths, strict=True):
            stages += [
                nn.Conv2d(channels, hidden_size, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(config.num_groups, hidden_size),
                nn.ReLU(),
                *(ResidualBlock(hidden_size, config.num_groups) for _ in range(depth)),
            ]
            channels = hidden_size
        self.stages = nn.Sequential(*stages)
        self.post_init()

    @property
    def weight(self) -> torch.Tensor:
        """An empty tensor of the trunk's dtype and device.

        CLIP's embeddings read `patch_embedding.weight.dtype`, and its initialisation fills `patch_embedding.weight`: an
        empty tensor answers the first and makes the second harmless.
        """
        return self.stages[0].weight.new_empty(0)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map pictures [B, 3, H, W] to features [B, C, H // stride, W // stride].

        Sides that the stride does not divide lose the rest, as a patch embedding would.
        """
        stride = self.config.stride
        height, width = pixel_values.shape[-2] // stride * stride, pixel_values.shape[-1] // stride * stride
        return self.stages(pixel_values[..., :height, :width])


@torch.no_grad()
def init_clip_stem_weights(module: CLIPStem) -> None:
    """Draw all convolutions of a stem from N(0, initializer_range) and reset its GroupNorms; loaded tensors stay.

    A norm follows every convolution, so the weights' scale does not reach the output. Building a stem does the same.
    """
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            init.normal_(child.weight, std=module.config.initializer_range)
        elif isinstance(child, nn.GroupNorm):
            init.ones_(child.weight)
            init.zeros_(child.bias)


def install_clip_stem(clip_model: PreTrainedModel, stem_config: CLIPStemConfig | dict[str, Any] | None) -> None:
    """Put a stem in the place of `vision_model.embeddings.patch_embedding`, in place. None leaves the model as it is.

    Args:
        clip_model: a `CLIPModel` (or any model with `vision_model.embeddings`).
        stem_config: configuration of the stem, or its dict.

    Raises:
        ValueError: if stride, channels or width do not fit CLIP's vision configuration.
    """
    if stem_config is None:
        return
    if isinstance(stem_config, dict):
        stem_config = CLIPStemConfig.from_dict(stem_config)
    vision = clip_model.vision_model.config
    expected = {"stride": vision.patch_size, "channels": vision.num_channels, "width": vision.hidden_size}
    given = {"stride": stem_config.stride, "channels": stem_config.num_channels, "width": stem_config.hidden_sizes[-1]}
    wrong = [f"{name} {given[name]} (CLIP's is {expected[name]})" for name in given if given[name] != expected[name]]
    if wrong:
        raise ValueError(
            f"clip_stem does not fit clip_config.vision_config: {', '.join(wrong)}. stride is 2 ** len(hidden_sizes) "
            "and has to equal patch_size, width is the last hidden size and has to equal hidden_size."
        )
    clip_model.vision_model.embeddings.patch_embedding = CLIPStem(stem_config)


class CLIPModelWithStem(CLIPModel):
    """A `CLIPModel` whose config may carry `clip_stem`, a [`CLIPStemConfig`] as a dict; without it a plain one.

    The folder of such a model says `model_type: clip`, so tokenizer and image processor load as any CLIP's do.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        install_clip_stem(self, getattr(config, "clip_stem", None))
        self.post_init()


def load_clip(
    name_or_path: str | os.PathLike, allow_missing_keys: bool = False, output_loading_info: bool = False, **kwargs: Any
) -> Any:
    """Load a CLIP from a folder or the Hub, with or without a stem; for `from_clip` of the ViT methods.

    Args:
        name_or_path: what `CLIPModel.from_pretrained` takes.
        allow_missing_keys: initialise weights that the checkpoint does not have at random.
        output_loading_info: also return which keys were missing, unexpected or mismatched.
        kwargs: passed on (`dtype`, `revision`, ...).

    Returns:
        The model in evaluation mode; [`split_clip_config`] gives the two configurations a method stores.

    Raises:
        ValueError: the checkpoint leaves weights unset.
        LoadingError: what cannot be found or downloaded.
    """
    with loading_explained(name_or_path):
        model, info = CLIPModelWithStem.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    missing = sorted(info["missing_keys"])
    if missing and not allow_missing_keys:
        raise ValueError(
            f"{name_or_path} leaves {len(missing)} weights of a CLIP unset ({', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}): it is incomplete, or holds something else."
        )
    return (model, info) if output_loading_info else model


def split_clip_config(config: CLIPConfig) -> tuple[CLIPConfig, dict[str, Any] | None]:
    """Split the configuration of [`load_clip`]'s model into (`clip_config`, `clip_stem`), as our methods hold them."""
    values = config.to_dict()
    stem = values.pop("clip_stem", None)
    return CLIPConfig.from_dict(values), stem
