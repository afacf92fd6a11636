"""Synthetic scenes: determinism, exact label maps, tiers, captions, tokenizer, the dataset builder."""

import itertools
import pickle
import random
import re

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, load_dataset
from PIL import Image as PILImage

from ov_segmentation.data.class_names import class_names, with_class_names
from ov_segmentation.data.scene_captions import build_scene_tokenizer, caption_words, write_caption
from ov_segmentation.data.scene_drawing import shape_outlines
from ov_segmentation.data.scene_vocabulary import THING_SHAPES, TIERS, SceneVocabulary
from ov_segmentation.data.scenes import GEOMETRIES, SceneGenerator
from ov_segmentation.data.scenes_dataset import PICTURE_FORMAT, scenes_dataset
from ov_segmentation.training.scene_crops import SceneCrops

VOCABULARIES = {"small": SceneVocabulary.small(), "full": SceneVocabulary.full()}


@pytest.fixture(scope="module")
def scenes():
    return SceneGenerator(VOCABULARIES["small"], seed=3).render(0, 128)


@pytest.fixture(scope="module")
def tokenizer():
    return build_scene_tokenizer()


class TestVocabulary:
    @pytest.mark.parametrize(("name", "counts"), [("small", (76, 22, 22)), ("full", (200, 60, 60))])
    def test_tiers_partition_the_classes(self, name, counts):
        vocabulary = VOCABULARIES[name]
        per_tier = [vocabulary.classes_of(tier) for tier in TIERS]
        assert sorted(itertools.chain(*per_tier)) == list(range(len(vocabulary.names)))
        assert tuple(len(vocabulary.classes_of(tier, "things")) for tier in TIERS) == counts
        assert tuple(len(vocabulary.classes_of(tier, "stuff")) for tier in TIERS) == (22, 4, 4)
        assert len(set(vocabulary.names)) == len(vocabulary.names)

    @pytest.mark.parametrize("name", VOCABULARIES)
    def test_every_attribute_pair_stays_in_tier_a(self, name):
        vocabulary = VOCABULARIES[name]
        in_a = [vocabulary.thing_attributes[index] for index in vocabulary.classes_of("a", "things")]
        for dims in itertools.combinations(range(3), 2):
            everywhere = {tuple(item[d] for d in dims) for item in vocabulary.thing_attributes}
            assert {tuple(item[d] for d in dims) for item in in_a} == everywhere
        stuff = [
            vocabulary.stuff_attributes[index - vocabulary.num_things] for index in vocabulary.classes_of("a", "stuff")
        ]
        assert {colour for colour, _ in stuff} == set(range(len(vocabulary.stuff_colours)))
        assert {texture for _, texture in stuff} == set(range(len(vocabulary.stuff_textures)))

    def test_errors_say_what_is_possible(self):
        with pytest.raises(ValueError, match="hold out fewer"):
            SceneVocabulary(("red", "blue"), ("plain", "striped"), ("star", "ring"), held_out_things=4)
        with pytest.raises(ValueError, match="magenta"):
            SceneVocabulary(("magenta",), ("plain",), ("star",))
        with pytest.raises(ValueError, match="tiers"):
            VOCABULARIES["small"].classes_of("d")

    def test_pickle_is_the_same_whatever_was_looked_at(self):
        fresh, used = SceneVocabulary.small(), SceneVocabulary.small()
        assert len(used.names) == 150
        assert pickle.dumps(fresh) == pickle.dumps(used)
        assert pickle.loads(pickle.dumps(used)) == fresh


