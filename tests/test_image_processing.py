"""Pictures and label maps of every kind, the resize rule, bad input."""

import base64
import os
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.numpy import load_file

from ov_segmentation.image_processing import OpenVocabularySegmentationImageProcessor, resized_size
from ov_segmentation.image_reading import read_image
from ov_segmentation.models.san.image_processing_san import SANImageProcessor
from tests.mixins.processor import ImageProcessorTesterMixin

SHIPPED = Path(__file__).parent / "fixtures"
FIXTURES = Path(os.environ.get("PARITY_FIXTURES") or ("../shared/fixtures" if Path("../shared").is_dir() else SHIPPED))
RAW = {"do_resize": False, "do_rescale": False, "do_normalize": False, "do_pad": False}


class Padded(OpenVocabularySegmentationImageProcessor):
    """Pads to multiples of 32, so that `pad_multiple=None` differs from the class's default."""

    pad_multiple = 32


class TestSANImageProcessor(ImageProcessorTesterMixin):
    image_processor_class = SANImageProcessor


def raw(image, **kwargs):
    """The 8-bit values [H, W, 3] that the processor makes of a picture."""
    values = OpenVocabularySegmentationImageProcessor(**RAW)(image, **kwargs)["pixel_values"]
    return values[0].transpose(1, 2, 0)


def noise(height=9, width=7, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def as_file(image, kind="PNG", **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# ------------------------------------------------------------------ parity with the originals' pictures


@pytest.mark.parametrize("folder", sorted((FIXTURES / "san").glob("*/inputs.safetensors")), ids=str)
def test_san_fixture_exactly(folder):
    inputs, expected = load_file(folder), load_file(folder.with_name("outputs.safetensors"))
    processor = SANImageProcessor(size={"shortest_edge": min(inputs["image_resized"].shape[:2]), "longest_edge": 2560})
    resized = processor(inputs["image"], do_rescale=False, do_normalize=False, do_pad=False)["pixel_values"]
    assert np.array_equal(resized[0].transpose(1, 2, 0), inputs["image_resized"])
    assert np.abs(processor(inputs["image"])["pixel_values"] - expected["pre/side_input"]).max() <= 1e-6


@pytest.mark.parametrize("method", ["sed", "cat_seg"])
def test_other_fixtures_exactly(method):
    folders = sorted((FIXTURES / method).glob("*/inputs.safetensors"))
    if not folders:
        pytest.skip(f"no {method} fixtures in {FIXTURES}")
    for folder in folders:
        inputs = load_file(folder)
        short = min(inputs["image_resized_rgb_hwc"].shape[:2])
        found = raw(inputs["image_raw_rgb_hwc"], do_resize=True, size={"shortest_edge": short, "longest_edge": 2560})
        assert np.array_equal(found, inputs["image_resized_rgb_hwc"])


# ------------------------------------------------------------------ resize rule


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((480, 640), (640, 853)),  # 853.33
        ((640, 480), (853, 640)),
        ((427, 640), (640, 959)),  # 959.25
        ((100, 1000), (256, 2560)),  # the cap shrinks the short side
        ((1, 2000), (1, 2560)),
        ((2000, 1), (2560, 1)),
        ((1, 100000), (1, 2560)),  # 0.0256: at least one pixel
        ((1, 1), (640, 640)),
        ((640, 640), (640, 640)),
    ],
)
def test_resize_rule(shape, expected):
    assert resized_size(shape, OpenVocabularySegmentationImageProcessor().size) == expected


def test_other_sizes():
    processor = OpenVocabularySegmentationImageProcessor()
    picture = noise(20, 40)
    assert processor(picture, size=10)["pixel_values"].shape == (1, 3, 10, 20)
    assert processor(picture, size={"shortest_edge": 10})["pixel_values"].shape == (1, 3, 10, 20)
    assert processor(picture, size={"height": 12, "width": 12})["pixel_values"].shape == (1, 3, 12, 12)
    fixed = OpenVocabularySegmentationImageProcessor(size={"height": 12, "width": 14})
    assert fixed([picture, noise(9, 9)])["reshaped_input_sizes"].tolist() == [[12, 14]] * 2
    with pytest.raises(ValueError, match=r"shortest_edge.*max_height"):
        processor(picture, size={"max_height": 3, "max_width": 3})
    for size in (-5, {"height": 12, "width": -12}, {"shortest_edge": 10, "longest_edge": 0}):
        with pytest.raises(ValueError, match="size must be"):
            processor(picture, size=size)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2000), (2000, 1)])
