"""Backbones, proposals and masked crops of the MaskFormer methods."""

from __future__ import annotations

import os
import pickle
import re
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch.nn.functional import batch_norm, interpolate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import SwinConfig
from transformers.models.maskformer.modeling_maskformer import MaskFormerSinePositionEmbedding
from transformers.models.swin.modeling_swin import SwinDropPath

from ov_segmentation.conversion import ConversionError
from ov_segmentation.conversion_maskformer import load_backbone_weights
from ov_segmentation.layers import mask_crops
from ov_segmentation.layers.configuration_maskformer import MaskProposalConfig, ResNetCConfig
from ov_segmentation.layers.mask_crops import CropGrid, crop_for_clip, cropped_masks, mask_boxes, masked_crops
from ov_segmentation.layers.maskformer import MaskProposalNetwork
from ov_segmentation.layers.resnet_c import FrozenBatchNorm, ResNetC
from ov_segmentation.layers.sine_positions import SinePositionEmbedding
from ov_segmentation.layers.swin_backbone import SwinBackbone
from ov_segmentation.precision import widest_float

TINY_SWIN = {"model_type": "swin", "embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}


def tiny_resnet(**changes: object) -> ResNetC:
    sizes = {"stem_channels": 8, "depths": (1, 1, 1, 3), "widths": (4, 4, 8, 8), "out_channels": (8, 16, 16, 32)}
    return ResNetC(ResNetCConfig(**{**sizes, **changes})).eval()


def make_network(**changes: object) -> MaskProposalNetwork:
    values = {"backbone_config": TINY_SWIN, "num_queries": 5, "hidden_size": 32, "num_heads": 2, "num_layers": 3}
    sizes = {"feedforward_size": 16, "pixel_decoder_size": 32, "mask_size": 16, "embedding_hidden_size": 12}
    return MaskProposalNetwork(MaskProposalConfig(**{**values, **sizes, **changes}), embedding_size=6)


def test_swin_drops_both_branches_of_every_block_in_training() -> None:
    backbone = SwinBackbone(SwinConfig(**{k: v for k, v in TINY_SWIN.items() if k != "model_type"}, drop_path_rate=0.5))
    calls = []
    for module in backbone.modules():
        if isinstance(module, SwinDropPath):
            module.register_forward_hook(lambda module, _inputs, _output: calls.append(module.drop_prob))
    backbone.train()(torch.randn(1, 3, 64, 64))
    rates = torch.linspace(0, 0.5, 5)[1:].tolist()  # the first block's rate is 0: it has nothing to drop
    assert calls == pytest.approx([rate for rate in rates for _branch in range(2)])


@pytest.mark.parametrize("training", [True, False])
def test_a_swin_block_whose_branches_are_dropped_passes_its_input_on(training: bool) -> None:
    """Both residual branches: with one of them alone left, the output would differ."""
    values = {k: v for k, v in TINY_SWIN.items() if k != "model_type"}
    backbone = SwinBackbone(SwinConfig(**values, drop_path_rate=1 - 1e-6)).train(training)
    block, states = backbone.model.swin.encoder.layers[3].blocks[-1], []
    block.register_forward_hook(lambda _module, inputs, output: states.extend([inputs[0], output]))
    backbone(torch.randn(1, 3, 64, 64))
    before, after = (state[0] if isinstance(state, tuple) else state for state in states)
    assert torch.equal(before, after) is training


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (72, 104)])
def test_swin_maps_have_their_strides(size: tuple[int, int]) -> None:
    backbone = SwinBackbone(SwinConfig(**{k: v for k, v in TINY_SWIN.items() if k != "model_type"})).eval()
    maps = backbone(torch.randn(2, 3, *size))
    assert [m.shape[1] for m in maps] == backbone.channels == [8, 16, 32, 64]
    assert [m.shape[-2] for m in maps] == [-(-size[0] // s) for s in (4, 8, 16, 32)]


def test_frozen_norm_is_batch_norm_in_evaluation_and_never_counts() -> None:
    norm = FrozenBatchNorm(4).train()
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 2.0)
    features = torch.randn(2, 4, 3, 3)
    expected = batch_norm(features, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5)
    torch.testing.assert_close(norm(features), expected, atol=1e-6, rtol=1e-5)
    assert set(norm.state_dict()) == {"weight", "bias", "running_mean", "running_var"}
    assert not list(norm.parameters())


def test_resnet_dilation_keeps_resolution_and_multi_grid_sets_dilations() -> None:
    plain, dilated = tiny_resnet(), tiny_resnet(stage4_dilation=2)
    picture = torch.randn(1, 3, 64, 96)
    assert [tuple(m.shape[-2:]) for m in plain(picture)] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert dilated(picture)[-1].shape[-2:] == (4, 6)
    assert [block.conv2.conv.dilation[0] for block in plain.stages[3]] == [1, 2, 4]
    assert [block.conv2.conv.dilation[0] for block in dilated.stages[3]] == [2, 4, 8]


def test_resnet_freezes_stem_and_first_stage() -> None:
    model = tiny_resnet()
    model.freeze()
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad and "stages" in name}
    assert trained == {"1", "2", "3"}
    assert not any(p.requires_grad for p in model.stem.parameters())


