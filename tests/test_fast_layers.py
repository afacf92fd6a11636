"""The layers that take another way on a CPU without gradients: the same numbers, and gradients as ever."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPConfig, CLIPModel
from transformers.activations import QuickGELUActivation

from ov_segmentation.layers import attention, fused_convolution, products
from ov_segmentation.layers.bicubic import bicubic_resize
from ov_segmentation.layers.configuration_maskformer import ResNetCConfig
from ov_segmentation.layers.mask_crops import mask_boxes
from ov_segmentation.layers.one_channel import one_channel
from ov_segmentation.layers.quick_gelu import QuickGELU, replace_quick_gelu
from ov_segmentation.layers.resnet_c import FrozenBatchNorm, ResNetC
from ov_segmentation.layers.upsampling import GuidedUpsampling, PreparedUpsampling
from ov_segmentation.precision import in_float32
from ov_segmentation.profiling import CONVOLUTION, MATRIX_PRODUCT, MultiplyAddCounter

from .tiny import tiny_clip_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quick_gelu_is_that_of_transformers_to_the_bit(dtype: torch.dtype) -> None:
    features = (4 * torch.randn(3, 70, 400)).to(dtype)
    expected, kept = QuickGELUActivation()(features), features.clone()
    with torch.no_grad():
        assert torch.equal(QuickGELU()(features.transpose(1, 2)), expected.transpose(1, 2))
        assert torch.equal(features, kept)  # only a contiguous input is overwritten
        assert torch.equal(QuickGELU()(features), expected)
    kept.requires_grad_()
    assert torch.equal(QuickGELU()(kept), expected)
    (gradient,) = torch.autograd.grad(QuickGELU()(kept).sum(), kept)
    (plain,) = torch.autograd.grad(QuickGELUActivation()(kept).sum(), kept)
    assert torch.equal(gradient, plain)


def test_quick_gelu_takes_the_place_in_both_towers() -> None:
    clip = CLIPModel(CLIPConfig(**tiny_clip_config())).eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = clip.text_model(ids).last_hidden_state
        replace_quick_gelu(clip)
        assert torch.equal(clip.text_model(ids).last_hidden_state, before)
    kinds = {type(m.activation_fn) for m in clip.modules() if hasattr(m, "activation_fn")}
    assert kinds == {QuickGELU}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_channel_is_the_convolution_in_float32(dtype: torch.dtype) -> None:
    conv = nn.Conv2d(16, 1, 3, padding=1).to(dtype)
    maps = torch.randn(3, 5, 7, 16).to(dtype)
    expected = copy.deepcopy(conv).float()(maps.permute(0, 3, 1, 2).float())[:, 0]
    assert torch.equal(one_channel(conv, maps), expected)  # with gradients
    with torch.no_grad():
        torch.testing.assert_close(one_channel(conv, maps), expected.detach(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 4, 3, padding=1), nn.Linear(8, 4, bias=False)], ids=lambda layer: layer._get_name()
)
def test_layers_in_float32_are_not_changed_under_other_threads(layer: nn.Module) -> None:
    layer, features = copy.deepcopy(layer).bfloat16(), torch.randn(1, 3, 8, 8)
    expected = copy.deepcopy(layer).float()(features)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda _: in_float32(layer, features), range(1000)))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(one, expected) for one in found)


@pytest.mark.parametrize(("old", "new"), [((14, 14), (32, 44)), ((24, 24), (9, 31)), ((5, 7), (5, 7))])
def test_bicubic_resize_is_that_of_torch(old: tuple[int, int], new: tuple[int, int]) -> None:
    grid = torch.randn(*old, 6, requires_grad=True)
    expected = nn.functional.interpolate(grid.permute(2, 0, 1)[None], size=new, mode="bicubic")[0].permute(1, 2, 0)
    found = bicubic_resize(grid, new)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    upstream = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(found, grid, upstream)
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected, grid, upstream), rtol=0, atol=1e-5)


class WaitingOperations(TorchDispatchMode):
    """Refuses what a GPU makes its caller wait for: numbers copied to it, and results whose size it has to tell."""

    waiting = ("lift_fresh", "_local_scalar_dense", "nonzero", "repeat_interleave")

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        assert not any(name in str(operation) for name in self.waiting), operation
        return operation(*arguments, **(options or {}))


@torch.no_grad()
@pytest.mark.parametrize(
    "run",
    [
        lambda: bicubic_resize(torch.randn(4, 4, 6), (7, 9)),
        lambda: mask_boxes(torch.ones(3, 20, 30, dtype=torch.bool), 1.5),
        lambda: GuidedUpsampling(16, None, 4, 0, 16)(
            torch.randn(5, 4, 4, 16), (2, 3), PreparedUpsampling(None, torch.randn(2, 16, 8, 8))
        ),
    ],
    ids=["bicubic", "boxes", "upsampling"],
)
def test_a_gpu_is_not_waited_for(run: Callable[[], torch.Tensor]) -> None:
    with WaitingOperations():
        run()


@pytest.mark.parametrize("bias_shape", [None, (2, 3, 200, 210), (1, 1, 200, 210)])
@torch.no_grad()
def test_tiled_attention(bias_shape: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    # several tiles along the queries, the last one short
    monkeypatch.setattr(attention, "SCORES_AT_ONCE_BYTES", 120_000)
    query, key, value = (torch.randn(2, 3, length, 8) for length in (200, 210, 210))
    bias = None if bias_shape is None else torch.randn(bias_shape)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, bias)
    torch.testing.assert_close(attention.tiled_attention(query, key, value, bias), expected, rtol=0, atol=1e-5)
    for at_once in (360_000, 1_200_000):  # two heads at a time, and both pictures
        monkeypatch.setattr(attention, "SCORES_AT_ONCE_BYTES", at_once)
        torch.testing.assert_close(attention.tiled_attention(query, key, value, bias), expected, rtol=0, atol=1e-5)
    half = [None if one is None else one.bfloat16() for one in (query, key, value, bias)]
    found, eager = attention.tiled_attention(*half), attention.eager_attention(nn.Identity(), *half, 8**-0.5)[0]
    assert found.dtype == torch.bfloat16
    # off by about what eager attention is, whose scores are bfloat16 too
    error, errors_of_eager = (found - expected).abs(), (eager.transpose(1, 2) - expected).abs()
    assert error.max() < 2 * errors_of_eager.max()
    assert error.mean() < errors_of_eager.mean()


@pytest.mark.parametrize("contiguous", [True, False])
def test_products_are_those_of_linear(contiguous: bool) -> None:
    layer = nn.Linear(200, 300)
    features = torch.randn(2, 50, 200) if contiguous else torch.randn(2, 200, 50).transpose(1, 2)
    expected = layer(features)
    (plain,) = torch.autograd.grad(expected.square().sum(), layer.weight)
    model = nn.Sequential(layer)
    products.replace_linear(model)
    assert isinstance(model[0], products.Linear)
    assert torch.equal(model(features), expected)  # with gradients
    (gradient,) = torch.autograd.grad(model(features).square().sum(), layer.weight)
    assert torch.equal(gradient, plain)
    with torch.no_grad(), MultiplyAddCounter() as counter:
        assert products.prefers_onednn(features, layer.weight)
        torch.testing.assert_close(model(features), expected.detach(), rtol=0, atol=1e-5)
        weight = layer.weight[:, :150]  # a part of its columns
        found = products.linear(features[..., :150], weight)
    assert counter.multiply_adds[MATRIX_PRODUCT] == 100 * 300 * (200 + 150)
    torch.testing.assert_close(found, nn.functional.linear(features[..., :150], weight.detach()), rtol=0, atol=1e-5)


@torch.no_grad()
def test_tall_products() -> None:
    for features in (torch.randn(40, 50, 60), torch.randn(2, 60)):
        weights = torch.randn(60, 9)[:, ::2]
        torch.testing.assert_close(products.tall_product(features, weights), features @ weights, rtol=0, atol=1e-5)
    repeated = torch.randn(60).expand(2000, 60)
    torch.testing.assert_close(products.tall_product(repeated, weights), repeated @ weights, rtol=0, atol=1e-5)
    weight = torch.randn(400, 400)[::2, ::2]
    found = products.linear(repeated[:, :1].expand(2000, 200), weight)
    torch.testing.assert_close(found, repeated[:, :1].expand(2000, 200) @ weight.t(), rtol=0, atol=1e-4)


@torch.no_grad()
def test_what_onednn_does_not_multiply() -> None:
    features, weight = torch.randn(100, 200), torch.randn(300, 200)
    assert products.prefers_onednn(features, weight)
    assert not products.prefers_onednn(features[:2], weight)
    assert not products.prefers_onednn(features.double(), weight.double())
    assert not products.prefers_onednn(features.to("meta"), weight.to("meta"))
    with torch.enable_grad():
        assert not products.prefers_onednn(features, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(features, weight).dtype == torch.bfloat16


@pytest.mark.parametrize("bias_shape", [None, (1, 3, 400, 410)])
@torch.no_grad()
def test_attention_in_float32_by_products(bias_shape: tuple[int, ...] | None) -> None:
    query, key, value = (torch.randn(1, 3, length, 64) for length in (400, 410, 410))
    bias = None if bias_shape is None else torch.randn(bias_shape)
    assert attention.prefers_tiles(query)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, bias)
    torch.testing.assert_close(attention.tiled_attention(query, key, value, bias), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
@torch.no_grad()
def test_resnet_in_fused_convolutions(dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # as many channels everywhere, and no stride in the last stages: their first blocks have no projection
    config = ResNetCConfig(
        stem_channels=16,
        widths=[4] * 4,
        out_channels=[16] * 4,
        depths=[1, 2, 1, 1],
        stage3_dilation=2,
        stage4_dilation=4,
        stage4_multi_grid=[1],
    )
    monkeypatch.setattr(fused_convolution, "LEAST_ELEMENTS", 1)
    backbone = ResNetC(config).eval()
    for module in backbone.modules():
        if isinstance(module, FrozenBatchNorm):
            for buffer in (module.weight, module.bias, module.running_mean):
                buffer.normal_()
            module.running_var.uniform_(0.5, 2)
    backbone.to(dtype)
    pictures = torch.randn(2, 3, 40, 56).to(dtype)
    with MultiplyAddCounter() as counter:
        found = backbone(pictures)
    monkeypatch.setattr(fused_convolution, "_CONVOLUTION", None)
    with MultiplyAddCounter() as plain_counter:
        expected = backbone(pictures)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * other.abs().max().item())
    assert counter.multiply_adds[CONVOLUTION] == plain_counter.multiply_adds[CONVOLUTION] > 0
    assert all(torch.equal(one, other) for one, other in zip(backbone(pictures), expected, strict=True))


@torch.no_grad()
def test_products_with_rows_that_lie_apart_are_no_slower() -> None:
    """oneDNN has no fast code for such a weight: it is copied, or a call would take a thousand times longer."""
    features, wide = torch.randn(400, 64), torch.randn(600, 192)
    weight = wide[:, 64:128]
    assert products.prefers_onednn(features, weight) and not weight.is_contiguous()

    def seconds(matrix: torch.Tensor) -> float:
        start = time.process_time()
        for _ in range(5):
            products.linear(features, matrix)
        return time.process_time() - start

    seconds(weight)
    assert seconds(weight) < 20 * seconds(weight.contiguous()) + 0.05
    heads = torch.randn(1, 500, 3, 6, 64).permute(2, 0, 3, 1, 4)  # queries, keys and values as one product leaves them
    query, key, value = heads
    assert attention.prefers_tiles(query) and not value.is_contiguous()
    assert not attention.prefers_tiles(query[..., :50, :])  # of small ones torch's own is the faster
    with torch.enable_grad():
        assert not attention.prefers_tiles(query)
    start = time.process_time()
    found = attention.tiled_attention(query, key, value)
    assert time.process_time() - start < 2
    expected = nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