def test_extreme_shapes(shape):
    processor = Padded(size={"shortest_edge": 8, "longest_edge": 40})
    batch = processor(noise(*shape), segmentation_maps=np.full(shape, 4))
    assert batch["original_sizes"].tolist() == [list(shape)]
    assert batch["reshaped_input_sizes"].min() >= 1
    assert batch["pixel_values"].shape[2:] == tuple(batch["padded_sizes"][0]) == batch["labels"].shape[1:]
    assert (batch["labels"] == 4).sum() == batch["reshaped_input_sizes"].prod()


def test_normalisation_and_padding():
    picture = noise(10, 12)
    batch = Padded(do_resize=False)(picture)
    expected = (picture / 255 - np.array(Padded.image_mean)) / np.array(Padded.image_std)
    assert np.allclose(batch["pixel_values"][0, :, :10, :12], expected.transpose(2, 0, 1), atol=1e-6)
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    assert np.allclose(Padded(do_resize=False, do_normalize=False, do_pad=False)(picture)["pixel_values"] * 255,
                       picture.transpose(2, 0, 1), atol=1e-4)  # fmt: skip
    with pytest.raises(ValueError, match=r"do_pad=True"):
        Padded(do_resize=False, do_pad=False)([picture, noise(4, 4)])
    with pytest.raises(ValueError, match=r"pad_multiple must be at least 1"):
        Padded()(picture, pad_multiple=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_mean": [1, 2]}, r"image_mean must be one number, or three .*got .1, 2"),
        ({"image_std": 0}, "image_std must be positive, got 0"),
        ({"image_std": [0.2, 0.0, 0.2]}, "image_std must be positive"),
        ({"rescale_factor": 0}, "rescale_factor must be positive, got 0"),
    ],
)
def test_pixels_that_would_not_be_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        Padded()(noise(), **options)


def test_wrong_argument_types():
    with pytest.raises(Exception, match=r"do_resize"):
        Padded()(noise(), do_resize="yes")


# ------------------------------------------------------------------ kinds of pictures


def test_paths_urls_bytes_and_containers(tmp_path):
    picture = PIL.Image.fromarray(noise())
    (tmp_path / "a.png").write_bytes(as_file(picture))
    text = base64.b64encode(as_file(picture)).decode()
    path = tmp_path / "a.png"
    for source in (str(path), path, text, f"data:image/png;base64,{text}", path.read_bytes(), picture, noise()):
        assert np.array_equal(raw(source), noise())
    processor = OpenVocabularySegmentationImageProcessor(**RAW)
    stacked = np.stack([noise(), noise(seed=1)])
    for several in (
        stacked,
        list(stacked),
        torch.from_numpy(stacked).permute(0, 3, 1, 2),
        [[noise()], [noise(seed=1)]],
    ):
        assert np.array_equal(processor(several)["pixel_values"].transpose(0, 2, 3, 1), stacked)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV"])
def test_modes_that_pil_converts(mode):
    picture = PIL.Image.fromarray(noise()).convert(mode)
    assert np.array_equal(raw(picture), np.array(picture.convert("RGB")))


def test_alpha_is_dropped_not_composited():
    values = np.dstack([noise(), np.zeros((9, 7), np.uint8)])
    transparent = PIL.Image.fromarray(values, "RGBA")
    assert np.array_equal(raw(transparent), noise())
    assert np.array_equal(raw(values), noise())
    palette = PIL.Image.fromarray(noise()).quantize(8)
    expected = np.array(palette.convert("RGB"))
    palette.info["transparency"] = 0
    assert np.array_equal(raw(palette), expected)
    with_alpha = palette.convert("PA") if "PA" in PIL.Image.MODES else palette
    assert np.array_equal(raw(with_alpha), expected)


