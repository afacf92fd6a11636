"""The picture side of the models: from preprocessed pixels to what does not depend on the class names."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers.utils import logging

from .layers.pieces import runs_in_pieces
from .modeling_outputs import ImageState, join_states
from .offloading import with_weights_at_hand
from .tensor_arguments import check_tensors

logger = logging.get_logger(__name__)

FROM_CONFIG = "config"
# more than an image processor pads a picture that is alone
_MOST_PADDING_ALONE = 32


class PictureSideMixin:
    """`encode_image` for users and what it is made of; part of the models' base class."""

    picture_switches: ClassVar[frozenset[str]] = frozenset()
    sees_padding: ClassVar[bool] = False
    """Whether pictures that are padded to a larger one's size look different to the model."""

    def _encode_image(self, pixel_values: torch.Tensor, *, for_training: bool, **inputs: Any) -> ImageState:
        """The picture side.

        Args:
            for_training: asks for what only the loss needs (auxiliary outputs).
            inputs: `reshaped_input_sizes`, `output_hidden_states`, `output_attentions`, `output_maps` and the resolved
                picture switches.
        """
        raise NotImplementedError

    @property
    def encodes_alone(self) -> bool:
        """Whether pictures may be encoded one after the other: their states are of equal shapes then too."""
        return True

    def _records(
        self, output_hidden_states: bool | None, output_attentions: bool | None, output_maps: bool
    ) -> dict[str, bool]:
        """What is kept on request; the configuration's value where nothing is said."""
        given = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        known = {name: getattr(self.config, name) if value is None else value for name, value in given.items()}
        return {**known, "output_maps": output_maps}

    @with_weights_at_hand
    def encode_image(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        padded_sizes: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_maps: bool = False,
        **switches: Any,
    ) -> ImageState:
        """Everything that does not depend on the class names; pass the result as `image_state=` as often as you like.

        Args:
            pixel_values: `[B, 3, H, W]` from the image processor, with the keys that come beside it. Where the pictures
                end is read from the sizes: `pixel_mask` `[B, H, W]` says the same, and only its shape is checked.
            output_hidden_states, output_attentions, output_maps: keep what `forward` may be asked for later; None: as
                the configuration says.
            switches: those of `forward` that shape the picture side (`picture_switches`).
        """
        records = self._records(output_hidden_states, output_attentions, output_maps)
        return self._encode_checked(
            pixel_values, pixel_mask, original_sizes, reshaped_input_sizes, padded_sizes, False, records, switches
        )

    def _encode_checked(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None,
        original_sizes: torch.Tensor | None,
        reshaped_input_sizes: torch.Tensor | None,
        padded_sizes: torch.Tensor | None,
        for_training: bool,
        records: dict[str, bool],
        switches: dict[str, Any],
    ) -> ImageState:
        check_tensors(pixel_values=pixel_values)
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or 0 in pixel_values.shape:
            raise ValueError(f"pixel_values must be [B, 3, H, W], none of them 0; got {list(pixel_values.shape)}.")
        if records["output_attentions"] and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions needs the attention written out, but this model runs "
                f"{self.config._attn_implementation!r}: call model.set_attn_implementation('eager')."
            )
        switches = self._resolve_switches(switches, self.picture_switches)
        given = {
            "original_sizes": original_sizes,
            "reshaped_input_sizes": reshaped_input_sizes,
            "padded_sizes": padded_sizes,
        }
        _check_mask(pixel_values, pixel_mask)
        _check_sizes(pixel_values.shape[0], given)
        whole = torch.tensor(pixel_values.shape[-2:]).expand(pixel_values.shape[0], 2)
        padded_sizes = whole if padded_sizes is None else padded_sizes
        reshaped_input_sizes = padded_sizes if reshaped_input_sizes is None else reshaped_input_sizes
        original_sizes = reshaped_input_sizes if original_sizes is None else original_sizes
        if self.sees_padding and not (self.training or switches["sliding_window"] or torch.compiler.is_compiling()):
            _warn_of_padding(reshaped_input_sizes, padded_sizes)
        state = self._encode_pictures(
            pixel_values.to(device=self.device, dtype=self.dtype),
            for_training=for_training,
            reshaped_input_sizes=reshaped_input_sizes,
            **records,
            **switches,
        )
        state.model_type, state.switches = self.config.model_type, switches
        state.original_sizes, state.reshaped_input_sizes = original_sizes, reshaped_input_sizes
        state.padded_sizes = padded_sizes
        return state

    def _encode_pictures(self, pixel_values: torch.Tensor, **inputs: Any) -> ImageState:
        """`_encode_image`, on a CPU without gradients one picture after the other: maps stay in the caches, and memory
        does not grow with their number. Views of a sliding window go one after the other as it is."""
        count = len(pixel_values)
        rows = {name: value.split(1) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        alone = self.encodes_alone and runs_in_pieces(pixel_values) and not inputs.get("sliding_window")
        # given masks of another number are left to the method, which says what is wrong with them
        if not alone or count < 2 or any(len(parts) != count for parts in rows.values()):
            return self._encode_image(pixel_values, **inputs)
        states = (
            self._encode_image(picture, **{**inputs, **{name: parts[i] for name, parts in rows.items()}})
            for i, picture in enumerate(pixel_values.split(1))
        )
        return join_states(states, count)

    def _check_state(self, state: ImageState, sizes: dict[str, torch.Tensor | None], switches: dict[str, Any]) -> None:
        """A ValueError for what only pixels could be given, and what the state was made with says otherwise."""
        if not isinstance(state, ImageState):
            raise TypeError(f"image_state is what encode_image returns, got {type(state).__name__}.")
        if state.model_type not in (None, self.config.model_type):
            raise ValueError(
                f"This image_state is of a {state.model_type!r}, the model is a {self.config.model_type!r}."
            )
        for name, value in sizes.items():
            if value is not None and not torch.equal(torch.as_tensor(value).cpu(), getattr(state, name).cpu()):
                raise ValueError(f"{name} is the image_state's own: give it to encode_image, with the pixel_values.")
        known = state.switches or {}
        for name in (self.picture_switches - self.switches) & switches.keys() & known.keys():
            if isinstance(switches[name], str) and switches[name] == FROM_CONFIG:
                continue
            given, used = switches[name], known[name]
            if isinstance(given, torch.Tensor) or isinstance(used, torch.Tensor):
                same = given is used
            else:  # None switches off, as False does
                same = (given or None) == (used or None)
            if not same:
                raise ValueError(
                    f"{name} shapes the picture side, and this image_state was encoded with another value: give it to "
                    f"encode_image, or leave it out here."
                )


def _check_mask(pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None) -> None:
    if pixel_mask is None:
        return
    check_tensors(pixel_mask=pixel_mask)
    if pixel_mask.shape != (len(pixel_values), *pixel_values.shape[-2:]):
        raise ValueError(
            f"pixel_mask {list(pixel_mask.shape)} must have the batch and picture size of pixel_values "
            f"{list(pixel_values.shape)}."
        )


def _check_sizes(pictures: int, sizes: dict[str, torch.Tensor | None]) -> None:
    for name, value in sizes.items():
        if value is None:
            continue
        check_tensors(**{name: value})
        if value.shape != (pictures, 2):
            raise ValueError(
                f"{name} must be [{pictures}, 2], height and width of each of the {pictures} pictures in pixel_values; "
                f"got {list(value.shape)}."
            )


def _warn_of_padding(reshaped_input_sizes: torch.Tensor, padded_sizes: torch.Tensor) -> None:
    padding = torch.as_tensor(padded_sizes) - torch.as_tensor(reshaped_input_sizes)
    if len(padding) > 1 and (padding >= _MOST_PADDING_ALONE).any():
        logger.warning_once(
            "Pictures of different sizes in a batch are padded to the largest, and this method sees the padding, as "
            "the original does: label maps differ from those of each picture alone. For the same maps, put pictures "
            "of one size into a batch, as the pipeline does."
        )
