"""SED: the shared checks, early rejection, chunks, and what its configuration changes."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from conversion.convert_sed import VARIANTS
from ov_segmentation.conversion import ConversionError
from ov_segmentation.layers.convnext_clip import ConvNextCLIPConfig, ConvNextCLIPModel
from ov_segmentation.models.sed.blocks import LargeKernelBlock
from ov_segmentation.models.sed.chunks import best_classes
from ov_segmentation.models.sed.configuration_sed import SEDConfig
from ov_segmentation.models.sed.decoder import REJECTED
from ov_segmentation.models.sed.image_processing_sed import SEDImageProcessor
from ov_segmentation.models.sed.modeling_sed import SEDForOpenVocabularySegmentation
from ov_segmentation.training.building import select_trainable
from ov_segmentation.training.optimization import parameter_settings
from ov_segmentation.training.recipe import load_recipe
from tests.mixins.conversion import ConversionTesterMixin
from tests.mixins.model import ModelTesterMixin
from tests.mixins.pipeline import PipelineTesterMixin
from tests.tiny import TOKENIZER, random_embeddings, tiny_clip_config, tiny_pictures

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
TEXT = {**tiny_clip_config()["text_config"], "hidden_act": "gelu"}
VISION = {
    "model_type": "convnext",
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 2, 1],
    "layer_norm_eps": 1e-6,
    # not the tiny scale of fresh weights, with which blocks do nothing that a test could see
    "layer_scale_init_value": 1.0,
    "initializer_range": 0.1,
}
PLAIN = {**tiny_clip_config()["vision_config"], "model_type": "clip_vision_model"}


class TestSED(ModelTesterMixin, PipelineTesterMixin):
    name = "SED"
    export_config: ClassVar = {"class_chunk_size": None}
    kept_in_float32: ClassVar = set()
    wrong_values: ClassVar = {"rejection_top_k": "eight", "feature_fusion": "all", "kernel_sizes": 9}

    def config_values(self) -> dict[str, Any]:
        return {
            "vision_config": VISION,
            "text_config": TEXT,
            "num_templates": 2,
            "image_size": 64,
            "projection_type": "mlp",
            "hidden_size": 32,
            "decoder_dims": (32, 16, 16),
            "guidance_dims": (8, 4, 4),
            "window_pixels": 64,
            "window_stride": 32,
            "canvas_size": (96, 96),
        }

    def token_ids(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Token ids `[K, 2, L]`: every name twice."""
        return {key: ids.expand(-1, 2, -1) for key, ids in super().token_ids(names).items()}

    def test_legacy_end_token_is_repaired(self) -> None:
        config = self.config(text_config={**TEXT, "eos_token_id": 2})
        assert config.text_config.eos_token_id == TOKENIZER.eos_token_id

    # ------------------------------------------------------------------ what the configuration changes

    @pytest.mark.parametrize(
        "changes",
        [
            {"kernel_sizes": (7, 7, 7)},
            {"kernel_sizes": (11, 9, 9)},
            {"spatial_aggregation": False},
            {"class_aggregation": False},
            {"feature_fusion": "none"},
            {"feature_fusion": "features"},
            {"feature_fusion": "cost"},
            {"num_decoder_layers": 1},
            {"num_decoder_layers": 2},
            {"image_size": 96},
            {"image_size": (64, 96)},
            {"projection_type": "linear"},
            {"class_attention_pooling": 2},
            {"vision_config": PLAIN, "projection_type": "linear"},
            {"vision_config": PLAIN, "projection_type": "linear", "feature_fusion": "cost"},
            {"vision_config": PLAIN, "projection_type": "linear", "skip_layers": (1, 1, 0)},
            {"rejection_top_k": 1},
        ],
        ids=str,
    )
    def test_options_change_the_prediction(self, changes: dict[str, Any]) -> None:
        model = self.model(**changes)
        with torch.no_grad():
            logits = model(**self.pictures(2), text_embeds=self.text(model, 4)).logits
            usual = self.model()
            before = usual(**self.pictures(2), text_embeds=self.text(usual, 4)).logits
        height, width = model.config.input_size
        scale = 2**model.config.num_decoder_layers / model.config.encoder_stride
        assert logits.shape == (2, 4, height * scale, width * scale)
        assert logits.isfinite().all()
        assert logits.shape != before.shape or not torch.allclose(logits, before)
        loss = model.train()(**self.training_inputs(model), rejection_top_k=None).loss
        loss.backward()
        assert not [name for name, p in model.named_parameters() if p.requires_grad != (p.grad is not None)]

    def test_large_kernels_need_parameters(self) -> None:
        sizes = [self.model(kernel_sizes=(k, k, k)).num_parameters() for k in (7, 9, 11)]
        assert sizes == sorted(set(sizes))

    @pytest.mark.parametrize(
        ("stages", "trained"),
        [
            (0, set()),
            (1, {"encoder.stages.3", "layernorm"}),
            (2, {"encoder.stages.2", "encoder.stages.3", "layernorm"}),
            (3, {"encoder.stages.1", "encoder.stages.2", "encoder.stages.3", "layernorm"}),
            (4, {"embeddings", *(f"encoder.stages.{i}" for i in range(4)), "layernorm"}),
        ],
    )
    def test_trainable_stages(self, stages: int, trained: set[str]) -> None:
        model = self.model(num_trainable_stages=stages)
        found = {name for name, p in model.vision_model.named_parameters() if p.requires_grad}
        parts = {".".join(name.split(".")[: 3 if name.startswith("encoder") else 1]) for name in found}
        assert parts == trained
        assert all(p.requires_grad == (stages > 0) for p in model.visual_projection.parameters())
        assert all(p.requires_grad for p in model.decoder.parameters())

    def test_trainable_stages_of_a_plain_encoder(self) -> None:
        model = self.model(vision_config=PLAIN, projection_type="linear", num_trainable_stages=1)
        blocks = [any(p.requires_grad for p in block.parameters()) for block in model.vision_model.encoder.layers]
        assert blocks == [False, False, False, True]
        assert not any(p.requires_grad for p in model.vision_model.embeddings.parameters())

    def test_gradient_stop(self) -> None:
        gradients = {}
        for detached in (True, False):
            model = self.model(detach_image_guidance=detached).train()
            gradients[detached] = self.gradients(model)["vision_model.encoder.stages.0.layers.0.pwconv1.weight"]
        assert not torch.allclose(gradients[True], gradients[False])

    def test_auxiliary_heads_train_nothing_but_themselves(self) -> None:
        with_heads, without = (self.gradients(self.model(auxiliary_loss_weight=w).train()) for w in (1.0, 0.0))
        heads = {"decoder.cost_embedding.head.conv", "decoder.layers.0.head.conv", "decoder.layers.1.head.conv"}
        assert {name.rsplit(".", 1)[0] for name in set(with_heads) - set(without)} == heads
        for name, gradient in without.items():
            torch.testing.assert_close(with_heads[name], gradient, msg=name)

    def test_loss_terms(self) -> None:
        model = self.model().train()
        inputs = self.training_inputs(model)
        losses = {}
        for ignore_as_negative in (True, False):
            model.config.ignore_as_negative = ignore_as_negative
            losses[ignore_as_negative] = model(**inputs).loss_dict
        assert list(losses[True]) == [f"loss_sem_seg_{i}" for i in range(4)]
        assert all(losses[True][name] != losses[False][name] for name in losses[True])

    @pytest.mark.parametrize("ignore_as_negative", [True, False])
    def test_loss_of_some_classes_at_a_time_is_the_same(
        self, monkeypatch: pytest.MonkeyPatch, ignore_as_negative: bool
    ) -> None:
        model = self.model(ignore_as_negative=ignore_as_negative).train()
        whole = self.gradients(model)
        height, width = self.picture_size
        monkeypatch.setattr("ov_segmentation.losses_per_class.ELEMENTS_AT_ONCE", height * width)
        for name, gradient in self.gradients(model).items():
            torch.testing.assert_close(gradient, whole[name], rtol=0, atol=1e-6, msg=name)

    def test_pooling_in_training_is_another(self) -> None:
        model = self.model().train()
        inputs = {**self.pictures(), "text_embeds": self.text(model)}
        with torch.no_grad():
            training = model(**inputs).logits
            assert torch.equal(model.eval()(**inputs, class_attention_pooling=2).logits, training)
            assert not torch.equal(model(**inputs).logits, training)

    def test_stochastic_depth_and_dropout_act_in_training_only(self) -> None:
        for changes in ({"vision_config": {**VISION, "drop_path_rate": 0.5}}, {"projection_dropout": 0.5}):
            model = self.model(**changes)
            inputs = {**self.pictures(), "text_embeds": self.text(model)}
            assert torch.equal(model(**inputs).logits, model(**inputs).logits)
            model.train()
            assert not torch.equal(model(**inputs).logits, model(**inputs).logits)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"image_size": 100}, "multiple of 32"),
            ({"num_decoder_layers": 4}, "1 to 3"),
            ({"decoder_dims": (32, 16)}, "decoder_dims"),
            ({"decoder_dims": (32, 16, 8)}, "multiples of 16"),
            ({"kernel_sizes": (8, 9, 9)}, "odd"),
            ({"guidance_dims": (32, 4, 4)}, "below"),
            ({"num_attention_heads": 5}, "divide"),
            ({"num_trainable_stages": 5}, "0 to 4"),
            ({"rejection_top_k": 0}, "None"),
            ({"class_attention_pooling": 0}, "no pooling"),
            ({"vision_config": {"model_type": "resnet"}}, "resnet"),
            ({"vision_config": PLAIN}, "linear"),
            ({"vision_config": PLAIN, "projection_type": "linear", "skip_layers": (3, 1, 0)}, "below the last"),
        ],
        ids=str,
    )
    def test_refuses_configurations_that_do_not_fit(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(StrictDataclassClassValidationError, match=message):
            self.config(**changes)

    def test_fast_preset(self) -> None:
        config = SEDConfig.sed_fast()
        assert (config.image_size, config.rejection_top_k) == (512, 8)

    @pytest.mark.parametrize(
        ("variant", "parameters", "trained"),
        # the sheet's totals count the unused temperature
        [("convnextB_768", 180_761_741 - 1, 89_598_220), ("convnextL_768", 353_245_773 - 1, 201_243_980)],
    )
    def test_published_sizes(self, variant: str, parameters: int, trained: int) -> None:
        with torch.device("meta"):
            model = SEDForOpenVocabularySegmentation(VARIANTS[variant]())
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained

    def test_training_on_some_of_the_classes(self) -> None:
        """The loss is that of the chosen names alone; the choice holds all labels and follows the seeds."""
        model = self.model(num_training_classes=4).train()
        text = self.text(model, 9)
        inputs = {**self.training_inputs(model), "text_embeds": text}
        inputs["labels"] = torch.where(inputs["labels"] == 1, 7, inputs["labels"])
        outputs, again = model(**inputs), model(**inputs)
        chosen = outputs.kept_classes[0].nonzero().flatten()
        assert len(chosen) == 4
        assert {0, 2, 7} <= set(chosen.tolist())
        assert torch.equal(outputs.kept_classes, again.kept_classes)
        assert (outputs.logits[:, ~outputs.kept_classes[0]] == REJECTED).all()
        others = {
            tuple(model(**{**inputs, "sample_seeds": torch.tensor([i, i])}).kept_classes[0].tolist()) for i in range(9)
        }
        assert len(others) > 1
        model.config.num_training_classes = None
        labels = inputs["labels"]
        inputs["labels"] = torch.where(labels < 0, labels, torch.searchsorted(chosen, labels.clamp(min=0)))
        alone = model(**{**inputs, "text_embeds": text[chosen]})
        torch.testing.assert_close(alone.loss, outputs.loss)
        assert model.eval()(**self.pictures(), text_embeds=text).kept_classes is None

    # ------------------------------------------------------------------ rejection and chunks

    @pytest.mark.parametrize("chunk_size", [None, 1, 4, 7])
    @pytest.mark.parametrize("top_k", [None, 1, 2])
    @torch.no_grad()
    def test_chunks_and_neighbours_change_nothing(self, chunk_size: int | None, top_k: int | None) -> None:
        """A batch of three in chunks gives what each picture alone gives in one piece."""
        model = self.model()
        batch, text = self.pictures(3), self.text(model, 7)
        outputs = model(**batch, text_embeds=text, rejection_top_k=top_k, class_chunk_size=chunk_size)
        for i in range(3):
            picture = {key: value[i : i + 1] for key, value in batch.items()}
            alone = model(**picture, text_embeds=text, rejection_top_k=top_k, class_chunk_size=None)
            torch.testing.assert_close(outputs.logits[i], alone.logits[0], rtol=0, atol=2e-5)
            if top_k is not None:
                assert torch.equal(outputs.kept_classes[i], alone.kept_classes[0])
        if top_k == 1:
            assert not outputs.kept_classes.all()
            assert len(outputs.kept_classes.unique(dim=0)) > 1

    @torch.no_grad()
    def test_rejection_keeps_the_union_of_the_best(self) -> None:
        logits = torch.randn(11, 3, 4)
        kept = best_classes(logits, [5, 6], 2)
        for part, of_picture in zip(kept.split([5, 6]), logits.split([5, 6])):
            ranked = of_picture.flatten(1).T.argsort(dim=1, descending=True)[:, :2]
            assert part.nonzero().flatten().tolist() == sorted(set(ranked.flatten().tolist()))
        assert best_classes(logits, [5, 6], 8).all()

    @torch.no_grad()
    def test_rejected_classes_cost_no_work_and_score_zero(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = self.model()
        seen: list[int] = []
        forward = LargeKernelBlock.forward
        monkeypatch.setattr(
            LargeKernelBlock, "forward", lambda block, maps: (seen.append(len(maps)), forward(block, maps))[1]
        )
        text = self.text(model, 9)
        outputs = model(**self.pictures(), text_embeds=text, rejection_top_k=1, class_chunk_size=None, output_maps=True)
        alive = [int((outputs.maps[f"auxiliary_logits_{i}"] != REJECTED).flatten(2).any(-1).sum()) for i in range(3)]
        assert alive[0] == 9
        assert seen == [*alive[1:], int(outputs.kept_classes.sum())]
        assert seen[-1] < 9
        assert (outputs.logits[~outputs.kept_classes] == REJECTED).all()
        (result,) = SEDImageProcessor().post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
        rejected = ~outputs.kept_classes[0]
        assert (result.segmentation_scores[rejected] == 0).all()
        assert (result.segmentation_scores[~rejected] > 0).all()
        assert set(result.segmentation.unique().tolist()) <= set(outputs.kept_classes[0].nonzero().flatten().tolist())

    @pytest.mark.parametrize(("classes", "top_k"), [(1, 8), (1, 1), (3, 8), (3, 3)])
    @torch.no_grad()
    def test_fewer_classes_than_are_kept(self, classes: int, top_k: int) -> None:
        model = self.model()
        text = self.text(model, classes)
        outputs = model(**self.pictures(2), text_embeds=text, rejection_top_k=top_k)
        assert outputs.kept_classes.all()
        torch.testing.assert_close(outputs.logits, model(**self.pictures(2), text_embeds=text).logits)

    @torch.no_grad()
    def test_many_classes_in_bounded_pieces(self) -> None:
        """Nothing larger than a chunk goes through a layer, and 847 classes work."""
        model = self.model(class_chunk_size=50)
        sizes: list[int] = []
        for layer in model.decoder.layers:
            layer.spatial.register_forward_pre_hook(lambda block, args: sizes.append(len(args[0])))
        outputs = model(**self.pictures(), text_embeds=self.text(model, 847))
        assert outputs.logits.shape[:2] == (1, 847)
        assert max(sizes) == 50
        assert sum(sizes) == 3 * 847

    # ------------------------------------------------------------------ pictures

    @torch.no_grad()
    def test_maps_of_encoded_views_are_kept_only_if_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = self.model()
        made: list[weakref.ref[torch.Tensor]] = []
        alive: list[int] = []
        run_stage = model._run_stage

        def counted(stage: torch.nn.Module, features: torch.Tensor) -> torch.Tensor:
            if stage is model.vision_model.encoder.stages[0]:
                alive.append(sum(one() is not None for one in made))
            made.append(weakref.ref(result := run_stage(stage, features)))
            return result

        monkeypatch.setattr(model, "_run_stage", counted)
        views = {"sliding_window": True, "crop_batch_size": 1}
        model.encode_image(**self.pictures(), **views)
        assert alive == [0] * 5
        state = model.encode_image(**self.pictures(), **views, output_hidden_states=True)
        assert [len(maps) for maps in state.hidden_states] == [5] * 5

    @torch.no_grad()
    def test_padding_and_small_pictures(self) -> None:
        """The model cuts each picture out of its padding; sides below the output grid are scored whole."""
        processor = SEDImageProcessor(do_resize=False)
        model = self.model()
        text = self.text(model)
        pictures = tiny_pictures((7, 40), (64, 50), (1, 1))
        batch = processor(images=pictures, return_tensors="pt")
        outputs = model(**batch, text_embeds=text)
        maps = processor.post_process_semantic_segmentation(
            outputs, target_sizes=[(p.height, p.width) for p in pictures], return_segmentation_scores=True
        )
        for picture, logits, result in zip(pictures, outputs.logits, maps):
            alone = model(**processor(images=picture, return_tensors="pt"), text_embeds=text)
            torch.testing.assert_close(logits, alone.logits[0], rtol=0, atol=1e-5)
            whole = torch.nn.functional.interpolate(
                alone.logits.sigmoid(), (picture.height, picture.width), mode="bilinear"
            )
            torch.testing.assert_close(result.segmentation_scores, whole[0], rtol=0, atol=1e-5)

    def test_labels_cover_the_picture_without_padding(self) -> None:
        """Loss of a padded batch = mean over the pixels of its pictures."""
        model = self.model().eval()
        big, small = self.pictures(1, (64, 64)), self.pictures(1, (32, 48), seed=1)
        labels = torch.randint(0, 3, (2, 64, 64))
        text = self.text(model)
        terms = [
            model(**big, text_embeds=text, labels=labels[:1]).loss,
            model(**small, text_embeds=text, labels=labels[1:, :32, :48]).loss,
        ]
        batch = {
            "reshaped_input_sizes": torch.tensor([[64, 64], [32, 48]]),
            "padded_sizes": torch.tensor([[64, 64]] * 2),
        }
        batch["pixel_values"] = torch.cat(
            [big["pixel_values"], torch.nn.functional.pad(small["pixel_values"], (0, 16, 0, 32))]
        )
        together = model(**batch, text_embeds=text, labels=labels).loss
        areas = torch.tensor([64 * 64, 32 * 48])
        torch.testing.assert_close(together, (torch.stack(terms) * areas).sum() / areas.sum())

    # ------------------------------------------------------------------ bad input

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rejection_top_k": 0}, "rejection_top_k"),
            ({"class_chunk_size": 0}, "class_chunk_size"),
            ({"class_attention_pooling": 5}, "class_attention_pooling"),
            ({"crop_batch_size": 0}, "crop_batch_size must be at least 1"),
            ({"crop_batch_size": -1}, "crop_batch_size must be at least 1"),
            ({"output_attentions": True}, "attention"),
        ],
        ids=str,
    )
    def test_refuses_switches_that_do_not_fit(self, options: dict[str, Any], message: str) -> None:
        model = self.model()
        with pytest.raises(ValueError, match=message):
            model(**self.pictures(), text_embeds=self.text(model), **options)

    def test_no_pooling_may_be_called_none(self) -> None:
        model = self.model(class_attention_pooling=2)
        inputs = {**self.pictures(), "text_embeds": self.text(model)}
        off = [model(**inputs, class_attention_pooling=value).logits for value in (None, 1)]
        assert torch.equal(*off) and not torch.equal(off[0], model(**inputs).logits)

    def test_refuses_another_number_of_templates(self) -> None:
        model = self.model()
        text = random_embeddings(3, 5, model.embedding_size)
        with pytest.raises(ValueError, match="2 prompts per class, text_embeds has 5"):
            model(**self.pictures(), text_embeds=text)

    def test_refuses_rejection_in_training(self) -> None:
        model = self.model().train()
        with pytest.raises(ValueError, match="inference"):
            model(**self.training_inputs(model), rejection_top_k=1)

    # ------------------------------------------------------------------ around a trained CLIP

    def around(self, clip: Any, **changes: Any) -> SEDForOpenVocabularySegmentation:
        """A model around `clip` with the tiny decoder."""
        decoder = {
            k: v
            for k, v in self.config_values().items()
            if k not in ("vision_config", "text_config", "projection_type")
        }
        return SEDForOpenVocabularySegmentation.from_clip(clip, **{**decoder, **changes})

    @pytest.mark.parametrize("projection", ["linear", "mlp"])
    @pytest.mark.parametrize("safe", [True, False])
    def test_from_open_clip(self, tmp_path: Path, projection: str, safe: bool) -> None:
        """The layout that LAION publishes, written from one of our models, read again."""
        model = self.model(projection_type=projection)
        write_open_clip(model, tmp_path, safe)
        around = self.around(tmp_path)
        expected = model.state_dict()
        for name, value in around.state_dict().items():
            if name.startswith(("vision_model.", "visual_projection.", "text_model.")):
                assert torch.equal(value, expected[name]), name
        assert around.config.projection_type == projection
        assert around.config.vision_config.drop_path_rate == 0.1
        assert around.config.text_config.hidden_act == "gelu"
        assert around.config.text_config.num_attention_heads == 2
        tokens = self.token_ids(["road", "a tree"])
        torch.testing.assert_close(around.encode_vocabulary(**tokens), model.encode_vocabulary(**tokens))
        assert self.around(tmp_path, vision_config={"drop_path_rate": 0.0}).config.vision_config.drop_path_rate == 0
        with pytest.raises(ValueError, match=r"'vision_config\.drop_path'. Did you mean 'drop_path_rate'"):
            self.around(tmp_path, vision_config={"drop_path": 0.0})

    def test_open_clip_folders_that_are_incomplete(self, tmp_path: Path) -> None:
        model = self.model()
        write_open_clip(model, tmp_path, True)
        weights = tmp_path / "open_clip_model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ConversionError, match="cannot be read"):
            self.around(tmp_path)
        weights.unlink()
        with pytest.raises(ConversionError, match="has none of open_clip_model"):
            self.around(tmp_path)
        save_file({"visual.conv1.weight": torch.zeros(1)}, weights)
        with pytest.raises(ConversionError, match="no ConvNeXt CLIP"):
            self.around(tmp_path)

    def test_from_the_convnext_clip_of_the_scenes(self, tmp_path: Path) -> None:
        clip = ConvNextCLIPModel(ConvNextCLIPConfig(vision_config=VISION, text_config=TEXT))
        clip.save_pretrained(tmp_path)
        for source in (clip, tmp_path):
            model = self.around(source)
            assert torch.equal(model.visual_projection.weight, clip.visual_projection.weight)
            tokens = TOKENIZER(["road"], return_tensors="pt")
            embedding = clip.get_text_features(**tokens).pooler_output
            ours = model.encode_vocabulary(tokens["input_ids"][:, None])[:, 0]
            torch.testing.assert_close(ours, torch.nn.functional.normalize(embedding, dim=-1))

    @torch.no_grad()
    def test_from_a_vit_clip(self, tmp_path: Path) -> None:
        clip = CLIPModel(CLIPConfig.from_dict(tiny_clip_config()))
        clip.save_pretrained(tmp_path)
        for source in (clip, tmp_path):
            model = self.around(source)
            assert model.config.has_plain_encoder
            assert model(**self.pictures(), text_embeds=self.text(model)).logits.shape == (1, 3, 64, 64)
            assert torch.equal(model.visual_projection.weight, clip.visual_projection.weight)
            weights = clip.text_model.state_dict()
            assert all(torch.equal(v, weights[k]) for k, v in model.text_model.text_model.state_dict().items())

    @torch.no_grad()
    def test_from_clip_is_in_float32_around_a_clip_of_half_precision(self, tmp_path: Path) -> None:
        vit = CLIPModel(CLIPConfig.from_dict(tiny_clip_config()))
        convnext = ConvNextCLIPModel(ConvNextCLIPConfig(vision_config=VISION, text_config=TEXT))
        for clip in (vit, convnext):
            clip.bfloat16().save_pretrained(tmp_path / type(clip).__name__)
            model = self.around(tmp_path / type(clip).__name__)
            assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
            self.run(model.eval())

    # ------------------------------------------------------------------ recipes

    @pytest.mark.parametrize("name", ["sed_convnext_b_coco", "sed_convnext_l_coco", "sed_tiny_camvid", "sed_scenes"])
    def test_recipes(self, name: str) -> None:
        """Every recipe builds its model, and each of its parameter groups finds parameters."""
        recipe = load_recipe(RECIPES / f"{name}.yaml")
        values = dict(recipe.model.config)
        if name.endswith("_coco"):
            released = VARIANTS["convnextB_768" if "_b_" in name else "convnextL_768"]().to_dict()
            values["vision_config"] = {**released["vision_config"], **values["vision_config"]}
            values = {**released, **values}
        elif name == "sed_scenes":
            clip = yaml.safe_load((RECIPES / "clip_convnext_scenes.yaml").read_text())["model"]
            values["vision_config"] = {"model_type": "convnext", **clip["vision_config"]}
            values["text_config"] = clip["text_config"]
        with torch.device("meta"):
            model = SEDForOpenVocabularySegmentation(SEDConfig(**values))
        select_trainable(model, recipe.model.trainable)
        assert model.trains_text == (name == "sed_tiny_camvid")
        settings = parameter_settings([n for n, p in model.named_parameters() if p.requires_grad], recipe.optimizer)
        assert len(set(settings.values())) >= 2


