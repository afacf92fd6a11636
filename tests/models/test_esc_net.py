"""ESC-Net: the shared checks, its formulas, SAM's parts, chunks, rejection, and what its configuration changes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch.nn import functional as F
from transformers import CLIPConfig, SamConfig, SamModel

from benchmarks import count_esc_net
from ov_segmentation.data.augmentation import build_augmentations
from ov_segmentation.layers.labelled_classes import classes_in, labelled_first
from ov_segmentation.layers.linear_attention import TextClassAttention
from ov_segmentation.layers.pseudo_prompts import PseudoPrompts, generate_pseudo_prompts
from ov_segmentation.layers.sam_blocks import PseudoPromptEncoder, SAMBlock, load_sam_parts
from ov_segmentation.losses import SeededDraws
from ov_segmentation.models.esc_net.chunks import chunk_bounds, kept_classes
from ov_segmentation.models.esc_net.configuration_esc_net import ESCNetConfig
from ov_segmentation.models.esc_net.image_processing_esc_net import ESCNetImageProcessor
from ov_segmentation.models.esc_net.modeling_esc_net import REJECTED, ESCNetForOpenVocabularySegmentation
from ov_segmentation.training.optimization import parameter_settings
from ov_segmentation.training.recipe import load_recipe
from tests.mixins.model import FromCLIPTesterMixin, ModelTesterMixin
from tests.mixins.pipeline import PipelineTesterMixin
from tests.tiny import random_embeddings, tiny_clip_config, tiny_pictures

SAM = {
    "vision_config": {
        "hidden_size": 16,
        "output_channels": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "global_attn_indexes": [0],
        "image_size": 64,
        "patch_size": 8,
        "num_pos_feats": 16,
    },
    "prompt_encoder_config": {"hidden_size": 32, "mask_input_channels": 8, "image_size": 64, "patch_size": 8},
    "mask_decoder_config": {
        "hidden_size": 32,
        "mlp_dim": 48,
        "num_attention_heads": 4,
        "iou_head_hidden_dim": 16,
        "layer_norm_eps": 1e-5,
    },
}
SMALL = {
    "image_size": 64,
    "hidden_size": 32,
    "window_size": 4,
    "text_guidance_size": 8,
    "skip_sizes": (8, 4),
    "decoder_sizes": (32, 16),
    "sam_block_indices": (0, 1),
    "window_pixels": 48,
    "window_stride": 32,
    "canvas_pixels": 80,
}
VIT_L = CLIPConfig(
    projection_dim=768,
    text_config={"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768},
    vision_config={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 336,
        "projection_dim": 768,
    },
)
RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes"
TABLE_3 = [("points",), ("boxes",), ("points", "boxes"), ("points", "masks"), ("boxes", "masks")]
TABLE_3 += [("points", "boxes", "masks")]


def tiny_sam(seed: int = 2) -> SamModel:
    torch.manual_seed(seed)
    return SamModel(SamConfig.from_dict(SAM)).eval()


class TestESCNet(ModelTesterMixin, FromCLIPTesterMixin, PipelineTesterMixin):
    name = "ESCNet"
    export_config: ClassVar = {"class_chunk_size": None}
    kept_in_float32: ClassVar = {
        "clip.logit_scale",
        "prompt_encoder.encoder.shared_embedding.positional_embedding",
    }
    wrong_values: ClassVar = {"num_objects": "five", "sam_block_indices": 4, "refined_feature_aggregation": "max"}
    clip_values: ClassVar = {**SMALL, "sam_config": SAM}

    def config_values(self) -> dict[str, Any]:
        return {"clip_config": tiny_clip_config(), "skip_layers": (0, 2), "sam_config": SAM, **SMALL}

    # ------------------------------------------------------------------ classes

    @torch.no_grad()
    def test_correlation_is_the_cosine(self) -> None:
        model = self.model()
        text = self.text(model, 5)
        state = model.encode_image(**self.pictures(2))
        found = model(image_state=state, text_embeds=text, output_maps=True).maps["correlation"]
        dense = state.dense_features / state.dense_features.norm(dim=1, keepdim=True)
        torch.testing.assert_close(found, torch.einsum("kd,bdhw->bkhw", text, dense), rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        "changes", [{}, {"refined_feature_aggregation": "mean"}, {"use_sam_blocks": False}], ids=str
    )
    @torch.no_grad()
    def test_class_order_moves_with_the_names(self, changes: dict[str, Any]) -> None:
        model = self.model(**changes)
        text, order = self.text(model, 12), torch.randperm(12, generator=torch.Generator().manual_seed(0))
        logits = model(**self.pictures(), text_embeds=text).logits
        permuted = model(**self.pictures(), text_embeds=text[order]).logits
        torch.testing.assert_close(permuted, logits[:, order], rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_a_class_depends_on_the_others(self) -> None:
        """Through the class attention; nothing else sees more than one class."""
        model = self.model()
        text = self.text(model, 6)
        assert not torch.allclose(self.logits(model, text)[:, :3], self.logits(model, text[:3]), atol=1e-4)
        for block in model.blocks:
            block.classes.value.weight.zero_()
            block.classes.value.bias.zero_()
        torch.testing.assert_close(self.logits(model, text)[:, :3], self.logits(model, text[:3]), rtol=0, atol=1e-5)

    def logits(self, model: ESCNetForOpenVocabularySegmentation, text: torch.Tensor, **switches: Any) -> torch.Tensor:
        return model(**self.pictures(), text_embeds=text, **switches).logits

    @pytest.mark.parametrize(
        "changes",
        [{}, {"refined_feature_aggregation": "mean"}, {"use_sam_blocks": False}, {"prompt_types": ("boxes",)}],
        ids=str,
    )
    @torch.no_grad()
    def test_chunks_change_nothing(self, changes: dict[str, Any]) -> None:
        model = self.model(**changes)
        inputs = {**self.pictures(3), "text_embeds": self.text(model, 11)}
        whole = model(**inputs, class_chunk_size=None).logits
        for chunk_size in (1, 4, 7, 50):
            found = model(**inputs, class_chunk_size=chunk_size).logits
            torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_large_vocabularies_in_chunks(self) -> None:
        model = self.model()
        inputs = {**self.pictures(), "text_embeds": self.text(model, 847)}
        whole = model(**inputs, class_chunk_size=None).logits
        torch.testing.assert_close(model(**inputs, class_chunk_size=64).logits, whole, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("limit", [{}, {"rejection_top_k": 1}])
    @torch.no_grad()
    def test_nothing_larger_than_a_chunk_is_computed(self, limit: dict[str, Any]) -> None:
        model = self.model(class_chunk_size=40, sam_block_indices=(0,))
        sizes: list[int] = []
        modules = [model.cost_embedding, *model.decoder]
        for block in model.blocks:
            modules += [block.sam, block.refinement, block.classes]
            # the guided Swin blocks take `[pictures, classes, positions, C]`
            block.spatial.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[:2].numel()))
        for module in modules:
            module.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        outputs = model(**self.pictures(2), text_embeds=self.text(model, 200), **limit)
        assert outputs.logits.shape[:2] == (2, 200)
        used = 400 if outputs.kept_classes is None else int(outputs.kept_classes.sum())
        assert max(sizes) == min(40, used)
        assert sum(sizes) == (len(modules) + len(model.blocks)) * used

    @torch.no_grad()
    def test_early_rejection_leaves_the_others_unchanged(self) -> None:
        model = self.model()
        text = self.text(model, 60)
        everything = model(**self.pictures(2), text_embeds=text, output_maps=True)
        assert everything.kept_classes is None
        cost = everything.maps["correlation"]
        for top_k in (1, 2):
            outputs = model(**self.pictures(2), text_embeds=text, rejection_top_k=top_k)
            kept = outputs.kept_classes
            for row in range(2):
                # in the top k of a position: fewer than k classes are better there
                better = (cost[row][None] > cost[row][:, None]).sum(dim=1)
                assert torch.equal(kept[row], (better < top_k).flatten(1).any(dim=1))
            assert 0 < kept.sum() < kept.numel()
            torch.testing.assert_close(outputs.logits[kept], everything.logits[kept], rtol=0, atol=1e-5)
            assert (outputs.logits[~kept] == REJECTED).all()
        every = model(**self.pictures(2), text_embeds=text, rejection_top_k=60)
        assert every.kept_classes.all()

    @torch.no_grad()
    def test_max_classes_keeps_the_strongest(self) -> None:
        model = self.model()
        text = self.text(model, 20)
        everything = model(**self.pictures(2), text_embeds=text, output_maps=True)
        outputs = model(**self.pictures(2), text_embeds=text, max_classes=3)
        best = everything.maps["correlation"].flatten(2).amax(dim=2)
        expected = torch.zeros(2, 20, dtype=torch.bool).scatter(1, best.topk(3, dim=1).indices, True)
        assert torch.equal(outputs.kept_classes, expected)
        torch.testing.assert_close(outputs.logits[expected], everything.logits[expected], rtol=0, atol=1e-5)
        both = model(**self.pictures(2), text_embeds=text, max_classes=3, rejection_top_k=1)
        top = model(**self.pictures(2), text_embeds=text, rejection_top_k=1)
        assert torch.equal(both.kept_classes, outputs.kept_classes & top.kept_classes)
        assert model(**self.pictures(), text_embeds=text, max_classes=20).kept_classes is None

    @torch.no_grad()
    def test_rejected_classes_score_exactly_zero(self) -> None:
        model = self.model()
        outputs = model(**self.pictures(), text_embeds=self.text(model, 60), rejection_top_k=1)
        (result,) = ESCNetImageProcessor().post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
        kept = outputs.kept_classes[0]
        assert (result.segmentation_scores[~kept] == 0).all()
        assert (result.segmentation_scores[kept] > 0).all()

    @torch.no_grad()
    def test_each_view_rejects_its_own_classes(self) -> None:
        model = self.model()
        outputs = model(**self.pictures(), text_embeds=self.text(model, 60), sliding_window=True, rejection_top_k=1)
        assert outputs.kept_classes.shape == (5, 60)
        assert len(outputs.kept_classes.unique(dim=0)) > 1

    # ------------------------------------------------------------------ pictures

    @torch.no_grad()
    def test_padding_of_the_batch_is_cut_off(self) -> None:
        processor, model = ESCNetImageProcessor(do_resize=False), self.model()
        text, pictures = self.text(model), tiny_pictures((7, 40), (64, 50), (90, 33))
        for switches in ({}, {"sliding_window": True}):
            together = model(**processor(images=pictures, return_tensors="pt"), text_embeds=text, **switches).logits
            for picture, found in zip(pictures, together.chunk(len(pictures)), strict=True):
                alone = model(**processor(images=picture, return_tensors="pt"), text_embeds=text, **switches)
                torch.testing.assert_close(found, alone.logits, rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_sizes_of_every_stage(self) -> None:
        """A grid of 8 x 8: skips and decoder stages at twice and four times the resolution, logits at four times."""
        model, shapes = self.model(), {}
        for name, module in [("neck", model.sam_neck), *model.decoder.named_children()]:
            module.register_forward_hook(lambda _, __, out, name=name: shapes.update({name: tuple(out.shape)}))
        outputs = model(**self.pictures(), text_embeds=self.text(model))
        state = model.encode_image(**self.pictures())
        assert [tuple(skip.shape) for skip in state.skips] == [(1, 8, 16, 16), (1, 4, 32, 32)]
        assert shapes == {"neck": (1, 64, 32), "0": (3, 16, 16, 32), "1": (3, 32, 32, 16)}
        assert outputs.logits.shape == (1, 3, 32, 32)

    @torch.no_grad()
    def test_forward_is_its_formulas(self) -> None:
        """Class by class, with concatenations and sums written out; chunks, pieces and shared parts aside."""
        model, grid = self.model(), (8, 8)
        text = self.text(model, 4)
        outputs = model(**self.pictures(), text_embeds=text, output_maps=True, output_hidden_states=True)
        state = model.encode_image(**self.pictures())
        neck = model.sam_neck
        projected = state.dense_features[0].flatten(1).T @ neck.projection.weight.T
        variance, mean = torch.var_mean(projected, dim=1, correction=0, keepdim=True)
        image = (projected - mean) / (variance + 1e-6).sqrt() * neck.norm.weight + neck.norm.bias
        torch.testing.assert_close(state.sam_features[0], image, rtol=0, atol=1e-5)
        guidance = model.text_projection(text).relu()
        positions = model.prompt_encoder.position_embeddings()
        for k in range(4):
            cosines = outputs.maps["correlation"][:1, k]
            embedded = model.cost_embedding(cosines[None])[0].flatten(1).T
            torch.testing.assert_close(outputs.hidden_states[0][0, k], embedded, rtol=0, atol=1e-5)
            keys = image[None]
            for i, block in enumerate(model.blocks):
                before, after = (outputs.hidden_states[i + j][0, k] for j in (0, 1))
                maps = cosines if i == 0 else (before @ block.prompt_map.weight[0]).view(1, *grid)
                prompts = generate_pseudo_prompts(maps, 5, 1.0, 0.5, 10)
                sparse, dense = model.prompt_encoder(prompts)
                queries = torch.cat([model.text_token(text[k])[None, None], sparse], dim=1)
                keys = block.sam(keys + dense, queries, positions)
                refined = keys[0] @ block.refinement.weight.T + block.refinement.bias
                fused = block.spatial(before[None, None], refined[None, None], grid)[0]
                expected = block.classes(fused, block.classes.class_sums(guidance))[0]
                torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)
            logits = self.decoded(model, outputs.hidden_states[-1][0, k].T.view(1, 32, *grid), state.skips)
            torch.testing.assert_close(outputs.logits[0, k], logits, rtol=0, atol=1e-5)

    @staticmethod
    def decoded(
        model: ESCNetForOpenVocabularySegmentation, maps: torch.Tensor, skips: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """Twice: bilinear x 2, [maps, skip], 3 x 3 convolution, norm in groups of 16 channels, ReLU, and all but the
        upsampling again; then a 3 x 3 convolution to one channel."""
        for stage, skip in zip(model.decoder, skips, strict=True):
            maps = torch.cat([F.interpolate(maps, scale_factor=2, mode="bilinear"), skip], dim=1)
            for conv, norm in ((stage.conv1, stage.norm1), (stage.conv2, stage.norm2)):
                maps = F.conv2d(maps, conv.weight, conv.bias, padding=1)
                maps = F.group_norm(maps, maps.shape[1] // 16, norm.weight, norm.bias).relu()
        return F.conv2d(maps, model.head.weight, model.head.bias, padding=1)[0, 0]

    @torch.no_grad()
    def test_skips_are_upsampled_and_convolved_maps_of_the_tower(self) -> None:
        model, seen = self.model(), {}
        for index in model.config.skip_layers:
            layer = model.clip.vision_model.encoder.layers[index]
            layer.register_forward_hook(lambda _, __, out, i=index: seen.update({i: out}))
        state = model.encode_image(**self.pictures())
        for skip, index, scale, module in zip(state.skips, (0, 2), (2, 4), model.skips, strict=True):
            maps = seen[index][:, 1:].transpose(1, 2).unflatten(2, (8, 8))
            larger = F.interpolate(maps, scale_factor=scale, mode="bilinear")
            expected = F.conv2d(larger, module.projection.weight, module.projection.bias, padding=1).relu()
            torch.testing.assert_close(skip, expected, rtol=0, atol=1e-5)

    # ------------------------------------------------------------------ records

    @torch.no_grad()
    def test_records(self) -> None:
        model = self.model(class_chunk_size=2)
        model.set_attn_implementation("eager")
        inputs = {**self.pictures(2), "text_embeds": self.text(model, 5)}
        asked = model(**inputs, output_hidden_states=True, output_attentions=True, output_maps=True)
        plain = model(**inputs)
        assert torch.equal(asked.logits, plain.logits)
        assert plain.hidden_states is plain.attentions is plain.maps is None
        assert [tuple(state.shape) for state in asked.hidden_states] == [(2, 5, 64, 32)] * 3
        assert len(asked.attentions) == 3  # CLIP's last block has none
        blocks = {f"{kind}_{i}" for kind in ("activation", "mask_prompt", "point_prompt") for i in (1, 2)}
        assert set(asked.maps) == {"correlation", *blocks}
        for i in (1, 2):
            expected = asked.hidden_states[i].norm(dim=-1).unflatten(2, (8, 8))
            torch.testing.assert_close(asked.maps[f"activation_{i}"], expected)
            assert asked.maps[f"mask_prompt_{i}"].amax((2, 3)).eq(1).all()
            assert asked.maps[f"point_prompt_{i}"].shape == (2, 5, 5, 3)
        rejected = model(**inputs, output_hidden_states=True, output_maps=True, max_classes=2)
        kept = rejected.kept_classes
        torch.testing.assert_close(rejected.maps["activation_2"][kept], asked.maps["activation_2"][kept])
        assert not rejected.hidden_states[2][~kept].any()
        without = self.model(use_sam_blocks=False)(**inputs, output_maps=True)
        assert set(without.maps) == {"correlation", "activation_1", "activation_2"}

    @torch.no_grad()
    def test_first_block_reads_the_correlation_and_later_ones_the_residual_stream(self) -> None:
        model = self.model()
        outputs = model(**self.pictures(), text_embeds=self.text(model), output_maps=True, output_hidden_states=True)
        second = (outputs.hidden_states[1] @ model.blocks[1].prompt_map.weight[0])[0]
        for index, maps in ((1, outputs.maps["correlation"][0].flatten(1)), (2, second)):
            z = (maps - maps.mean(1, keepdim=True)) / maps.std(1, correction=0, keepdim=True)
            p = (z - z.amax(1, keepdim=True)).exp()
            expected = torch.where(p >= 0.5, p, 0.0).view(3, 8, 8)
            torch.testing.assert_close(outputs.maps[f"mask_prompt_{index}"][0], expected, rtol=1e-4, atol=1e-4)

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
        """Of SAM, its table of positions and the embeddings of prompts that are not used are frozen."""
        model = self.model(clip_finetune=mode)
        unused = r"prompt_encoder\.encoder\.(shared_embedding|no_mask_embed|point_embed\.[023])\..*"
        expected = {n for n, _ in model.named_parameters() if not re.fullmatch(f"{frozen}|{unused}", n)}
        assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
        assert model.trains_text == (mode != "none")

    @pytest.mark.parametrize(
        "changes",
        [
            *({"prompt_types": types, "text_prompt_token": False} for types in TABLE_3),
            {"prompt_types": ("masks",)},
            {"use_sam_blocks": False},
            {"sam_output_tokens": True},
            {"refined_feature_aggregation": "mean"},
            {"sam_finetune": False},
        ],
        ids=str,
    )
    def test_every_combination_trains(self, changes: dict[str, Any]) -> None:
        """The paper's Tables 2 and 3: what is said to be trained has a gradient, which several processes rely on."""
        model = self.model(**changes, clip_finetune="none").train()
        gradients = self.gradients(model)
        assert set(gradients) == {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        trains_sam = any(".sam." in name or name.startswith("prompt_encoder") for name in gradients)
        assert trains_sam == (changes.get("use_sam_blocks", True) and changes.get("sam_finetune", True))

    def test_ignored_pixels(self) -> None:
        model = self.model().train()
        inputs = self.training_inputs(model)
        logits = F.interpolate(model(**inputs).logits, self.picture_size, mode="bilinear")
        labels = inputs["labels"]
        wanted = F.one_hot(labels.clamp(min=0), 3).permute(0, 3, 1, 2) * (labels >= 0)[:, None]
        terms = F.binary_cross_entropy_with_logits(logits, wanted.float(), reduction="none")
        expected = {True: terms.mean(), False: terms.mean(1)[labels >= 0].mean()}
        assert model.config.ignore_as_negative is False
        for ignore_as_negative, loss in expected.items():
            model.config.ignore_as_negative = ignore_as_negative
            torch.testing.assert_close(model(**inputs).loss, loss)

    def test_classes_of_the_labels_come_first_in_training(self) -> None:
        """Of those that are left, logits and loss are the same as among all; the rest counts as rejected."""
        model = self.model(train_max_classes=4).train()
        inputs = {**self.pictures(2), "text_embeds": self.text(model, 12)}
        labels = torch.zeros(2, *self.picture_size, dtype=torch.long)
        labels[0, :9], labels[1] = 1, 7
        seeded = {**inputs, "labels": labels, "sample_seeds": torch.tensor([3, 4])}
        outputs, everything = (model(**seeded, max_classes=limit) for limit in ("config", None))
        kept = outputs.kept_classes
        assert kept.sum(dim=1).tolist() == [4, 4]
        assert kept[0, :2].all()
        assert kept[1, 7]
        torch.testing.assert_close(outputs.logits[kept], everything.logits[kept], rtol=0, atol=1e-5)
        assert (outputs.logits[~kept] == REJECTED).all()
        assert 0 < outputs.loss < 1
        assert torch.equal(model(**seeded).kept_classes, kept)
        # labels say nothing about what is predicted
        evaluated = model.eval()(**inputs, labels=labels, max_classes=4).kept_classes
        assert torch.equal(evaluated, model(**inputs, max_classes=4).kept_classes)
        assert model(**inputs).kept_classes is None

    def test_no_rejection_in_training(self) -> None:
        model = self.model().train()
        with pytest.raises(ValueError, match="rejection_top_k=None"):
            model(**self.training_inputs(model), rejection_top_k=2)

    # ------------------------------------------------------------------ a pretrained SAM

    def test_from_clip_and_sam_takes_the_weights_of_both(self, tmp_path: Path) -> None:
        clip, sam = self.clip(), tiny_sam()
        sam.save_pretrained(tmp_path)
        values = {**SMALL, "sam_block_indices": (1, 0, 1), "sam_output_tokens": True}
        for source in (tmp_path, sam):
            model = self.model_class.from_clip_and_sam(clip, source, **values)
            assert torch.equal(model.clip.visual_projection.weight, clip.visual_projection.weight)
            for name, value in sam.prompt_encoder.state_dict().items():
                assert torch.equal(model.prompt_encoder.encoder.state_dict()[name], value), name
            layers = sam.mask_decoder.transformer.layers
            for block, index in zip(model.blocks, (1, 0, 1), strict=True):
                assert block.sam.block.skip_first_layer_pe == (index == 0)
                assert block.sam.block.layer_norm1.eps == 1e-5
                for name, value in layers[index].state_dict().items():
                    assert torch.equal(block.sam.block.state_dict()[name], value), name
            tokens = [sam.mask_decoder.iou_token.weight, sam.mask_decoder.mask_tokens.weight]
            assert torch.equal(model.output_tokens, torch.cat(tokens))
        assert not torch.equal(model.blocks[0].sam.block.mlp.lin1.weight, model.blocks[1].sam.block.mlp.lin1.weight)
        self.run(model.eval())

    def test_sams_own_epsilon_is_the_originals(self) -> None:
        """Configurations on the Hub have transformers' default, the original has torch's."""
        config = SamConfig.from_dict(
            {**SAM, "mask_decoder_config": {**SAM["mask_decoder_config"], "layer_norm_eps": 1e-6}}
        )
        model = self.model_class.from_clip_and_sam(self.clip(), SamModel(config), **SMALL)
        assert model.blocks[1].sam.block.layer_norm4.eps == 1e-5
        assert config.mask_decoder_config.layer_norm_eps == 1e-6

    def test_random_and_pretrained_sam_differ_only_in_sam(self) -> None:
        clip, sam = self.clip(), tiny_sam()
        torch.manual_seed(0)
        pretrained = self.model_class.from_clip_and_sam(clip, sam, **SMALL)
        torch.manual_seed(0)
        random = self.model_class.from_clip(clip, **SMALL, sam_config=SAM).state_dict()
        changed = {n for n, value in pretrained.state_dict().items() if not torch.equal(value, random[n])}
        assert changed
        assert all(".sam." in name or name.startswith("prompt_encoder.") for name in changed)

    def test_no_place_for_sam(self) -> None:
        with pytest.raises(ValueError, match="from_clip"):
            self.model_class.from_clip_and_sam(self.clip(), tiny_sam(), use_sam_blocks=False, **SMALL)
        assert not [
            name for name in self.model(use_sam_blocks=False).state_dict() if "sam." in name or "prompt" in name
        ]

    # ------------------------------------------------------------------ what the configuration changes

    @pytest.mark.parametrize(
        "changes",
        [
            {"dense_residual": "token"},
            {"window_size": 8},  # the map is one window: no shift
            {"use_sam_blocks": False},
            {"sam_block_indices": (1, 1)},
            {"sam_output_tokens": True},
            {"text_prompt_token": False},
            {"prompt_types": ("points", "boxes", "masks")},
            {"num_objects": 2},
            {"prompt_temperature": 0.5},
            {"prompt_threshold": 0.8},
            {"mask_prompt_scale": 5.0},
            {"refined_feature_aggregation": "mean"},
            {"skip_layers": (2, 0)},
        ],
        ids=str,
    )
    @torch.no_grad()
    def test_options_change_the_prediction(self, changes: dict[str, Any]) -> None:
        """The same weights where both have them."""
        usual, changed = self.model(), self.model(**changes)
        changed.load_state_dict(usual.state_dict(), strict=False)
        text = 5 * self.text(usual)
        found, expected = (m(**self.pictures(seed=3), text_embeds=text).logits for m in (changed, usual))
        assert found.shape == expected.shape
        assert found.isfinite().all()
        assert not torch.equal(found, expected)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"image_size": 60}, "patch size 8"),
            ({"window_size": 5}, "does not divide"),
            ({"window_stride": 49}, "window_stride"),
            ({"skip_layers": (0, 3)}, "below the last"),
            ({"num_attention_heads": 5}, "no multiple"),
            ({"decoder_sizes": (32, 8)}, "groups"),
            ({"skip_sizes": [8, 4, 2]}, "two numbers"),
            ({"prompt_types": ()}, "use_sam_blocks=False"),
            ({"prompt_types": ("points", "points")}, "one or more"),
            ({"prompt_types": ("scribbles",)}, "points, boxes, masks"),
            ({"prompt_types": ("masks",), "text_prompt_token": False}, "needs a token"),
            ({"prompt_threshold": 0.0}, "prompt_threshold"),
            ({"prompt_temperature": -1}, "prompt_temperature"),
            ({"num_objects": 0}, "num_objects"),
            ({"num_objects": 256}, "at most 255"),
            ({"kmeans_iterations": -1}, "kmeans_iterations"),
            ({"sam_block_indices": (0, 2)}, "0 or 1"),
            ({"sam_block_indices": ()}, "0 or 1"),
            ({"sam_config": {**SAM, "prompt_encoder_config": {"hidden_size": 64}}}, "must be equal"),
            ({"rejection_top_k": 0}, "rejection_top_k"),
            ({"class_chunk_size": 0}, "class_chunk_size"),
            ({"train_max_classes": 0}, "train_max_classes"),
            ({"rejection_top_k": 8, "refined_feature_aggregation": "mean"}, "depends on all others"),
        ],
        ids=str,
    )
    def test_refuses_configurations_that_do_not_fit(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(StrictDataclassClassValidationError, match=message):
            self.config(**changes)

    @pytest.mark.parametrize("switch", ["rejection_top_k", "max_classes", "class_chunk_size", "crop_batch_size"])
    def test_refuses_switches_that_do_not_fit(self, switch: str) -> None:
        model = self.model()
        with pytest.raises(ValueError, match=f"{switch} must be at least 1"):
            model(**self.pictures(), text_embeds=self.text(model), **{switch: 0})

    def test_refuses_rejection_where_maps_are_averaged(self) -> None:
        model = self.model(refined_feature_aggregation="mean")
        with pytest.raises(ValueError, match="rejection_top_k=None"):
            model(**self.pictures(), text_embeds=self.text(model), rejection_top_k=3)

    def test_attention_implementation_reaches_every_part(self) -> None:
        model = self.model()
        parts = [model.blocks[0].sam.block.self_attn, model.blocks[0].spatial.block1.attention]
        parts += [
            model.clip.vision_model.encoder.layers[0].self_attn,
            model.clip.text_model.encoder.layers[0].self_attn,
        ]
        for name in ("eager", "sdpa"):
            model.set_attn_implementation(name)
            assert [part.config._attn_implementation for part in parts] == [name] * 4
        with pytest.raises(ValueError, match="fastest"):
            model.set_attn_implementation("fastest")
        assert [part.config._attn_implementation for part in parts] == ["sdpa"] * 4
        loaded = self.model_class._from_config(self.config(), attn_implementation="eager")
        assert loaded.blocks[0].sam.block.self_attn.config._attn_implementation == "eager"


# ---------------------------------------------------------------------- SAM's parts


@torch.no_grad()
def test_a_block_computes_what_it_does_inside_of_sam() -> None:
    sam, seen = tiny_sam(), []
    for layer in sam.mask_decoder.transformer.layers:
        layer.register_forward_hook(lambda _, __, kwargs, out: seen.append((kwargs, out)), with_kwargs=True)
    points = torch.tensor([[[[10.0, 20.0], [40.0, 50.0]]]])
    image = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    sam(image_embeddings=image, input_points=points, input_labels=torch.ones(1, 1, 2, dtype=torch.long))
    encoder = PseudoPromptEncoder(sam.config, ("points",), 10.0)
    blocks = [SAMBlock(sam.config.mask_decoder_config, index) for index in (0, 1)]
    load_sam_parts(sam, encoder.encoder, [block.block for block in blocks], (0, 1))
    positions = encoder.position_embeddings()
    wide = sam.get_image_wide_positional_embeddings()
    torch.testing.assert_close(positions, wide[0].flatten(1).T, rtol=0, atol=1e-5)
    assert len(seen) == 2
    # in SAM the second block goes on with the first one's queries; ours starts with fresh ones, so give it the same
    inputs, (_, keys, _) = seen[0]
    queries = inputs["queries"]
    assert torch.equal(queries, inputs["query_point_embedding"])
    found = blocks[0](inputs["keys"][:, 0], queries[:, 0], wide[0].flatten(1).T)
    torch.testing.assert_close(found, keys[:, 0], rtol=0, atol=1e-6)
    inputs, outputs = seen[1]
    for value, expected in zip(blocks[1].block(**inputs), outputs, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
    again = {**inputs, "queries": queries, "query_point_embedding": queries}
    _, keys, _ = sam.mask_decoder.transformer.layers[1](**again)
    found = blocks[1](inputs["keys"][:, 0], queries[:, 0], wide[0].flatten(1).T)
    torch.testing.assert_close(found, keys[:, 0], rtol=0, atol=1e-6)


PROMPTS = PseudoPrompts(
    points=torch.tensor([[[0.0, 0.0], [3.0, 2.0]], [[7.0, 7.0], [0.0, 0.0]]]),
    boxes=torch.tensor([[[0.0, 0.0, 1.0, 0.0], [3.0, 2.0, 4.0, 6.0]], [[7.0, 7.0, 7.0, 7.0], [0.0, 0.0, 0.0, 0.0]]]),
    valid=torch.tensor([[True, True], [True, False]]),
    masks=torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0)),
)


