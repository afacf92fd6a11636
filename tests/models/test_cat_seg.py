"""CAT-Seg: the shared checks, class selection, chunks, windows, and what its configuration changes."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from ov_segmentation.models.cat_seg.configuration_cat_seg import CATSegConfig
from ov_segmentation.models.cat_seg.convert_cat_seg import VARIANTS
from ov_segmentation.models.cat_seg.image_processing_cat_seg import CATSegImageProcessor
from ov_segmentation.models.cat_seg.modeling_cat_seg import REJECTED, CATSegForOpenVocabularySegmentation
from tests.mixins.conversion import ConversionTesterMixin
from tests.mixins.model import FromCLIPTesterMixin, ModelTesterMixin
from tests.mixins.pipeline import PipelineTesterMixin
from tests.mixins.processor import ImageProcessorTesterMixin
from tests.tiny import tiny_clip_config, tiny_pictures

SMALL = {
    "image_size": 64,
    "hidden_size": 32,
    "window_size": 4,
    "appearance_guidance_size": 12,
    "text_guidance_size": 8,
    "skip_upsampled_sizes": (12, 8),
    "skip_sizes": (8, 4),
    "decoder_sizes": (32, 16),
    "padding_length": 6,
    "max_classes": 8,
    "window_pixels": 48,
    "window_stride": 32,
    "canvas_pixels": 80,
}


class TestCATSeg(ModelTesterMixin, FromCLIPTesterMixin, PipelineTesterMixin):
    name = "CATSeg"
    export_config: ClassVar = {"class_chunk_size": None, "max_classes": None}
    wrong_values: ClassVar = {"max_classes": "all", "clip_finetune": "some", "skip_layers": 3, "dense_residual": None}
    clip_values: ClassVar = {**SMALL, "num_templates": 2}

    def config_values(self) -> dict[str, Any]:
        return {"clip_config": tiny_clip_config(), "skip_layers": (0, 2), "num_templates": 2, **SMALL}

    def token_ids(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Token ids `[K, 2, L]`: every name twice."""
        return {key: ids.expand(-1, 2, -1) for key, ids in super().token_ids(names).items()}

    # ------------------------------------------------------------------ class selection

    @pytest.mark.parametrize("classes", [1, 5, 6, 7, 8])
    @torch.no_grad()
    def test_up_to_max_classes_nothing_is_rejected(self, classes: int) -> None:
        """Below the padding length, at it, between the two limits, and at `max_classes`."""
        model = self.model()
        text = self.text(model, classes)
        outputs = model(**self.pictures(2), text_embeds=text)
        assert outputs.kept_classes is None
        assert torch.equal(outputs.logits, model(**self.pictures(2), text_embeds=text, max_classes=None).logits)

    def test_labelled_classes_stay_in_training(self) -> None:
        model = self.model().train()
        pictures, labels = self.pictures(2), torch.full((2, *self.picture_size), 7)
        labels[1] = 5
        given = {**pictures, "text_embeds": self.text(model, 9), "labels": labels, "sample_seeds": torch.arange(2)}
        kept = model(**given, max_classes=2).kept_classes
        assert kept.sum(1).tolist() == [2, 2]
        assert kept[0, 7]
        assert kept[1, 5]
        # labels say nothing about what is predicted
        evaluated = [
            model.eval()(**{**given, "labels": given_labels}, max_classes=2) for given_labels in (labels, None)
        ]
        assert torch.equal(evaluated[0].kept_classes, evaluated[1].kept_classes)

    @torch.no_grad()
    def test_beyond_max_classes_the_best_are_kept(self) -> None:
        model = self.model()
        text = self.text(model, 20)
        outputs = model(**self.pictures(3), text_embeds=text, output_maps=True)
        state = model.encode_image(**self.pictures(3))
        dense = torch.nn.functional.normalize(state.dense_features.flatten(2), dim=1)
        best = torch.einsum("kpd,bdn->bkpn", text, dense).amax(dim=(2, 3))
        assert outputs.kept_classes.sum(1).tolist() == [8, 8, 8]
        for row in range(3):
            kept = outputs.kept_classes[row]
            assert set(kept.nonzero().flatten().tolist()) == set(best[row].argsort(descending=True)[:8].tolist())
            # the rejected take no part in the aggregation
            picture = {key: value[row : row + 1] for key, value in self.pictures(3).items()}
            alone = model(**picture, text_embeds=text[kept], max_classes=None).logits[0]
            torch.testing.assert_close(outputs.logits[row, kept], alone, rtol=0, atol=1e-5)
        assert (outputs.logits[~outputs.kept_classes] == REJECTED).all()
        everything = model(**self.pictures(3), text_embeds=text, max_classes=None)
        assert everything.kept_classes is None
        assert (everything.logits != REJECTED).all()

    @torch.no_grad()
    def test_rejected_classes_score_exactly_zero(self) -> None:
        model = self.model()
        outputs = model(**self.pictures(), text_embeds=self.text(model, 20), max_classes=3)
        (result,) = CATSegImageProcessor().post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
        kept = outputs.kept_classes[0]
        assert (result.segmentation_scores[~kept] == 0).all()
        assert (result.segmentation_scores[kept] > 0).all()
        assert kept[result.segmentation].all()

    @torch.no_grad()
    def test_each_view_selects_its_own_classes(self) -> None:
        model = self.model()
        outputs = model(**self.pictures(), text_embeds=self.text(model, 20), sliding_window=True, max_classes=2)
        assert outputs.kept_classes.shape == (5, 20)
        assert outputs.kept_classes.sum(1).tolist() == [2] * 5
        assert len(outputs.kept_classes.unique(dim=0)) > 1

    @pytest.mark.parametrize("chunk_size", [1, 4, 7, 50])
    @pytest.mark.parametrize("switches", [{}, {"max_classes": None}, {"class_attention_pooling": 3}], ids=str)
    @torch.no_grad()
    def test_chunks_change_nothing(self, chunk_size: int, switches: dict[str, Any]) -> None:
        model = self.model()
        inputs = {**self.pictures(3), "text_embeds": self.text(model, 11), **switches}
        whole = model(**inputs, class_chunk_size=None).logits
        torch.testing.assert_close(model(**inputs, class_chunk_size=chunk_size).logits, whole, rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_nothing_larger_than_a_chunk_is_aggregated(self) -> None:
        model = self.model(class_chunk_size=40)
        sizes: list[int] = []
        for module in (model.cost_embedding, *model.decoder):
            module.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        for layer in model.layers:
            layer.spatial.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[:2].numel()))
        outputs = model(**self.pictures(2), text_embeds=self.text(model, 847), max_classes=None)
        assert outputs.logits.shape[:2] == (2, 847)
        assert max(sizes) == 40
        assert sum(sizes) == 5 * 2 * 847

    @torch.no_grad()
    def test_class_order_moves_with_the_names(self) -> None:
        model = self.model()
        text, order = self.text(model, 12), torch.randperm(12, generator=torch.Generator().manual_seed(0))
        logits = model(**self.pictures(), text_embeds=text).logits
        permuted = model(**self.pictures(), text_embeds=text[order]).logits
        torch.testing.assert_close(permuted, logits[:, order], rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_padding_takes_part_below_its_length(self) -> None:
        model = self.model()
        before = {classes: self.run_with(model, classes) for classes in (3, 6, 7)}
        for layer in model.layers:
            torch.nn.init.normal_(layer.padding_token)
            torch.nn.init.normal_(layer.padding_guidance)
        changed = {k for k, logits in before.items() if not torch.allclose(self.run_with(model, k), logits)}
        assert changed == {3}

    def run_with(self, model: CATSegForOpenVocabularySegmentation, classes: int) -> torch.Tensor:
        return model(**self.pictures(), text_embeds=self.text(model, classes)).logits

    # ------------------------------------------------------------------ pictures

    @torch.no_grad()
    def test_padding_of_the_batch_is_cut_off(self) -> None:
        processor, model = CATSegImageProcessor(do_resize=False), self.model()
        text, pictures = self.text(model), tiny_pictures((7, 40), (64, 50), (1, 1), (90, 33))
        for switches in ({}, {"sliding_window": True}):
            together = model(**processor(images=pictures, return_tensors="pt"), text_embeds=text, **switches).logits
            rows = together.chunk(len(pictures))
            for picture, found in zip(pictures, rows, strict=True):
                alone = model(**processor(images=picture, return_tensors="pt"), text_embeds=text, **switches)
                torch.testing.assert_close(found, alone.logits, rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_pad_multiple_is_the_originals_stretching(self) -> None:
        """A picture that the multiple divides is the same with and without it, another one is not."""
        plain, padding = self.model(), self.model(pad_multiple=32)
        for size, same in (((64, 96), True), ((64, 70), False)):
            inputs = {**self.pictures(size=size), "text_embeds": self.text(plain)}
            assert torch.equal(plain(**inputs).logits, padding(**inputs).logits) == same
            # views never contain padding
            views = [model(**inputs, sliding_window=True).logits for model in (plain, padding)]
            assert torch.equal(*views)

    @torch.no_grad()
    def test_views_are_encoded_in_batches(self) -> None:
        model, sizes = self.model(), []
        model.clip.vision_model.pre_layrnorm.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        inputs = {**self.pictures(2), "text_embeds": self.text(model), "sliding_window": True}
        results = [model(**inputs, crop_batch_size=size).logits for size in (None, 3)]
        assert sizes == [10, 3, 3, 3, 1]
        torch.testing.assert_close(*results, rtol=0, atol=1e-5)

    # ------------------------------------------------------------------ records

    @torch.no_grad()
    def test_records(self) -> None:
        model = self.model(class_chunk_size=2)
        model.set_attn_implementation("eager")
        inputs = {**self.pictures(2), "text_embeds": self.text(model, 5)}
        asked = model(**inputs, output_hidden_states=True, output_attentions=True, output_maps=True)
        plain = model(**inputs)
        torch.testing.assert_close(asked.logits, plain.logits, rtol=0, atol=1e-5)
        assert plain.hidden_states is plain.attentions is plain.maps is None
        assert [tuple(state.shape) for state in asked.hidden_states] == [(2, 5, 64, 32)] * 3
        assert len(asked.attentions) == 3  # the last block has none
        for weights in asked.attentions:
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 65))
        assert asked.maps["correlation"].shape == (2, 5, 8, 8)
        assert asked.maps["correlation"].abs().max() <= 1

    # ------------------------------------------------------------------ training

    @pytest.mark.parametrize(
        ("mode", "frozen"),
        [
            ("all", r"clip\.logit_scale"),
            ("blocks", r"clip\.(?!\w+\.encoder\.layers).*"),
            ("attention", r"clip\.(?!.*\.[qv]_proj\.weight$).*"),
            ("none", r"clip\..*"),
        ],
    )
    def test_trained_parameters(self, mode: str, frozen: str) -> None:
        model = self.model(clip_finetune=mode).train()
        trained = set(self.gradients(model))
        expected = {name for name, _ in model.named_parameters() if not re.fullmatch(frozen, name)}
        assert trained == expected
        assert model.trains_text == (mode != "none")

    def test_pooling_in_training_is_another(self) -> None:
        model = self.model().train()
        inputs = {**self.pictures(), "text_embeds": self.text(model)}
        with torch.no_grad():
            training = model(**inputs).logits
            assert torch.equal(model.eval()(**inputs, class_attention_pooling=2).logits, training)
            assert not torch.equal(model(**inputs).logits, training)

    def test_embeddings_follow_the_trained_text_tower(self) -> None:
        """The original keeps embeddings from the first validation on; here a step is seen at once."""
        model, names = self.model(), self.token_ids(["road", "a tree", "sky"])
        with torch.no_grad():
            before = model.encode_vocabulary(**names)
            assert model.encode_vocabulary(**names) is before
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        model.train()(**self.training_inputs(model)).loss.backward()
        optimizer.step()
        with torch.no_grad():
            after = model.eval().encode_vocabulary(**names)
        assert not torch.allclose(after, before, atol=1e-4)
        assert model.encode_vocabulary(**names).requires_grad

    def test_ignored_pixels(self) -> None:
        model = self.model().train()
        inputs = self.training_inputs(model)
        logits = torch.nn.functional.interpolate(model(**inputs).logits, self.picture_size, mode="bilinear")
        labels = inputs["labels"]
        wanted = torch.nn.functional.one_hot(labels.clamp(min=0), 3).permute(0, 3, 1, 2) * (labels >= 0)[:, None]
        terms = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted.float(), reduction="none")
        expected = {True: terms.mean(), False: terms.mean(1)[labels >= 0].mean()}
        for ignore_as_negative, loss in expected.items():
            model.config.ignore_as_negative = ignore_as_negative
            torch.testing.assert_close(model(**inputs).loss, loss)

    # ------------------------------------------------------------------ what the configuration changes

    @pytest.mark.parametrize(
        "changes",
        [
            {"dense_residual": "token"},
            {"window_size": 8},  # the map is one window: no shift
            {"window_size": 2},
            {"num_aggregation_layers": 1},
            {"num_attention_heads": 2},
            {"skip_layers": (2, 0)},
            {"skip_layers": (1, 1)},
            {"image_size": 32},
            {"padding_length": 3},
        ],
        ids=str,
    )
    @torch.no_grad()
    def test_options_change_the_prediction(self, changes: dict[str, Any]) -> None:
        logits, usual = (self.run(self.model(**values))["logits"] for values in (changes, {}))
        side = changes.get("image_size", 64) // 2
        assert logits.shape == (1, 3, side, side)
        assert logits.isfinite().all()
        assert changes == {"padding_length": 3} or logits.shape != usual.shape or not torch.allclose(logits, usual)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"image_size": 60}, "patch size 8"),
            ({"window_size": 5}, "does not divide"),
            ({"window_stride": 49}, "window_stride"),
            ({"canvas_pixels": 40}, "canvas_pixels"),
            ({"skip_layers": (0, 3)}, "below the last"),
            ({"skip_layers": [0]}, "two blocks"),
            ({"num_attention_heads": 5}, "no multiple"),
            ({"decoder_sizes": (32, 8)}, "groups of about 16"),
            ({"skip_sizes": (32, 4)}, "smaller"),
            ({"skip_upsampled_sizes": [8, 4, 2]}, "two numbers"),
            ({"max_classes": 0}, "max_classes"),
            ({"class_attention_pooling": 0}, "class_attention_pooling"),
        ],
        ids=str,
    )
    def test_refuses_configurations_that_do_not_fit(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(StrictDataclassClassValidationError, match=message):
            self.config(**changes)

    @pytest.mark.parametrize(
        ("switches", "message"),
        [
            ({"max_classes": 0}, "max_classes"),
            ({"class_chunk_size": 0}, "class_chunk_size"),
            ({"crop_batch_size": 0}, "crop_batch_size"),
            ({"class_attention_pooling": 9}, "between 1"),
            ({"class_attention_pooling": 0}, "between 1"),
        ],
        ids=str,
    )
    def test_refuses_switches_that_do_not_fit(self, switches: dict[str, Any], message: str) -> None:
        model = self.model()
        with pytest.raises(ValueError, match=message):
            model(**self.pictures(), text_embeds=self.text(model), **switches)

    def test_no_pooling_may_be_called_none(self) -> None:
        model = self.model(class_attention_pooling=2)
        inputs = {**self.pictures(), "text_embeds": self.text(model)}
        off = [model(**inputs, class_attention_pooling=value).logits for value in (None, 1)]
        assert torch.equal(*off) and not torch.equal(off[0], model(**inputs).logits)

    def test_refuses_another_number_of_prompts(self) -> None:
        model = self.model()
        with pytest.raises(ValueError, match=r"made for 2 prompt\(s\) per class"):
            model(**self.pictures(), text_embeds=self.text(model)[:, :1])

    def test_default_initialisation_is_torchs(self) -> None:
        """As the original, which has no initialisation of its own; padding starts at zero."""
        model = self.model()
        for module in (model.cost_embedding, model.layers[0].spatial.block1.attention.query, model.decoder[0].up):
            bound = module.weight[0].numel() ** -0.5
            assert bound / 2 < module.weight.abs().max() <= bound
            assert module.bias.abs().max() <= bound
        for layer in model.layers:
            assert not layer.padding_token.any()
            assert not layer.padding_guidance.any()


@pytest.mark.parametrize(
    ("variant", "parameters", "trained"),
    [("vitb_384", 154_289_378, 25_115_873), ("vitl_336", 433_726_946, 70_270_177)],
)
def test_published_sizes(variant: str, parameters: int, trained: int) -> None:
    with torch.device("meta"):
        model = CATSegForOpenVocabularySegmentation(VARIANTS[variant]())
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained


def test_from_clip_finds_the_released_settings() -> None:
    for variant, make_config in VARIANTS.items():
        released = make_config()
        values = CATSegForOpenVocabularySegmentation.config_for_clip(released.clip_config)
        found = CATSegConfig(clip_config=released.clip_config, pad_multiple=32, weights_license="mit", **values)
        assert found.to_diff_dict() == released.to_diff_dict(), variant


class TestCATSegConversion(ConversionTesterMixin):
    method = "cat_seg"
    case = "cat_seg/case_a"
    manifests = ("cat_seg", ("vitb_384", "vitl_336"))

    def test_a_clip_checkpoint_is_refused(self) -> None:
        with pytest.raises(ValueError, match="clip_checkpoint"):
            self.rules.convert(self.checkpoint, self.config(), self.checkpoint)

    def test_released_configurations_keep_the_originals_geometry(self) -> None:
        assert {name: make().pad_multiple for name, make in VARIANTS.items()} == {"vitb_384": 32, "vitl_336": 32}


class TestCATSegImageProcessor(ImageProcessorTesterMixin):
    image_processor_class = CATSegImageProcessor
