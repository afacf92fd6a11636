"""SED against the original: every recorded tensor from recorded inputs, and everything end to end."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers.models.convnext.modeling_convnext import ConvNextDropPath

from ov_segmentation.layers.correlation import correlation
from ov_segmentation.layers.linear_attention import add_pooled, pool_positions
from ov_segmentation.layers.sliding_window import resize
from ov_segmentation.losses_per_class import per_class_cross_entropy
from ov_segmentation.modeling_outputs import OpenVocabularySegmentationOutput
from ov_segmentation.models.sed.chunks import best_classes
from ov_segmentation.models.sed.convert_sed import convert, key_rules, map_keys
from ov_segmentation.models.sed.decoder import REJECTED
from ov_segmentation.training.optimization import build_optimizer, parameter_settings
from ov_segmentation.training.recipe import load_recipe

from .common import Case, Comparison, assert_close, check_recorded, each_case, each_recorded_tensor

MAPS, TEXT, SCORES, NORMALISED, LOSSES, GRADIENTS = 1e-4, 1e-5, 5e-5, 1e-6, 1e-6, 1e-4
RECIPE = Path(__file__).parents[2] / "examples" / "recipes" / "sed_convnext_b_coco.yaml"
HEADS = ("aux_0", "aux_1", "aux_2")


def channels_last(maps: torch.Tensor) -> torch.Tensor:
    return maps.permute(0, 2, 3, 1)


def channels_first(maps: torch.Tensor) -> torch.Tensor:
    return maps.permute(0, 3, 1, 2)


class SEDCase(Case):
    """A SED fixture, its model, and the stages between recorded tensors."""

    def __init__(self, folder: Path) -> None:
        super().__init__("sed", folder)
        self.model = convert(self.checkpoint, self.config).eval()
        # the fixtures were made without dropout and stochastic depth
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(module, ConvNextDropPath):
                module.drop_prob = 0.0

    # ---------------------------------------------------------------- text and pictures

    def prompt_ids(self, which: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids `[K, P, S, L]` and their mask, from rows with class and template."""
        tokens = self.inputs[f"{which}_token_ids"]
        place: dict[tuple[int, int], int] = {}
        rows = []
        columns = (self.inputs[f"{which}_prompt_{name}_index"].tolist() for name in ("class", "template"))
        for pair in zip(*columns, strict=True):
            rows.append((*pair, place.get(pair, 0)))
            place[pair] = rows[-1][2] + 1
        shape = [1 + max(row[axis] for row in rows) for axis in range(3)]
        ids, mask = (torch.zeros(*shape, tokens.shape[1], dtype=torch.long) for _ in range(2))
        for row, of_prompt in zip(rows, tokens, strict=True):
            ids[row], mask[row] = of_prompt, 1
        return ids, mask

    def text_features(self, which: str) -> torch.Tensor:
        return self.model.encode_vocabulary(*self.prompt_ids(which))

    def prompt_embeddings(self, which: str) -> torch.Tensor:
        ids = self.inputs[f"{which}_token_ids"]
        return self.model._text_features(ids, (ids == self.hparams["text"]["eot_token_id"]).int().argmax(-1))

    def batch(self, which: str) -> dict[str, torch.Tensor]:
        """Model inputs of the recorded pictures: "image_raw" is resized, the others go in as they are."""
        pictures = self.inputs[f"{which}_rgb_hwc"]
        pictures = list(pictures.numpy()) if pictures.ndim == 4 else pictures.numpy()
        return self.image_processor(images=pictures, do_resize=which == "image_raw", return_tensors="pt")

    @functools.cache  # noqa: B019 - cases live as long as the tests
    def run(self, run: str) -> OpenVocabularySegmentationOutput:
        """A forward pass of the whole model as in one of the recorded runs."""
        batch = self.batch("image_small" if run == "small_image" else "image_raw")
        pooling = self.config.train_class_attention_pooling if run == "full_pool_train" else 1
        return self.model(
            **batch,
            text_embeds=self.expected["text/test_features"],
            rejection_top_k=self.top_k(run),
            class_attention_pooling=pooling,
            class_chunk_size=None,
            output_maps=True,
        )

    @functools.cache  # noqa: B019
    def training_run(self) -> OpenVocabularySegmentationOutput:
        """A forward pass with losses; leaves the gradients in the model."""
        batch = self.batch("train_images")
        labels = self.inputs["train_targets"].clone()
        labels[labels == self.hparams["SEM_SEG_HEAD"]["IGNORE_VALUE"]] = -100
        self.model.train()
        outputs = self.model(
            **batch,
            text_embeds=self.expected["text/train_features"],
            labels=labels,
            output_maps=True,
        )
        outputs.loss.backward()
        self.model.eval()
        return outputs

    # ---------------------------------------------------------------- encoder and guidance

    def encoder_map(self, name: str) -> torch.Tensor:
        vision = self.model.vision_model
        if name == "stem":
            return vision.embeddings(self.expected["preprocess/model_input"])
        level = int(name[-1])
        below = self.expected["visual/stem" if level == 2 else f"visual/res{level - 1}"]
        return vision.encoder.stages[level - 2](below)

    def head_norm(self) -> torch.Tensor:
        return self.model.vision_model.layernorm(channels_last(self.expected["visual/res5"])).flatten(0, 2)

    def dense(self) -> torch.Tensor:
        grid = self.expected["visual/res5"].shape[-2:]
        return self.model.visual_projection(self.expected["visual/head_layernorm"]).T.unflatten(1, grid)[None]

    def image_guidance(self, index: int) -> torch.Tensor:
        return self.model._guide([self.expected[f"visual/res{level}"] for level in (4, 3, 2)])[index]

    def cost_guidance(self, index: int) -> torch.Tensor:
        below = self.expected[f"guidance/cost_{index - 1}"] if index else self.cost_maps()
        return channels_first(self.model.decoder.layers[index].cost_guidance(channels_last(below)))

    def cost_maps(self) -> torch.Tensor:
        """The recorded cost map `[T, P, h, w]`."""
        return self.expected["cost/corr"][0].transpose(0, 1)

    def embedded_costs(self) -> torch.Tensor:
        return channels_first(self.model.decoder.cost_embedding(channels_last(self.cost_maps()))).transpose(0, 1)[None]

    # ---------------------------------------------------------------- decoder

    def top_k(self, run: str) -> int | None:
        return int(run.removeprefix("cer_k")) if run.startswith("cer_k") else None

    def alive(self, run: str, point: int) -> torch.Tensor:
        """Recorded class indices that are alive after rejection point `point` (-1: all)."""
        if self.top_k(run) is None or point < 0:
            return torch.arange(self.expected["cost/corr"].shape[2])
        return self.expected[f"{run}/cer/kept_class_indices_{point}"]

    def layer_input(self, run: str, layer: int) -> torch.Tensor:
        """Recorded features `[T', h, w, C]` that enter decoder layer `layer` (from 0)."""
        if layer == 0:
            maps = self.expected["cost/corr_embed"][0].transpose(0, 1)
        else:
            maps = self.expected[f"{run}/decoder{layer}/output"]
        survivors = torch.isin(self.alive(run, layer - 1), self.alive(run, layer))
        return channels_last(maps[survivors])

    def spatial(self, run: str, layer: int) -> torch.Tensor:
        return self.model.decoder.layers[layer].spatial(self.layer_input(run, layer))

    def class_fusion(self, run: str, layer: int) -> torch.Tensor:
        """`[1, C, T, h, w]` from the recorded spatial aggregation, or from the layer's input where there is none."""
        recorded = self.expected.get(f"{run}/decoder{layer + 1}/spatial_fusion")
        maps = self.spatial(run, layer) if recorded is None else channels_last(recorded)
        pooling = self.config.train_class_attention_pooling if run == "full_pool_train" else 1
        attention, tokens = self.model.decoder.layers[layer].class_attention, pool_positions(maps, pooling)
        tokens = attention(tokens, [len(maps)], attention.class_sums(tokens, [len(maps)]))
        return channels_first(add_pooled(maps, tokens, pooling)).transpose(0, 1)[None]

    def fused(self, run: str, layer: int) -> torch.Tensor:
        """Recorded features `[T, h, w, C]` after class aggregation."""
        return self.expected[f"{run}/decoder{layer + 1}/class_fusion"][0].permute(1, 2, 3, 0)

    def upsampled(self, run: str, layer: int) -> torch.Tensor:
        return self.model.decoder.layers[layer].upsampling.up(channels_first(self.fused(run, layer)))

    def concatenated(self, run: str, layer: int) -> torch.Tensor:
        image, cost = (self.expected[f"guidance/{name}_{layer}"] for name in ("image", "cost"))
        upsampled = self.expected[f"{run}/decoder{layer + 1}/upsampled"]
        return torch.cat([upsampled, image.expand(len(cost), -1, -1, -1), cost], dim=1)

    def layer_output(self, run: str, layer: int) -> torch.Tensor:
        image, cost = (self.expected[f"guidance/{name}_{layer}"] for name in ("image", "cost"))
        cost = channels_last(cost[self.alive(run, layer)])
        features, upsampling = self.fused(run, layer), self.model.decoder.layers[layer].upsampling
        prepared = upsampling.prepare(tuple(image.shape[-2:]), image)
        return channels_first(upsampling(features, [len(features)], prepared, cost))

    def head(self, run: str, which: str) -> torch.Tensor:
        """Logits `[1, T, h, w]` from the recorded features below the head; end to end where there are none."""
        layer = len(self.model.decoder.layers) - 1 if which == "main" else int(which[-1]) - 1
        if layer < 0:
            return self.model.decoder.cost_embedding.head(
                channels_last(self.expected["cost/corr_embed"][0].transpose(0, 1))
            )[None]
        recorded = self.expected.get(f"{run}/decoder{layer + 1}/output")
        if recorded is None:
            return self.logits(run, which)
        return self.model.decoder.layers[layer].head(channels_last(recorded))[None]

    def logits(self, run: str, which: str) -> torch.Tensor:
        """Logits of the classes that are alive, from a run of the whole model."""
        outputs = self.run(run)
        maps = outputs.logits if which == "main" else outputs.maps[f"auxiliary_logits_{which[-1]}"]
        point = len(self.model.decoder.layers) - 1 if which == "main" else int(which[-1]) - 1
        return maps[:, self.alive(run, point)]

    def kept(self, run: str, point: int) -> torch.Tensor:
        """Class indices that a rejection keeps, from the recorded logits."""
        alive, logits = self.alive(run, point - 1), self.expected[f"{run}/logits/aux_{point}"][0]
        return alive[best_classes(logits, [len(logits)], self.top_k(run))]

    # ---------------------------------------------------------------- scores and losses

    def all_logits(self, run: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Recorded logits `[1, T, h, w]` with rejected classes filled in, and `kept_classes` `[1, T]`."""
        logits = self.expected[f"{run}/logits/main"]
        alive = self.alive(run, len(self.model.decoder.layers) - 1)
        num_classes = self.expected["cost/corr"].shape[2]
        full = logits.new_full((1, num_classes, *logits.shape[2:]), REJECTED).index_copy(1, alive, logits)
        return full, torch.zeros(1, num_classes, dtype=torch.bool).index_fill(1, alive, True)

    def scores(self, run: str) -> torch.Tensor:
        logits, kept = self.all_logits(run)
        size = tuple(self.inputs["image_raw_rgb_hwc"].shape[:2])
        outputs = OpenVocabularySegmentationOutput(
            logits=logits,
            score_function="sigmoid",
            kept_classes=None if self.top_k(run) is None else kept,
            reshaped_input_sizes=torch.tensor([size]),
        )
        return self.post_process(outputs, size)

    def post_process(self, outputs: OpenVocabularySegmentationOutput, size: tuple[int, int]) -> torch.Tensor:
        results = self.image_processor.post_process_semantic_segmentation(
            outputs, target_sizes=[size], return_segmentation_scores=True
        )
        return results[0].segmentation_scores

    def low_resolution_scores(self, run: str) -> torch.Tensor:
        logits, kept = self.all_logits(run)
        return logits.sigmoid() * kept[..., None, None]

    def loss(self, index: int) -> torch.Tensor:
        name = "main" if index == 0 else HEADS[index - 1]
        labels = self.inputs["train_targets"].clone()
        labels[labels == self.hparams["SEM_SEG_HEAD"]["IGNORE_VALUE"]] = -100
        sizes = torch.tensor([labels.shape[-2:]] * len(labels))
        return per_class_cross_entropy(self.expected[f"train/logits/{name}"], labels, sizes, True)[None]

    def training_dense(self) -> torch.Tensor:
        batch = self.batch("train_images")
        return self.model.encode_image(**batch).dense_features

    def load_gradients(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "train_grads.safetensors")

    def training_logits(self, which: str) -> torch.Tensor:
        outputs = self.training_run()
        return outputs.logits if which == "main" else outputs.maps[f"auxiliary_logits_{which[-1]}"]

    def gradients(self) -> dict[str, torch.Tensor]:
        """Our gradients, by our names."""
        self.training_run()
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


RUN = r"(full|full_pool_train|cer_k\d+)"
COMPARISONS = [
    Comparison(r"preprocess/normalised", lambda c, m: c.batch("image_raw")["pixel_values"], NORMALISED),
    Comparison(
        r"preprocess/model_input",
        lambda c, m: resize(c.expected["preprocess/normalised"], c.config.input_size),
        NORMALISED,
    ),
    Comparison(r"text/(test|train)_features", lambda c, m: c.text_features(m[1]), TEXT),
    Comparison(r"text/(test|train)_prompt_embeddings_unnormalised", lambda c, m: c.prompt_embeddings(m[1]), MAPS),
    Comparison(r"visual/(stem|res[2-5])", lambda c, m: c.encoder_map(m[1]), MAPS),
    Comparison(r"visual/head_layernorm", lambda c, m: c.head_norm(), MAPS),
    Comparison(r"visual/clip_vis_dense", lambda c, m: c.dense(), MAPS),
    Comparison(
        r"cost/corr",
        lambda c, m: correlation(c.expected["visual/clip_vis_dense"], c.expected["text/test_features"]).transpose(1, 2),
        MAPS,
    ),
    Comparison(r"cost/corr_embed", lambda c, m: c.embedded_costs(), MAPS),
    Comparison(r"guidance/image_(\d)", lambda c, m: c.image_guidance(int(m[1])), MAPS),
    Comparison(r"guidance/cost_(\d)", lambda c, m: c.cost_guidance(int(m[1])), MAPS),
    Comparison(rf"{RUN}/decoder(\d)/spatial_fusion", lambda c, m: channels_first(c.spatial(m[1], int(m[2]) - 1)), MAPS),
    Comparison(rf"{RUN}/decoder(\d)/class_fusion", lambda c, m: c.class_fusion(m[1], int(m[2]) - 1), MAPS),
    Comparison(rf"{RUN}/decoder(\d)/upsampled", lambda c, m: c.upsampled(m[1], int(m[2]) - 1), MAPS),
    Comparison(rf"{RUN}/decoder(\d)/concatenated", lambda c, m: c.concatenated(m[1], int(m[2]) - 1), MAPS),
    Comparison(rf"{RUN}/decoder(\d)/output", lambda c, m: c.layer_output(m[1], int(m[2]) - 1), MAPS),
    Comparison(rf"{RUN}/logits/(main|aux_\d)", lambda c, m: c.head(m[1], m[2]), MAPS),
    Comparison(r"(small_image)/logits/(main)", lambda c, m: c.logits(m[1], m[2]), MAPS),
    Comparison(rf"{RUN}/cer/kept_class_indices_(\d)", lambda c, m: c.kept(m[1], int(m[2])), 0),
    Comparison(rf"{RUN}/scores/sigmoid_lowres", lambda c, m: c.low_resolution_scores(m[1]), NORMALISED),
    Comparison(rf"{RUN}/scores/final", lambda c, m: c.scores(m[1]), NORMALISED),
    Comparison(r"train/visual/clip_vis_dense", lambda c, m: c.training_dense(), MAPS),
    Comparison(
        r"train/cost/corr",
        lambda c, m: correlation(
            c.expected["train/visual/clip_vis_dense"], c.expected["text/train_features"]
        ).transpose(1, 2),
        MAPS,
    ),
    Comparison(r"train/logits/(main|aux_\d)", lambda c, m: c.training_logits(m[1]), MAPS),
    Comparison(r"train/losses/loss_sem_seg_(\d)", lambda c, m: c.loss(int(m[1])), LOSSES),
    Comparison(r"train/losses/total", lambda c, m: sum(c.loss(i) for i in range(1 + len(HEADS))), 4 * LOSSES),
]
EXCUSED = {
    r"small_image/scores/final": "the original crops the score map to the picture's size, wrong below 192 pixels",
    r"train/after_one_step/.*": "compared together in test_one_optimizer_step",
}


@each_recorded_tensor("sed")
def test_recorded_tensor(folder: Path, name: str) -> None:
    case = SEDCase.load(folder)
    with torch.set_grad_enabled(name.startswith("train/")):
        check_recorded(case, name, COMPARISONS, EXCUSED)


@each_case("sed")
@torch.no_grad()
def test_end_to_end(folder: Path) -> None:
    """From pixels to scores, with the text embeddings of our own text tower."""
    case = SEDCase.load(folder)
    text_embeds = case.text_features("test")
    size = tuple(case.inputs["image_raw_rgb_hwc"].shape[:2])
    for name in filter(lambda name: re.fullmatch(rf"{RUN}/scores/final", name), case.expected):
        run = name.split("/")[0]
        pooling = case.config.train_class_attention_pooling if run == "full_pool_train" else 1
        outputs = case.model(
            **case.batch("image_raw"),
            text_embeds=text_embeds,
            rejection_top_k=case.top_k(run),
            class_attention_pooling=pooling,
            class_chunk_size=5,
        )
        assert_close(case.post_process(outputs, size), case.expected[name], SCORES)
        if case.top_k(run) is not None:
            assert outputs.kept_classes[0].nonzero().flatten().tolist() == case.alive(run, 2).tolist()


@each_case("sed")
@torch.no_grad()
def test_rejection_points_end_to_end(folder: Path) -> None:
    """Each point keeps the recorded classes when nothing but the picture is given."""
    case = SEDCase.load(folder)
    for run in {name.split("/")[0] for name in case.expected if "/cer/" in name}:
        for index, head in enumerate(HEADS):
            assert_close(case.logits(run, head), case.expected[f"{run}/logits/{head}"], MAPS)
            alive = (case.run(run).maps[f"auxiliary_logits_{index}"] != REJECTED).flatten(2).any(-1)[0]
            assert alive.nonzero().flatten().tolist() == case.alive(run, index - 1).tolist()


@each_case("sed")
@torch.no_grad()
def test_small_picture(folder: Path) -> None:
    """A picture below the output grid: the scores cover it whole, which the original's crop does not."""
    case = SEDCase.load(folder)
    if "small_image/logits/main" not in case.expected:
        pytest.skip("this fixture has no small picture")
    size = tuple(case.inputs["image_small_rgb_hwc"].shape[:2])
    whole = F.interpolate(case.expected["small_image/logits/main"].sigmoid(), size, mode="bilinear")[0]
    assert_close(case.post_process(case.run("small_image"), size), whole, SCORES)


@each_case("sed")
def test_gradients(folder: Path) -> None:
    """Losses and gradients of a training step: of all trained parameters, and of no others."""
    case = SEDCase.load(folder)
    outputs = case.training_run()
    for name, loss in outputs.loss_dict.items():
        assert_close(loss.detach()[None], case.expected[f"train/losses/{name}"], LOSSES)
    assert_close(outputs.loss.detach()[None], case.expected["train/losses/total"], 4 * LOSSES)
    expected = key_rules(case.config).convert(case.load_gradients())
    found = case.gradients()
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, GRADIENTS, relative=True)