@pytest.mark.parametrize("types", [*TABLE_3, ("masks",)], ids=str)
@torch.no_grad()
def test_prompts_are_embedded_as_sam_embeds_them(types: tuple[str, ...]) -> None:
    """Patches of 8 pixels: the middle of column 3 is 3.5 * 8, and SAM adds 0.5 to what it is given."""
    sam = tiny_sam()
    encoder = PseudoPromptEncoder(sam.config, types, 10.0)
    encoder.encoder.load_state_dict(sam.prompt_encoder.state_dict())
    sparse, dense = encoder(PROMPTS)
    expected = []
    if "points" in types:
        points = torch.tensor([[[3.5, 3.5], [27.5, 19.5]], [[59.5, 59.5], [3.5, 3.5]]])[:, None]
        labels = torch.tensor([[1, 1], [1, -1]])[:, None]
        embedded, _ = sam.prompt_encoder(points, labels, None, None)
        # SAM pads points with one that is none, unless there are boxes
        expected.append(embedded[:, 0, :2] if "boxes" in types else embedded[:, 0])
    if "boxes" in types:
        corners = (
            [[-0.5, -0.5, 15.5, 7.5], [23.5, 15.5, 39.5, 55.5]],
            [[55.5, 55.5, 63.5, 63.5], [-0.5, -0.5, 7.5, 7.5]],
        )
        embedded, _ = sam.prompt_encoder(None, None, torch.tensor(corners), None)
        embedded[1, 1] = sam.prompt_encoder.not_a_point_embed.weight
        expected.append(embedded.flatten(1, 2))
    if expected:
        torch.testing.assert_close(sparse, torch.cat(expected, dim=1), rtol=0, atol=1e-6)
    else:
        assert sparse is None
    logits = F.interpolate(20 * PROMPTS.masks[:, None] - 10, (32, 32), mode="bilinear", align_corners=False)
    wanted = sam.prompt_encoder(None, None, None, logits if "masks" in types else None)[1]
    torch.testing.assert_close(dense, wanted.flatten(2).transpose(1, 2).expand_as(dense), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- class attention with texts


@torch.no_grad()
def test_text_class_attention_by_hand() -> None:
    torch.manual_seed(0)
    layer = TextClassAttention(8, 2, text_channels=5).double()
    tokens, texts = torch.randn(3, 4, 8).double(), torch.randn(6, 5).double()
    found = layer(tokens, layer.class_sums(texts))
    normed = F.layer_norm(tokens, (8,), layer.norm1.weight, layer.norm1.bias)
    phi = [F.elu(x) + 1 for x in (layer.query(normed), layer.key(texts))]
    values = layer.value(texts)
    expected = torch.zeros_like(tokens)
    for n in range(3):
        for s in range(4):
            for head in (slice(0, 4), slice(4, 8)):
                weights = torch.tensor([phi[0][n, s, head] @ phi[1][k, head] for k in range(6)])
                expected[n, s, head] = (weights @ values[:, head]) / (weights.sum() + 1e-6)
    hidden = tokens + expected
    normed = F.layer_norm(hidden, (8,), layer.norm2.weight, layer.norm2.bias)
    torch.testing.assert_close(found, hidden + layer.fc2(layer.fc1(normed).relu()))
    order = torch.randperm(6)
    torch.testing.assert_close(layer(tokens, layer.class_sums(texts[order])), found)


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("counts", "size"), [([3, 3], 2), ([3, 3], 4), ([3, 3], None), ([1, 0, 5], 4), ([7], 7)], ids=str
)
def test_chunks_cover_every_pair(counts: list[int], size: int | None) -> None:
    rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    covered = []
    for part, used, shares in chunk_bounds(counts, size):
        covered += range(part.start, part.stop)
        assert part.stop - part.start <= (size or sum(counts))
        assert [(rows[part] == row).sum() for row in range(used.start, used.stop)] == shares
        assert sum(shares) == part.stop - part.start
    assert covered == list(range(sum(counts)))


