"""SAM's layers as we compute them, against transformers' own: the mask decoder for many points, two-way blocks whose
maps are not projected, and the image encoder's attention in tiles."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import SamConfig, SamModel
from transformers.models.sam.modeling_sam import SamTwoWayAttentionBlock, SamVisionSdpaAttention

from ov_segmentation.layers import two_way_attention
from ov_segmentation.layers.sam_decoder import PointDecoder
from ov_segmentation.layers.sam_vision_attention import SAMVisionAttention, replace_sam_attention
from ov_segmentation.layers.two_way_attention import final_attention, two_way_block

SAM = {
    "vision_config": {
        "hidden_size": 64, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 512,
        "patch_size": 16, "mlp_dim": 64, "window_size": 14, "global_attn_indexes": [1], "num_pos_feats": 16,
    },
    "prompt_encoder_config": {
        "hidden_size": 32, "image_size": 512, "patch_size": 16, "mask_input_channels": 16,
    },
    "mask_decoder_config": {
        "hidden_size": 32, "num_attention_heads": 2, "mlp_dim": 64, "iou_head_hidden_dim": 32,
    },
}  # fmt: skip
POINTS = torch.tensor([[100.0, 40.0], [7.0, 300.0], [511.0, 0.0], [256.0, 256.0], [31.0, 32.0]])
# bfloat16 rounds to 2^-9 of a number at every step, in both computations
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-2}


@pytest.fixture
def sam() -> SamModel:
    torch.manual_seed(0)
    model = SamModel(SamConfig(**SAM)).eval()
    for name, parameter in model.named_parameters():
        scale = (
            0.3 if "rel_pos" in name or "bias" in name else (parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0)
        )
        if scale:
            nn.init.normal_(parameter, std=scale)
    return model


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To a share of the largest number."""
    assert found.dtype == expected.dtype
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[expected.dtype] * scale)


def all_masks(sam: SamModel, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' masks of `POINTS` `[P, 3, h, w]` and their scores `[P, 3]`."""
    found = sam(
        image_embeddings=embeddings,
        input_points=POINTS[None, :, None].to(embeddings),
        input_labels=torch.ones(1, len(POINTS), 1, dtype=torch.long),
        multimask_output=True,
    )
    return found.pred_masks[0], found.iou_scores[0]


@pytest.mark.parametrize("gradients", [False, True], ids=["folded", "modules"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_of_points(sam: SamModel, dtype: torch.dtype, gradients: bool) -> None:
    embeddings = torch.randn(1, 32, 32, 32).to(dtype)
    sam = sam.to(dtype)
    with torch.no_grad():
        expected, scores = all_masks(sam, embeddings)
    with torch.set_grad_enabled(gradients):
        decoder = PointDecoder(sam, embeddings)
        masks, found_scores = decoder(POINTS.to(dtype), -torch.inf)
    assert masks.requires_grad == gradients
    assert masks.dtype == found_scores.dtype == torch.float32
    assert_close(masks.detach().to(dtype), expected.flatten(0, 1))
    assert_close(found_scores.detach().to(dtype), scores.flatten())


@torch.no_grad()
def test_only_masks_above_the_score_are_computed(sam: SamModel) -> None:
    embeddings = torch.randn(1, 32, 32, 32)
    expected, scores = all_masks(sam, embeddings)
    decoder = PointDecoder(sam, embeddings)
    upscaled = []
    sam.mask_decoder.activation.register_forward_hook(lambda module, inputs, output: upscaled.append(len(output)))
    ordered = scores.flatten().sort().values
    for count in (8, 1, 0):  # of 15
        upscaled.clear()
        least = ordered[-1] + 1 if count == 0 else ordered[-count - 1 : len(ordered) - count + 1].mean()
        masks, found_scores = decoder(POINTS, least.item())
        good = scores > least
        assert masks.shape == (count, 128, 128)
        torch.testing.assert_close(found_scores, scores[good], rtol=0, atol=1e-5)
        torch.testing.assert_close(masks, expected[good], rtol=0, atol=1e-5 * expected.abs().max().item())
        assert set(upscaled) == {good.any(dim=1).sum().item()}


@torch.no_grad()
def test_points_at_once(sam: SamModel) -> None:
    decoder = PointDecoder(sam, torch.randn(1, 32, 32, 32))  # 64 such maps are a piece of 2^21 elements
    assert [decoder.points_at_once(most) for most in (16, 64, 1000)] == [16, 64, 64]
    with torch.enable_grad():
        assert decoder.points_at_once(1000) == 1000


@pytest.mark.parametrize("maps", [3, 1], ids=["a map each", "one map"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_two_way_block(sam: SamModel, dtype: torch.dtype, first: bool, maps: int) -> None:
    block = sam.mask_decoder.transformer.layers[0 if first else 1].to(dtype)
    tokens, positions = (torch.randn(3, 7, 32).to(dtype) for _ in range(2))
    features, places = torch.randn(maps, 200, 32).to(dtype), torch.randn(200, 32).to(dtype)
    several = features.expand(3, -1, -1)
    expected = block(tokens[:, None], several[:, None], positions[:, None], places, None)
    assert two_way_attention.folds(block.cross_attn_image_to_token, tokens, features)
    found = two_way_block(block, tokens, features, positions, places)
    for ours, theirs in zip(found, expected[:2], strict=True):
        assert_close(ours, theirs[:, 0])
    attention = sam.mask_decoder.transformer.final_attn_token_to_image.to(dtype)
    expected = attention((tokens + positions)[:, None], (several + places)[:, None], several[:, None])[0][:, 0]
    assert_close(final_attention(attention, tokens, features, positions, places), expected)


@pytest.mark.parametrize("reason", ["tokens", "gradients"])
def test_modules_run_as_they_are(sam: SamModel, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many tokens as a head has channels nothing is won, and gradients take torch's kernels."""
    block = sam.mask_decoder.transformer.layers[0]
    calls = []
    forward = SamTwoWayAttentionBlock.forward
    monkeypatch.setattr(SamTwoWayAttentionBlock, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    tokens = torch.randn(2, 8 if reason == "tokens" else 7, 32)
    with torch.set_grad_enabled(reason == "gradients"):
        found = two_way_block(block, tokens, torch.randn(2, 50, 32), tokens, torch.randn(50, 32))
    assert calls == [1]
    assert [part.requires_grad for part in found] == [reason == "gradients"] * 2


@pytest.mark.parametrize("layer", [0, 1], ids=["windows", "global"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_the_image_encoder(
    sam: SamModel, dtype: torch.dtype, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = sam.vision_encoder.layers[layer].attn.to(dtype)
    assert type(theirs) is SamVisionSdpaAttention
    features = torch.randn(9, 14, 14, 64).to(dtype) if layer == 0 else torch.randn(2, 32, 32, 64).to(dtype)
    with torch.no_grad():
        expected, _ = theirs(features)
    replace_sam_attention(sam)
    assert type(theirs) is SAMVisionAttention
    assert_close(theirs(features)[0].detach(), expected)  # with gradients: torch's kernel
    monkeypatch.setattr(SamVisionSdpaAttention, "forward", None)
    with torch.no_grad():
        assert_close(theirs(features)[0], expected)


@torch.no_grad()
def test_attention_of_a_picture_that_is_not_square(sam: SamModel) -> None:
    replace_sam_attention(sam)
    attention = sam.vision_encoder.layers[1].attn
    features = torch.randn(1, 32, 40, 64)
    assert_close(attention(features)[0], SamVisionSdpaAttention.forward(attention, features)[0])
