"""OVSeg: the shared checks, and what its configuration and its switches change."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import cpu_offload
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoImageProcessor, AutoProcessor, SwinConfig, SwinForImageClassification

from ov_segmentation import (
    AutoModelForOpenVocabularySegmentation,
    OpenVocabularySegmentationPipeline,
    conversion_cli,
)
from ov_segmentation.conversion import ConversionError
from ov_segmentation.layers.mask_prompts import DeepPrompts, MaskPrompts
from ov_segmentation.models.ovseg.convert_ovseg import VARIANTS, convert_adapted_clip
from ov_segmentation.models.ovseg.image_processing_ovseg import OVSegImageProcessor
from ov_segmentation.models.ovseg.modeling_ovseg import OVSegForOpenVocabularySegmentation
from ov_segmentation.models.ovseg.processing_ovseg import OVSegProcessor
from ov_segmentation.post_processing import post_process_semantic_segmentation
from tests.mixins.conversion import FIXTURES, ConversionTesterMixin
from tests.mixins.model import FromCLIPTesterMixin, ModelTesterMixin
from tests.mixins.pipeline import PipelineTesterMixin
from tests.parity.hparams import build
from tests.tiny import TOKENIZER, tiny_clip_config

SMALL = {
    "mask_config": {
        "backbone_config": {
            "model_type": "swin",
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 2, 2],
            "window_size": 4,
            "drop_path_rate": 0.0,
        },
        "num_queries": 5,
        "hidden_size": 32,
        "num_heads": 2,
        "feedforward_size": 16,
        "num_layers": 2,
        "dropout": 0.0,
        "pixel_decoder_size": 32,
        "mask_size": 16,
        "embedding_hidden_size": 12,
    },
    "crop_size": 32,
    "prompt_depth": 2,
    "num_deep_prompts": 3,
    "window_pixels": 64,
    "window_stride": 64,
    "canvas_pixels": 128,
}
VARIANT_OF_CLIP = {"ViT-L-14": "ovseg_swinbase_vitL14_ft_mpt", "ViT-B-16": "ovseg_R101c_vitB16_ft_mpt"}
RESNET = {
    "model_type": "ov_resnet_c",
    "stem_channels": 8,
    "depths": [1, 1, 1, 3],
    "widths": [4, 4, 8, 8],
    "out_channels": [8, 16, 16, 32],
}


class TestOVSeg(ModelTesterMixin, FromCLIPTesterMixin, PipelineTesterMixin):
    name = "OVSeg"
    has_hidden_states = False
    rounding: ClassVar = 1e-12  # products for the class token alone depend on how a file's weights are aligned
    export_config: ClassVar = {"ensemble_weight": None}  # the number of crops depends on the picture
    wrong_values: ClassVar = {"crop_size": "large", "prompt_type": "text", "mask_fill": "grey", "demo_mode": "yes"}
    clip_values: ClassVar = SMALL

    def config_values(self) -> dict[str, Any]:
        return {"clip_config": tiny_clip_config(), **SMALL}

    def logits(self, *values: float) -> torch.Tensor:
        """Mask logits `[1, 5, 16, 16]`: query n has the n-th value in a quarter of the picture, -10 elsewhere."""
        maps = torch.full((1, 5, 16, 16), -10.0)
        for query, value in enumerate(values):
            y, x = 8 * (query % 2), 8 * (query // 2 % 2)
            maps[0, query, y : y + 8, x : x + 8] = value
        return maps

    def propose(self, model: Any, mask_logits: torch.Tensor) -> None:
        """Make the proposals' masks the given ones."""
        forward = model.proposal_network.forward

        def replaced(pixel_values: torch.Tensor, all_layers: bool = False) -> list:
            return [p._replace(mask_logits=mask_logits) for p in forward(pixel_values, all_layers)]

        model.proposal_network.forward = replaced

    # ------------------------------------------------------------------ what the shared checks ask differently

    def test_compiles_without_graph_breaks(self) -> None:
        """How many crops there are depends on the picture: only without CLIP's part there is one graph."""
        model = self.model()
        expected = self.run(model, ensemble_weight=None)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            found = compiled(**self.pictures(), text_embeds=self.text(model), ensemble_weight=None)
        self.assert_same(self.predictions(found), expected, 1e-4)

    # ------------------------------------------------------------------ options of the paper's studies

    @pytest.mark.parametrize(
        "changes",
        [
            {"prompt_type": "none"},
            {"prompt_type": "deep"},  # Table 7
            {"prompt_depth": 1},
            {"prompt_depth": 4},
            {"mask_fill": "none", "prompt_type": "none"},  # appendix, Table A.1
            {"mask_fill": "zero"},
            {"mask_expand_ratio": 1.5},
            {"ensemble_weight": None},  # Table 4
            {"ensemble_weight": 0.0},
            {"ensemble_weight": 1.0},
            {"mask_threshold": 0.3},
            {"demo_mode": True},
        ],
        ids=str,
    )
    def test_study_changes_the_output(self, changes: dict[str, Any]) -> None:
        # a softmax at temperature 100 is nearly one-hot, whatever the crops
        model, changed = self.model(temperature=2.0), self.model(**{"temperature": 2.0, **changes})
        shared, own = model.state_dict(), changed.state_dict()
        changed.load_state_dict({k: v for k, v in shared.items() if k in own and v.shape == own[k].shape}, strict=False)
        masks = self.logits(9.0, -0.6, 9.0, 2.0)
        masks[0, 0, 2:12] = masks[0, 0, :, 2:12] = -10.0
        masks[0, 0, 14:, 14:] = 9.0  # between its two corners lie patches without a pixel of it
        for tested in (model, changed):
            self.propose(tested, masks)
            # what depends on patches must show in the class token
            torch.manual_seed(3)
            for parameter in tested.clip.vision_model.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
            if isinstance(tested.visual_prompts, (MaskPrompts, DeepPrompts)):
                torch.nn.init.normal_(tested.visual_prompts.embedding, std=3.0)
        found, expected = (self.run(tested)["class_queries_scores"] for tested in (changed, model))
        assert found.isfinite().all()
        assert not torch.allclose(found, expected, atol=1e-5)

    def test_resnet_backbone(self) -> None:
        model = self.model(mask_config={**SMALL["mask_config"], "backbone_config": RESNET})
        assert self.run(model)["masks_queries_logits"].shape == (1, 5, 16, 16)
        frozen = {n for n, p in model.proposal_network.named_parameters() if not p.requires_grad}
        assert frozen
        assert all(name.startswith(("backbone.stem.", "backbone.stages.0.")) for name in frozen)

    def test_learned_text_prompt(self) -> None:
        """SimBaseline: the context stands between start token and name."""
        model = self.model(num_context_vectors=4, prompt_type="none", dot_token_id=3)
        tokens = self.token_ids(["road", "a tree"])
        before = model.encode_vocabulary(**tokens)
        torch.nn.init.normal_(model.text_prompt.context, std=3.0)
        assert not torch.allclose(model.encode_vocabulary(**tokens), before, atol=1e-4)
        assert "text_prompt.context" in model.state_dict()
        with pytest.raises(ValueError, match=r"bare names, not names in 2 templates.*prompt_templates"):
            model.encode_vocabulary(**{name: ids.expand(-1, 2, -1) for name, ids in tokens.items()})

    def test_learned_text_prompt_of_another_model(self, tmp_path: Path) -> None:
        """SimBaseline's prompt is learned by DeOP's first stage; it is taken over, frozen."""
        source = self.model(num_context_vectors=4, prompt_type="none", dot_token_id=5)
        torch.nn.init.normal_(source.text_prompt.context, std=3.0)
        source.save_pretrained(tmp_path / "prompt")
        make = OVSegForOpenVocabularySegmentation.from_clip
        model = make(self.clip(), text_prompt=tmp_path / "prompt", **{**SMALL, "prompt_type": "none"})
        assert torch.equal(model.text_prompt.context, source.text_prompt.context)
        assert (model.config.num_context_vectors, model.text_prompt.dot_token_id) == (4, 5)
        assert not model.text_prompt.context.requires_grad
        self.model().save_pretrained(tmp_path / "none")
        with pytest.raises(ValueError, match="no learned text prompt"):
            make(self.clip(), text_prompt=tmp_path / "none", **SMALL)
        with pytest.raises(ValueError, match="around the same CLIP"):
            source.load_text_prompt(torch.zeros(4, 7))

    # ------------------------------------------------------------------ ensemble

    def test_ensemble_is_the_geometric_mean(self) -> None:
        model = self.model()
        self.propose(model, self.logits(9.0, -9.0, 9.0))
        text = self.text(model)
        own = self.run(model, ensemble_weight=None)["class_queries_scores"]
        clip = self.run(model, ensemble_weight=0.0)["class_queries_scores"]
        valid = torch.tensor([True, False, True, False, False])
        assert not clip[0, ~valid].any()
        torch.testing.assert_close(clip[0, valid].sum(-1), torch.ones(2))
        mixed = self.run(model, ensemble_weight=0.7)["class_queries_scores"]
        torch.testing.assert_close(mixed[0, valid], own[0, valid] ** 0.3 * clip[0, valid] ** 0.7)
        torch.testing.assert_close(mixed[0, ~valid], own[0, ~valid] ** 0.3)
        with torch.no_grad():
            outputs = model(**self.pictures(), text_embeds=text, ensemble_weight=0.7, class_is_seen=[True, False, True])
        seen = torch.tensor([0, 2])
        found = outputs.class_queries_scores[0, valid]
        torch.testing.assert_close(found[:, seen], (own**0.7 * clip**0.3)[0, valid][:, seen])
        torch.testing.assert_close(found[:, 1], mixed[0, valid][:, 1])

    def test_no_clip_without_an_ensemble(self) -> None:
        model = self.model()
        calls = []
        model.clip.vision_model.encoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
        with torch.no_grad():
            state = model.encode_image(**self.pictures(), ensemble_weight=None)
            model(image_state=state, text_embeds=self.text(model), ensemble_weight=None)
            assert calls == []
            with pytest.raises(ValueError, match="encode_image was told"):
                model(image_state=state, text_embeds=self.text(model))

    @pytest.mark.parametrize("valid", [0, 1])
    @pytest.mark.parametrize("weight", [0.7, 0.0])
    def test_hardly_any_proposal(self, valid: int, weight: float) -> None:
        """The original crashes here; the sheet's evident intention is tested."""
        model = self.model()
        self.propose(model, self.logits(*[9.0] * valid))
        with torch.no_grad():
            outputs = model(**self.pictures(), text_embeds=self.text(model), ensemble_weight=weight, output_maps=True)
        assert int(outputs.maps["valid_proposals"].sum()) == valid
        own = self.run(model, ensemble_weight=None)["class_queries_scores"]
        expected = own[:, valid:] ** (1 - weight) if weight else torch.zeros_like(own[:, valid:])
        torch.testing.assert_close(outputs.class_queries_scores[:, valid:], expected)
        (result,) = post_process_semantic_segmentation(outputs, return_confidence=True, resizes_mask_logits=False)
        assert result.segmentation.shape == self.picture_size
        assert result.confidence.isfinite().all()

    def test_a_picture_without_proposals_among_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It neither changes its neighbours' crops nor is changed by them."""
        model = self.model()
        masks = torch.cat([self.logits(), self.logits(9.0, 9.0), self.logits()])
        self.propose(model, masks)
        monkeypatch.setattr(type(model), "encodes_alone", False)
        batch = self.run(model, batch=3)
        inputs = self.pictures(3)
        for index in range(3):
            self.propose(model, masks[index : index + 1])
            single = {name: value[index : index + 1] for name, value in inputs.items()}
            with torch.no_grad():
                found = model(**single, text_embeds=self.text(model))
            torch.testing.assert_close(found.class_queries_scores[0], batch["class_queries_scores"][index])

    @pytest.mark.parametrize("demo", [False, True])
    def test_pipeline_on_a_picture_without_proposals(self, demo: bool) -> None:
        """Every pixel still belongs to a name; with a threshold, the demo's pixels, which nothing covers, to none."""
        model = self.model(demo_mode=demo, ensemble_weight=0.0 if demo else 0.7)
        self.propose(model, self.logits())
        image_processor = OVSegImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
        processor = OVSegProcessor(image_processor, TOKENIZER, ["a photo of a {}."])
        segment = OpenVocabularySegmentationPipeline(model, processor, device="cpu")
        picture = PIL.Image.new("RGB", (40, 30), "red")
        names = ["road", "sky"]
        found = segment(picture, candidate_labels=names, output_type="map")
        assert found["segmentation"].shape == (30, 40)
        assert set(np.unique(found["segmentation"])) <= {0, 1}
        if demo:
            assert not any(found["scores"])
            assert segment(picture, candidate_labels=names, threshold=0.1) == []

    def test_chunks_of_crops_change_nothing(self) -> None:
        model = self.model()
        self.propose(model, self.logits(*[9.0] * 5))
        sizes = []
        model.clip.vision_model.encoder.layers[0].register_forward_hook(lambda m, x, y: sizes.append(len(y)))
        whole = self.run(model, crop_batch_size=None)
        for size in (1, 2, 100):
            self.assert_same(self.run(model, crop_batch_size=size), whole, 1e-5)
        assert sizes == [5, 1, 1, 1, 1, 1, 2, 2, 1, 5]

    def test_crops_of_a_batch_share_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = self.model()
        monkeypatch.setattr(type(model), "encodes_alone", False)
        self.propose(model, self.logits(9.0, 9.0, 9.0).expand(2, -1, -1, -1))
        sizes = []
        model.clip.vision_model.encoder.layers[0].register_forward_hook(lambda m, x, y: sizes.append(len(y)))
        self.run(model, batch=2, crop_batch_size=4)
        assert sizes == [4, 2]

    def test_padding_is_outside_of_crops(self) -> None:
        """A proposal that covers everything is cropped to the picture, not to the padding."""
        model = self.model(prompt_type="none")
        self.propose(model, torch.full((1, 5, 16, 16), 9.0))
        batch = self.pictures()
        batch["reshaped_input_sizes"] = torch.tensor([[48, 40]])
        with torch.no_grad():
            first = model.encode_image(**batch).crop_features
            batch["pixel_values"] = batch["pixel_values"].clone()
            batch["pixel_values"][:, :, 48:] = 7.0
            batch["pixel_values"][..., 40:] = 7.0
            assert torch.equal(model.encode_image(**batch).crop_features, first)

    def test_demo_keeps_one_proposal_per_class(self) -> None:
        model = self.model(demo_mode=True)
        self.propose(model, self.logits(*[9.0] * 4))
        with torch.no_grad():
            outputs = model(**self.pictures(), text_embeds=self.text(model), ensemble_weight=0.0)
            plain = model(**self.pictures(), text_embeds=self.text(model), ensemble_weight=None)
        assert outputs.mask_threshold == model.config.mask_threshold
        for scores in (outputs.class_queries_scores[0], plain.class_queries_scores[0]):
            kept = scores.any(dim=-1)
            assert set(kept.nonzero()[:, 0].tolist()) == set(scores.argmax(dim=0).tolist())
        (result,) = post_process_semantic_segmentation(
            outputs, return_segmentation_scores=True, resizes_mask_logits=False
        )
        assert not result.segmentation_scores[:, 32:, 40:].any()  # the fifth quarter: nobody's

    def test_views_get_crops_of_their_own(self) -> None:
        model = self.model(mask_threshold=0.0)
        with torch.no_grad():
            state = model.encode_image(**self.pictures(2), sliding_window=True)
        assert state.crop_features.shape == (10, 5, model.embedding_size)
        assert state.valid.all()

    def test_masks_of_an_offloaded_model(self) -> None:
        model, offloaded = self.model(), cpu_offload(self.model(), torch.device("cpu"))
        inputs = self.pictures()
        masks, again = (
            m.propose_masks(inputs["pixel_values"], inputs["reshaped_input_sizes"]) for m in (model, offloaded)
        )
        assert torch.equal(again[0], masks[0])
        with torch.no_grad():
            features, found = (m.encode_masks(inputs["pixel_values"], masks)[0] for m in (model, offloaded))
        assert torch.equal(found, features)

    # ------------------------------------------------------------------ prompts

    def test_prompts_can_be_changed(self) -> None:
        model = self.model()
        model.set_visual_prompts("none")
        assert model.visual_prompts is None
        assert model.config.prompt_type == "none"
        model.set_visual_prompts("mask", depth=4)
        assert model.visual_prompts.embedding.shape == (4, 16, 32)
        assert 0.01 < model.visual_prompts.embedding.std() < 0.03
        model.set_visual_prompts("deep", depth=1, num_deep_prompts=7)
        assert model.visual_prompts.embedding.shape == (1, 7, 32)
        assert not model.visual_prompts.embedding.requires_grad
        with pytest.raises(StrictDataclassClassValidationError, match="prompt_depth"):
            model.set_visual_prompts("mask", depth=5)
        assert model.config.prompt_depth == 1

    def test_what_is_trained(self) -> None:
        model = self.model(num_context_vectors=2, dot_token_id=3)
        trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {"proposal_network", "no_object_embedding"}
        assert not model.trains_text

    def test_crops_are_clips_size(self) -> None:
        model = OVSegForOpenVocabularySegmentation.from_clip(self.clip(), mask_config=SMALL["mask_config"])
        assert model.config.crop_size == self.clip_pixels
        assert model.config.prompt_depth == 3

    def test_swin_starts_from_a_classifier(self, tmp_path: Path) -> None:
        values = {k: v for k, v in SMALL["mask_config"]["backbone_config"].items() if k != "model_type"}
        torch.manual_seed(7)
        classifier = SwinForImageClassification(SwinConfig(**values, num_labels=3))
        classifier.save_pretrained(tmp_path)
        model = OVSegForOpenVocabularySegmentation.from_clip(self.clip(), backbone=tmp_path, **SMALL)
        found = model.proposal_network.backbone.model.swin.state_dict()
        expected = classifier.swin.state_dict()
        used = [name for name in expected if not name.startswith("layernorm.")]
        assert used
        assert all(torch.equal(found[name], expected[name]) for name in used)

    def test_resnet_starts_from_detectron2_names(self, tmp_path: Path) -> None:
        config = {**SMALL, "mask_config": {**SMALL["mask_config"], "backbone_config": RESNET}}
        source = self.model(**config).proposal_network.backbone
        torch.nn.init.normal_(source.stem[0].conv.weight)
        weights = {}
        for name, value in source.state_dict().items():
            name = re.sub(r"^stem\.(\d)\.", lambda m: f"stem.conv{int(m[1]) + 1}.", name)
            name = re.sub(r"^stages\.(\d)\.", lambda m: f"res{int(m[1]) + 2}.", name)
            weights[name.replace(".conv.weight", ".weight")] = value
        torch.save({**weights, "stem.fc.weight": torch.zeros(3, 32)}, tmp_path / "r103.pth")
        model = OVSegForOpenVocabularySegmentation.from_clip(self.clip(), backbone=tmp_path / "r103.pth", **config)
        found = model.proposal_network.backbone.state_dict()
        assert all(torch.equal(found[name], value) for name, value in source.state_dict().items())
        del weights["res2.0.conv1.weight"]
        torch.save(weights, tmp_path / "less.pth")
        with pytest.raises(ConversionError, match=r"stages\.0\.0\.conv1"):
            OVSegForOpenVocabularySegmentation.from_clip(self.clip(), backbone=tmp_path / "less.pth", **config)

    # ------------------------------------------------------------------ bad input

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"prompt_depth": 5}, "CLIP's 4 blocks"),
            ({"prompt_depth": 0}, "prompt_depth"),
            ({"prompt_type": "deep", "num_deep_prompts": 0}, "num_deep_prompts"),
            ({"crop_size": 30}, "patch size 8"),
            ({"mask_threshold": 1.0}, "probability"),
            ({"mask_expand_ratio": 0}, "mask_expand_ratio"),
            ({"crop_batch_size": 0}, "crop_batch_size"),
            ({"ensemble_weight": 1.5}, "between 0 and 1"),
            ({"num_context_vectors": 80}, "num_context_vectors"),
        ],
        ids=str,
    )
    def test_impossible_configurations(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(StrictDataclassClassValidationError, match=message):
            self.config(**changes)

    def test_impossible_switches(self) -> None:
        model = self.model()
        inputs = {**self.pictures(), "text_embeds": self.text(model)}
        for weight in (-0.1, 1.5):
            with pytest.raises(ValueError, match="between 0 and 1"):
                model(**inputs, ensemble_weight=weight)
        with pytest.raises(ValueError, match="values for 3 classes"):
            model(**inputs, class_is_seen=[True, False])
        with pytest.raises(ValueError, match="crop_batch_size"):
            model(**inputs, crop_batch_size=0)


@pytest.mark.parametrize(
    ("variant", "total", "trained"),
    [("ovseg_swinbase_vitL14_ft_mpt", 531.2, 102.8), ("ovseg_R101c_vitB16_ft_mpt", 211.1, 60.7)],
)
def test_released_sizes(variant: str, total: float, trained: float) -> None:
    with torch.device("meta"):
        model = OVSegForOpenVocabularySegmentation(VARIANTS[variant]())
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(total, abs=0.06)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6 == pytest.approx(trained, abs=0.06)


class TestOVSegConversion(ConversionTesterMixin):
    method = "ovseg"
    case = "ovseg/case_a"
    # DeOP's first stage holds the same adapter as SimBaseline and nothing else: a variant, not another method
    relatives = ("simbaseline_case", "prompt_case")
    manifests = ("ovseg", ("ovseg_swinbase_vitL14_ft_mpt", "ovseg_R101c_vitB16_ft_mpt", "simbaseline_coco156"))

    @pytest.mark.parametrize("clip", ["ViT-L-14", "ViT-B-16"])
    def test_adapted_clips_are_complete(self, clip: str) -> None:
        """Fine-tuned CLIPs fill `clip.*`, prompt-tuned ones the prompts too; none of their keys is left over."""
        for kind, filled in (("ft", {"clip"}), ("mpt", {"clip", "visual_prompts"})):
            manifest = json.loads((FIXTURES / "ovseg" / f"keys_open_clip_training_{clip}_{kind}.json").read_text())
            content = {key: torch.zeros(()).expand(value[0]) for key, value in manifest["state_dict"].items()}
            weights = convert_adapted_clip({key.removeprefix("module."): value for key, value in content.items()})
            assert {name.split(".")[0] for name in weights} == filled
            with torch.device("meta"):
                model = OVSegForOpenVocabularySegmentation(VARIANTS[VARIANT_OF_CLIP[clip]]())
            wanted = {name for name in model.state_dict() if name.split(".")[0] in filled}
            assert set(weights) == wanted

    def test_the_folder_resizes_as_the_release(self, tmp_path: Path) -> None:
        sizes = {
            "ovseg_swinbase_vitL14_ft_mpt": (640, 2560),
            "ovseg_R101c_vitB16_ft_mpt": (512, 2048),
            "simbaseline_coco156": (640, 2560),
        }
        rules = importlib.import_module("ov_segmentation.models.ovseg.convert_ovseg")
        for variant, (short, long) in sizes.items():
            found = conversion_cli.image_processor_of(self.row, rules, VARIANTS[variant]())
            assert (found.size["shortest_edge"], found.size["longest_edge"]) == (short, long), variant
        resnet = self.config()
        resnet.image_mean = [0.5, 0.25, 0.125]
        conversion_cli.image_processor_of(self.row, rules, resnet).save_pretrained(tmp_path)
        assert list(AutoImageProcessor.from_pretrained(tmp_path).image_mean) == [0.5, 0.25, 0.125]

    def test_simbaseline_from_the_command_line(self, tmp_path: Path) -> None:
        """Its learned prompt takes bare names: the folder has no templates. The VOC variant is refused by name."""
        case = FIXTURES / "deop" / "simbaseline_case"
        config = build("ovseg", json.loads((case / "hparams.json").read_text()))[0]
        config.save_pretrained(tmp_path / "config")
        TOKENIZER.save_pretrained(tmp_path / "tokenizer")
        given = ["--config", str(tmp_path / "config" / "config.json"), "--tokenizer", str(tmp_path / "tokenizer")]
        given += ["--output", str(tmp_path / "out")]
        conversion_cli.main("ovseg", ["--checkpoint", str(case / "original.pth"), *given])
        processor = AutoProcessor.from_pretrained(tmp_path / "out")
        assert processor.prompt_templates == ["{}"]
        model = AutoModelForOpenVocabularySegmentation.from_pretrained(tmp_path / "out")
        assert model.text_prompt.context.any() and not model.config.demo_mode
        content = torch.load(case / "original.pth", weights_only=True)
        content["model"]["_region_clip_adapter.clip_model.logit_scale"] = torch.zeros(())
        voc = self.saved(content, tmp_path / "voc.pth")
        with pytest.raises(ConversionError, match="VOC variant with two prompt learners"):
            conversion_cli.main("ovseg", ["--checkpoint", str(voc), *given])
        with pytest.raises(ConversionError, match="VOC variant with two prompt learners"):  # also when none is named
            conversion_cli.main("ovseg", ["--checkpoint", str(voc), *given[2:]])

    def test_an_adapted_clip_replaces_the_checkpoints(self, tmp_path: Path) -> None:
        """As open_clip's training writes it: `module.` in front of the names, and states of other things."""
        prefix = "clip_adapter.clip_model."
        clip = {key.removeprefix(prefix): value for key, value in self.weights().items() if key.startswith(prefix)}
        prompts = clip.pop("visual.mask_embedding")
        tuned = {**clip, "visual.proj": clip["visual.proj"] + 1, "visual.mask_embedding": prompts * 2}
        content = {
            "epoch": 5,
            "name": "mpt",
            "state_dict": {f"module.{k}": v for k, v in tuned.items()},
            "optimizer": {},
        }
        adapted = self.saved(content, tmp_path / "adapted.pt")
        plain, joined = self.convert(self.checkpoint), self.rules.convert(self.checkpoint, self.config(), adapted)
        torch.testing.assert_close(joined.clip.visual_projection.weight, plain.clip.visual_projection.weight + 1)
        torch.testing.assert_close(joined.visual_prompts.embedding, 2 * plain.visual_prompts.embedding)
        changed = [n for n, value in joined.state_dict().items() if not torch.equal(value, plain.state_dict()[n])]
        assert len(changed) == 2
        with pytest.warns(UserWarning, match="holds no mask prompts"):  # fine-tuned only: as in the original, none
            tuned_alone = self.rules.convert(self.checkpoint, self.config(), self.saved(clip, tmp_path / "ft.pt"))
        assert tuned_alone.visual_prompts is None
        assert (tuned_alone.config.prompt_type, self.config().prompt_type) == ("none", "mask")
        more = self.saved({"state_dict": {**tuned, "something": torch.zeros(1)}}, tmp_path / "more.pt")
        with pytest.raises(ConversionError, match="something"):
            self.rules.convert(self.checkpoint, self.config(), more)

    def test_prompts_need_a_place(self) -> None:
        """A checkpoint with mask prompts does not become a model without them unnoticed."""
        config = self.config()
        config.prompt_type = "none"
        with pytest.raises(ConversionError, match="visual_prompts"):
            self.convert(self.checkpoint, config)
