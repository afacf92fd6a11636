"""Class embeddings against the plain full-length computation, and what the caches may and may not return."""

import itertools

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from ov_segmentation import text_encoding
from ov_segmentation.modeling_base import OpenVocabularySegmentationModel
from ov_segmentation.models.san.configuration_san import SANConfig
from ov_segmentation.text_encoding import CACHED_VOCABULARIES, TextEmbeddingCache, encode_vocabulary, end_positions

END, START, LENGTH, WIDTH = 49, 48, 20, 12


def clip_config():
    text = {
        "vocab_size": END + 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": LENGTH,
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": 0,
        "projection_dim": WIDTH,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
        "projection_dim": WIDTH,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)


class TextSide(OpenVocabularySegmentationModel):
    """Just the text side that every method inherits."""

    config: SANConfig

    def __init__(self, config):
        super().__init__(config)
        self.clip = CLIPModel._from_config(config.clip_config)
        self.post_init()

    def freeze_pretrained(self):
        self.requires_grad_(False)


class PromptKeepingTextSide(TextSide):
    keeps_prompts = True


def build(cls=TextSide, seed=0):
    torch.manual_seed(seed)
    config = SANConfig(
        clip_config=clip_config().to_dict(), num_feature_layers=1, num_recognition_layers=1, side_num_layers=2
    )
    model = cls(config)
    # the default initialisation leaves differences between texts too small to see
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.freeze_pretrained()
    return model.eval()


@pytest.fixture
def model():
    return build()


def random_ids(*shape, seed=0):
    """Token ids `[*shape, LENGTH]` of texts of random lengths, and their mask; what follows the end token is noise."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, START, (*shape, LENGTH), generator=generator)
    ends = torch.randint(1, LENGTH, shape, generator=generator)
    positions = torch.arange(LENGTH)
    ids = torch.where(positions == ends[..., None], END, ids)
    ids[..., 0] = START
    return ids, (positions <= ends[..., None]).long()


def plainly(model, ids, present):
    """Every row at full length through transformers' own `get_text_features`, averaged in plain loops."""
    K, P, S, _ = ids.shape
    result = torch.zeros(K, P, WIDTH)
    for k, p in itertools.product(range(K), range(P)):
        rows = [s for s in range(S) if present[k, p, s]]
        features = [model.clip.get_text_features(ids[k, p, s][None]).pooler_output[0] for s in rows]
        units = [feature / feature.norm() for feature in features]
        mean = sum(units) / len(units)
        result[k, p] = mean / mean.norm()
    return result


def over_prompts(embeds):
    return nn.functional.normalize(embeds.mean(dim=1), dim=-1)


@torch.no_grad()
def test_equals_the_plain_computation(model):
    ids, mask = random_ids(5, 3)
    expected = plainly(model, ids[:, :, None], torch.ones(5, 3, 1))
    embeds = model.encode_vocabulary(ids, mask)
    assert embeds.shape == (5, WIDTH)
    torch.testing.assert_close(embeds, over_prompts(expected), atol=1e-6, rtol=0)
    torch.testing.assert_close(model.encode_vocabulary(ids), embeds, atol=0, rtol=0)
    kept = PromptKeepingTextSide(model.config).eval()
    kept.load_state_dict(model.state_dict())
    torch.testing.assert_close(kept.encode_vocabulary(ids, mask), expected, atol=1e-6, rtol=0)
    assert expected.std(dim=0).min() > 0.01  # texts do differ


