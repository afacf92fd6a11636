"""Colours, overlays and label-map files."""

import numpy as np
import pytest
import torch
from PIL import Image

from ov_segmentation.visualization import color_palette, colored_map, overlay, save_label_map

LABELS = ["sky", "road", "car"]


@pytest.fixture
def segmentation():
    segmentation = np.full((60, 80), -1, dtype=np.int32)
    segmentation[20:40] = 0
    segmentation[40:] = 2
    return segmentation


def test_colours_are_distinct_and_stable():
    large = color_palette(20_000)
    assert len(np.unique(large, axis=0)) == 20_000
    assert large.any(axis=1).all()  # black is for unlabelled pixels
    np.testing.assert_array_equal(color_palette(11), large[:11])
    assert color_palette(2).tolist() == [[128, 0, 0], [0, 128, 0]]
    assert color_palette(0).shape == (0, 3)


def test_colored_map(segmentation):
    colors = np.array(colored_map(torch.from_numpy(segmentation)))
    assert colors[0, 0].tolist() == [0, 0, 0]
    assert colors[30, 5].tolist() == color_palette(1)[0].tolist()
    assert colors[50, 5].tolist() == color_palette(3)[2].tolist()
    assert np.array(colored_map(np.full((2, 2), -1))).max() == 0
    with pytest.raises(ValueError, match="K > 2"):
        colored_map(segmentation, color_palette(2))
    with pytest.raises(ValueError, match="integers"):
        colored_map(segmentation.astype(float))


def test_overlay_mixes_colours_and_leaves_the_unlabelled(segmentation):
    image = Image.new("RGB", (80, 60), (200, 100, 0))
    plain = np.array(overlay(image, segmentation, LABELS, alpha=0.25, legend=False)).astype(int)
    assert plain.shape == (60, 80, 3)
    assert plain[0, 0].tolist() == [200, 100, 0]
    expected = 0.75 * np.array([200, 100, 0]) + 0.25 * color_palette(3)[2]
    assert abs(plain[50, 5] - expected).max() <= 1
    opaque = np.array(overlay(np.array(image), segmentation, LABELS, alpha=1.0, legend=False))
    assert opaque[30, 5].tolist() == [128, 0, 0]


def test_legend_names_the_classes_present_only(segmentation):
    image = Image.new("RGB", (80, 60), (10, 10, 10))
    with_legend = np.array(overlay(image, segmentation, LABELS, alpha=1.0))
    legend = with_legend[:, 80:].reshape(-1, 3).tolist()
    palette = color_palette(3).tolist()
    assert palette[0] in legend
    assert palette[2] in legend
    assert palette[1] not in legend
    np.testing.assert_array_equal(
        with_legend[:60, :80], np.array(overlay(image, segmentation, LABELS, alpha=1.0, legend=False))
    )
    # nothing present: no legend
    assert overlay(image, np.full((60, 80), -1), LABELS).size == (80, 60)


@pytest.mark.parametrize("size", [(1, 1), (2000, 1), (1, 300), (40, 500)])
def test_legend_of_many_classes_fits_any_picture(size):
    width, height = size
    segmentation = (np.arange(width * height) % 90).reshape(height, width)
    labels = [f"class {k}\nwith a {{longer}} name" for k in range(90)]
    drawn = overlay(Image.new("L", size), segmentation, labels)
    assert drawn.width > width
    assert height <= drawn.height <= height + 40


def test_overlay_errors(segmentation):
    image = Image.new("RGB", (80, 60))
    with pytest.raises(ValueError, match=r"60 x 80 .* 80 x 60"):
        overlay(image.rotate(90, expand=True), segmentation, LABELS)
    with pytest.raises(ValueError, match="only 2 labels"):
        overlay(image, segmentation, LABELS[:2])
    with pytest.raises(ValueError, match="alpha"):
        overlay(image, segmentation, LABELS, alpha=2)


@pytest.mark.parametrize(
    ("highest", "unlabelled", "mode"), [(254, 255, "L"), (255, 65535, "I;16"), (846, 65535, "I;16")]
)
def test_saved_label_maps_come_back(tmp_path, highest, unlabelled, mode):
    segmentation = np.full((4, 5), -1)
    segmentation[1] = highest
    save_label_map(torch.from_numpy(segmentation), tmp_path / "map.png")
    read = Image.open(tmp_path / "map.png")
    assert read.mode == mode
    expected = np.where(segmentation < 0, unlabelled, segmentation)
    np.testing.assert_array_equal(np.array(read), expected)


def test_label_map_beyond_16_bits(tmp_path):
    with pytest.raises(ValueError, match="65535"):
        save_label_map(np.full((2, 2), 65535), tmp_path / "map.png")