def test_classes_of_labels_by_hand() -> None:
    labels = torch.tensor([[[-100, 2], [2, 0]], [[-1, -1], [-1, -1]]])
    assert classes_in(labels, 4).tolist() == [[True, False, True, False], [False] * 4]
    cost = torch.tensor([[0.1, 0.5, 0.2, 0.9]])[:, :, None, None]
    order = torch.tensor([[1.5, 0.7, 0.1, 0.2]])
    assert kept_classes(cost, None, 2).tolist() == [[False, True, False, True]]
    assert kept_classes(cost, None, 2, order).tolist() == [[True, True, False, False]]
    assert kept_classes(cost, None, 4, order) is None


def test_classes_beside_those_of_the_labels_are_drawn_evenly() -> None:
    labels = torch.tensor([1, 4]).repeat(500)[:, None, None].expand(-1, 2, 2)
    order = labelled_first(labels, 6, SeededDraws(torch.arange(1000)))
    kept = kept_classes(torch.rand(1000, 6, 1, 1), None, 3, order)
    assert (kept.sum(dim=1) == 3).all()
    for row, label in ((0, 1), (1, 4)):
        share = kept[row::2].float().mean(dim=0)
        assert share[label] == 1
        # two of the five others
        others = share[torch.arange(6) != label]
        assert ((others - 0.4).abs() < 0.1).all()