@pytest.mark.parametrize("kind", ["I;16", "I;16B", "I", "array", "int64", "file"])
def test_16_bit_keeps_the_upper_bits(kind, tmp_path):
    values = np.array([[0, 128, 129, 257], [32768, 65535, 65000, 300]], dtype=np.uint16)
    picture = {"array": values, "int64": values.astype(np.int64), "I;16B": values.astype(">u2")}.get(kind)
    if picture is None:
        picture = PIL.Image.fromarray(values.astype(np.int32) if kind == "I" else values)
    if kind == "file":
        picture.save(tmp_path / "deep.png")
        picture = tmp_path / "deep.png"
    expected = np.array([[0, 0, 1, 1], [128, 255, 253, 1]])
    assert np.array_equal(raw(picture), np.repeat(expected[..., None], 3, -1))


def test_integer_pictures_of_8_bit_values():
    for dtype in (np.int32, np.int64, np.int16):
        assert np.array_equal(raw(noise().astype(dtype)), noise())
    assert np.array_equal(raw(PIL.Image.fromarray(noise(channels=0).astype(np.int32)))[..., 0], noise(channels=0))
    assert np.array_equal(raw(noise() > 100), (noise() > 100) * 255)
    with pytest.raises(ValueError, match=r"picture 0: integer pixels must lie in 0..255 .*-1\.\."):
        raw(noise().astype(np.int64) - 256 + 255 - noise().min())


