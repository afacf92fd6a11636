"""The checks that every method has to pass in the pipeline."""

from __future__ import annotations

import base64
import functools
import json
import math
import pickle
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import pipeline

from ov_segmentation import OpenVocabularySegmentationPipeline, Vocabulary
from ov_segmentation.auto import load_class
from ov_segmentation.pipeline import TASK
from tests.tiny import TOKENIZER

TEMPLATES = ["a photo of a {}.", "the {}"]
NAMES = ["car", "tree", "road", "red car", "house", "sky", "wood", "zebra"]
TRIES = 40


def block_pictures(*sizes: tuple[int, int], seed: int = 0) -> list[Image.Image]:
    """Pictures of the given (height, width) made of colour blocks, so that different places look different."""
    random = np.random.default_rng(seed)
    blocks = [Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8)) for _ in sizes]
    return [block.resize((width, height), Image.Resampling.NEAREST) for block, (height, width) in zip(blocks, sizes)]


def png(picture: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def assert_same_map(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal maps and scores, up to rounding and a pixel in a thousand that is nearly a tie."""
    assert found["labels"] == expected["labels"]
    assert found["segmentation"].shape == expected["segmentation"].shape
    assert (found["segmentation"] != expected["segmentation"]).mean() <= 1e-3
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=2e-3)


class PipelineTesterMixin:
    """Subclass as `class TestX(ModelTesterMixin, PipelineTesterMixin)`: the tiny model is `ModelTesterMixin`'s.

    Attributes:
        short_side: of the resized picture.
    """

    short_side: ClassVar[int] = 64

    @classmethod
    @functools.cache
    def parts(cls) -> tuple[nn.Module, Any]:
        """A tiny model that tells places apart, and its processor: random weights are drawn until it does."""
        model = cls().model()
        image_processor = load_class(f"{cls.name}ImageProcessor")(
            size={"shortest_edge": cls.short_side, "longest_edge": 2 * cls.short_side}
        )
        processor = load_class(f"{cls.name}Processor")(image_processor, TOKENIZER, cls.templates())
        segment = OpenVocabularySegmentationPipeline(model, processor, device="cpu")
        (picture,) = block_pictures((60, 90))
        for seed in range(TRIES):
            cls.draw_weights(model, seed)
            areas = np.unique(segment(picture, NAMES, output_type="map")["segmentation"], return_counts=True)[1]
            if len(areas) > 1 and areas.min() > 100:
                return model, processor
        raise AssertionError(f"{cls.name}: one class owns everything, whatever the weights; change draw_weights.")

    @classmethod
    def templates(cls) -> list[str] | None:
        """Prompt templates of the tiny processor; None: the method's."""
        return TEMPLATES

    @classmethod
    def draw_weights(cls, model: nn.Module, seed: int) -> None:
        """Random weights that keep the size of activations; the usual initialisation makes all queries alike."""
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    # a lone weight is a scale
                    scale = parameter.fill_ if parameter.numel() == 1 else parameter.normal_
                    scale(*((40.0,) if parameter.numel() == 1 else (0, 1 / math.sqrt(parameter[0].numel()))))
            for module in model.modules():
                if isinstance(module, nn.Embedding):
                    module.weight.normal_()

    def pipe(self, **options: Any) -> OpenVocabularySegmentationPipeline:
        model, processor = self.parts()
        return pipeline(TASK, model=model, processor=processor, device="cpu", **options)

    # ------------------------------------------------------------------ what comes out

    def test_masks_and_map_agree(self) -> None:
        (picture,) = block_pictures((60, 90))
        segment = self.pipe(candidate_labels=NAMES)
        whole = segment(picture, output_type="map", return_confidence=True)
        segmentation, confidence = whole["segmentation"], whole["confidence"]
        assert segmentation.dtype == np.int32
        assert segmentation.shape == confidence.shape == (60, 90)
        assert whole["labels"] == NAMES
        assert confidence.min() > 0
        assert confidence.max() <= 1
        masks = segment(picture)
        assert [mask["label"] for mask in masks] == [NAMES[k] for k in np.unique(segmentation)]
        assert len(masks) > 1
        for mask in masks:
            k = NAMES.index(mask["label"])
            assert (mask["mask"].mode, mask["mask"].size) == ("L", (90, 60))
            np.testing.assert_array_equal(np.array(mask["mask"]), np.where(segmentation == k, 255, 0))
            assert mask["score"] == pytest.approx(confidence[segmentation == k].mean(), abs=1e-5)
            assert whole["scores"][k] == mask["score"]
        assert sum(score == 0 for score in whole["scores"]) == len(NAMES) - len(masks)

    def test_order_of_names_only_renames(self) -> None:
        (picture,) = block_pictures((60, 90))
        segment = self.pipe(output_type="map")
        forwards, backwards = segment(picture, NAMES), segment(picture, NAMES[::-1])
        assert backwards["labels"] == NAMES[::-1]
        assert (forwards["segmentation"] != len(NAMES) - 1 - backwards["segmentation"]).mean() <= 1e-3

    def test_threshold_leaves_pixels_unlabelled(self) -> None:
        (picture,) = block_pictures((60, 90))
        segment = self.pipe(candidate_labels=NAMES, output_type="map", return_confidence=True)
        whole = segment(picture)
        threshold = float(np.median(whole["confidence"]))
        kept = segment(picture, threshold=threshold)
        expected = np.where(whole["confidence"] < threshold, -1, whole["segmentation"])
        assert 0 < (expected == -1).mean() < 1
        assert (kept["segmentation"] != expected).mean() <= 1e-3
        assert (segment(picture, threshold=None)["segmentation"] >= 0).all()

    def test_background_is_folded(self) -> None:
        (picture,) = block_pictures((60, 90))
        segment = self.pipe(output_type="map")
        whole = segment(picture, NAMES)
        present = np.unique(whole["segmentation"]).tolist()
        folded = segment(picture, NAMES, background=[NAMES[k] for k in present])
        assert (folded["segmentation"] == present[0]).all()
        by_vocabulary = segment(picture, Vocabulary(NAMES, background=present))
        np.testing.assert_array_equal(by_vocabulary["segmentation"], folded["segmentation"])
        assert_same_map(segment(picture, Vocabulary(NAMES, background=present), background=None), whole)

    # ------------------------------------------------------------------ what goes in

    def test_every_kind_of_picture(self, tmp_path: Path) -> None:
        (picture,) = block_pictures((60, 90))
        path = tmp_path / "street.png"
        path.write_bytes(png(picture))
        array = np.array(picture)
        text = base64.b64encode(path.read_bytes()).decode()
        segment = self.pipe(candidate_labels=NAMES, output_type="map")
        expected = segment(picture)
        sources = {
            "text path": str(path),
            "path": path,
            "height x width x 3": array,
            "3 x height x width": array.transpose(2, 0, 1),
            "fractions": array.astype(np.float32) / 255,
            "tensor": torch.from_numpy(array).permute(2, 0, 1),
            "base64": text,
            "bytes": path.read_bytes(),
            "data URI": f"data:image/png;base64,{text}",
            "dict": {"image": picture},
        }
        for kind, source in sources.items():
            found = segment(source)
            np.testing.assert_array_equal(found["segmentation"], expected["segmentation"], err_msg=kind)
        for several in ([picture, path.read_bytes()], (picture, array), np.stack([array, array])):
            results = segment(several)
            assert isinstance(results, list)
            assert len(results) == 2
            assert all((result["segmentation"] == expected["segmentation"]).all() for result in results)

    def test_every_kind_of_names(self) -> None:
        (picture,) = block_pictures((60, 90))
        segment = self.pipe(output_type="map")
        expected = segment(picture, candidate_labels=NAMES)
        for names in (", ".join(NAMES), tuple(NAMES), iter(NAMES), Vocabulary(NAMES), [[name] for name in NAMES]):
            assert_same_map(segment(picture, candidate_labels=names), expected)
        assert_same_map(self.pipe(candidate_labels=NAMES, output_type="map")(picture), expected)
        assert_same_map(segment({"image": picture, "candidate_labels": NAMES}, ["overridden"]), expected)
        synonyms = segment(picture, [["car", "automobile"], "tree"])
        assert synonyms["labels"] == ["car", "tree"]

    @pytest.mark.parametrize("batch_size", [2, 5])
    def test_neighbours_do_not_change_a_picture(self, batch_size: int) -> None:
        pictures = block_pictures((60, 90), (90, 60), (60, 90), (64, 64), (60, 88), (60, 90))
        requests = [{"image": picture, "candidate_labels": NAMES} for picture in pictures]
        requests[2]["candidate_labels"] = NAMES[:3]
        segment = self.pipe(output_type="map")
        one_by_one = [segment(request) for request in requests]
        together = segment(requests, batch_size=batch_size)
        for found, expected in zip(together, one_by_one, strict=True):
            assert_same_map(found, expected)

    def test_each_switch_can_be_passed(self) -> None:
        (picture,) = block_pictures((60, 90))
        segment = self.pipe(candidate_labels=NAMES, output_type="map")
        expected = segment(picture)
        for switch in self.model_class.switches | self.model_class.picture_switches:
            assert_same_map(segment(picture, **{switch: "config"}), expected)
        if "sliding_window" in self.model_class.picture_switches:
            found = segment(picture, sliding_window=True)
            assert found["segmentation"].shape == (60, 90)
            np.testing.assert_array_equal(
                self.pipe(candidate_labels=NAMES, output_type="map", sliding_window=True)(picture)["segmentation"],
                found["segmentation"],
            )

    # ------------------------------------------------------------------ the model behind it

    @torch.no_grad()
    def test_picture_encoded_once_serves_every_vocabulary(self) -> None:
        model, processor = self.parts()
        inputs = processor(images=block_pictures((60, 90)), return_tensors="pt")
        state = model.encode_image(**inputs)
        for names in (NAMES, NAMES[:1], NAMES[3:]):
            text_embeds = model.encode_vocabulary(**processor(text=names, return_tensors="pt"))
            once = self.predictions(model(image_state=state, text_embeds=text_embeds))
            whole = self.predictions(
                model(**processor(images=block_pictures((60, 90)), text=names, return_tensors="pt"))
            )
            self.assert_same(once, whole, 1e-6)

    def test_names_are_encoded_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, _ = self.parts()
        model._text_cache.clear()
        calls: list[int] = []
        original: Callable = model._text_features
        monkeypatch.setattr(model, "_text_features", lambda *args: calls.append(1) or original(*args))
        segment = self.pipe(candidate_labels=NAMES)
        segment(block_pictures((60, 90), (90, 60), (60, 90)), batch_size=2)
        first = len(calls)
        assert first > 0
        segment(block_pictures((60, 90)))
        assert len(calls) == first

    def test_saved_pipeline_comes_back(self, tmp_path: Path) -> None:
        (picture,) = block_pictures((60, 90))
        segment = self.pipe(candidate_labels=NAMES, output_type="map")
        segment.save_pretrained(tmp_path)
        # transformers' own way would make the folder unusable without our code
        assert "custom_pipelines" not in json.loads((tmp_path / "config.json").read_text())
        assert not list(tmp_path.glob("*.py"))
        again = pipeline(TASK, model=str(tmp_path), device="cpu")
        assert type(again) is OpenVocabularySegmentationPipeline
        assert again.processor.prompt_templates == segment.processor.prompt_templates
        assert_same_map(again(picture, NAMES, output_type="map"), segment(picture))

    def test_a_used_pipeline_can_be_pickled(self) -> None:
        (picture,) = block_pictures((60, 90))
        segment = self.pipe(candidate_labels=NAMES, output_type="map")
        expected = segment(picture)
        assert_same_map(pickle.loads(pickle.dumps(segment))(picture), expected)

    def test_half_precision(self, tmp_path: Path) -> None:
        (picture,) = block_pictures((60, 90))
        self.pipe().save_pretrained(tmp_path)
        segment = pipeline(TASK, model=str(tmp_path), device="cpu", dtype=torch.bfloat16)
        assert segment.dtype == torch.bfloat16
        found = segment(picture, NAMES, output_type="map")
        assert found["segmentation"].min() >= 0
        assert all(0 <= score <= 1 for score in found["scores"])

    def test_training_mode_and_gradients_are_left_as_they_were(self) -> None:
        model, _ = self.parts()
        (picture,) = block_pictures((60, 90))
        segment = self.pipe(candidate_labels=NAMES, output_type="map")
        expected = segment(picture)
        model.train()
        try:
            assert_same_map(segment(picture), expected)
            assert model.training
            assert all(parameter.grad is None for parameter in model.parameters())
        finally:
            model.eval()