@torch.no_grad()
def test_synonyms_are_averaged_per_template_and_absent_rows_ignored(model):
    ids, mask = random_ids(4, 2, 3)
    present = torch.ones(4, 2, 3, dtype=torch.bool)
    present[0, :, 1:] = False
    present[2, :, 2] = False
    mask = mask * present[..., None]
    ids = ids.masked_fill(~present[..., None], 7)  # no end token: reading an absent row would be an error
    expected = plainly(model, ids, present)
    torch.testing.assert_close(model.encode_vocabulary(ids, mask), over_prompts(expected), atol=1e-6, rtol=0)
    kept = PromptKeepingTextSide(model.config).eval()
    kept.load_state_dict(model.state_dict())
    torch.testing.assert_close(kept.encode_vocabulary(ids, mask), expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_one_class_one_prompt_one_token(model):
    ids = torch.tensor([[[START, END]]])
    assert model.encode_vocabulary(ids).shape == (1, WIDTH)


@torch.no_grad()
def test_each_distinct_text_runs_once_and_no_longer_than_needed(model, monkeypatch):
    ids, mask = random_ids(6, 2)
    ids, mask = torch.cat([ids, ids]), torch.cat([mask, mask])
    ids[7, 0] = torch.where(mask[7, 0].bool(), ids[7, 0], 3)  # another rest behind the end token
    seen = []
    original = model._text_features

    def spy(chunk, ends):
        seen.append((chunk.shape, ends))
        return original(chunk, ends)

    monkeypatch.setattr(model, "_text_features", spy)
    monkeypatch.setattr(text_encoding, "TOKENS_PER_CHUNK", 2 * LENGTH)
    embeds = model.encode_vocabulary(ids, mask)
    assert sum(shape[0] for shape, _ in seen) == 12
    assert len(seen) > 3
    for shape, ends in seen:
        assert shape[1] == ends.max() + 1
        assert shape[0] == 1 or shape[0] * shape[1] <= 2 * LENGTH
    monkeypatch.undo()
    torch.testing.assert_close(embeds[:6], embeds[6:], atol=0, rtol=0)
    model._text_cache.clear()
    torch.testing.assert_close(model.encode_vocabulary(ids, mask), embeds, atol=1e-6, rtol=0)


def test_errors_say_what_is_wrong(model):
    ids, mask = random_ids(3, 2)
    no_end = ids.clone()
    no_end[1, 0] = 5
    with pytest.raises(ValueError, match=r"1 of 6 prompts hold no end token \(eos_token_id 49\)"):
        model.encode_vocabulary(no_end)
    with pytest.raises(ValueError, match=r"\[K, P, L\]"):
        model.encode_vocabulary(ids[0])
    with pytest.raises(ValueError, match="one shape"):
        model.encode_vocabulary(ids, mask[:2])
    mask[2, 1] = 0
    with pytest.raises(ValueError, match="Class 2 has no text for prompt 1"):
        model.encode_vocabulary(ids, mask)


def test_the_first_end_token_counts():
    assert end_positions(torch.tensor([[1, END, END], [END, 2, END]]), END).tolist() == [1, 0]


def test_gradients_reach_the_text_side_and_are_not_cached(model):
    ids, mask = random_ids(3, 2)
    model.clip.text_projection.requires_grad_(True)
    assert model.trains_text
    first = model.encode_vocabulary(ids, mask)
    first[:, 0].sum().backward()
    assert model.clip.text_projection.weight.grad.abs().sum() > 0
    second = model.encode_vocabulary(ids, mask)
    assert second.requires_grad
    assert second is not first
    with torch.no_grad():
        assert not model.encode_vocabulary(ids, mask).requires_grad
    assert model.encode_vocabulary(ids, mask).requires_grad


def test_frozen_text_side_is_cached_without_gradients(model):
    ids, mask = random_ids(3, 2)
    first = model.train().encode_vocabulary(ids, mask)
    assert not first.requires_grad
    assert model.encode_vocabulary(ids.clone(), mask.clone()) is first
    assert model.encode_vocabulary(ids) is not first
    assert model.encode_vocabulary(ids[:2], mask[:2]) is not first


@torch.no_grad()
def test_training_mode_of_a_trained_text_side_is_not_cached(model):
    ids, mask = random_ids(3, 2)
    model.clip.text_model.requires_grad_(True)
    assert model.train().encode_vocabulary(ids, mask) is not model.encode_vocabulary(ids, mask)
    assert model.eval().encode_vocabulary(ids, mask) is model.encode_vocabulary(ids, mask)


def step(model):
    model.clip.text_projection.weight.requires_grad_(True).grad = torch.ones_like(model.clip.text_projection.weight)
    torch.optim.SGD([model.clip.text_projection.weight], lr=0.5).step()
    model.freeze_pretrained()


def load(model):
    model.load_state_dict(build(seed=1).state_dict())


def assign(model):
    model.load_state_dict(build(seed=1).state_dict(), assign=True)


def change_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.5).add_(0.1)


def round_trip(model):
    model.to(torch.bfloat16).to(torch.float32)


@pytest.mark.parametrize("change", [step, load, assign, change_data, round_trip])
@torch.no_grad()
def test_changed_weights_are_never_answered_from_the_cache(model, change):
    ids, mask = random_ids(3, 2)
    before = model.encode_vocabulary(ids, mask)
    change(model)
    after = model.encode_vocabulary(ids, mask)
    assert not torch.equal(before, after)
    model._text_cache.clear()
    torch.testing.assert_close(model.encode_vocabulary(ids, mask), after, atol=0, rtol=0)


