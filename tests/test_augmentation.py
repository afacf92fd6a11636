"""Paired augmentations: picture and label map stay together, ids survive, every draw comes from the given generator."""

import numpy as np
import pytest
from PIL import Image

from ov_segmentation.data.augmentation import (
    ColourJitter,
    HorizontalFlip,
    PadToSize,
    RandomCrop,
    RandomScale,
    ResizeShortSide,
    augment,
    build_augmentations,
)
from ov_segmentation.label_maps import IGNORED
from ov_segmentation.strict_mapping import RecipeError


def rng(seed=0):
    return np.random.default_rng(seed)


def coordinates(height=24, width=32):
    """A picture whose red and green are the pixel's row and column, and a label map that says the same."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows, columns, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    return Image.fromarray(image), (rows * 1000 + columns).astype(np.int32)


def labels_of(image):
    values = np.asarray(image).astype(np.int32)
    return values[..., 0] * 1000 + values[..., 1]


@pytest.mark.parametrize("seed", range(5))
def test_crop_and_flip_move_picture_and_labels_alike(seed):
    steps = [RandomCrop(10, 13), HorizontalFlip()]
    image, label_map = augment(*coordinates(), steps, rng(seed))
    assert image.size == (13, 10)
    assert label_map.dtype == np.int32
    assert label_map.flags.c_contiguous
    np.testing.assert_array_equal(label_map, labels_of(image))


def test_crop_keeps_a_side_that_is_smaller_and_reaches_every_place():
    image, label_map = RandomCrop(100, 4)(*coordinates(), rng())
    assert (image.size, label_map.shape) == ((4, 24), (24, 4))
    firsts = {RandomCrop(22, 30)(*coordinates(), rng(seed))[1][0, 0] for seed in range(100)}
    assert firsts == {row * 1000 + column for row in range(3) for column in range(3)}


def test_single_category_limit_draws_again():
    label_map = np.full((8, 40), 300, dtype=np.int32)
    label_map[:, :4] = 7
    image = Image.new("RGB", (40, 8))
    plain = [len(np.unique(RandomCrop(8, 8)(image, label_map, rng(s))[1])) for s in range(60)]
    limited = [len(np.unique(RandomCrop(8, 8, 0.75)(image, label_map, rng(s))[1])) for s in range(60)]
    assert np.mean(np.array(limited) == 2) > 2 * np.mean(np.array(plain) == 2)


def test_flip_probability():
    image, label_map = coordinates()
    flipped, flipped_map = HorizontalFlip(1.0)(image, label_map, rng())
    np.testing.assert_array_equal(flipped_map, label_map[:, ::-1])
    np.testing.assert_array_equal(np.asarray(flipped), np.asarray(image)[:, ::-1])
    assert HorizontalFlip(0.0)(image, label_map, rng())[0] is image


@pytest.mark.parametrize(
    ("sizes", "max_size", "expected"),
    [([48], 2560, (48, 64)), ([13], 2560, (13, 17)), ([48], 40, (30, 40)), ([24], 2560, (24, 32))],
)
def test_resize_short_side(sizes, max_size, expected):
    image, label_map = ResizeShortSide(sizes=sizes, max_size=max_size)(*coordinates(), rng())
    assert (image.height, image.width) == label_map.shape == expected


def test_resize_draws_every_size_of_a_list_and_of_a_range():
    image, label_map = coordinates()
    from_list = {ResizeShortSide(sizes=[8, 12, 20])(image, label_map, rng(s))[1].shape[0] for s in range(60)}
    from_range = {ResizeShortSide(size_range=(8, 11))(image, label_map, rng(s))[1].shape[0] for s in range(60)}
    assert (from_list, from_range) == ({8, 12, 20}, {8, 9, 10, 11})


def test_random_scale_keeps_the_aspect_ratio_and_its_cap():
    shapes = [RandomScale((0.5, 2.0), max_size=48)(*coordinates(), rng(s))[1].shape for s in range(40)]
    assert max(width for _, width in shapes) == 48
    assert min(height for height, _ in shapes) >= 12
    assert all(abs(width - height * 4 / 3) <= 1 for height, width in shapes)


def test_large_and_ignored_ids_survive_a_resize():
    label_map = np.array([[846, 255], [IGNORED, 70000]], dtype=np.int32).repeat(8, 0).repeat(8, 1)
    resized = ResizeShortSide(sizes=[37])(Image.new("RGB", (16, 16)), label_map, rng())[1]
    assert set(np.unique(resized)) == {IGNORED, 255, 846, 70000}


def test_padding_is_grey_and_ignored():
    image, label_map = PadToSize(30, 40, value=128)(*coordinates(), rng())
    assert (image.size, label_map.shape) == ((40, 30), (30, 40))
    np.testing.assert_array_equal(label_map[:24, :32], labels_of(image)[:24, :32])
    assert (label_map[24:] == IGNORED).all()
    assert (label_map[:, 32:] == IGNORED).all()
    assert (np.asarray(image)[24:] == 128).all()
    assert (np.asarray(image)[:, 32:] == 128).all()


def test_padding_leaves_or_cuts_what_is_larger():
    assert PadToSize(10, 40)(*coordinates(), rng())[1].shape == (24, 40)
    image, label_map = PadToSize(10, 20, cut=True)(*coordinates(), rng())
    np.testing.assert_array_equal(label_map, labels_of(image))
    assert label_map.shape == (10, 20)


def photo():
    return Image.fromarray(rng(3).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def test_colour_jitter_leaves_labels_and_size():
    label_map = coordinates()[1]
    changed, same = ColourJitter(probability=1.0)(photo(), label_map, rng())
    assert same is label_map
    assert (changed.size, changed.mode) == ((16, 16), "RGB")
    assert np.asarray(changed).tolist() != np.asarray(photo()).tolist()
    assert ColourJitter(probability=0.0)(photo(), label_map, rng())[0] == photo()


@pytest.mark.parametrize("seed", range(5))
def test_brightness_shifts_all_values_by_one_number(seed):
    only = ColourJitter(brightness=32, contrast=(1, 1), saturation=(1, 1), hue=0, probability=1.0)
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    values = np.unique(np.asarray(only(grey, None, rng(seed))[0]))
    assert len(values) == 1
    assert 68 <= values[0] <= 132


def test_contrast_scales_and_clips():
    only = ColourJitter(brightness=0, contrast=(1.5, 1.5), saturation=(1, 1), hue=0, probability=1.0)
    grey = Image.new("RGB", (1, 1), (100, 100, 100))
    white = Image.new("RGB", (1, 1), (200, 200, 200))
    assert only(grey, None, rng())[0].getpixel((0, 0)) == (150, 150, 150)
    assert only(white, None, rng())[0].getpixel((0, 0)) == (255, 255, 255)


def test_saturation_zero_makes_grey():
    only = ColourJitter(brightness=0, contrast=(1, 1), saturation=(0, 0), hue=0, probability=1.0)
    red = Image.new("RGB", (1, 1), (200, 10, 10))
    assert only(red, None, rng())[0].getpixel((0, 0)) == (200, 200, 200)


def test_hue_turns_at_most_36_degrees():
    only = ColourJitter(brightness=0, contrast=(1, 1), saturation=(1, 1), hue=18, probability=1.0)
    red = Image.new("RGB", (1, 1), (255, 0, 0))
    turned = [only(red, None, rng(seed))[0].getpixel((0, 0)) for seed in range(200)]
    assert all(pixel[0] == 255 for pixel in turned), "within 60 degrees of red, red stays the largest"
    largest = max(max(pixel[1:]) for pixel in turned)
    assert 255 * 30 / 60 < largest <= 255 * 38 / 60


def test_each_change_happens_in_half_of_the_pictures():
    only = ColourJitter(brightness=32, contrast=(1, 1), saturation=(1, 1), hue=0)
    grey = Image.new("RGB", (1, 1), (100, 100, 100))
    changed = [only(grey, None, rng(seed))[0].getpixel((0, 0)) != (100, 100, 100) for seed in range(300)]
    assert 0.4 < np.mean(changed) < 0.6


RECIPE = [
    {"name": "resize_short_side", "sizes": [16, 24, 40]},
    {"name": "random_crop", "height": 20, "width": 20},
    {"name": "colour_jitter"},
    {"name": "horizontal_flip"},
    {"name": "pad_to_size", "height": 24, "width": 24},
]


def test_the_generator_decides_everything():
    steps = build_augmentations(RECIPE)
    first, second, other = (augment(photo(), coordinates(16, 16)[1], steps, rng(seed)) for seed in (5, 5, 6))
    assert first[0] == second[0]
    np.testing.assert_array_equal(first[1], second[1])
    assert first[0] != other[0]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "random_corp", "height": 1, "width": 1}, "'random_crop'"),
        ({"height": 1}, "augmentation.0.name"),
        ({"name": "random_crop", "hieght": 1, "width": 1}, "'height'"),
        ({"name": "random_crop", "height": 1}, "lacks augmentation.0.width"),
        ({"name": "random_crop", "height": "tall", "width": 1}, "augmentation.0.height must be of type int"),
        ({"name": "resize_short_side"}, "either sizes or size_range"),
        ({"name": "resize_short_side", "sizes": []}, "empty"),
    ],
)
def test_wrong_entries_say_what_is_wrong(entry, message):
    with pytest.raises(RecipeError, match=message):
        build_augmentations([entry])
