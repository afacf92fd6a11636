"""The layers that take another way on a CPU without gradients: the same numbers, and gradients as ever."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel
from transformers.activations import QuickGELUActivation

from ov_segmentation.layers import attention
from ov_segmentation.layers.one_channel import one_channel
from ov_segmentation.layers.quick_gelu import QuickGELU, replace_quick_gelu

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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_one_channel_is_the_convolution(dtype: torch.dtype, tolerance: float) -> None:
    conv = nn.Conv2d(16, 1, 3, padding=1).to(dtype)
    maps = torch.randn(3, 5, 7, 16).to(dtype)
    expected = conv(maps.permute(0, 3, 1, 2))[:, 0]
    assert torch.equal(one_channel(conv, maps), expected)  # with gradients
    with torch.no_grad():
        torch.testing.assert_close(one_channel(conv, maps), expected.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias_shape", [None, (2, 3, 200, 210), (1, 1, 200, 210)])
@torch.no_grad()
def test_tiled_attention(bias_shape: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 30_000)  # several tiles along the queries, the last one short
    query, key, value = (torch.randn(2, 3, length, 8) for length in (200, 210, 210))
    bias = None if bias_shape is None else torch.randn(bias_shape)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, bias)
    torch.testing.assert_close(attention.tiled_attention(query, key, value, bias), expected, rtol=0, atol=1e-5)
    assert not attention.prefers_tiles(query)
    assert attention.prefers_tiles(query.bfloat16())
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 90_000)  # two heads at a time
    torch.testing.assert_close(attention.tiled_attention(query, key, value, bias), expected, rtol=0, atol=1e-5)