def test_published_sizes() -> None:
    """ViT-L/14 at 336: the sheet expects about 438 to 443 M; CLIP has 427,944,193, one two-way block 1.58 M."""
    values = ESCNetForOpenVocabularySegmentation.config_for_clip(VIT_L)
    config = ESCNetConfig(clip_config=VIT_L.to_dict(), **values)
    assert (config.image_size, tuple(config.skip_layers), config.grid_size) == (336, (7, 15), 24)
    with torch.device("meta"):
        model = ESCNetForOpenVocabularySegmentation(config)

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert count(model.clip) == 427_944_193
    assert round(count(model.blocks[0].sam) / 1e6, 2) == 1.58
    assert 437.5e6 < count(model) < 443e6
    base = ESCNetConfig()
    assert (base.image_size, tuple(base.skip_layers), base.grid_size) == (384, (3, 7), 24)
    assert base.sam_config.prompt_encoder_config.image_embedding_size == 24
    assert config.sam_config.prompt_encoder_config.image_size == 336


def test_counts_stand_part_by_part_beside_the_papers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """What the command prints of ViT-L/14: with 150 classes, the sheet expects at most about 650 G for a view."""
    sizes = count_esc_net.configurations()
    monkeypatch.setattr(count_esc_net, "configurations", lambda: {"vit_l_14_336": sizes["vit_l_14_336"]})
    monkeypatch.setattr("sys.argv", ["count_esc_net.py"])
    count_esc_net.main()
    printed = capsys.readouterr().out
    rows = re.findall(r"^  (\w.*?) +([\d.]+) M +([\d.]+) G$", printed, flags=re.MULTILINE)
    counts = {name: (float(parameters), float(operations)) for name, parameters, operations in rows}
    paper, whole = counts.pop("paper (five views, most likely)"), counts.pop("all")
    assert paper == (451.3, 2203.5)
    assert "438 to 443 M   at most about 650 G" in printed
    assert set(counts) == {*count_esc_net.PARTS.values(), "rest"}
    for column in (0, 1):
        assert sum(count[column] for count in counts.values()) == pytest.approx(whole[column], abs=0.5)
    assert counts["rest"][0] == 0 and counts["rest"][1] < 1
    assert 437.5 < whole[0] < 443 and whole[1] < 650
    assert float(re.search(r"5 views +([\d.]+) G", printed)[1]) == pytest.approx(5 * whole[1], abs=0.5)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("esc_net_*.yaml")), ids=lambda path: path.stem)
