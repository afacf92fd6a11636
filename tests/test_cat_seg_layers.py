"""The layers that CAT-Seg shares with others, against their formulas written out."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity, interpolate, softmax
from transformers import PreTrainedConfig

from ov_segmentation.layers.correlation import correlation, strongest_classes
from ov_segmentation.layers.guided import guided_linear
from ov_segmentation.layers.guided_swin import OTHER_REGION, GuidedSwinPair, shifted_window_mask, window_order
from ov_segmentation.layers.linear_attention import ClassAttention, repeated
from ov_segmentation.layers.sliding_window import cut_views, view_boxes, window_offsets


def config(implementation: str = "eager") -> PreTrainedConfig:
    result = PreTrainedConfig()
    result._attn_implementation = implementation
    return result


# ---------------------------------------------------------------------- sliding window


@pytest.mark.parametrize(
    ("length", "window", "stride", "offsets"),
    [
        (640, 384, 256, [0, 256]),
        (80, 48, 32, [0, 32]),
        (70, 48, 32, [0, 22]),
        (48, 48, 32, [0]),
        (9, 2, 3, [0, 3, 6, 7]),
    ],
)
def test_windows_cover_the_canvas(length: int, window: int, stride: int, offsets: list[int]) -> None:
    assert window_offsets(length, window, stride) == offsets


def test_windows_must_fit() -> None:
    with pytest.raises(ValueError, match="window of 48 pixels does not fit a canvas of 47"):
        window_offsets(47, 48, 32)


def test_published_views() -> None:
    boxes = [[0, 0, 384, 384], [256, 0, 640, 384], [0, 256, 384, 640], [256, 256, 640, 640], [0, 0, 640, 640]]
    assert view_boxes((640, 640), 384, 256, True).tolist() == boxes
    assert view_boxes((640, 640), 384, 256, False).tolist() == boxes[:4]


def test_views_are_cut_from_the_canvas_in_the_order_of_their_boxes() -> None:
    pictures = [torch.randn(1, 3, 30, 41), torch.randn(1, 3, 24, 32)]
    canvas_size, window, stride = (24, 32), 10, 7
    boxes = view_boxes(canvas_size, window, stride, True)
    views = cut_views(pictures, canvas_size, window, stride, True).unflatten(0, (2, len(boxes)))
    for picture, of_picture in zip(pictures, views, strict=True):
        canvas = interpolate(picture, canvas_size, mode="bilinear")[0]
        for (x0, y0, x1, y1), view in zip(boxes[:-1].tolist(), of_picture[:-1], strict=True):
            assert torch.equal(view, canvas[:, y0:y1, x0:x1])
        # the whole picture, not the canvas
        assert torch.equal(of_picture[-1], interpolate(picture, (window, window), mode="bilinear")[0])


# ---------------------------------------------------------------------- cost


def test_correlation_is_the_cosine() -> None:
    dense, text = torch.randn(2, 5, 3, 4), torch.randn(6, 2, 5)
    cost = correlation(dense, text)
    assert cost.shape == (2, 6, 2, 3, 4)
    torch.testing.assert_close(cost[1, 4, 1, 2, 3], cosine_similarity(dense[1, :, 2, 3], text[4, 1], dim=0))
    kept = strongest_classes(cost, 2)
    for row in range(2):
        peaks = [cost[row, k].max().item() for k in range(6)]
        assert kept[row].tolist() == sorted(sorted(range(6), key=lambda k: -peaks[k])[:2])


# ---------------------------------------------------------------------- guidance and windows


def test_guided_linear_is_the_layer_of_the_concatenation() -> None:
    linear, features, guidance = torch.nn.Linear(7, 5), torch.randn(2, 3, 4), torch.randn(2, 1, 3)
    expected = linear(torch.cat([features, guidance.expand(-1, 3, -1)], dim=-1))
    torch.testing.assert_close(guided_linear(linear, features, guidance), expected)


@pytest.mark.parametrize(("grid", "window"), [((4, 4), 2), ((6, 9), 3), ((8, 4), 4), ((6, 6), 6)])
def test_shifted_windows_keep_neighbours_together(grid: tuple[int, int], window: int) -> None:
    """Tokens of a shifted window see each other if they lie within a window's reach in the map itself."""
    shift = window // 2
    device = torch.device("cpu")
    order = window_order(grid, window, shift, device)
    assert sorted(order.tolist()) == list(range(grid[0] * grid[1]))
    mask = shifted_window_mask(grid, window, shift, device, torch.float32)
    places = order.view(-1, window * window)
    rows, columns = places // grid[1], places % grid[1]
    near = (rows[:, :, None] - rows[:, None]).abs() < window
    near &= (columns[:, :, None] - columns[:, None]).abs() < window
    # where one window is the whole side, the two halves of it are apart although they are near
    if min(grid) > window:
        assert torch.equal(mask[:, 0] == 0, near)
    assert set(mask.unique().tolist()) <= {0.0, OTHER_REGION}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("grid", [(4, 6), (2, 2)])