def test_float_pictures():
    fractions = noise() / 255
    for values in (fractions, fractions.astype(np.float32), torch.from_numpy(fractions), noise().astype(np.float32)):
        processor = OpenVocabularySegmentationImageProcessor(do_resize=False)
        assert np.array_equal(processor(values)["pixel_values"], processor(noise())["pixel_values"])
    unscaled = OpenVocabularySegmentationImageProcessor(do_resize=False, do_rescale=False)
    assert np.allclose(unscaled(fractions)["pixel_values"], processor(noise())["pixel_values"], atol=1e-6)
    half = torch.from_numpy(noise()).to(torch.bfloat16)  # 8 bits of mantissa: integers up to 256 survive
    assert np.array_equal(raw(half), noise())
    picture = PIL.Image.fromarray(fractions[..., 0].astype(np.float32))
    assert picture.mode == "F"
    assert np.array_equal(raw(picture, do_rescale=True, rescale_factor=1.0)[..., 0], noise()[..., 0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity(bad):
    values = noise() / 255
    values[2, 3, 1] = bad
    with pytest.raises(ValueError, match=r"picture 1: 1 pixel values are NaN or infinite"):
        raw([noise(), values])


def test_floats_out_of_range():
    with pytest.raises(ValueError, match=r"before normalisation, got -1.*255"):
        raw(np.array([[[-1.0, 0, 255]]]))
    # what a resize makes of fractions is no picture of values up to 255
    with pytest.raises(ValueError, match=r"fractions of white, which end at 1.*0..1.01"):
        raw(np.array([[[0.0, 0.5, 1.01]]]))
    assert raw(np.array([[[0.0, 1.0, 2.0]]])).max() == 2


def test_array_layouts():
    hwc, chw = noise(), noise().transpose(2, 0, 1)
    for values in (hwc, chw, torch.from_numpy(hwc), torch.from_numpy(chw.copy())):
        assert np.array_equal(raw(values), hwc)
    grey = noise(channels=0)
    for values in (grey, grey[..., None], grey[None], torch.from_numpy(grey)):
        assert np.array_equal(raw(values), np.repeat(grey[..., None], 3, -1))
    # one row of pixels: the axis of three is the channels, not the axis of one
    assert raw(noise(1, 5)).shape == raw(noise(1, 5).transpose(2, 0, 1)).shape == (1, 5, 3)
    assert raw(noise(1, 1)).shape == (1, 1, 3)
    ambiguous = noise(3, 5, 3)
    assert np.array_equal(raw(ambiguous), ambiguous)
    assert np.array_equal(raw(torch.from_numpy(ambiguous)), ambiguous.transpose(1, 2, 0))
    assert np.array_equal(raw(ambiguous, input_data_format="channels_first"), ambiguous.transpose(1, 2, 0))
    for shape in ((5, 6, 7), (0, 4, 3), (4,)):
        with pytest.raises(ValueError, match=r"shape"):
            raw(np.zeros(shape, np.uint8))
    with pytest.raises(TypeError, match=r"picture 1: a picture is a path.*dict"):
        raw([noise(), {}])
    with pytest.raises(ValueError, match=r"at least one picture"):
        raw([])


def test_without_conversion_to_rgb():
    assert np.array_equal(raw(noise(), do_convert_rgb=False), noise())
    for picture in (noise(channels=4), PIL.Image.new("L", (4, 4))):
        with pytest.raises(ValueError, match=r"do_convert_rgb=False"):
            raw(picture, do_convert_rgb=False)


def test_exif_rotation(tmp_path):
    picture = PIL.Image.fromarray(noise(8, 16)).resize((160, 80), PIL.Image.Resampling.NEAREST)
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    opened = PIL.Image.open(tmp_path / "turned.jpg")
    for source in (tmp_path / "turned.jpg", opened):
        found = raw(source)
        assert found.shape == (160, 80, 3)
        assert np.array_equal(found, np.rot90(np.array(PIL.Image.open(tmp_path / "turned.jpg")), -1))
    with pytest.raises(ValueError, match=r"label map 0 is 80 x 160.*160 x 80.*EXIF"):
        raw(opened, segmentation_maps=np.zeros((80, 160), np.uint8))


# ------------------------------------------------------------------ files that cannot be used


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_truncated_file(kind, tmp_path):
    whole = as_file(PIL.Image.fromarray(noise(200, 200)), kind)
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    for source in (tmp_path / "cut", whole[: len(whole) // 2], PIL.Image.open(tmp_path / "cut")):
        with pytest.raises(ValueError, match=r"picture 1: cannot read"):
            raw([noise(), source])
    with pytest.raises(ValueError, match=r"label map 0: cannot read"):
        raw(noise(200, 200), segmentation_maps=tmp_path / "cut")


def test_no_picture_at_all(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"cannot read .*notes\.txt"):
        raw(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match=r"no such file, nor an http.*missing.jpg"):
        raw("missing.jpg")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [90, 40])  # PIL itself only warns up to twice its limit
def test_decompression_bomb(limit, tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(as_file(PIL.Image.fromarray(noise(10, 10))))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=r"(?s)picture 0: .*decompression bomb.*MAX_IMAGE_PIXELS"):
        raw(tmp_path / "bomb.png")


# ------------------------------------------------------------------ label maps


def labels_of(label_map, picture=None, **kwargs):
    picture = noise() if picture is None else picture
    return OpenVocabularySegmentationImageProcessor(**RAW)(picture, segmentation_maps=label_map, **kwargs)["labels"]


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "int64", "uint64", ">u2", "bool"]
)
def test_label_map_dtypes(dtype):
    highest = 1 if dtype == "bool" else min(np.iinfo(dtype).max, 2**31 - 1)
    label_map = np.where(noise(channels=0) > 99, highest, 1).astype(dtype)
    assert np.array_equal(labels_of(label_map)[0], label_map.astype(np.int64))
    assert labels_of(label_map).dtype == np.int64
    if dtype != ">u2":
        assert np.array_equal(labels_of(torch.from_numpy(label_map))[0], label_map.astype(np.int64))


def test_pil_label_maps(tmp_path):
    ids = noise(channels=0) % 4
    assert np.array_equal(labels_of(PIL.Image.fromarray(ids))[0], ids)
    palette = PIL.Image.fromarray(ids, "P")
    palette.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0, 0, 0, 200])  # the colours must not matter
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(labels_of(tmp_path / "palette.png")[0], ids)
    deep = ids.astype(np.uint16) * 20000
    PIL.Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(labels_of(tmp_path / "deep.png")[0], deep)
    assert np.array_equal(labels_of(PIL.Image.fromarray(deep.astype(np.int32)))[0], deep)
    assert np.array_equal(labels_of(PIL.Image.fromarray(ids > 0))[0], ids > 0)
    for mode in ("RGB", "LA", "F"):
        with pytest.raises(ValueError, match=f"label map 0: a label map has one channel.*{mode}"):
            labels_of(PIL.Image.new(mode, (7, 9)))