def write_open_clip(model: SEDForOpenVocabularySegmentation, folder: Path, safe: bool) -> None:
    """Write a model's CLIP as OpenCLIP does."""
    names = {
        "vision_model.embeddings.patch_embeddings.": "visual.trunk.stem.0.",
        "vision_model.embeddings.layernorm.": "visual.trunk.stem.1.",
        "vision_model.encoder.stages.": "visual.trunk.stages.",
        "vision_model.layernorm.": "visual.trunk.head.norm.",
        "visual_projection.fc": "visual.head.mlp.fc",
        "visual_projection.": "visual.head.proj.",
        ".downsampling_layer.": ".downsample.",
        ".dwconv.": ".conv_dw.",
        ".layernorm.": ".norm.",
        ".pwconv": ".mlp.fc",
        ".layer_scale_parameter": ".gamma",
        "text_model.text_projection.weight": "text_projection",
        "text_model.text_model.embeddings.token_embedding.": "token_embedding.",
        "text_model.text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.text_model.final_layer_norm.": "ln_final.",
        "text_model.text_model.encoder.layers.": "transformer.resblocks.",
        ".layer_norm": ".ln_",
        ".self_attn.out_proj.": ".attn.out_proj.",
    }
    weights = {"logit_scale": torch.tensor(2.0)}
    for key, tensor in model.state_dict().items():
        if not key.startswith(("vision_model.", "visual_projection.", "text_model.")):
            continue
        is_vision = key.startswith("vision_model.encoder")
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        if is_vision:
            key = key.replace(".layers.", ".blocks.")
        elif key.startswith("transformer."):
            key = key.replace(".mlp.fc1.", ".mlp.c_fc.").replace(".mlp.fc2.", ".mlp.c_proj.")
        if ".self_attn." in key:
            if ".q_proj." in key:
                names_of = [key.replace("q_proj", f"{x}_proj") for x in "qkv"]
                parts = [model.state_dict()[to_ours(n)] for n in names_of]
                key = key.replace("self_attn.q_proj.", "attn.in_proj_")
                weights[key] = torch.cat(parts)
            continue
        weights[key] = (tensor.T if key == "text_projection" else tensor).contiguous()
    if safe:
        save_file(weights, folder / "open_clip_model.safetensors")
    else:
        torch.save(weights, folder / "open_clip_pytorch_model.bin")
    model_config = {
        "embed_dim": 16,
        "vision_cfg": {"timm_model_name": "convnext_tiny", "timm_drop": 0.0, "timm_drop_path": 0.1},
        "text_cfg": {"context_length": 77, "heads": 2, "layers": 2},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_config}))


def to_ours(key: str) -> str:
    """`transformer.resblocks.<i>.self_attn.*` -> our name."""
    return key.replace("transformer.resblocks.", "text_model.text_model.encoder.layers.")


class TestSEDConversion(ConversionTesterMixin):
    method = "sed"
    case = "sed/case_a"
    manifests = ("sed", ("convnextB_768", "convnextL_768"))

    def test_a_clip_checkpoint_is_refused(self) -> None:
        with pytest.raises(ValueError, match="clip_checkpoint"):
            self.rules.convert(self.checkpoint, self.config(), self.checkpoint)

    def test_a_plain_encoder_is_refused(self) -> None:
        with pytest.raises(ConversionError, match="ViT"):
            self.rules.convert(self.checkpoint, TestSED().config(vision_config=PLAIN, projection_type="linear"))
