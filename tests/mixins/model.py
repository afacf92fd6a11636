"""The checks that every model has to pass; a method's test class adds its tiny configuration."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import attach_execution_device_hook
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_utils import local_torch_dtype

from ov_segmentation import AutoModelForOpenVocabularySegmentation
from ov_segmentation.auto import load_class
from ov_segmentation.configuration_base import configurations
from ov_segmentation.download_errors import LoadingError
from ov_segmentation.layers.clip_stem import CLIPModelWithStem, CLIPStem
from ov_segmentation.modeling_base import OpenVocabularySegmentationModel
from ov_segmentation.modeling_outputs import OpenVocabularySegmentationOutput
from ov_segmentation.picture_side import logger
from tests.tiny import TOKENIZER, random_embeddings, tiny_clip_config

PREDICTIONS = ("class_queries_logits", "class_queries_scores", "masks_queries_logits", "logits")


class ModelTesterMixin:
    """Subclass it as `class TestX(ModelTesterMixin)` and give the attributes and `config_values`.

    Attributes:
        name: display name of the method ("SAN").
        picture_size: (height, width) of the pictures that most tests use.
        odd_sizes: other sizes that have to work.
        wrong_values: config field -> a value of a wrong type.
        prompts: P of the embeddings, where the method keeps its prompts.
        num_classes: K where a test does not say otherwise.
        export_config: changes of the configuration without which a model cannot be exported.
        exports_any_number_of_classes: whether the number of classes stays open in an exported model.
        kept_in_float32: names of the tensors that are not loaded in half precision.
        rounding: what outputs of the same weights may differ by, where they lie elsewhere in memory.
        has_hidden_states: whether the method has some to give.
    """

    name: ClassVar[str]
    picture_size: ClassVar[tuple[int, int]] = (64, 64)
    odd_sizes: ClassVar[list[tuple[int, int]]] = [(64, 96), (96, 64), (70, 81)]
    wrong_values: ClassVar[dict[str, Any]] = {"sliding_window": "yes", "weights_license": 3}
    prompts: ClassVar[int] = 2
    num_classes: ClassVar[int] = 3
    export_config: ClassVar[dict[str, Any]] = {}
    exports_any_number_of_classes: ClassVar[bool] = True
    kept_in_float32: ClassVar[set[str]] = {"clip.logit_scale"}
    rounding: ClassVar[float] = 0
    has_hidden_states: ClassVar[bool] = True

    def config_values(self) -> dict[str, Any]:
        """Arguments of the tiny configuration."""
        raise NotImplementedError

    # ------------------------------------------------------------------ helpers

    @property
    def model_class(self) -> type[OpenVocabularySegmentationModel]:
        return load_class(f"{self.name}ForOpenVocabularySegmentation")

    def config(self, **changes: Any) -> Any:
        return load_class(f"{self.name}Config")(**{**self.config_values(), **changes})

    def model(self, **changes: Any) -> OpenVocabularySegmentationModel:
        """A tiny model with the same weights at every call, in evaluation mode."""
        torch.manual_seed(0)
        return self.model_class(self.config(**changes)).eval()

    def pictures(self, batch: int = 1, size: tuple[int, int] | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
        """What the image processor would give for unpadded pictures."""
        height, width = size or self.picture_size
        sizes = torch.tensor([[height, width]] * batch)
        generator = torch.Generator().manual_seed(seed)
        return {
            "pixel_values": torch.randn(batch, 3, height, width, generator=generator),
            "pixel_mask": torch.ones(batch, height, width, dtype=torch.long),
            "original_sizes": sizes,
            "reshaped_input_sizes": sizes,
            "padded_sizes": sizes,
        }

    def text(self, model: OpenVocabularySegmentationModel, classes: int | None = None, seed: int = 0) -> torch.Tensor:
        """Random class embeddings of the right shape."""
        prompts = (self.prompts,) if model.keeps_prompts else ()
        return random_embeddings(classes or self.num_classes, *prompts, model.embedding_size, seed=seed)

    def token_ids(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Token ids `[K, 1, L]` of bare names."""
        tokens = TOKENIZER(names, padding=True, return_tensors="pt")
        return {key: tokens[key][:, None] for key in ("input_ids", "attention_mask")}

    def labels(self, batch: int = 1) -> torch.Tensor:
        """Label maps in blocks, with some ignored pixels."""
        height, width = self.picture_size
        labels = torch.zeros(batch, height, width, dtype=torch.long)
        labels[:, : height // 2] = 1
        labels[:, :, : width // 4] = 2
        labels[:, -4:] = -100
        return labels

    def training_inputs(self, model: OpenVocabularySegmentationModel, batch: int = 2) -> dict[str, torch.Tensor]:
        """A training batch, with texts where the text side is trained."""
        names = ["road", "a tree", "sky"]
        text = self.token_ids(names) if model.trains_text else {"text_embeds": self.text(model)}
        seeds = torch.arange(batch)
        return {**self.pictures(batch), **text, "labels": self.labels(batch), "sample_seeds": seeds}

    @staticmethod
    def predictions(outputs: OpenVocabularySegmentationOutput) -> dict[str, torch.Tensor]:
        return {name: outputs[name] for name in PREDICTIONS if outputs.get(name) is not None}

    def run(self, model: OpenVocabularySegmentationModel, batch: int = 1, **options: Any) -> dict[str, torch.Tensor]:
        """The predictions for random pictures and classes."""
        with torch.no_grad():
            return self.predictions(model(**self.pictures(batch), text_embeds=self.text(model), **options))

    def assert_same(
        self, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 0
    ) -> None:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            close = max(tolerance, self.rounding)
            torch.testing.assert_close(found[name], value, rtol=0, atol=close, msg=lambda m, n=name: f"{n}: {m}")

    # ------------------------------------------------------------------ configuration

    def test_config_survives_json(self, tmp_path: Path) -> None:
        config = self.config()
        config.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert type(loaded) is type(config)

        def values(config: Any) -> dict[str, Any]:
            return {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}

        assert values(loaded) == values(config)

    def test_config_refuses_wrong_types(self) -> None:
        for field, value in self.wrong_values.items():
            with pytest.raises(StrictDataclassFieldValidationError, match=field):
                self.config(**{field: value})

    def test_legacy_end_token_is_repaired(self) -> None:
        config = self.config()
        clip = config.clip_config.to_dict()
        clip["text_config"]["eos_token_id"] = 2
        assert self.config(clip_config=clip).clip_config.text_config.eos_token_id == TOKENIZER.eos_token_id

    # ------------------------------------------------------------------ saving and loading

    def test_auto_classes_load_what_was_saved(self, tmp_path: Path) -> None:
        model = self.model()
        model.save_pretrained(tmp_path)
        for auto in (AutoModel, AutoModelForOpenVocabularySegmentation):
            loaded = auto.from_pretrained(tmp_path)
            assert type(loaded) is self.model_class
            self.assert_same(self.run(loaded), self.run(model))

    def test_loading_restores_weights_and_buffers(self, tmp_path: Path) -> None:
        model = self.model()
        model.save_pretrained(tmp_path)
        loaded = self.model_class.from_pretrained(tmp_path)
        for kind in ("named_parameters", "named_buffers"):
            found, expected = dict(getattr(loaded, kind)()), dict(getattr(model, kind)())
            assert found.keys() == expected.keys()
            assert [name for name in expected if not torch.equal(found[name], expected[name])] == []

    def test_nothing_stays_on_the_meta_device(self, tmp_path: Path) -> None:
        self.model().save_pretrained(tmp_path)
        loaded = self.model_class.from_pretrained(tmp_path)
        for name, module in loaded.named_modules():
            tensors = {**module._parameters, **module._buffers, **vars(module)}
            meta = [key for key, value in tensors.items() if isinstance(value, torch.Tensor) and value.is_meta]
            assert not meta, f"{name}: {meta}"

    def test_frozen_parameters_stay_frozen_after_loading(self, tmp_path: Path) -> None:
        model = self.model()
        model.save_pretrained(tmp_path)
        loaded = self.model_class.from_pretrained(tmp_path)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert trained == {name for name, p in loaded.named_parameters() if p.requires_grad}

    def test_missing_weights_are_an_error_or_initialised(self, tmp_path: Path) -> None:
        model = self.model()
        model.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        gone = random.Random(0).sample(sorted(weights), len(weights) // 2)
        save_file({k: v for k, v in weights.items() if k not in gone}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f"leaves {len(gone)} weights"):
            self.model_class.from_pretrained(tmp_path)
        loaded = self.model_class.from_pretrained(tmp_path, allow_missing_keys=True).state_dict()
        fresh = model.state_dict()
        for name, value in loaded.items():
            assert value.isfinite().all(), name
            if name not in gone:
                assert torch.equal(value, fresh[name]), name
            elif value.numel() >= 64:
                found, expected = (x.float().std().item() for x in (value, fresh[name]))
                assert expected / 2 <= found <= expected * 2, f"{name}: std {found}, freshly made {expected}"

    def test_both_key_formats_load(self, tmp_path: Path) -> None:
        model = self.model()
        own_names = set(model.state_dict())
        for original_format in (False, True):
            folder = tmp_path / str(original_format)
            model.save_pretrained(folder, save_original_format=original_format)
            if not original_format:
                assert set(load_file(folder / "model.safetensors")) == own_names
            self.assert_same(self.run(self.model_class.from_pretrained(folder)), self.run(model))

    def test_bfloat16_survives_saving(self, tmp_path: Path) -> None:
        self.model().save_pretrained(tmp_path / "float32")
        model = self.model_class.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
        assert all(value.isfinite().all() for value in self.run(model).values())
        model.save_pretrained(tmp_path / "bfloat16")
        loaded = self.model_class.from_pretrained(tmp_path / "bfloat16")
        assert loaded.dtype == torch.bfloat16
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_a_model_built_by_a_loaded_configuration_is_of_one_dtype(self, dtype: torch.dtype, tmp_path: Path) -> None:
        """Torch's default, though every part of the configuration names the dtype of the checkpoint."""
        self.model().to(torch.bfloat16).save_pretrained(tmp_path / "loaded")
        config = self.model_class.from_pretrained(tmp_path / "loaded").config
        with local_torch_dtype(dtype):
            model = self.model_class(config).eval()
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                assert value.dtype == (torch.float32 if model.stays_in_float32(name) else dtype), name
        self.run(model)
        model.save_pretrained(tmp_path / "built")
        loaded = self.model_class.from_pretrained(tmp_path / "built").state_dict()
        for name, value in model.state_dict().items():
            assert torch.equal(loaded[name], value), name
            assert loaded[name].dtype == value.dtype, name

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_keeps_what_needs_more(self, dtype: torch.dtype, tmp_path: Path) -> None:
        exact = self.model()
        exact.save_pretrained(tmp_path)
        model = self.model_class.from_pretrained(tmp_path, dtype=dtype)
        assert model.dtype == dtype
        weights = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
        kept = {name: value for name, value in weights.items() if value.dtype == torch.float32}
        assert kept.keys() == self.kept_in_float32
        assert all(torch.equal(value, exact.state_dict()[name]) for name, value in kept.items())
        assert {value.dtype for name, value in weights.items() if name not in kept} == {dtype}
        found = self.run(model)
        # classes are compared by these: rounded, many would be equal
        assert {found[name].dtype for name in found if name != "masks_queries_logits"} == {torch.float32}
        for name, expected in self.run(exact).items():
            allowed = 8 * torch.finfo(dtype).eps * (expected.max() - expected.min()).item()
            torch.testing.assert_close(
                found[name].float(), expected, rtol=0, atol=allowed, msg=lambda m, n=name: f"{n}: {m}"
            )

    def test_hooks_of_accelerate_change_nothing(self) -> None:
        """They hand every module a copy of the lists that it is called with."""
        model = self.model()
        expected = self.run(model)
        attach_execution_device_hook(model, torch.device("cpu"))
        self.assert_same(self.run(model), expected)

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("offload", "dtype"),
        [
            ("cpu_offload", torch.float32),
            ("disk_offload", torch.bfloat16),
            ("a part on disk", torch.float32),
            ("all on disk", torch.bfloat16),
        ],
        ids=str,
    )
    def test_offloaded_weights_are_at_hand(self, offload: str, dtype: torch.dtype, tmp_path: Path) -> None:
        self.model().save_pretrained(tmp_path / "model")
        exact, model = (self.model_class.from_pretrained(tmp_path / "model", dtype=dtype) for _ in range(2))
        if offload == "cpu_offload":
            cpu_offload(model, torch.device("cpu"))
        elif offload == "disk_offload":
            disk_offload(model, tmp_path / "weights", torch.device("cpu"))
        else:
            parts = dict.fromkeys((name.split(".")[0] for name in model.state_dict()), "cpu")
            parts["clip" if "clip" in parts else "text_model"] = "disk"
            model = self.model_class.from_pretrained(
                tmp_path / "model",
                dtype=dtype,
                device_map=parts if offload == "a part on disk" else {"": "disk"},
                offload_folder=tmp_path / "weights",
            )
        tokens = self.token_ids(["road", "a tree", "sky"])
        away = [parameter.is_meta for parameter in model.parameters()]
        assert any(away)
        assert model.device == torch.device("cpu")
        expected = self.predictions(exact(**self.pictures(), **tokens))
        for _ in range(2):
            self.assert_same(self.predictions(model(**self.pictures(), **tokens)), expected)
            with pytest.raises(ValueError, match="neither"):
                model(**self.pictures())
            state, text = model.encode_image(**self.pictures()), model.encode_vocabulary(**tokens)
            self.assert_same(self.predictions(model(image_state=state, text_embeds=text)), expected)
            assert [parameter.is_meta for parameter in model.parameters()] == away

    def test_refuses_checkpoints_of_another_method(self, tmp_path: Path) -> None:
        config = self.config()
        config.save_pretrained(tmp_path)
        text = (tmp_path / "config.json").read_text()
        (tmp_path / "config.json").write_text(text.replace(f'"{config.model_type}"', '"another_method"'))
        with pytest.raises(ValueError, match="another_method"):
            self.model_class.from_pretrained(tmp_path)

    def test_refuses_a_configuration_of_another_method(self) -> None:
        other = "SED" if self.name == "SAN" else "SAN"
        with pytest.raises(TypeError, match=f"needs a {self.name}Config, got a {other}Config"):
            self.model_class(load_class(f"{other}Config")())

    def test_can_be_built_without_memory(self) -> None:
        with torch.device("meta"):
            model = self.model_class(self.config())
        assert all(p.is_meta for p in model.parameters())
        assert not [name for name in model.state_dict() if "num_batches_tracked" in name]

    # ------------------------------------------------------------------ forward

    def test_runs_are_repeatable(self) -> None:
        model = self.model()
        self.assert_same(self.run(model), self.run(model))

    def test_can_be_pickled_after_a_call(self) -> None:
        model = self.model()
        expected = self.run(model)
        self.assert_same(self.run(pickle.loads(pickle.dumps(model))), expected)

    def test_outputs_have_the_documented_shapes(self) -> None:
        model = self.model()
        for batch, classes in ((1, 1), (2, 1), (1, 4), (2, 4)):
            with torch.no_grad():
                outputs = model(**self.pictures(batch), text_embeds=self.text(model, classes))
            if outputs.logits is None:
                queries = getattr(model.config, "mask_config", model.config).num_queries
                assert outputs.class_queries_logits.shape == (batch, queries, classes + 1)
                assert outputs.class_queries_scores.shape == (batch, queries, classes)
                assert outputs.masks_queries_logits.shape[:2] == (batch, queries)
                assert outputs.class_queries_scores.min() >= 0
            else:
                assert outputs.logits.shape[:2] == (batch, classes)
                assert outputs.score_function in ("sigmoid", "softmax")
            assert len(outputs.text_embeds) == classes
            for name in ("original_sizes", "reshaped_input_sizes", "padded_sizes"):
                assert outputs[name].shape == (batch, 2)

    def test_any_picture_size(self) -> None:
        model = self.model()
        for size in self.odd_sizes:
            with torch.no_grad():
                outputs = model(**self.pictures(size=size), text_embeds=self.text(model))
            assert all(value.isfinite().all() for value in self.predictions(outputs).values()), size

    def test_pictures_of_a_batch_do_not_mix(self) -> None:
        model = self.model()
        batch = self.pictures(2)
        text = self.text(model)
        with torch.no_grad():
            together = self.predictions(model(**batch, text_embeds=text))
            alone = [
                self.predictions(model(**{k: v[i : i + 1] for k, v in batch.items()}, text_embeds=text))
                for i in range(2)
            ]
        self.assert_same(together, {k: torch.cat([alone[0][k], alone[1][k]]) for k in together}, 1e-4)

    def test_pictures_of_a_batch_are_encoded_alone_on_a_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And together elsewhere: no prediction differs."""
        model, counts = self.model(), []
        encode = model._encode_image
        monkeypatch.setattr(
            model, "_encode_image", lambda pixels, **inputs: counts.append(len(pixels)) or encode(pixels, **inputs)
        )
        alone = self.run(model, batch=3)
        monkeypatch.setattr(type(model), "encodes_alone", False)
        together = self.run(model, batch=3)
        assert counts == [1, 1, 1, 3]
        self.assert_same(alone, together, 1e-4)

    def test_encoded_pictures_answer_any_vocabulary(self) -> None:
        model = self.model()
        batch = self.pictures(2)
        with torch.no_grad():
            state = model.encode_image(**batch)
            for classes in (3, 1, 5):
                text = self.text(model, classes, seed=classes)
                whole = model(**batch, text_embeds=text)
                asked = model(image_state=state, text_embeds=text)
                self.assert_same(self.predictions(asked), self.predictions(whole), 1e-6)
                assert torch.equal(asked.padded_sizes, whole.padded_sizes)

    def test_an_encoded_picture_keeps_what_it_was_encoded_with(self) -> None:
        """Arguments that come too late are errors; those that say the same are not."""
        model = self.model()
        batch, text = self.pictures(), self.text(model)
        with torch.no_grad():
            state = model.encode_image(**batch)
            sizes = {name: value for name, value in batch.items() if name.endswith("sizes")}
            model(image_state=state, text_embeds=text, **sizes, sliding_window=False)
            for same in ("config", None):
                model(image_state=state, text_embeds=text, sliding_window=same)
            with pytest.raises(ValueError, match="sliding_window shapes the picture side"):
                model(image_state=state, text_embeds=text, sliding_window=True)
            with pytest.raises(ValueError, match=r"original_sizes is the image_state's own"):
                model(image_state=state, text_embeds=text, original_sizes=sizes["original_sizes"] + 1)
            state.model_type = "clip"
            with pytest.raises(ValueError, match="image_state is of a 'clip'"):
                model(image_state=state, text_embeds=text)

    def test_padding_that_is_seen_is_warned_of(self, caplog: pytest.LogCaptureFixture) -> None:
        model, batch = self.model(), self.pictures(2, (96, 96))
        batch["reshaped_input_sizes"] = torch.tensor([[96, 96], [64, 96]])
        logger.warning_once.cache_clear()
        with caplog.at_level("WARNING"), torch.no_grad():
            model(**{name: value[:1] for name, value in batch.items()}, text_embeds=self.text(model))
            assert "different sizes" not in caplog.text
            model(**batch, text_embeds=self.text(model))
        assert ("different sizes" in caplog.text) == model.sees_padding

    def test_the_configuration_may_ask_for_records(self) -> None:
        model = self.model()
        model.config.output_hidden_states = True
        with torch.no_grad():
            if not self.has_hidden_states:
                with pytest.raises(ValueError, match="output_hidden_states: this method has nothing"):
                    model(**self.pictures(), text_embeds=self.text(model))
                return
            found = model(**self.pictures(), text_embeds=self.text(model))
            told = model(**self.pictures(), text_embeds=self.text(model), output_hidden_states=True)
            assert len(found.hidden_states) == len(told.hidden_states)
            assert (
                model(**self.pictures(), text_embeds=self.text(model), output_hidden_states=False).hidden_states is None
            )

    def test_texts_and_their_embeddings_give_the_same(self) -> None:
        model = self.model()
        tokens = self.token_ids(["road", "a tree", "sky"])
        with torch.no_grad():
            embeds = model.encode_vocabulary(**tokens)
            given = model(**self.pictures(), **tokens)
            self.assert_same(
                self.predictions(given), self.predictions(model(**self.pictures(), text_embeds=embeds)), 1e-6
            )
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(embeds.shape[:-1]))

    def test_tuple_outputs(self) -> None:
        model = self.model()
        with torch.no_grad():
            outputs = model(**self.pictures(), text_embeds=self.text(model))
            as_tuple = model(**self.pictures(), text_embeds=self.text(model), return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert len(as_tuple) == len(outputs.to_tuple())
        torch.testing.assert_close(as_tuple[0], outputs.to_tuple()[0])

    def test_attention_implementations_agree(self) -> None:
        model = self.model()
        model.set_attn_implementation("sdpa")
        fast = self.run(model)
        model.set_attn_implementation("eager")
        self.assert_same(self.run(model), fast, 1e-4)

    def test_a_loss_is_taken_on_whole_pictures(self) -> None:
        """Also of a model whose configuration asks for views, as that of a released checkpoint may."""
        model = self.model()
        inputs, losses = self.training_inputs(model), []
        for model.config.sliding_window in (False, True):
            torch.manual_seed(0)
            losses.append(model(**inputs).loss)
        assert torch.equal(*losses)
        with pytest.raises(ValueError, match="whole pictures"):
            model(**inputs, sliding_window=True)

    def test_sliding_window_gives_one_row_per_view(self) -> None:
        model = self.model()
        with torch.no_grad():
            outputs = model(**self.pictures(2), text_embeds=self.text(model), sliding_window=True)
        views = len(outputs.view_boxes)
        assert outputs.view_boxes.shape == (views, 4)
        assert all(len(value) == 2 * views for value in self.predictions(outputs).values())
        height, width = outputs.canvas_size
        assert outputs.view_boxes.min() >= 0
        assert outputs.view_boxes[:, 0::2].max() == width
        assert outputs.view_boxes[:, 1::2].max() == height

    # ------------------------------------------------------------------ bad input

    def test_needs_exactly_one_kind_of_text(self) -> None:
        model = self.model()
        tokens, text = self.token_ids(["road"]), self.text(model)
        with pytest.raises(ValueError, match="neither"):
            model(**self.pictures())
        with pytest.raises(ValueError, match="both"):
            model(**self.pictures(), **tokens, text_embeds=text)

    def test_needs_exactly_one_kind_of_picture(self) -> None:
        model = self.model()
        with torch.no_grad(), pytest.raises(ValueError, match="image_state"):
            model(text_embeds=self.text(model))
        with torch.no_grad(), pytest.raises(ValueError, match="image_state"):
            model(**self.pictures(), image_state=model.encode_image(**self.pictures()), text_embeds=self.text(model))

    def test_refuses_embeddings_of_another_width(self) -> None:
        model = self.model()
        text = self.text(model)
        with pytest.raises(ValueError, match=str(text.shape[-1])):
            model(**self.pictures(), text_embeds=text[..., :-1])

    def test_refuses_pictures_of_another_layout(self) -> None:
        model = self.model()
        with pytest.raises(ValueError, match="pixel_values must be"):
            model(pixel_values=torch.zeros(1, 64, 64, 3), text_embeds=self.text(model))

    def test_refuses_what_is_no_tensor(self) -> None:
        model = self.model()
        pixels, text = self.pictures()["pixel_values"], self.text(model)
        with pytest.raises(TypeError, match=r'pixel_values must be a tensor, got list: pass return_tensors="pt"'):
            model(pixels.tolist(), text_embeds=text)
        with pytest.raises(TypeError, match="text_embeds must be a tensor, got ndarray"):
            model(pixels, text_embeds=text.numpy())
        with pytest.raises(TypeError, match="input_ids must be a tensor, got list"):
            model(pixels, input_ids=[[[1, 2]]])
        with pytest.raises(TypeError, match="attention_mask must be a tensor, got list"):
            model(pixels, input_ids=torch.ones(1, 1, 2, dtype=torch.long), attention_mask=[[[1, 1]]])
        with pytest.raises(TypeError, match="reshaped_input_sizes must be a tensor, got list"):
            model(pixels, reshaped_input_sizes=[list(pixels.shape[-2:])], text_embeds=text)
        with pytest.raises(TypeError, match="pixel_mask must be a tensor, got list"):
            model(pixels, self.pictures()["pixel_mask"].tolist(), text_embeds=text)
        with pytest.raises(TypeError, match="labels must be a tensor, got list"):
            model(pixels, text_embeds=text, labels=self.labels().tolist())
        with pytest.raises(TypeError, match="image_state is what encode_image returns, got dict"):
            model(image_state={}, text_embeds=text)

    def test_refuses_another_number_of_rows(self) -> None:
        model = self.model()
        inputs = {**self.pictures(2), "text_embeds": self.text(model)}
        for name in ("original_sizes", "reshaped_input_sizes", "padded_sizes"):
            for wrong in (inputs[name][:1], inputs[name][:, :1]):
                with pytest.raises(ValueError, match=rf"{name} must be \[2, 2\], .*got \[{wrong.shape[0]}, "):
                    model(**{**inputs, name: wrong})
        for wrong in (inputs["pixel_mask"][:1], inputs["pixel_mask"][:, 1:], inputs["pixel_mask"][:, None]):
            with pytest.raises(ValueError, match=r"pixel_mask .* must have the batch and picture size"):
                model(**{**inputs, "pixel_mask": wrong})
        with pytest.raises(ValueError, match=r"none of them 0; got \[0, 3"):
            model(inputs["pixel_values"][:0], text_embeds=inputs["text_embeds"])
        with pytest.raises(ValueError, match=r"sample_seeds must be \[2\].* got \[3\]"):
            model.draws(torch.arange(3), 2)

    def test_refuses_unknown_switches(self) -> None:
        model = self.model()
        with pytest.raises(TypeError, match="no_such_switch"):
            model(**self.pictures(), text_embeds=self.text(model), no_such_switch=1)
        for switch in model.switches | model.picture_switches:
            # the one switch that takes text refuses this by itself
            with pytest.raises((TypeError, ValueError), match=f"{switch}.*'false'"):
                model(**self.pictures(), text_embeds=self.text(model), **{switch: "false"})

    def test_refuses_labels_that_do_not_fit(self) -> None:
        model = self.model()
        inputs = {**self.pictures(), "text_embeds": self.text(model)}
        with pytest.raises(ValueError, match="size of pixel_values"):
            model(**inputs, labels=self.labels()[:, 1:])
        with pytest.raises(ValueError, match="class 255"):
            model(**inputs, labels=torch.full_like(self.labels(), 255))
        with pytest.raises(ValueError, match=r"labels hold -1, .*Pass ignore_index=-1"):
            model(**inputs, labels=torch.full_like(self.labels(), -1))
        with pytest.raises(TypeError, match=r"int64 class indices, got torch\.float32"):
            model(**inputs, labels=self.labels().float())

    # ------------------------------------------------------------------ training

    def gradients(self, model: OpenVocabularySegmentationModel) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        outputs = model(**self.training_inputs(model))
        torch.testing.assert_close(outputs.loss, sum(outputs.loss_dict.values()))
        outputs.loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def test_a_step_trains_exactly_what_is_trained(self) -> None:
        model = self.model().train()
        gradients = self.gradients(model)
        assert set(gradients) == {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(value.isfinite().all() for value in gradients.values())

    def test_the_loss_depends_on_the_seeds_only(self) -> None:
        model = self.model().train()
        inputs = self.training_inputs(model)
        with torch.no_grad():
            first, again = model(**inputs).loss, model(**inputs).loss
        assert torch.equal(first, again)

    def test_a_loss_is_taken_of_all_classes(self) -> None:
        """A configuration that rejects classes early, as the fast ones do, can be trained."""
        model = self.model().train()
        if "rejection_top_k" not in model.switches:
            assert not hasattr(model.config, "rejection_top_k")
            return
        expected = model(**self.training_inputs(model)).loss_dict
        model.config.rejection_top_k = 1
        found = model(**self.training_inputs(model)).loss_dict
        assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in expected.items()}

    def test_labels_change_no_prediction(self) -> None:
        model = self.model()
        inputs = self.training_inputs(model)
        with torch.no_grad():
            found = self.predictions(model(**inputs))
            del inputs["labels"]
            self.assert_same(found, self.predictions(model(**inputs)), 1e-4)

    def test_transformers_trainer(self, tmp_path: Path) -> None:
        model, seen = self.model(), []
        trainer = Trainer(
            model,
            TrainingArguments(
                str(tmp_path),
                max_steps=2,
                per_device_train_batch_size=2,
                per_device_eval_batch_size=2,
                remove_unused_columns=False,
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
            ),
            data_collator=lambda rows: self.training_inputs(model, len(rows)),
            train_dataset=list(range(4)),
            eval_dataset=list(range(4)),
            compute_metrics=lambda found: seen.append(found) or {"pictures": len(found.label_ids)},
        )
        before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
        assert trainer.train().training_loss > 0
        assert any(not torch.equal(value, before[name]) for name, value in model.named_parameters() if name in before)
        assert trainer.evaluate()["eval_pictures"] == 4
        assert all(len(value) == 4 for value in seen[0].predictions)

    @pytest.mark.parametrize("option", [{"batch_eval_metrics": True}, {"eval_do_concat_batches": False}], ids=str)
    def test_transformers_trainer_with_pictures_of_different_sizes(
        self, option: dict[str, bool], tmp_path: Path
    ) -> None:
        """By default it joins the outputs of all batches, which do not fit."""
        model, labels = self.model(), []

        def batch(rows: list[int]) -> dict[str, torch.Tensor]:
            size = self.odd_sizes[rows[0] // 2]
            wanted = torch.zeros(len(rows), *size, dtype=torch.long)
            return {**self.training_inputs(model, len(rows)), **self.pictures(len(rows), size), "labels": wanted}

        def metrics(found: EvalPrediction, compute_result: bool = True) -> dict[str, int]:
            labels.extend(found.label_ids if "eval_do_concat_batches" in option else [found.label_ids])
            return {"batches": len(labels)}

        shared = {"remove_unused_columns": False, "use_cpu": True, "report_to": [], "disable_tqdm": True}
        options = TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, **shared, **option)
        trainer = Trainer(model, options, data_collator=batch, eval_dataset=list(range(4)), compute_metrics=metrics)
        assert trainer.evaluate()["eval_batches"] == 2
        assert [tuple(part.shape) for part in labels] == [(2, *size) for size in self.odd_sizes[:2]]

    def test_attention_implementations_by_part(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """A dict says the same at loading and later, and every part goes by its name."""
        model = self.model()
        expected = self.run(model)
        model.save_pretrained(tmp_path)
        parts = list(configurations(model.config))
        for module in model.modules():
            assert any(getattr(module, "config", part) is part for part in parts), type(module).__name__
        for name in ("", *model.config.sub_configs):
            if name and isinstance(getattr(model.config, name), ConvNextConfig | None):  # without attention
                continue
            model = self.model_class.from_pretrained(tmp_path)
            model.set_attn_implementation({name: "eager"})
            loaded = self.model_class.from_pretrained(tmp_path, attn_implementation={name: "eager"})
            found, wanted = ([p._attn_implementation for p in configurations(m.config)] for m in (model, loaded))
            assert found == wanted
            part = getattr(model.config, name) if name else model.config
            assert part._attn_implementation == "eager"
            assert "sdpa" in found
            self.assert_same(self.run(model), self.run(loaded))
            self.assert_same(self.run(model), expected, 1e-4)
            with pytest.raises(ValueError, match="fastest"):
                model.set_attn_implementation({name: "fastest"})
            assert [part._attn_implementation for part in configurations(model.config)] == found
        assert "attention implementation" not in caplog.text

    def test_labels_go_to_the_device_of_the_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As pictures and texts do; the meta device stands for a GPU."""
        inputs = self.training_inputs(self.model())
        with torch.device("meta"):
            model = self.model_class(self.config()).train()
        outputs, seen = OpenVocabularySegmentationOutput(), []
        monkeypatch.setattr(model, "_segment", lambda state, text, labels, **_: seen.append(labels.device) or outputs)
        if "input_ids" in inputs:  # a text's end cannot be found there
            inputs = {name: inputs[name] for name in inputs if name not in ("input_ids", "attention_mask")}
            inputs["text_embeds"] = self.text(model)
        model(**inputs)
        assert seen == [model.device]

    def test_a_picture_without_labels_has_a_loss(self) -> None:
        model = self.model().train()
        inputs = self.training_inputs(model)
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
        loss = model(**inputs).loss
        loss.backward()
        assert loss.isfinite()

    def test_activation_checkpointing_changes_no_gradient(self) -> None:
        model = self.model().train()
        plain = self.gradients(model)
        model.activation_checkpointing_enable()
        checkpointed = self.gradients(model)
        self.assert_same(checkpointed, plain, 1e-4)

    # ------------------------------------------------------------------ compilers

    def test_compiles_without_graph_breaks(self) -> None:
        model = self.model()
        expected = self.run(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            found = compiled(**self.pictures(), text_embeds=self.text(model))
        self.assert_same(self.predictions(found), expected, 1e-4)

    @pytest.mark.slow
    def test_compiles_to_machine_code(self) -> None:
        model = self.model(**self.export_config)
        expected = self.run(model)
        torch._dynamo.reset()
        self.assert_same(self.run(torch.compile(model, fullgraph=True)), expected, 1e-4)

    def test_can_be_exported(self) -> None:
        model = self.model(**self.export_config)
        inputs = {"pixel_values": self.pictures()["pixel_values"], "text_embeds": self.text(model, 5)}
        classes = {0: torch.export.Dim("classes", max=4096)} if self.exports_any_number_of_classes else None
        with torch.no_grad():
            shapes = {"pixel_values": None, "text_embeds": classes}
            program = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
            for count in (5, 2, 9) if classes else (5,):
                inputs["text_embeds"] = self.text(model, count, seed=count)
                found, expected = program(**inputs), model(**inputs)
                self.assert_same(self.predictions(found), self.predictions(expected), 1e-5)


class FromCLIPTesterMixin:
    """For methods with a `CLIPModel`: `from_clip` takes weights and sizes from it."""

    clip_pixels: ClassVar[int] = 32
    clip_values: ClassVar[dict[str, Any]] = {}

    def clip(self, **vision: Any) -> CLIPModel:
        torch.manual_seed(1)
        values = {"image_size": self.clip_pixels, **vision}
        return CLIPModel(CLIPConfig.from_dict(tiny_clip_config(**values)))

    def test_from_clip_takes_weights_and_sizes(self, tmp_path: Path) -> None:
        clip = self.clip()
        clip.config.text_config.eos_token_id = 2  # as in OpenAI's checkpoints on the Hub
        clip.save_pretrained(tmp_path)
        for source in (tmp_path, str(tmp_path), clip):
            model = self.model_class.from_clip(source, **self.clip_values)
            for name, value in clip.state_dict().items():
                assert torch.equal(model.clip.state_dict()[name], value), name
            assert model.config.clip_config.text_config.eos_token_id == TOKENIZER.eos_token_id
        assert model.config.clip_config.vision_config.hidden_size == clip.config.vision_config.hidden_size
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained
        self.run(model.eval())

    def test_from_clip_says_what_is_not_there(self) -> None:
        with pytest.raises(LoadingError, match="nowhere/at-all is no folder here"):
            self.model_class.from_clip("nowhere/at-all", **self.clip_values)

    def test_from_clip_refuses_a_field_that_there_is_not(self) -> None:
        with pytest.raises(ValueError, match=r"field 'initializer_rang'. Did you mean 'initializer_range'"):
            self.model_class.from_clip(self.clip(), **self.clip_values, initializer_rang=0.1)
        with pytest.raises(ValueError, match=r"'clip_config\.vision_config\.patch_sice'. Did you mean 'patch_size'"):
            self.model_class.from_clip(self.clip(), clip_config={"vision_config": {"patch_sice": 16}})

    def test_from_clip_is_in_float32_around_a_clip_of_half_precision(self, tmp_path: Path) -> None:
        self.clip().bfloat16().save_pretrained(tmp_path)
        model = self.model_class.from_clip(tmp_path, **self.clip_values).eval()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        self.run(model)

    def test_from_clip_keeps_a_convolutional_stem(self, tmp_path: Path) -> None:
        config = CLIPConfig.from_dict(tiny_clip_config(image_size=self.clip_pixels))
        config.clip_stem = {"hidden_sizes": [8, 16, 32], "depths": [1, 1, 1], "num_groups": 4}
        torch.manual_seed(1)
        clip = CLIPModelWithStem(config)
        clip.save_pretrained(tmp_path / "clip", save_original_format=False)
        model = self.model_class.from_clip(tmp_path / "clip", **self.clip_values).eval()
        stem = model.clip.vision_model.embeddings.patch_embedding
        assert isinstance(stem, CLIPStem)
        for name, value in clip.state_dict().items():
            assert torch.equal(model.clip.state_dict()[name], value), name
        model.save_pretrained(tmp_path / "model")
        self.assert_same(self.run(self.model_class.from_pretrained(tmp_path / "model")), self.run(model))
