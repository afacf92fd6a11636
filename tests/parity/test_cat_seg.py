"""CAT-Seg against the original implementation's recorded numbers: every stage alone, and all of them end to end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from ov_segmentation.layers.clip_vision import clip_position_embedding, embed_patches
from ov_segmentation.layers.correlation import correlation, strongest_classes
from ov_segmentation.layers.dense_clip import value_path
from ov_segmentation.layers.linear_attention import add_pooled, pool_positions
from ov_segmentation.layers.sliding_window import cut_views, pad_to_multiple, resize, split_pictures, squared
from ov_segmentation.models.cat_seg.convert_cat_seg import RULES, convert

from .folders import Case, case_folders, read_case
from .hparams import build

TOLERANCE, SCORE_TOLERANCE, TEXT_TOLERANCE = 1e-4, 5e-5, 1e-5
# mode -> (picture, token ids, embeddings, pooling of the class attention)
MODES = {
    "whole": ("image_raw_rgb_hwc", "test", "eval"),
    "whole_pool_train": ("image_raw_rgb_hwc", "test", "train"),
    "whole_small_image": ("image_small_rgb_hwc", "test", "eval"),
    "whole_many_classes": ("image_raw_rgb_hwc", "many", "eval"),
    "sliding": ("image_raw_rgb_hwc", "test", "eval"),
    "train": ("train_images_rgb_hwc", "train", "train"),
}
CASES = {folder.name: folder for folder in case_folders("cat_seg")}


class Run:
    """A converted model, and one mode's ladder of tensors, each stage fed with the recorded output of the one before."""

    def __init__(self, case: Case) -> None:
        self.case, self.expected = case, case.expected
        self.config, self.image_processor = build("cat_seg", case.hparams)
        self.model = convert(case.folder / "original.pth", self.config)
        self.clip = self.model.clip

    def batch(self, mode: str) -> dict[str, torch.Tensor]:
        """The image processor's output; small and training pictures are given at their size."""
        pictures = self.case.inputs[MODES[mode][0]]
        pictures = list(pictures.numpy()) if pictures.ndim == 4 else [pictures.numpy()]
        options: dict[str, Any] = {} if MODES[mode][0] == "image_raw_rgb_hwc" else {"do_resize": False}
        if mode == "train":
            options["segmentation_maps"] = list(self.case.inputs["train_targets"].numpy())
        return self.image_processor(images=pictures, return_tensors="pt", **options)

    def switches(self, mode: str) -> dict[str, Any]:
        pooling = self.case.hparams["SEM_SEG_HEAD"][f"POOLING_SIZES_{MODES[mode][2]}"][0]
        return {"sliding_window": mode == "sliding", "class_attention_pooling": pooling}

    def text_embeds(self, mode: str) -> torch.Tensor:
        return self.expected[f"text/{MODES[mode][1]}_features"]

    def ladder(self, mode: str) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, our tensor) of every stage, in the original's shapes."""
        model, config = self.model, self.config

        def recorded(name: str, computed: torch.Tensor) -> torch.Tensor:
            return self.expected.get(f"{mode}/{name}", computed)

        # ------------------------------------------------ picture
        batch, pooling = self.batch(mode), self.switches(mode)["class_attention_pooling"]
        pictures = split_pictures(batch["pixel_values"], batch["reshaped_input_sizes"])
        side = config.image_size
        if mode == "sliding":
            canvas = (config.canvas_pixels, config.canvas_pixels)
            cut = cut_views(pictures, canvas, config.window_pixels, config.window_stride, config.global_view)
            views = resize(cut, (side, side))
        else:
            padded = torch.cat([pad_to_multiple(picture, config.pad_multiple) for picture in pictures])
            yield "preprocess/normalised_padded_to_32", padded
            views = squared(pictures, side, config.pad_multiple)
        yield "visual/model_input", views
        vision = self.clip.vision_model
        hidden, grid = embed_patches(vision, recorded("visual/model_input", views))
        yield "visual/resized_position_embedding", clip_position_embedding(vision, grid)[0]
        yield "visual/tokens_after_ln_pre", hidden
        hidden = recorded("visual/tokens_after_ln_pre", hidden)
        skips = []
        *blocks, last = vision.encoder.layers
        for index, block in enumerate(blocks):
            hidden = block(hidden, None)
            yield f"visual/block_{index}_output", hidden
            hidden = recorded(f"visual/block_{index}_output", hidden)
            if index in config.skip_layers:
                skips.append(hidden[:, 1:].transpose(1, 2).unflatten(2, grid))
        hidden = value_path(last, hidden, config.dense_residual)
        name = "visual/last_block_value_path_plus_class_token_residual"
        yield name, hidden
        hidden = recorded(name, hidden)
        hidden = hidden + last.mlp(last.layer_norm2(hidden))
        yield "visual/last_block_dense_output", hidden
        hidden = vision.post_layernorm(recorded("visual/last_block_dense_output", hidden))
        yield "visual/tokens_after_ln_post", hidden
        tokens = self.clip.visual_projection(recorded("visual/tokens_after_ln_post", hidden))
        yield "visual/dense_clip_tokens", tokens
        tokens = recorded("visual/dense_clip_tokens", tokens)
        dense = tokens[:, 1:].transpose(1, 2).unflatten(2, grid)

        # ------------------------------------------------ cost and guidance
        text_embeds = self.text_embeds(mode)
        cost = correlation(dense, text_embeds)
        yield "cost/corr_all_classes", cost.transpose(1, 2)
        cost = recorded("cost/corr_all_classes", cost.transpose(1, 2)).transpose(1, 2)
        rows, used = len(cost), min(len(text_embeds), config.max_classes)
        kept = torch.arange(used).expand(rows, -1)
        if used < len(text_embeds):
            kept = strongest_classes(cost, config.max_classes)
            yield "cost/kept_class_indices", kept
            # the order in which the original kept them, for the tensors that follow
            kept = recorded("cost/kept_class_indices", kept)
        row = torch.arange(rows)[:, None]
        used_cost = cost[row, kept]
        yield "cost/corr_used_by_conv", used_cost.flatten(0, 1)
        embedded = model.cost_embedding(used_cost.flatten(0, 1)).unflatten(0, (rows, used)).transpose(1, 2)
        yield "cost/corr_embed", embedded
        embedded = recorded("cost/corr_embed", embedded)
        appearance = F.relu(model.appearance_projection(dense))
        yield "guidance/appearance_projected", appearance
        appearance = recorded("guidance/appearance_projected", appearance).flatten(2).transpose(1, 2)[:, None]
        text = F.relu(model.text_projection(F.normalize(text_embeds.mean(dim=1), dim=-1)))[kept]
        yield "guidance/text_projected", text
        text = recorded("guidance/text_projected", text)
        guides = []
        for index, (skip, features) in enumerate(zip(model.skips, skips, strict=True), start=1):
            upsampled = skip.upsample(features)
            yield f"guidance/mid_layer_{index}_upsampled", upsampled
            guide = F.relu(skip.projection(recorded(f"guidance/mid_layer_{index}_upsampled", upsampled)))
            yield f"guidance/decoder_{index}_projected", guide
            guides.append(recorded(f"guidance/decoder_{index}_projected", guide))

        # ------------------------------------------------ aggregation
        features = embedded.flatten(3).permute(0, 2, 3, 1)  # [R, T, h * w, C]
        for index, layer in enumerate(model.layers):
            name = f"aggregator/layer_{index}"
            spatial, guidance = layer.spatial, layer.spatial.guidance_norm(appearance)
            first = spatial.block1(features, guidance, grid).flatten(0, 1)
            yield f"{name}/swin_block_1_output", first
            first = recorded(f"{name}/swin_block_1_output", first).unflatten(0, (rows, used))
            second = spatial.block2(first, guidance, grid).flatten(0, 1)
            yield f"{name}/swin_block_2_shifted_output", second
            second = recorded(f"{name}/swin_block_2_shifted_output", second)
            maps = second.unflatten(1, grid)
            raw, after = self.class_attention(layer, pool_positions(maps, pooling), text)
            yield f"{name}/class_attention_raw_output", raw
            features = add_pooled(maps, after, pooling).unflatten(0, (rows, used))
            yield f"{name}/output", features.permute(0, 4, 1, 2, 3)
            output = recorded(f"{name}/output", features.permute(0, 4, 1, 2, 3))
            features = output.permute(0, 2, 3, 4, 1).flatten(2, 3)

        # ------------------------------------------------ decoder
        maps = features.flatten(0, 1).unflatten(1, grid)
        for index, (stage, guide) in enumerate(zip(model.decoder, guides, strict=True), start=1):
            yield f"decoder/stage_{index}_upsampled", stage.up(maps.permute(0, 3, 1, 2))
            maps = stage(maps, [used] * rows, guide)
            yield f"decoder/stage_{index}_output", maps.permute(0, 3, 1, 2)
            maps = recorded(f"decoder/stage_{index}_output", maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        logits = model.head(maps.permute(0, 3, 1, 2)).unflatten(0, (rows, used))[:, :, 0]
        yield "logits/used_classes", logits

    def class_attention(self, layer: Any, tokens: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the attention adds `[R * S, max(T, padding), C]`, padding last, and the layer's output `[R * T, S, C]`.

        Ours needs no copies of the padding token; here they ask too, as one more class.
        """
        rows, used, positions = len(text), text.shape[1], tokens.shape[1]
        sums = layer.padding_sums(used, positions) + layer.classes.class_sums(tokens, [used] * rows, text.flatten(0, 1))
        inputs: list[torch.Tensor] = []
        hook = layer.classes.norm2.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        after = layer.classes(tokens, [used] * rows, sums, text.flatten(0, 1))
        padding = layer.padding_token.expand(rows, positions, -1)
        layer.classes(padding, [1] * rows, sums, layer.padding_guidance.expand(rows, -1))
        hook.remove()
        of_classes = (inputs[0] - tokens).unflatten(0, (rows, used))
        of_padding = (inputs[1] - padding)[:, None].expand(-1, max(0, layer.padding_length - used), -1, -1)
        return torch.cat([of_classes, of_padding], dim=1).transpose(1, 2).flatten(0, 1), after

    def end_to_end(self, mode: str) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, our tensor) of what the public API gives."""
        outputs = self.model(**self.batch(mode), text_embeds=self.text_embeds(mode), **self.switches(mode))
        yield "logits/all_classes", outputs.logits
        if outputs.kept_classes is not None:
            yield "cost/kept_class_indices", outputs.kept_classes.nonzero()[:, 1].view(len(outputs.logits), -1)
        if mode == "train":
            yield "losses/loss_sem_seg", outputs.loss[None]
            return
        if mode != "sliding":
            yield "scores/sigmoid_lowres", outputs.logits.sigmoid()
        size = tuple(self.case.inputs[MODES[mode][0]].shape[:2])
        if mode == "whole_small_image":
            # the original cuts its coarse map to the picture's size, as if it were a map at that size: not ours
            crop = outputs.logits.sigmoid()[:, :, : size[0], : size[1]]
            yield "scores/final", F.interpolate(crop, size, mode="bilinear")[0]
            return
        for target, name in (((self.config.canvas_pixels,) * 2, "scores/on_canvas"), (size, "scores/final")):
            if mode == "sliding" or name == "scores/final":
                (result,) = self.image_processor.post_process_semantic_segmentation(
                    outputs, target_sizes=[target], return_segmentation_scores=True
                )
                yield name, result.segmentation_scores


@pytest.fixture(scope="module", params=sorted(CASES))
def run(request: pytest.FixtureRequest) -> Run:
    return Run(read_case(CASES[request.param]))


def compare(expected: dict[str, torch.Tensor], mode: str, found: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
    """The recorded names that were compared; a difference fails with all that are off."""
    compared, off = set(), []
    for name, value in found:
        if f"{mode}/{name}" not in expected:
            continue
        compared.add(f"{mode}/{name}")
        wanted = expected[f"{mode}/{name}"]
        assert value.shape == wanted.shape, f"{mode}/{name}: {list(value.shape)}, recorded {list(wanted.shape)}"
        if name == "cost/kept_class_indices":
            if not torch.equal(value.sort(dim=1).values, wanted.sort(dim=1).values):
                off.append(f"{mode}/{name}: other classes were kept")
            continue
        tolerance = SCORE_TOLERANCE if name.startswith(("scores/", "losses/")) else TOLERANCE
        difference = (value - wanted).abs().max().item()
        if not difference <= tolerance:
            off.append(f"{mode}/{name}: off by {difference:.1e}")
    assert not off, "\n".join(off)
    return compared


def modes_of(case: Case) -> list[str]:
    return [mode for mode in MODES if any(name.startswith(f"{mode}/") for name in case.expected)]


def excused(name: str) -> bool:
    """Compared by a test of its own."""
    return name.startswith(("text/", "train/after_one_step/"))


@torch.no_grad()
def test_every_recorded_tensor(run: Run) -> None:
    compared = set()
    for mode in modes_of(run.case):
        run.model.eval()
        compared |= compare(run.expected, mode, run.ladder(mode))
        compared |= compare(run.expected, mode, run.end_to_end(mode))
    assert {name for name in run.expected if name not in compared and not excused(name)} == set()


@torch.no_grad()
def test_text_embeddings(run: Run) -> None:
    compared = set()
    for name in ("test", "train", "many"):
        if f"text/{name}_features" not in run.expected:
            continue
        ids = run.case.inputs[f"{name}_token_ids"]
        embeds = run.model.encode_vocabulary(input_ids=ids, attention_mask=torch.ones_like(ids))
        torch.testing.assert_close(embeds, run.expected[f"text/{name}_features"], rtol=0, atol=TEXT_TOLERANCE)
        ends = (ids == run.config.clip_config.text_config.eos_token_id).int().argmax(dim=-1)
        raw = run.model._text_features(ids.flatten(0, 1), ends.flatten()).unflatten(0, ids.shape[:2])
        wanted = run.expected[f"text/{name}_prompt_embeddings_unnormalised"]
        torch.testing.assert_close(raw, wanted, rtol=0, atol=TOLERANCE)
        compared |= {f"text/{name}_features", f"text/{name}_prompt_embeddings_unnormalised"}
    assert compared == {name for name in run.expected if name.startswith("text/")}


@pytest.mark.parametrize("chunk_size", [1, 3, None])
@torch.no_grad()
def test_class_chunks_are_exact(run: Run, chunk_size: int | None) -> None:
    for mode in modes_of(run.case):
        batch, switches = run.batch(mode), run.switches(mode)
        outputs = run.model(**batch, text_embeds=run.text_embeds(mode), class_chunk_size=chunk_size, **switches)
        wanted = run.expected[f"{mode}/logits/all_classes"]
        torch.testing.assert_close(outputs.logits, wanted, rtol=0, atol=TOLERANCE)


def test_gradients(run: Run) -> None:
    if not (run.case.folder / "train_grads.safetensors").exists():
        pytest.skip("this folder records no gradients")
    wanted = load_file(run.case.folder / "train_grads.safetensors")
    model = convert(run.case.folder / "original.pth", run.config).train()
    ids = run.case.inputs["train_token_ids"]
    model(**run.batch("train"), input_ids=ids, attention_mask=torch.ones_like(ids)).loss.backward()
    targets = RULES.convert(wanted)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert parameters.keys() == targets.keys()
    frozen = json.loads((run.case.folder / "train_grads.json").read_text())
    off = []
    for name, target in targets.items():
        gradient = parameters[name].grad
        gradient = torch.zeros_like(target) if gradient is None else gradient
        # the softmax is blind to a bias of the keys, so both gradients are rounding there
        allowed = 1e-6 if target.ndim == 0 or name.endswith("attention.key.bias") else 1e-4 * target.norm()
        if not (gradient - target).norm() <= allowed:
            off.append(f"{name}: {(gradient - target).norm():.1e} of {target.norm():.1e}")
    assert not off, "\n".join(off)
    assert frozen