@each_case("sed")
def test_parameter_groups(folder: Path) -> None:
    """The recipe gives every parameter the original's learning rate and weight decay, and freezes what it froze."""
    case = SEDCase.load(folder)
    recorded = json.loads((folder / "train_grads.json").read_text())
    places = map_keys([*recorded["optimizer"]["groups"], *recorded["frozen_parameters"]], case.config)
    trained = {name for name, parameter in case.model.named_parameters() if parameter.requires_grad}
    frozen = {n for key in recorded["frozen_parameters"] if not isinstance(places[key], str) for n in places[key]}
    settings = parameter_settings(sorted(trained), load_recipe(RECIPE).optimizer)
    for key, group in recorded["optimizer"]["groups"].items():
        for name in places[key]:
            assert settings[name] == pytest.approx((group["lr"], group["weight_decay"])), name
    assert trained.isdisjoint(frozen)
    assert trained | frozen == {name for name, _ in case.model.named_parameters()}


@each_case("sed")
def test_one_optimizer_step(folder: Path) -> None:
    """Clipping and AdamW of the recipe: parameters after the first step."""
    case = SEDCase.load(folder)
    recipe = load_recipe(RECIPE)
    case.training_run()
    gradients = case.gradients()
    model = convert(case.checkpoint, case.config)
    parameters = dict(model.named_parameters())
    for name, gradient in gradients.items():
        parameters[name].grad = gradient.clone()
    norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad_norm)
    recorded = json.loads((folder / "train_grads.json").read_text())
    assert norm.item() == pytest.approx(recorded["total_grad_norm_before_clipping"], rel=1e-4)
    build_optimizer(model, recipe.optimizer).step()
    prefix = "train/after_one_step/"
    stepped = {name.removeprefix(prefix): value for name, value in case.expected.items() if name.startswith(prefix)}
    for key, names in map_keys(stepped, case.config).items():
        assert_close(parameters[names[0]].detach(), stepped[key], 1e-6)