def test_resnet_config_says_what_is_wrong() -> None:
    with pytest.raises(StrictDataclassClassValidationError, match="one factor for each of the 2 bottlenecks"):
        ResNetCConfig(depths=(1, 1, 1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_positions_are_those_of_transformers_rounded_once(dtype: torch.dtype) -> None:
    exact, ours = (kind(8, normalize=True) for kind in (MaskFormerSinePositionEmbedding, SinePositionEmbedding))
    shape, device = torch.Size([2, 16, 40, 60]), torch.device("cpu")
    assert torch.equal(ours(shape, device, dtype), exact(shape, device, torch.float32).to(dtype))


def test_deep_supervision_does_not_change_the_output() -> None:
    network = make_network().eval()
    picture = torch.randn(2, 3, 64, 64)
    alone, layers = network(picture), network(picture, all_layers=True)
    assert len(alone) == 1 and len(layers) == 3
    assert torch.equal(alone[0].mask_logits, layers[-1].mask_logits)
    assert torch.equal(alone[0].embeddings, layers[-1].embeddings)
    assert alone[0].embeddings.shape == (2, 5, 6) and alone[0].mask_logits.shape == (2, 5, 16, 16)


@pytest.mark.parametrize("fill", [None, torch.tensor([0.5, -1.0, 2.0])])
def test_masked_crops_equal_cropping_first_and_resizing_then(fill: torch.Tensor | None) -> None:
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(3, 40, 56, generator=generator)
    masks = torch.zeros(4, 40, 56, dtype=torch.bool)
    masks[0, 5:30, 10:50] = torch.rand(25, 40, generator=generator) > 0.5
    masks[1] = True
    masks[2, 39, 55] = True
    masks[3, 0, 3:9] = True
    boxes = mask_boxes(masks)
    grid = CropGrid.of(boxes, 24)
    crops, small = masked_crops(picture, masks, grid, fill), cropped_masks(masks, grid)
    background = torch.zeros(3) if fill is None else fill
    for mask, (x0, y0, x1, y1), crop, small_mask in zip(masks, boxes.tolist(), crops, small, strict=True):
        ys, xs = mask.nonzero().unbind(1)
        assert [x0, y0, x1, y1] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        filled = torch.where(mask, picture, background[:, None, None])[None, :, y0:y1, x0:x1]
        expected = interpolate(filled, size=(24, 24), mode="bicubic", align_corners=False)[0]
        torch.testing.assert_close(crop, expected, atol=1e-5, rtol=1e-5)
        nearest = interpolate(mask[None, None, y0:y1, x0:x1].float(), size=(24, 24), mode="nearest")[0, 0]
        assert torch.equal(small_mask, nearest.bool())


class CountedOperations(TorchDispatchMode):
    """Counts what PyTorch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.names[str(operation)] += 1
        return operation(*arguments, **(options or {}))


def test_many_crops_are_as_many_operations_as_two() -> None:
    """No loop over crops, boxes of different sizes included."""
    counted = []
    for number in (2, 30):
        masks = torch.zeros(number, 40, 56, dtype=torch.bool)
        for index in range(number):
            masks[index, index : index + 5, 2 : 4 + index] = True
        with CountedOperations() as operations:
            crops, _ = crop_for_clip(torch.randn(3, 40, 56), masks, CropGrid.of(mask_boxes(masks, 1.5), 24), "zero")
        assert len(crops) == number
        counted.append(operations.names)
    assert counted[0] == counted[1]


@pytest.mark.parametrize("fill", ["mean", "zero", "none"])
def test_crops_are_made_where_the_picture_is(fill: str) -> None:
    """A tensor made on the processor would not go together with those of another device."""
    picture, masks = torch.empty(3, 40, 56, device="meta"), torch.empty(4, 40, 56, dtype=torch.bool, device="meta")
    crops, crop_masks = crop_for_clip(picture, masks, CropGrid.of(mask_boxes(masks, 1.5), 24), fill)
    assert (crops.device.type, crop_masks.device.type) == ("meta", "meta")
    assert (crops.shape, crop_masks.shape) == ((4, 3, 24, 24), (4, 24, 24))


def test_expanded_boxes_stay_on_the_picture() -> None:
    masks = torch.zeros(2, 20, 30, dtype=torch.bool)
    masks[0, 8:12, 10:20] = True
    masks[1, 0:10, 0:30] = True
    assert mask_boxes(masks, 1.5).tolist() == [[7, 7, 22, 13], [0, 0, 30, 12]]


class Singles(TorchDispatchMode):
    """A device without float64, as Apple's GPUs are."""

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        assert all(tensor.dtype != torch.float64 for tensor in filter(torch.is_tensor, tree_leaves(result))), operation
        return result


def test_boxes_need_no_float64_on_apple_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = torch.zeros(2, 20, 30, dtype=torch.bool)
    masks[:, 8:12, 10:20] = True
    expected = mask_boxes(masks, 1.5)
    monkeypatch.setattr(mask_crops, "widest_float", lambda device: widest_float(torch.device("mps")))
    with Singles():
        assert torch.equal(mask_boxes(masks, 1.5), expected)


# ---------------------------------------------------------------------- weights of the backbone


def detectron2_weights(network: MaskProposalNetwork) -> dict[str, np.ndarray]:
    """A ResNet-c's weights under detectron2's names."""
    weights = {}
    for name, value in network.backbone.state_dict().items():
        name = re.sub(r"^stem\.(\d)\.", lambda m: f"stem.conv{int(m[1]) + 1}.", name)
        name = re.sub(r"^stages\.(\d)\.", lambda m: f"res{int(m[1]) + 2}.", name)
        weights[name.replace(".conv.weight", ".weight")] = value.numpy()
    return weights


def make_resnet_network() -> MaskProposalNetwork:
    sizes = {"stem_channels": 8, "depths": (1, 1, 1, 3), "widths": (4, 4, 8, 8), "out_channels": (8, 16, 16, 32)}
    return make_network(backbone_config={"model_type": "ov_resnet_c", **sizes})


@pytest.mark.parametrize("protocol", range(5))
def test_backbone_from_a_plain_pickle(tmp_path: Path, protocol: int) -> None:
    """As detectron2 writes them; protocols below 3 are what Python 2 wrote."""
    source, target = make_resnet_network(), make_resnet_network()
    torch.nn.init.normal_(source.backbone.stem[0].conv.weight)
    content = {"model": OrderedDict(detectron2_weights(source)), "__author__": "somebody", "step": np.float32(3)}
    (tmp_path / "R-103.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    load_backbone_weights(target, tmp_path / "R-103.pkl")
    for name, value in source.backbone.state_dict().items():
        assert torch.equal(target.backbone.state_dict()[name], value)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("inside", ["list", "object array"])
def test_code_in_a_plain_pickle_is_refused(tmp_path: Path, inside: str) -> None:
    proof = tmp_path / "proof"
    evil = [Evil(proof)] if inside == "list" else np.array([Evil(proof)], dtype=object)
    (tmp_path / "R-103.pkl").write_bytes(pickle.dumps({"stem.conv1.weight": evil}))
    with pytest.raises(ConversionError, match=r"holds objects \((posix|os)\.system\)"):
        load_backbone_weights(make_resnet_network(), tmp_path / "R-103.pkl")
    assert not proof.exists()


def test_damaged_pickles_and_missing_networks(tmp_path: Path) -> None:
    content = pickle.dumps(detectron2_weights(make_resnet_network()))
    (tmp_path / "half.pkl").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConversionError, match=r"damaged|download complete"):
        load_backbone_weights(make_resnet_network(), tmp_path / "half.pkl")
    (tmp_path / "page.pkl").write_bytes(b"<html>404</html>")
    with pytest.raises(ConversionError, match=r"damaged|download complete"):
        load_backbone_weights(make_resnet_network(), tmp_path / "page.pkl")
    with pytest.raises(ConversionError, match="no proposal network"):
        load_backbone_weights(None, tmp_path / "half.pkl")


def test_masks_without_gradients_are_one_convolution_of_as_many_kernels() -> None:
    network = make_network().eval()
    pictures = torch.randn(2, 3, 64, 96)
    (expected,) = network(pictures)  # with gradients: queries times mask features
    convolved: list[torch.Tensor] = []
    network.pixel_decoder.mask_projection.register_forward_hook(lambda *call: convolved.append(call[-1]))
    with torch.no_grad():
        (found,) = network(pictures)
        assert not convolved
        every = network(pictures, all_layers=True)
    assert len(convolved) == 1
    scale = expected.mask_logits.abs().max().item()
    for masks in (found.mask_logits, every[-1].mask_logits):
        torch.testing.assert_close(masks, expected.mask_logits.detach(), rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(found.embeddings, expected.embeddings.detach(), rtol=0, atol=1e-5)
