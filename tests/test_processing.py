"""From class names to token ids, the processor's round trip, and what it passes on."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, CLIPTokenizer

from ov_segmentation import Vocabulary
from ov_segmentation.auto import METHODS, load_class
from ov_segmentation.data.word_tokenizer import build_word_tokenizer
from ov_segmentation.models.san.image_processing_san import SANImageProcessor
from ov_segmentation.models.san.processing_san import SANProcessor
from ov_segmentation.vocabulary import PROTOCOLS, load_prompt_templates

SHARED = Path(__file__).parents[2] / "shared"
TOKENIZER = Path(os.environ.get("CLIP_TOKENIZER") or SHARED / "tokenizer")
FIXTURES = Path(os.environ.get("PARITY_FIXTURES") or SHARED / "fixtures")
CLIP_VOCABULARY_SIZE = 49408
NEEDED = "needs CLIP's tokenizer (../shared/tokenizer or CLIP_TOKENIZER) and whole fixtures (../shared/fixtures)"


@pytest.fixture(scope="module")
def tokenizer():
    return build_word_tokenizer(["a", "photo", "of", "car", "tree", "the", "."], model_max_length=16)


@pytest.fixture
def processor(tokenizer):
    image_processor = SANImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    return SANProcessor(image_processor, tokenizer, prompt_templates=["a photo of a {}.", "the {}"])


# ---------------------------------------------------------------------- class names to token ids


def expected_ids(tokenizer, texts):
    return [tokenizer(text)["input_ids"] for text in texts]


def test_ids_are_classes_by_templates(processor, tokenizer):
    tokens = processor(text=["car", "tree"], return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    assert ids.shape == mask.shape == (2, 2, 8)
    assert ids.dtype == mask.dtype == torch.int64
    texts = ["a photo of a car.", "the car", "a photo of a tree.", "the tree"]
    for row, row_mask, expected in zip(ids.flatten(0, 1), mask.flatten(0, 1), expected_ids(tokenizer, texts)):
        assert row[row_mask.bool()].tolist() == expected
        assert row_mask.tolist() == [1] * len(expected) + [0] * (8 - len(expected))
        assert row[len(expected) :].eq(0).all()


def test_synonyms_add_a_dimension_and_absent_ones_are_empty(processor, tokenizer):
    tokens = processor(text=["tree", ["car", "a car", "the car"]], return_tensors="pt")
    assert tokens["input_ids"].shape == (2, 2, 3, 9)
    assert tokens["attention_mask"].any(-1).tolist() == [[[True, False, False]] * 2, [[True, True, True]] * 2]
    row, mask = tokens["input_ids"][1, 1, 2], tokens["attention_mask"][1, 1, 2].bool()
    assert row[mask].tolist() == tokenizer("the the car")["input_ids"]


def test_each_distinct_text_is_tokenized_once(processor, monkeypatch):
    given = []
    original = CLIPTokenizer.__call__
    monkeypatch.setattr(
        CLIPTokenizer, "__call__", lambda self, text, **kw: given.append(list(text)) or original(self, text, **kw)
    )
    processor(text=["car", "tree", ["a car", "car"]])
    assert [len(texts) for texts in given] == [6]


def test_vocabulary_brings_its_own_templates_and_rule(processor, tokenizer):
    vocabulary = Vocabulary(["car, tree"], templates=["{}"], comma_rule="split")
    ids = processor(text=vocabulary, return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 1, 2, 3)
    assert ids[0, 0].tolist() == expected_ids(tokenizer, ["car", "tree"])
    assert processor(text=["car, tree"], return_tensors="pt")["input_ids"].ndim == 3  # SAN keeps commas


def test_braces_in_names_survive(processor, tokenizer):
    ids = processor(text=Vocabulary(["a{}b"], templates=["{}"]), return_tensors="pt")["input_ids"]
    assert ids[0, 0].tolist() == tokenizer("a{}b")["input_ids"]


def test_long_labels_are_cut_with_the_end_token_last_and_a_warning(processor, tokenizer):
    with pytest.warns(UserWarning, match="context of 16 tokens are cut, of the class names 'car car"):
        tokens = processor(text=["tree", "car " * 20], return_tensors="pt")
    assert tokens["input_ids"].shape == (2, 2, 16)
    assert tokens["input_ids"][1, :, -1].tolist() == [tokenizer.eos_token_id] * 2
    assert tokens["attention_mask"][1].all()
    whole = tokenizer("the " + "car " * 20)["input_ids"]
    assert tokens["input_ids"][1, 1, :-1].tolist() == whole[:15]
    # exactly as long as the context: nothing is lost, nothing said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitting = Vocabulary(["car " * 13], templates=["the {}"])
        assert processor(text=fitting, return_tensors="pt")["input_ids"].shape == (1, 1, 16)


def test_context_is_77_where_the_tokenizer_states_none(processor):
    limitless = build_word_tokenizer(["car"], model_max_length=10**30)
    with pytest.warns(UserWarning, match="context of 77"):
        ids = SANProcessor(processor.image_processor, limitless)(text=["car " * 100], return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 14, 77)


def test_end_token_inside_a_name_is_an_error(processor):
    with pytest.raises(ValueError, match=r"'car <\|endoftext\|>'"):
        processor(text=["tree", "car <|endoftext|>"])


def test_character_that_the_tokenizer_does_not_know_is_an_error(processor):
    vocab = {"a": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}
    tiny = SANProcessor(processor.image_processor, CLIPTokenizer(vocab=vocab, merges=[]), ["{}"])
    assert tiny(text=["aa"])["input_ids"] == [[[2, 0, 1, 3]]]
    with pytest.raises(ValueError, match="'ab'"):
        tiny(text=["aa", "ab"])


@pytest.mark.parametrize("number", [1, 847, 2000])
def test_any_number_of_names(processor, number):
    tokens = processor(text=[f"car {k}" for k in range(number)], return_tensors="np")
    assert tokens["input_ids"].shape[:2] == (number, 2)
    assert len(np.unique(tokens["input_ids"][:, 1], axis=0)) == number


@pytest.mark.parametrize("text", [[], ["car", ""], ["car", "car"]])
def test_names_that_cannot_be_used(processor, text):
    with pytest.raises(ValueError, match=r"[Cc]lass"):
        processor(text=text)


def test_one_text_is_not_a_list_of_names(processor):
    with pytest.raises(TypeError, match="list"):
        processor(text="car")


# ---------------------------------------------------------------------- pictures, both, neither


def test_pictures_and_names_together(processor):
    image = Image.new("RGB", (40, 32))
    label_map = np.full((32, 40), 3, dtype=np.uint16)
    alone = processor(images=image, segmentation_maps=label_map, return_tensors="pt")
    assert alone["labels"].shape == alone["pixel_values"].shape[:1] + alone["pixel_values"].shape[2:]
    both = processor(images=image, text=["car"], return_tensors="pt")
    assert set(both) == set(alone) - {"labels"} | {"input_ids", "attention_mask"}
    assert torch.equal(both["pixel_values"], alone["pixel_values"])
    assert both.to("meta")["input_ids"].device.type == "meta"
    resized = processor(images=image, return_tensors="pt", size={"shortest_edge": 64})
    assert resized["reshaped_input_sizes"].tolist() == [[64, 80]]


def test_padding_and_truncation_are_what_happens_anyway(processor):
    usual = {"padding": True, "truncation": True}
    assert processor(text=["a", "b c"], **usual) == processor(text=["a", "b c"])
    picture = np.zeros((40, 40, 3), np.uint8)
    assert processor(images=picture, text=["a"], **usual).keys() == processor(images=picture, text=["a"]).keys()
    with pytest.raises(TypeError, match="padding"):
        processor(images=picture, text=["a"], padding="max_length")


def test_calls_that_make_no_sense(processor):
    with pytest.raises(ValueError, match="images="):
        processor()
    with pytest.raises(TypeError, match="segmentation_maps"):
        processor(text=["car"], segmentation_maps=np.zeros((2, 2), np.uint8))
    with pytest.raises(TypeError, match="padding"):
        processor(text=["car"], padding="max_length")
    with pytest.raises(TypeError, match="padding"):
        processor(images=Image.new("RGB", (40, 32)), padding=True)


def test_post_processing_is_passed_on_with_background_names_resolved(processor, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        type(processor.image_processor),
        "post_process_semantic_segmentation",
        lambda self, outputs, **kwargs: seen.update(kwargs, outputs=outputs) or ["maps"],
    )
    found = processor.post_process_semantic_segmentation(
        "outputs",
        target_sizes=[(2, 3)],
        return_segmentation_scores=True,
        return_confidence=True,
        background=["tree", 0],
        threshold=0.5,
        labels=Vocabulary(["car", "road", "tree"]),
    )
    assert found == ["maps"]
    assert seen == {
        "outputs": "outputs",
        "target_sizes": [(2, 3)],
        "return_segmentation_scores": True,
        "return_confidence": True,
        "background": [0, 2],
        "threshold": 0.5,
    }
    processor.post_process_semantic_segmentation("outputs", background="no_object")
    assert seen["background"] == ["no_object"]
    with pytest.raises(ValueError, match="labels="):
        processor.post_process_semantic_segmentation("outputs", background="tree")


# ---------------------------------------------------------------------- saving


@pytest.mark.parametrize("templates", [None, "single_1", ["{} in {{braces}}", "the {}"]])
def test_round_trip(processor, tmp_path, templates):
    tokenizer = build_word_tokenizer(["car", "tree"], model_max_length=70)
    original = SANProcessor(processor.image_processor, tokenizer, templates)
    original.save_pretrained(tmp_path)
    for loaded in (AutoProcessor.from_pretrained(tmp_path), SANProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is SANProcessor
        assert loaded.prompt_templates == original.prompt_templates
        assert loaded.image_processor.to_dict() == original.image_processor.to_dict()
        assert loaded.tokenizer.model_max_length == 70
        names = ["car", ["tree", "the tree"]]
        assert loaded(text=names)["input_ids"] == original(text=names)["input_ids"]
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is SANImageProcessor
    assert AutoTokenizer.from_pretrained(tmp_path)("car")["input_ids"] == tokenizer("car")["input_ids"]
    assert "auto_map" not in (tmp_path / "processor_config.json").read_text()


def test_default_templates_are_the_methods(processor):
    plain = SANProcessor(processor.image_processor, processor.tokenizer)
    assert plain.prompt_templates == list(load_prompt_templates("vild_14"))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.model_type)
def test_processors_follow_their_protocol(method):
    cls, protocol = load_class(method.processor), PROTOCOLS[method.model_type]
    assert load_prompt_templates(cls.default_templates) == load_prompt_templates(protocol.templates)
    assert cls.comma_rule == protocol.comma_rule


# ---------------------------------------------------------------------- CLIP's own tokenizer


def recorded_texts(method, folder):
    """(class names, templates, recorded ids, position of each row's text in our [K, P, S, L]) of a fixture's lists."""
    hparams = json.loads((folder / "hparams.json").read_text())
    inputs = load_file(folder / "inputs.safetensors")
    if method in ("san", "ovseg"):
        templates = next((value for key, value in hparams.items() if key.startswith("templates [")), "vild_14")
        yield hparams.get("classes") or hparams["class_names"], templates, inputs["token_ids"].transpose(0, 1), None
    elif method == "deop":
        yield hparams.get("class_names") or hparams["classes"], "bare_1", inputs["class_token_ids"][:, None], None
    elif method == "cat_seg":
        for part in ("test", "train"):
            yield hparams[f"{part}_classes"], hparams["prompt_templates"], inputs[f"{part}_token_ids"], None
    elif method == "sed":
        for part in ("test", "train"):
            at = inputs[f"{part}_prompt_class_index"].tolist(), inputs[f"{part}_prompt_template_index"].tolist()
            yield hparams[f"{part}_classes"], hparams["prompt_templates"], inputs[f"{part}_token_ids"], list(zip(*at))


def as_recorded(ids, method, hparams):
    """CLIP's ids by the rule that `hparams.json` states for a fixture with a vocabulary cut to `size`."""
    if method == "ovseg" and "tiny_tokenizer_rule" in hparams:
        size = hparams["clip"]["vocab_size"]
        folded = 1 + ids % (size - 3)
    elif "vocab" in hparams:
        size = hparams["vocab"]
        folded = ids % (size - 2)
    else:
        return ids
    for row, special in enumerate((CLIP_VOCABULARY_SIZE - 2, CLIP_VOCABULARY_SIZE - 1)):
        folded = torch.where(ids == special, size - 2 + row, folded)
    return torch.where(ids == 0, 0, folded)


def fixture_cases():
    methods = ("san", "sed", "cat_seg", "ovseg", "deop")
    folders = [
        (method, path.parent) for method in methods for path in sorted(FIXTURES.glob(f"{method}/*/hparams.json"))
    ]
    return [pytest.param(*case, id=f"{case[0]}-{case[1].name}") for case in folders]


@pytest.mark.parametrize(("method", "folder"), fixture_cases())
def test_token_ids_equal_the_originals(method, folder):
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    assert len(tokenizer) == CLIP_VOCABULARY_SIZE
    hparams = json.loads((folder / "hparams.json").read_text())
    for names, templates, recorded, positions in recorded_texts(method, folder):
        processor = SANProcessor(SANImageProcessor(), tokenizer, templates)
        vocabulary = Vocabulary(names, comma_rule=PROTOCOLS[method].comma_rule)
        ids = processor(text=vocabulary, return_tensors="pt")["input_ids"]
        ids = as_recorded(ids, method, hparams)
        if positions is not None:  # rows are texts: class, template, and synonyms in turn
            seen: dict[tuple, int] = {}
            rows = []
            for position in positions:
                seen[position] = seen.get(position, -1) + 1
                rows.append(ids[(*position, seen[position])])
            ids = torch.stack(rows)
            assert len(rows) == sum(len(s) for s in vocabulary.names_with("keep")) * len(templates)
        length = ids.shape[-1]
        assert torch.equal(ids, recorded[..., :length])
        assert not recorded[..., length:].any()


@pytest.mark.skipif(not (FIXTURES / "sed/case_a/prompts.json").exists(), reason="needs ../shared/fixtures")
@pytest.mark.parametrize("method", ["sed", "cat_seg"])
def test_texts_equal_the_recorded_ones(method):
    folder = FIXTURES / method / "case_a"
    templates = json.loads((folder / "hparams.json").read_text())["prompt_templates"]
    for entries in json.loads((folder / "prompts.json").read_text()).values():
        rule = PROTOCOLS[method].comma_rule
        vocabulary = Vocabulary([entry["class_name"] for entry in entries], templates, comma_rule=rule)
        for entry, by_template in zip(entries, vocabulary.prompts, strict=True):
            assert [text for texts in by_template for text in texts] == entry["prompts"]