@torch.no_grad()
def test_precision_is_part_of_the_key(model):
    ids, mask = random_ids(3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.encode_vocabulary(ids, mask)
    exact = model.encode_vocabulary(ids, mask)
    assert not torch.equal(rough.float(), exact)
    model._text_cache.clear()
    assert torch.equal(model.encode_vocabulary(ids, mask), exact)


def test_what_inference_mode_cached_can_be_trained_on(model):
    ids, mask = random_ids(3, 2)
    with torch.inference_mode():
        cached = model.encode_vocabulary(ids, mask)
    assert model.encode_vocabulary(ids, mask) is cached
    weight = torch.ones(WIDTH, requires_grad=True)
    (cached * weight).sum().backward()
    torch.testing.assert_close(weight.grad, cached.sum(dim=0))


@torch.no_grad()
def test_only_the_most_recent_vocabularies_stay(model):
    calls = []
    cache = TextEmbeddingCache()
    parameters = model._text_parameters()

    def get(number):
        ids = torch.full((1, 1, 2), number)
        return cache.get(ids, None, parameters, lambda: calls.append(number) or torch.tensor(float(number)))

    for number in range(CACHED_VOCABULARIES):
        get(number)
    get(0)  # used again, so 1 is the oldest
    get(99)
    assert get(0) == 0
    get(1)
    assert calls == [*range(CACHED_VOCABULARIES), 99, 1]


@torch.no_grad()
def test_disk_cache(model, tmp_path, monkeypatch):
    ids, mask = random_ids(3, 2)
    folder = tmp_path / "new" / "folder"
    embeds = model.encode_vocabulary(ids, mask, cache_folder=folder)
    (file,) = folder.iterdir()
    again = build()
    monkeypatch.setattr(again, "_text_features", None)  # the file answers, nothing is computed
    assert torch.equal(again.encode_vocabulary(ids, mask, cache_folder=folder), embeds)
    monkeypatch.undo()
    again.encode_vocabulary(ids[:2], mask[:2], cache_folder=folder)
    assert len(list(folder.iterdir())) == 2
    # other weights
    other = build(seed=1).encode_vocabulary(ids, mask, cache_folder=folder)
    assert not torch.allclose(other, embeds)
    # the same weights put to another use
    kept = PromptKeepingTextSide(model.config).eval()
    kept.load_state_dict(model.state_dict())
    assert kept.encode_vocabulary(ids, mask, cache_folder=folder).shape == (3, 2, WIDTH)
    assert len(list(folder.iterdir())) == 4
    assert file.exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "other key"])
@torch.no_grad()
def test_damaged_cache_file_is_made_again(model, tmp_path, damage):
    from safetensors.torch import save_file

    ids, mask = random_ids(3, 2)
    embeds = model.encode_vocabulary(ids, mask, cache_folder=tmp_path)
    (file,) = tmp_path.iterdir()
    intact = file.read_bytes()
    if damage == "other key":
        save_file({"something": torch.zeros(1)}, file)
    else:
        file.write_bytes({"cut": intact[:-5], "empty": b"", "garbage": b"\xff" * 100}[damage])
    again = build()
    assert torch.equal(again.encode_vocabulary(ids, mask, cache_folder=tmp_path), embeds)
    assert file.read_bytes() == intact
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


@torch.no_grad()
def test_large_vocabulary_is_quick(model):
    ids, mask = random_ids(2000, 2)
    assert model.encode_vocabulary(ids, mask).shape == (2000, WIDTH)


def test_function_without_a_mask_takes_every_row():
    calls = []

    def features(ids, ends):
        calls.append(ids)
        return nn.functional.one_hot(ids[torch.arange(len(ids)), ends - 1], 4).float()

    ids = torch.tensor([[[1, 9], [2, 9]], [[3, 9], [3, 9]]])
    kept = encode_vocabulary(ids, None, 9, features, keep_prompts=True)
    assert kept.argmax(-1).tolist() == [[1, 2], [3, 3]]
    assert sum(map(len, calls)) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_text_side_in_half_precision_is_run_in_float32(dtype):
    ids, mask = random_ids(6, 2)
    half = build().to(dtype)
    exact = build()
    exact.load_state_dict(half.state_dict())
    found = half.encode_vocabulary(ids, mask)
    assert found.dtype == torch.float32  # names that are alike differ by less than its rounding
    assert torch.equal(found, exact.encode_vocabulary(ids, mask))
    assert {p.dtype for p in half.parameters() if p.ndim} == {dtype}  # the weights themselves stay