class TestGenerator:
    def test_same_seed_same_bytes_whatever_the_batch_size(self, scenes):
        generator = SceneGenerator(VOCABULARIES["small"], seed=3)
        parts = list(generator.batches(50, 128))
        assert torch.equal(torch.cat([part.images for part in parts]), scenes.images)
        assert torch.equal(torch.cat([part.label_maps for part in parts]), scenes.label_maps)
        assert [caption for part in parts for caption in part.captions] == scenes.captions
        across = generator.render(120, 16)
        assert torch.equal(across.images[:8], scenes.images[120:])

    def test_other_seeds_and_later_scenes_differ(self, scenes):
        other = SceneGenerator(VOCABULARIES["small"], seed=4).render(0, 128)
        later = SceneGenerator(VOCABULARIES["small"], seed=3).render(128, 128)
        assert not torch.equal(other.images, scenes.images)
        assert not torch.equal(later.images, scenes.images)

    def test_label_maps_are_exact(self, scenes):
        """Every pixel belongs to the object drawn last there or to one of the scene's stuff classes."""
        num_things = VOCABULARIES["small"].num_things
        on_object = scenes.instance_maps >= 0
        assert torch.equal(on_object, scenes.label_maps < num_things)
        owner = scenes.object_classes.gather(1, scenes.instance_maps.clamp(min=0).long().flatten(1))
        labels = scenes.label_maps.flatten(1).long()
        assert torch.equal(labels[on_object.flatten(1)], owner[on_object.flatten(1)])
        stuff = (labels[:, :, None] == scenes.stuff_classes[:, None]).any(-1)
        assert bool(stuff[~on_object.flatten(1)].all())

    def test_colours_agree_with_labels(self, scenes):
        """Red things are red in the picture: rendering and label map talk about the same pixels and words."""
        vocabulary = VOCABULARIES["small"]
        pixels = scenes.images.permute(0, 2, 3, 1).float()
        for colour, channel in (("red", 0), ("green", 1), ("blue", 2)):
            plain = [i for i, name in enumerate(vocabulary.things) if name.startswith(f"{colour} plain")]
            mean = pixels[torch.isin(scenes.label_maps.long(), torch.tensor(plain))].mean(0)
            assert int(mean.argmax()) == channel
            assert mean[channel] > 1.5 * mean.sum() / 3

    def test_shape_outlines(self):
        outlines, holes = shape_outlines()
        area = dict(zip(THING_SHAPES, outlines.square().mean(1) * torch.pi, strict=True))
        assert area["circle"].item() == pytest.approx(torch.pi * 0.95**2, rel=1e-3)
        assert area["square"].item() == pytest.approx(1.68**2, rel=0.01)
        assert area["bar"].item() == pytest.approx(2.2 * 0.8, rel=0.01)
        assert area["cross"].item() == pytest.approx(4 * 0.68 - 0.68**2, rel=0.01)
        assert bool((outlines > 0.2).all())
        assert holes.nonzero()[:, 0].tolist() == [THING_SHAPES.index("ring")]

    @pytest.mark.parametrize("geometry", GEOMETRIES)
    @pytest.mark.parametrize("size", [48, 128])
    def test_sizes_and_geometries(self, size, geometry):
        batch = SceneGenerator(VOCABULARIES["full"], size=size, geometry=geometry).render(5, 3)
        assert batch.images.shape == (3, 3, size, size)
        assert batch.label_maps.shape == (3, size, size)
        assert batch.images.dtype == torch.uint8

    @pytest.mark.parametrize("tiers", [("a",), ("b",), ("a", "b"), ("c",)])
    def test_only_classes_of_the_tiers_are_drawn(self, tiers):
        vocabulary = VOCABULARIES["small"]
        batch = SceneGenerator(vocabulary, seed=1, tiers=tiers).render(0, 128)
        allowed = set(vocabulary.classes_of(tiers))
        assert set(batch.label_maps.unique().tolist()) <= allowed
        forbidden = [vocabulary.names[i] for i in range(len(vocabulary.names)) if i not in allowed]
        assert not [name for name in forbidden for caption in batch.captions if name in caption]

    def test_captions_name_what_is_visible(self, scenes):
        names = VOCABULARIES["small"].names
        for caption, label_map in zip(scenes.captions, scenes.label_maps, strict=True):
            seen = {names[index] for index in label_map.unique().tolist()}
            assert all(name in caption for name in seen)
            assert not [name for name in names if name in caption and name not in seen]

    def test_errors(self):
        with pytest.raises(ValueError, match="geometry"):
            SceneGenerator(VOCABULARIES["small"], geometry="medium")
        with pytest.raises(ValueError, match="size=16"):
            SceneGenerator(VOCABULARIES["small"], size=16)
        with pytest.raises(ValueError, match="count"):
            SceneGenerator(VOCABULARIES["small"]).render(0, 0)


@pytest.fixture(scope="module")
def crops():
    return SceneCrops(SceneGenerator(VOCABULARIES["small"], seed=0, tiers=("a", "b")), num_blocks=4)


class TestCrops:
    def test_no_held_out_composition_reaches_a_caption(self, crops):
        vocabulary = VOCABULARIES["small"]
        captions = [caption for seed in range(40) for caption in crops.sample(64, seed).captions]
        held_out = [vocabulary.names[index] for index in vocabulary.classes_of("c")]
        assert not [name for name in held_out for caption in captions if name in caption]
        met = [vocabulary.names[index] for index in vocabulary.classes_of(("a", "b"))]
        assert sum(any(name in caption for caption in captions) for name in met) > 0.9 * len(met)

    def test_a_batch_depends_on_its_seed_alone(self, crops):
        first, again, other = crops.sample(32, 5), crops.sample(32, 5), crops.sample(32, 6)
        assert torch.equal(first.images, again.images)
        assert first.captions == again.captions
        assert torch.equal(first.fits, again.fits)
        assert first.captions != other.captions

    def test_fits_marks_captions_true_of_other_pictures(self, crops):
        """Two crops of one class fit each other's full name, a crop of another class does not."""
        checked = 0
        names = VOCABULARIES["small"].names
        for seed in range(6):
            batch = crops.sample(96, seed)
            assert bool(batch.fits.diagonal().all())
            full = [i for i, c in enumerate(batch.classes.tolist()) if c >= 0 and names[c] in batch.captions[i]]
            bare = [i for i in full if " on " not in batch.captions[i]]
            for i, j in itertools.product(bare, bare):
                if i != j and batch.classes[i] == batch.classes[j]:
                    assert batch.fits[i, j]
                    checked += 1
            stuff = [i for i in bare if batch.classes[i] >= VOCABULARIES["small"].num_things]
            for i, j in itertools.product(stuff, stuff):
                assert batch.fits[i, j] == (batch.classes[i] == batch.classes[j])
                checked += 1
        assert checked > 100

    def test_refresh_brings_new_scenes(self, crops):
        before = crops.bank.images.clone()
        crops.refresh()
        changed = (before != crops.bank.images).flatten(1).any(1)
        assert changed[:128].all()
        assert not changed[128:].any()