@torch.no_grad()
def test_guided_swin_pair(grid: tuple[int, int], per_class: bool, implementation: str) -> None:
    """Position by position: who sees whom, queries and keys from both, values from the features."""
    torch.manual_seed(0)
    pair = GuidedSwinPair(config(implementation), 8, 4, num_heads=2, window_size=2)
    features = torch.randn(2, 3, grid[0] * grid[1], 8)
    guidance = torch.randn(2, 3 if per_class else 1, grid[0] * grid[1], 4)
    expected = features
    for block, shift in ((pair.block1, 0), (pair.block2, 1)):
        normed, guide = block.norm1(expected), pair.guidance_norm(guidance).expand(-1, 3, -1, -1)
        both, attention = torch.cat([normed, guide], dim=-1), block.attention
        query, key, value = attention.query(both), attention.key(both), attention.value(normed)
        mixed = torch.zeros_like(features)
        for i in range(grid[0] * grid[1]):
            seen = [j for j in range(grid[0] * grid[1]) if in_one_window(i, j, grid, shift)]
            for head in (slice(0, 4), slice(4, 8)):
                scores = query[:, :, i, None, head] @ key[:, :, seen][..., head].transpose(2, 3) / 4**0.5
                mixed[:, :, i, head] = (softmax(scores, -1) @ value[:, :, seen][..., head])[:, :, 0]
        expected = expected + attention.projection(mixed)
        expected = expected + block.fc2(torch.nn.functional.gelu(block.fc1(block.norm2(expected))))
    torch.testing.assert_close(pair(features, guidance, grid), expected, rtol=0, atol=1e-5)
    # one picture at a time takes the way in pieces
    alone = torch.cat([pair(features[i : i + 1], guidance[i : i + 1], grid) for i in range(2)])
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-5)


def in_one_window(i: int, j: int, grid: tuple[int, int], shift: int) -> bool:
    """Whether two positions are in the same window of 2 x 2; of a map of that size all are."""
    if grid == (2, 2):
        return True
    (y, x), (v, u) = divmod(i, grid[1]), divmod(j, grid[1])
    return (y + shift) // 2 == (v + shift) // 2 and (x + shift) // 2 == (u + shift) // 2


# ---------------------------------------------------------------------- class attention with guidance and padding


@torch.no_grad()
def test_guided_class_attention_with_padding() -> None:
    """Against softmax-free attention written out with copies of the padding."""
    torch.manual_seed(0)
    layer = ClassAttention(8, num_heads=2, guidance_channels=3)
    tokens, guidance = torch.randn(4, 5, 8), torch.randn(4, 3)
    pad_token, pad_guidance = torch.randn(8), torch.randn(3)
    everyone = torch.cat([tokens, pad_token.expand(6, 5, 8)])
    guides = torch.cat([guidance, pad_guidance.expand(6, 3)])[:, None].expand(-1, 5, -1)
    normed = layer.norm1(everyone)
    both = torch.cat([normed, guides], dim=-1)
    query, key = (torch.nn.functional.elu(part(both)) + 1 for part in (layer.query, layer.key))
    value = layer.value(normed)
    mixed = torch.zeros_like(everyone)
    for head in (slice(0, 4), slice(4, 8)):
        weights = torch.einsum("ksc,lsc->skl", query[..., head], key[..., head])
        mixed[..., head] = torch.einsum(
            "skl,lsc->ksc", weights / (weights.sum(-1, keepdim=True) + 1e-6), value[..., head]
        )
    expected = everyone + mixed
    expected = expected + layer.fc2(torch.relu(layer.fc1(layer.norm2(expected))))
    of_padding = layer.class_sums(pad_token.expand(1, 5, 8), [1], pad_guidance[None])
    sums = layer.class_sums(tokens, [4], guidance) + repeated(of_padding, 6)
    torch.testing.assert_close(layer(tokens, [4], sums, guidance), expected[:4], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_thousands_of_classes_stay_in_the_range_of_float16(autocast: bool) -> None:
    """Of the published width: a normaliser that is infinite would leave nothing of the attention."""
    torch.manual_seed(0)
    layer, tokens = ClassAttention(128, num_heads=4), 2 * torch.randn(2000, 2, 128)
    expected = layer(tokens, [2000], layer.class_sums(tokens, [2000]))
    if not autocast:
        layer, tokens = layer.half(), tokens.half()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        found = layer(tokens, [2000], layer.class_sums(tokens, [2000]))
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.02)