def test_label_maps_are_resized_like_their_pictures():
    processor = OpenVocabularySegmentationImageProcessor(
        size={"shortest_edge": 37, "longest_edge": 60}, pad_multiple=32
    )
    ids = np.random.default_rng(3).integers(0, 60000, (50, 71)).astype(np.uint16)
    batch = processor(noise(50, 71), segmentation_maps=ids)
    height, width = batch["reshaped_input_sizes"][0]
    expected = PIL.Image.fromarray(ids.astype(np.int32)).resize((width, height), PIL.Image.Resampling.NEAREST)
    assert np.array_equal(batch["labels"][0, :height, :width], np.array(expected))
    assert (batch["labels"][0, height:] == -100).all()
    assert (batch["labels"][0, :, width:] == -100).all()


def test_ignored_ids():
    ids = np.array([[0, 1], [255, 65535]], dtype=np.uint16)
    picture = noise(2, 2)
    assert labels_of(ids, picture).tolist() == [ids.tolist()]
    assert labels_of(ids, picture, ignore_index=255).tolist() == [[[0, 1], [-100, 65535]]]
    assert labels_of(ids, picture, ignore_index=[0, 65535]).tolist() == [[[-100, 1], [255, -100]]]
    always = OpenVocabularySegmentationImageProcessor(**RAW, ignore_index=255)
    assert always(picture, segmentation_maps=ids)["labels"].tolist() == [[[0, 1], [-100, 65535]]]
    assert always(picture, segmentation_maps=ids, ignore_index=None)["labels"].tolist() == [ids.tolist()]
    assert labels_of(np.array([[-100, 1], [2, -100]]), picture).tolist() == [[[-100, 1], [2, -100]]]
    assert labels_of(np.array([[-1, 1], [2, 3]]), picture, ignore_index=-1).tolist() == [[[-100, 1], [2, 3]]]
    with pytest.raises(ValueError, match=r"label map 0: -1 is no class index; .*ignore_index=-1"):
        labels_of(np.array([[-1, 1], [2, 3]]), picture)


@pytest.mark.parametrize("values", [np.zeros((9, 7)), torch.zeros(9, 7), torch.zeros(9, 7, dtype=torch.bfloat16)])
def test_float_label_maps(values):
    with pytest.raises(ValueError, match=r"label map 0: class indices are integers, got .*float"):
        labels_of(values)


def test_label_maps_that_do_not_fit():
    with pytest.raises(ValueError, match=r"label map 1 is 9 x 8 .*, its picture 9 x 7"):
        labels_of([np.zeros((9, 7), int), np.zeros((9, 8), int)], [noise(), noise()])
    with pytest.raises(ValueError, match=r"2 pictures but 1 segmentation maps"):
        labels_of(np.zeros((9, 7), int), [noise(), noise()])
    with pytest.raises(ValueError, match=r"more than 32 bits"):
        labels_of(np.full((9, 7), 2**31))
    with pytest.raises(TypeError, match=r"label map 0: a label map is"):
        labels_of({})
    stacked = np.stack([np.zeros((9, 7), int), np.ones((9, 7), int)])
    assert np.array_equal(labels_of(stacked, [noise(), noise()]), stacked)
    assert np.array_equal(labels_of(torch.from_numpy(stacked), [noise(), noise()]), stacked)


def test_read_image_says_whether_values_were_fractions():
    assert read_image(noise())[1] is False
    assert read_image(noise() / 255)[1] is True