def split_words(tokenizer, texts):
    """Words of `texts` that the tokenizer has to split, i.e. that no caption contains."""
    words = {word for text in texts for word in re.findall(r"\w+", text.lower())}
    return sorted(word for word in words if len(tokenizer(word, add_special_tokens=False).input_ids) > 1)


class TestTokenizer:
    def test_every_caption_word_is_one_token(self, tokenizer):
        assert split_words(tokenizer, caption_words()) == []
        vocabulary = VOCABULARIES["full"]
        assert split_words(tokenizer, vocabulary.names) == []

    def test_round_trip_through_a_folder(self, tokenizer, tmp_path):
        from transformers import AutoTokenizer

        tokenizer.save_pretrained(tmp_path)
        reloaded = AutoTokenizer.from_pretrained(tmp_path)
        generator = random.Random(0)
        captions = [write_caption("red striped circle on gray wavy ground", generator) for _ in range(50)]
        assert reloaded(captions).input_ids == tokenizer(captions).input_ids
        assert reloaded.model_max_length == 77
        assert reloaded.decode(reloaded("A Red striped CIRCLE").input_ids, skip_special_tokens=True) == (
            "a red striped circle"
        )

    def test_unknown_words_are_split_and_named(self, tokenizer):
        text = "a zebra, 3 cafés and 路 \U0001f980"
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
        assert "zebra" in split_words(tokenizer, [text])
        assert "and" not in split_words(tokenizer, [text])
        assert tokenizer.unk_token_id not in ids[1:-1]

    def test_special_tokens(self, tokenizer):
        ids = tokenizer(["red ring", "a red plain ring on gray wavy ground"], padding=True).input_ids
        assert ids[0][0] == tokenizer.bos_token_id
        assert ids[0].index(tokenizer.eos_token_id) == 3
        assert tokenizer.eos_token_id != 2
        assert tokenizer.pad_token_id == tokenizer.eos_token_id


class TestDataset:
    def test_rows_and_names_survive_parquet(self, tmp_path):
        vocabulary = VOCABULARIES["small"]
        dataset = scenes_dataset(6, seed=2, tiers=("a",), cache_dir=str(tmp_path / "cache"))
        (tmp_path / "data").mkdir()
        dataset.to_parquet(str(tmp_path / "data" / "train-00000-of-00001.parquet"))
        loaded = load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache2"))
        assert class_names(loaded) == list(vocabulary.names)
        batch = SceneGenerator(vocabulary, seed=2, tiers=("a",)).render(0, 6)
        for row, image, label_map in zip(loaded, batch.images, batch.label_maps, strict=True):
            assert np.array_equal(np.asarray(row["image"]), image.permute(1, 2, 0).numpy())
            assert np.array_equal(np.asarray(row["annotation"]), label_map.numpy())
            assert row["classes"] == label_map.unique().tolist()
            assert row["image"].format == PICTURE_FORMAT
        assert len(set(loaded["file_name"])) == 6

    def test_many_classes_need_sixteen_bits(self, tmp_path):
        dataset = scenes_dataset(2, vocabulary=VOCABULARIES["full"], cache_dir=str(tmp_path))
        batch = SceneGenerator(VOCABULARIES["full"]).render(0, 2)
        assert dataset[0]["annotation"].mode == "I;16"
        assert np.array_equal(np.asarray(dataset[0]["annotation"]), batch.label_maps[0].numpy())
        assert batch.label_maps.max() > 255

    def test_names_for_any_dataset(self):
        maps = [PILImage.fromarray(np.array([[0, 1], [255, 1]], np.uint8)) for _ in range(2)]
        features = Features({"mask": Image()})
        dataset = Dataset.from_dict({"mask": maps}, features=features)
        with pytest.raises(ValueError, match="classes"):
            class_names(dataset)
        named = with_class_names(dataset, ["road", "car", "tree"], annotation="mask")
        assert class_names(named) == ["road", "car", "tree"]
        assert named[0]["classes"] == [0, 1]
