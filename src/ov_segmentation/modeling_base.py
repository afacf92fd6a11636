"""The base class of all models: text side, encoded pictures, switches, freezing, loading and saving."""

from __future__ import annotations

from typing import Any, ClassVar, get_type_hints

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .configuration_base import OpenVocabularySegmentationConfig, configurations
from .download_errors import loading_explained
from .from_clip import FromCLIPMixin
from .label_maps import IGNORED
from .layers.clip_stem import CLIPStem, init_clip_stem_weights
from .layers.freed_memory import keep_freed_memory
from .layers.products import replace_linear
from .losses import SeededDraws
from .modeling_outputs import ImageState, OpenVocabularySegmentationOutput
from .offloading import execution_device, with_weights_at_hand
from .picture_side import FROM_CONFIG, PictureSideMixin
from .pushing import PushToHub
from .tensor_arguments import check_tensors
from .text_encoding import TextEmbeddingCache
from .text_side import TextSideMixin

logger = logging.get_logger(__name__)


class OpenVocabularySegmentationModel(PushToHub, FromCLIPMixin, TextSideMixin, PictureSideMixin, PreTrainedModel):
    """Base of the six `<X>ForOpenVocabularySegmentation`.

    A method implements `_encode_image` (what does not depend on the class names), `_segment` (the rest, and the loss)
    and `freeze_pretrained`; it names the inference switches it understands in `switches` (each is a config field of the
    same name) and those that shape the picture side in `picture_switches`; a name may stand in both.

    `torch.compile(fullgraph=True)` and `torch.export` take the inference of every method. The size of the pictures is
    part of the graph; an exported program takes any number of classes (`dynamic_shapes` of `text_embeds`). Sliding
    windows are cut by the pictures' sizes, which are values: they have to be off. A method's docstring says what else.
    """

    config: OpenVocabularySegmentationConfig
    config_class = OpenVocabularySegmentationConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    model_tags = ["open-vocabulary-segmentation"]
    # the mean of a batch is taken here: Trainer need not count its items
    accepts_loss_kwargs = False
    # a logarithm: bfloat16 would change the scale by a percent
    _keep_in_fp32_modules_strict = ["logit_scale"]

    switches: ClassVar[frozenset[str]] = frozenset()
    inference_switches: ClassVar[dict[str, Any]] = {"sliding_window": False, "rejection_top_k": None}
    """Switches that a loss does not go with -> their value there, where the call leaves them to the configuration."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if isinstance(cls.config_class, str):  # what transformers reads from an annotation that is not evaluated
            cls.config_class = get_type_hints(cls)["config"]

    def __init__(self, config: OpenVocabularySegmentationConfig, *args: Any, **kwargs: Any) -> None:
        keep_freed_memory()
        if isinstance(config, PreTrainedConfig) and not isinstance(config, self.config_class):
            raise TypeError(
                f"{type(self).__name__} needs a {self.config_class.__name__}, got a {type(config).__name__}."
            )
        super().__init__(config, *args, **kwargs)
        self._text_cache = TextEmbeddingCache()

    def post_init(self) -> None:
        """What every constructor ends with."""
        for name, parameter in self.named_parameters():
            # when loading too: what is offloaded to disk is read in the dtype that it has now
            if self.stays_in_float32(name):
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        super().post_init()
        self._settle_attention()
        replace_linear(self)

    @property
    def device(self) -> torch.device:
        """Of the weights; of offloaded ones, where they are fetched to for a call."""
        device = next(p.device for p in self.parameters())
        return execution_device(self) or device if device.type == "meta" else device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, without scalars: CLIP's temperature, its first parameter, stays in float32."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point() and p.ndim > 0)

    def stays_in_float32(self, name: str) -> bool:
        """Whether loading in half precision leaves the weight `name` in float32."""
        return any(part in name for part in self._keep_in_fp32_modules_strict)

    # ------------------------------------------------------------------ the parts that a method fills in

    def _segment(
        self, state: ImageState, text_embeds: torch.Tensor, labels: torch.Tensor | None, **options: Any
    ) -> OpenVocabularySegmentationOutput:
        """Outputs, and `loss` and `loss_dict` when there are labels. `options`: the resolved switches, `sample_seeds`,
        `output_hidden_states`, `output_attentions`, `output_maps`. The base fills in `text_embeds` and the sizes."""
        raise NotImplementedError

    def freeze_pretrained(self) -> None:
        """Set `requires_grad` of every parameter as the config asks; called after construction and after loading."""
        raise NotImplementedError

    trainable_parts: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Parts that can be trained alone, as regular expressions of parameter names: "adapter" (what the method adds to
    CLIP), "prompts" (learned tokens), "attention" (weights of query and value projections), and, of module names,
    "lora" (linear layers that low-rank updates are for). A method has an entry for those that it has."""

    @property
    def unread_parameters(self) -> tuple[str, ...]:
        """Regular expressions of parameters that the loss does not reach, with this configuration."""
        return ()

    # ------------------------------------------------------------------ picture side and forward

    def _resolve_switches(self, given: dict[str, Any], known: frozenset[str]) -> dict[str, Any]:
        unknown = sorted(set(given) - known)
        if unknown:
            raise TypeError(
                f"{type(self).__name__} does not take {', '.join(unknown)}. Its switches: {', '.join(sorted(known))}."
            )
        return {name: self._switch_value(name, given.get(name, FROM_CONFIG)) for name in known}

    def _switch_value(self, name: str, given: Any) -> Any:
        """The value given, or the config's; in training its `train_<name>`, where there is one."""
        if not isinstance(given, str):
            return given
        in_training = f"train_{name}"
        configured = getattr(self.config, in_training if self.training and hasattr(self.config, in_training) else name)
        if given == FROM_CONFIG:
            return configured
        if not isinstance(configured, str):  # any text would count as true
            raise TypeError(
                f"{name} takes no text but {FROM_CONFIG!r}, the configuration's value ({configured!r}); got {given!r}."
            )
        return given

    @can_return_tuple
    @with_weights_at_hand
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        padded_sizes: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        image_state: ImageState | None = None,
        labels: torch.Tensor | None = None,
        sample_seeds: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_maps: bool = False,
        **switches: Any,
    ) -> OpenVocabularySegmentationOutput:
        """Segment pictures with the given class names.

        Args:
            pixel_values: `[B, 3, H, W]`, or `image_state` from `encode_image`; exactly one of them.
            pixel_mask, original_sizes, reshaped_input_sizes, padded_sizes: as the image processor returns them. Where
                the pictures end is read from the sizes; the mask, which says the same, is checked for its shape alone.
            input_ids, attention_mask: `[K, P, L]` or `[K, P, S, L]` from the processor, or
            text_embeds: from `encode_vocabulary`; exactly one of the two.
            labels: `[B, H, W]` int64 class indices, -100 ignored, at the size of `pixel_values`: adds `loss`. It is
                taken on whole pictures and all classes, so the configuration's `sliding_window` and `rejection_top_k`
                are not used.
            sample_seeds: `[B]` int64: seeds of the random draws that the loss makes for each picture.
            output_hidden_states, output_attentions, output_maps: fill the output's fields of that name; None: as the
                configuration says.
            switches: inference switches of the method; "config" (default) takes the config's value, None switches off.
        """
        if (pixel_values is None) == (image_state is None):
            raise ValueError("Give either pixel_values or image_state (from model.encode_image), not both or neither.")
        resolved = self._resolve_switches(switches, self.switches | self.picture_switches)
        if labels is not None and switches.get("sliding_window", FROM_CONFIG) not in (FROM_CONFIG, None, False):
            raise ValueError("A loss is taken on whole pictures: leave sliding_window out, or pass False.")
        if labels is not None or self.training:
            left = [name for name in resolved if isinstance(switches.get(name, FROM_CONFIG), str)]
            resolved |= {name: value for name, value in self.inference_switches.items() if name in left}
        class_embeds = self._class_embeddings(input_ids, attention_mask, text_embeds)
        records = self._records(output_hidden_states, output_attentions, output_maps)
        if image_state is None:
            self._check_labels(labels, pixel_values, class_embeds.shape[0])
            labels = None if labels is None else labels.to(self.device)
            image_state = self._encode_checked(
                pixel_values,
                pixel_mask,
                original_sizes,
                reshaped_input_sizes,
                padded_sizes,
                labels is not None,
                records,
                {name: resolved[name] for name in self.picture_switches},
            )
        elif labels is not None:
            raise ValueError("A loss needs pixel_values: an image_state holds no auxiliary outputs.")
        else:
            sizes = {
                "original_sizes": original_sizes,
                "reshaped_input_sizes": reshaped_input_sizes,
                "padded_sizes": padded_sizes,
            }
            self._check_state(image_state, sizes, switches)
        outputs = self._segment(
            image_state,
            class_embeds,
            labels,
            sample_seeds=sample_seeds,
            **records,
            **{name: resolved[name] for name in self.switches},
        )
        outputs.text_embeds = class_embeds
        for name in ("original_sizes", "reshaped_input_sizes", "padded_sizes", "view_boxes", "canvas_size"):
            setattr(outputs, name, getattr(image_state, name))
        self._hand_on_records(records, image_state, outputs, pixel_values is None)
        return outputs

    @staticmethod
    def _hand_on_records(
        records: dict[str, bool],
        state: ImageState,
        outputs: OpenVocabularySegmentationOutput,
        was_encoded: bool,
    ) -> None:
        for name in ("hidden_states", "attentions"):
            if records[f"output_{name}"] and getattr(outputs, name) is None:
                setattr(outputs, name, getattr(state, name))
        if records["output_maps"]:
            outputs.maps = {**(state.maps or {}), **(outputs.maps or {})} or None
        for option, wanted in records.items():
            if wanted and getattr(outputs, option.removeprefix("output_")) is None:
                advice = f"; encode_image({option}=True) keeps what it has" if was_encoded else ""
                raise ValueError(f"{option}: this method has nothing of this kind in the outputs asked for{advice}.")

    @staticmethod
    def draws(sample_seeds: torch.Tensor | None, batch_size: int) -> SeededDraws:
        """Random draws of the loss: by `sample_seeds` `[B]`, or, when there are none, seeded by torch's generator."""
        if sample_seeds is None:
            sample_seeds = torch.randint(2**62, (batch_size,))
        check_tensors(sample_seeds=sample_seeds)
        if sample_seeds.shape != (batch_size,):
            raise ValueError(
                f"sample_seeds must be [{batch_size}], one for each picture, got {list(sample_seeds.shape)}."
            )
        return SeededDraws(sample_seeds)

    @staticmethod
    def _check_labels(labels: torch.Tensor | None, pixel_values: torch.Tensor, num_classes: int) -> None:
        if labels is None:
            return
        check_tensors(labels=labels)
        if labels.is_floating_point():
            raise TypeError(f"labels are int64 class indices, got {labels.dtype}.")
        if labels.shape != (len(pixel_values), *pixel_values.shape[-2:]):
            raise ValueError(
                f"labels {list(labels.shape)} must have the batch and picture size of pixel_values "
                f"{list(pixel_values.shape)}: pass segmentation_maps= to the processor together with the pictures."
            )
        negative = labels[(labels < 0) & (labels != IGNORED)]
        if len(negative):
            raise ValueError(
                f"labels hold {int(negative[0])}, which is no class; {IGNORED} is what is ignored. Pass "
                f"ignore_index={int(negative[0])} to the processor, which replaces it."
            )
        highest = int(labels.max())
        if highest >= num_classes:
            raise ValueError(
                f"labels hold class {highest}, but only {num_classes} class names were given. Is it the ignore index? "
                f"Pass ignore_index={highest} to the processor."
            )

    def _settle_attention(self) -> None:
        """Choose or check the attention of parts that are no models of transformers, which do so themselves:
        MaskFormer's decoder, SAM's blocks."""
        models = {id(module.config) for module in self.modules() if isinstance(module, PreTrainedModel)}
        for part in configurations(self.config):
            if id(part) not in models:
                chosen = self.get_correct_attn_implementation(part._attn_implementation, is_init_check=True)
                part._attn_implementation_internal = chosen

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """transformers' own, with the meaning that a dict has at loading, and all or nothing.

        Args:
            attn_implementation: for the model and all of its parts, or a dict: "" is the model without the parts that
                have a configuration of their own, which go by its name ("clip_config", "mask_config", ...).

        Raises:
            ValueError: an implementation that a part does not have; nothing is changed then.
        """
        models = {id(module.config) for module in self.modules() if isinstance(module, PreTrainedModel)}
        before = [(part, part._attn_implementation) for part in configurations(self.config)]
        self.config._attn_implementation = attn_implementation
        try:
            # transformers sets those of models, and would warn of the others
            for part, previous in before:
                if id(part) in models:
                    part._attn_implementation_internal = previous
            self._settle_attention()
            super().set_attn_implementation(attn_implementation, *args, **kwargs)
        except (ValueError, ImportError):
            for part, previous in before:
                part._attn_implementation_internal = previous
            raise

    # ------------------------------------------------------------------ weights

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: our initialisers are transformers', which leave loaded tensors alone. As custom code, modules without
        parameters of their own (CLIP's attention) would not be initialised when their weights are missing."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CLIPStem):
            init_clip_stem_weights(module)

    @classmethod
    def from_pretrained(cls, *args: Any, allow_missing_keys: bool = False, **kwargs: Any) -> Any:
        """transformers' `from_pretrained`, and: a checkpoint of another method or one that leaves weights unset is an
        error (`allow_missing_keys=True` initialises them instead), frozen parameters are frozen again, and the licence
        of the weights is logged."""
        wants_info = kwargs.pop("output_loading_info", False)
        with loading_explained(kwargs.get("pretrained_model_name_or_path", args[0] if args else None)):
            cls._refuse_other_method(args, kwargs)
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        if missing and not allow_missing_keys:
            raise ValueError(
                f"The checkpoint leaves {len(missing)} weights of {cls.__name__} unset ({', '.join(missing[:5])}"
                f"{', ...' if len(missing) > 5 else ''}): it is incomplete or of another variant. "
                f"allow_missing_keys=True initialises them at random."
            )
        model.freeze_pretrained()
        if model.config.weights_license:
            # a warning, because transformers shows nothing less by default; once in a process
            logger.warning_once(f"Licence of these weights: {model.config.weights_license}")
        return (model, info) if wants_info else model

    @classmethod
    def _refuse_other_method(cls, args: tuple, kwargs: dict[str, Any]) -> None:
        source = kwargs.get("pretrained_model_name_or_path", args[0] if args else None)
        if kwargs.get("config") is not None or source is None:
            return
        hub = {k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only", "subfolder") if k in kwargs}
        found = OpenVocabularySegmentationConfig.get_config_dict(source, **hub)[0].get("model_type")
        wanted = cls.config_class.model_type
        if found is not None and found != wanted:
            raise ValueError(
                f"{source} is a checkpoint of model type {found!r}, {cls.__name__} loads {wanted!r}. "
                f"AutoModelForOpenVocabularySegmentation.from_pretrained picks the class itself."
            )

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> Any:
        """transformers' `save_pretrained`, writing the model's own key names."""
        return super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)
