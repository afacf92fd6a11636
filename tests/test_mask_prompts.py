"""Visual prompts in CLIP's tower, block by block: which tokens enter each block, at every depth."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from ov_segmentation.layers.mask_prompts import DeepPrompts, MaskPrompts, condense_masks, encode_crops

BLOCKS, SIDE, WIDTH = 12, 4, 16
VISION = {"hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def tower() -> CLIPVisionModel:
    torch.manual_seed(0)
    return CLIPVisionModel(CLIPVisionConfig(**VISION, num_hidden_layers=BLOCKS)).eval()


def crops_and_masks() -> tuple[torch.Tensor, torch.Tensor]:
    """Two crops; the first mask is one pixel of patch 5, the second the upper half and a pixel below."""
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[0, 15, 8] = True
    masks[1, :16] = masks[1, 31, 31] = True
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)), masks


def tokens_of_blocks(tower: CLIPVisionModel, *arguments: object) -> tuple[torch.Tensor, list, list]:
    """The class tokens, and what entered and left each block."""
    entered, left = [], []
    handles = [layer.register_forward_pre_hook(lambda m, x: entered.append(x[0])) for layer in tower.encoder.layers]
    handles += [layer.register_forward_hook(lambda m, x, y: left.append(y)) for layer in tower.encoder.layers]
    try:
        features = encode_crops(tower, torch.nn.Identity(), *arguments)
    finally:
        for handle in handles:
            handle.remove()
    return features, entered, left


def test_a_patch_counts_with_one_pixel() -> None:
    occupied = condense_masks(crops_and_masks()[1], 8)
    assert occupied[0].nonzero()[:, 0].tolist() == [5]
    assert occupied[1].nonzero()[:, 0].tolist() == [*range(8), 15]


@pytest.mark.parametrize("depth", range(1, BLOCKS + 1))
def test_mask_prompts_replace_empty_patches_before_the_first_blocks(tower: CLIPVisionModel, depth: int) -> None:
    prompts = MaskPrompts(depth, SIDE**2, WIDTH)
    torch.nn.init.normal_(prompts.embedding, generator=torch.Generator().manual_seed(2))
    crops, masks = crops_and_masks()
    features, entered, left = tokens_of_blocks(tower, crops, masks, prompts)
    occupied = condense_masks(masks, 8)[..., None]
    # before the first block prompts get a position and a norm, as patches do
    patches = tower.embeddings.patch_embedding(crops).flatten(2).transpose(1, 2)
    patches = torch.where(occupied, patches, prompts.embedding[0])
    first = torch.cat([tower.embeddings.class_embedding.expand(2, 1, -1), patches], dim=1)
    first = tower.pre_layrnorm(first + tower.embeddings.position_embedding.weight)
    torch.testing.assert_close(entered[0], first)
    for block in range(1, BLOCKS):
        assert torch.equal(entered[block][:, 0], left[block - 1][:, 0])  # the class token is never touched
        expected = left[block - 1][:, 1:]
        if block < depth:
            expected = torch.where(occupied, expected, prompts.embedding[block])
        assert torch.equal(entered[block][:, 1:], expected)
    torch.testing.assert_close(features, tower.post_layernorm(left[-1][:, 0]))


def test_one_mask_prompt_for_all_positions(tower: CLIPVisionModel) -> None:
    shared, single = MaskPrompts(2, SIDE**2, WIDTH), MaskPrompts(2, 1, WIDTH)
    torch.nn.init.normal_(single.embedding)
    with torch.no_grad():
        shared.embedding.copy_(single.embedding.expand(-1, SIDE**2, -1))
        found, expected = (
            encode_crops(tower, torch.nn.Identity(), *crops_and_masks(), prompts) for prompts in (single, shared)
        )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("depth", [1, 3, BLOCKS])
def test_deep_prompts_are_fresh_before_each_of_the_first_blocks(tower: CLIPVisionModel, depth: int) -> None:
    """Jia et al., "Visual Prompt Tuning" (2022), equation 5; afterwards tokens stay as they came out."""
    prompts, number = DeepPrompts(depth, 3, WIDTH), 3
    torch.nn.init.normal_(prompts.embedding, generator=torch.Generator().manual_seed(2))
    crops, masks = crops_and_masks()
    features, entered, left = tokens_of_blocks(tower, crops, masks, prompts)
    plain = tokens_of_blocks(tower, crops, masks)[1][0]
    assert [tokens.shape[1] for tokens in entered] == [1 + number + SIDE**2] * BLOCKS
    assert torch.equal(torch.cat([entered[0][:, :1], entered[0][:, 1 + number :]], dim=1), plain)
    for block in range(BLOCKS):
        own = entered[block][:, 1 : 1 + number]
        if block < depth:
            assert torch.equal(own, prompts.embedding[block].expand(2, -1, -1))
        else:
            assert torch.equal(entered[block], left[block - 1])
        if block:
            assert torch.equal(entered[block][:, 1 + number :], left[block - 1][:, 1 + number :])
    assert not torch.equal(features[0], features[1])


@pytest.mark.parametrize("prompts", [None, MaskPrompts(3, SIDE**2, WIDTH), DeepPrompts(3, 2, WIDTH)], ids=str)
def test_the_class_token_alone_is_computed_in_the_last_block(tower: CLIPVisionModel, prompts: object) -> None:
    """Without a gradient nothing else of it is: the result stays the same."""
    with_gradient = encode_crops(tower, torch.nn.Identity(), *crops_and_masks(), prompts)
    with torch.no_grad():
        without = encode_crops(tower, torch.nn.Identity(), *crops_and_masks(), prompts)
    torch.testing.assert_close(without, with_gradient.detach())