def test_recipes(path: Path) -> None:
    """They load; around published CLIPs, CLIP and SAM have the paper's lower rate."""
    recipe = load_recipe(path)
    assert build_augmentations(recipe.augmentation)
    values = recipe.model.config
    if "from_clip" in path.read_text() and "vit_l" in path.stem:
        values = {"clip_config": VIT_L.to_dict(), **ESCNetForOpenVocabularySegmentation.config_for_clip(VIT_L)}
    with torch.device("meta"):
        model = ESCNetForOpenVocabularySegmentation(ESCNetConfig(**values))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    settings = parameter_settings(trained, recipe.optimizer)
    assert settings.keys() == trained.keys()
    if path.stem.endswith("coco"):
        for name, (lr, decay) in settings.items():
            pretrained = name.startswith(("clip.", "prompt_encoder.")) or ".sam." in name
            assert lr == pytest.approx(2e-6 if pretrained else 2e-4), name
            assert decay == (0 if "norm" in name else 1e-4), name
        assert recipe.model.from_sam


def test_the_small_model_of_the_camvid_recipe_learns() -> None:
    """A few steps on two pictures: below 0.614, what knowing the shares of the classes alone would give."""
    torch.manual_seed(0)
    config = ESCNetConfig(**load_recipe(RECIPES / "esc_net_tiny_camvid.yaml").model.config)
    config._attn_implementation = "eager"
    model = ESCNetForOpenVocabularySegmentation(config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    labels = torch.zeros(2, 96, 96, dtype=torch.long)
    labels[0, :48], labels[1, :, 48:], labels[:, -9:] = 1, 2, -100
    pictures = torch.nn.functional.one_hot(labels.clamp(min=0), 3).permute(0, 3, 1, 2).float()
    losses = []
    for _ in range(16):
        loss = model(pixel_values=pictures, text_embeds=random_embeddings(3, 128), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6


@pytest.mark.slow
@torch.no_grad()
def test_large_vocabularies_in_chunks_equal_the_whole() -> None:
    """847 classes, released ViT-B/16 size, random weights."""
    torch.manual_seed(0)
    model = ESCNetForOpenVocabularySegmentation(ESCNetConfig()).eval()
    inputs = {"pixel_values": torch.randn(1, 3, 384, 384), "text_embeds": random_embeddings(847, 512)}
    state = model.encode_image(pixel_values=inputs["pixel_values"])
    whole, chunked = (
        model(image_state=state, text_embeds=inputs["text_embeds"], class_chunk_size=size).logits for size in (None, 64)
    )
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-5)
