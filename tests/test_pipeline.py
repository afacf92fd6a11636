"""The pipeline beyond what every method is tested for: sources, bad input, options, registration. The model is SAN."""

import http.server
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, IterableDataset, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoImageProcessor, CLIPModel, pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.pt_utils import KeyDataset

import ov_segmentation
from ov_segmentation import OpenVocabularySegmentationPipeline, Vocabulary
from ov_segmentation.pipeline import TASK, Results, logger, register_pipeline
from tests.mixins.pipeline import NAMES, PipelineTesterMixin, assert_same_map, block_pictures, png
from tests.models import test_san


class SAN(test_san.TestSAN, PipelineTesterMixin):
    """Just its model and processor."""

    __test__ = False


@pytest.fixture
def segment():
    model, processor = SAN.parts()
    return pipeline(TASK, model=model, processor=processor, device="cpu", output_type="map", candidate_labels=NAMES)


@pytest.fixture
def picture():
    return block_pictures((60, 90))[0]


def test_a_model_in_training_is_in_training_again(segment, picture):
    expected = segment(picture)
    segment.model.train()
    assert np.array_equal(segment(picture)["segmentation"], expected["segmentation"])
    assert segment.model.training


# ---------------------------------------------------------------------- where pictures come from


@pytest.fixture
def server(picture):
    """A loopback HTTP server: /street.png is a picture, /moved leads to it, /text is none, the rest is missing."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/street.png")
                self.end_headers()
                return
            body = {"/street.png": png(picture), "/text": b"no picture"}.get(self.path)
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *args):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    thread.join()
    running.server_close()


def test_urls(segment, picture, server):
    expected = segment(picture)
    for path in ("/street.png", "/moved"):
        np.testing.assert_array_equal(segment(server + path, timeout=20)["segmentation"], expected["segmentation"])
    with pytest.raises(ValueError, match="404"):
        segment(server + "/missing.png")
    with pytest.raises(ValueError, match="cannot read"):
        segment(server + "/text")


def test_server_that_does_not_answer(segment):
    with pytest.raises(ValueError, match=r"cannot fetch http://127\.0\.0\.1:9/"):
        segment("http://127.0.0.1:9/street.png", timeout=2)


@pytest.fixture
def dataset():
    pictures = block_pictures((60, 90), (90, 60), (60, 90), (60, 90))
    rows = {"image": [{"bytes": png(one), "path": None} for one in pictures], "name": list("abcd")}
    return Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "name": Value("string")}))


def test_datasets_and_generators_are_read_as_the_results_are(segment, dataset):
    expected = segment([row["image"] for row in dataset])
    assert len({result["segmentation"].tobytes() for result in expected}) == 4
    read = []

    def generator():
        for row in dataset:
            read.append(row["name"])
            yield row["image"]

    lazy = segment(generator())
    assert read == []
    first = next(lazy)
    assert read == ["a"]
    assert_same_map(first, expected[0])
    assert len(list(lazy)) == 3
    sources = [dataset, KeyDataset(dataset, "image"), dataset["image"], dataset.to_iterable_dataset()]
    sources += [IterableDataset.from_generator(generator), iter(list(dataset["image"]))]
    for source in sources:
        results = segment(source, batch_size=3)
        assert isinstance(results, Results)
        if hasattr(source, "__len__"):
            assert len(results) == 4
        for found, wanted in zip(results, expected, strict=True):
            assert_same_map(found, wanted)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers(segment, dataset, num_workers, caplog):
    logger.warning_once.cache_clear()
    expected = segment([row["image"] for row in dataset])
    found = list(segment(dataset, batch_size=2, num_workers=num_workers))
    for _ in range(2):
        found += list(segment((row["image"] for row in dataset), num_workers=num_workers))
    for result, wanted in zip(found, expected * 3, strict=True):
        assert_same_map(result, wanted)
    assert (
        caplog.text.count("num_workers is set to 1") == num_workers - 1
    )  # a stream has one reader, which is said once


def test_error_in_a_worker_names_the_picture(segment, dataset, tmp_path):
    with pytest.raises(ValueError, match="no-such-file"):
        list(segment([dataset[0]["image"], str(tmp_path / "no-such-file.png")], num_workers=1))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_says_which_of_many_pictures_it_is_about(segment, dataset, num_workers):
    rows = [*dataset["image"], np.full((8, 8, 3), np.nan, np.float32)]
    with pytest.raises(ValueError, match=r"picture 4: 192 pixel values are NaN") as caught:
        segment(rows, num_workers=num_workers)
    assert "picture 0" not in str(caught.value).splitlines()[-1]
    with pytest.raises(ValueError, match=r"picture 4: 192 pixel values"):
        list(segment(iter(rows), num_workers=num_workers))
    encoded = [{"bytes": content, "path": None} for content in [png(row) for row in rows[:4]] + [b"no picture"]]
    broken = Dataset.from_dict({"image": encoded}, features=Features({"image": ImageFeature()}))
    with pytest.raises(ValueError, match=r"picture 4: cannot identify"):
        list(segment(broken, num_workers=num_workers))


def test_names_per_row(segment, picture):
    features = Features({"image": ImageFeature(), "candidate_labels": [Value("string")]})
    encoded = {"bytes": png(picture), "path": None}
    rows = {"image": [encoded] * 3, "candidate_labels": [["car", "tree"], ["sky"], ["car", "tree"]]}
    results = list(segment(Dataset.from_dict(rows, features=features), batch_size=3))
    assert [result["labels"] for result in results] == rows["candidate_labels"]
    assert_same_map(results[0], segment(picture, ["car", "tree"]))
    assert_same_map(results[2], results[0])


def test_nothing_to_do(segment):
    assert segment([]) == []
    assert segment(()) == []
    assert list(segment(iter([]))) == []


def test_column_of_another_name(segment, dataset):
    with pytest.raises(ValueError, match=r"'picture', 'name'.*KeyDataset"):
        list(segment(dataset.rename_column("image", "picture")))


# ---------------------------------------------------------------------- pictures out of the ordinary


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (3, 5)])
def test_tiny_and_long_pictures(segment, size):
    height, width = size
    result = segment(Image.new("RGB", (width, height), (200, 30, 90)))
    assert result["segmentation"].shape == (height, width)
    assert result["segmentation"].min() >= 0


def modes(picture):
    """The same picture in other modes of PIL, and as RGB pixels of what is left of it."""
    grey = picture.convert("L")
    high = np.array(grey).astype(np.uint16) * 257
    alpha = picture.convert("RGBA")
    alpha.putalpha(128)
    palette = picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    yield "L", grey, grey
    yield "LA", grey.convert("LA"), grey
    yield "1", picture.convert("1"), picture.convert("1")
    yield "RGBA", alpha, picture
    yield "P", palette, palette
    yield "CMYK", picture.convert("CMYK"), picture.convert("CMYK")
    yield "I;16", Image.fromarray(high), grey
    yield "I", Image.fromarray(high.astype(np.int32)), grey
    yield "F", Image.fromarray(np.array(grey).astype(np.float32)), grey


def test_modes(segment, picture, tmp_path):
    for mode, other, plain in modes(picture):
        expected = segment(plain.convert("RGB"))["segmentation"]
        np.testing.assert_array_equal(segment(other)["segmentation"], expected, err_msg=mode)
        if mode not in ("CMYK", "I", "F"):  # PNG can't hold these
            other.save(tmp_path / "file.png")
            found = segment(str(tmp_path / "file.png"))["segmentation"]
            np.testing.assert_array_equal(found, expected, err_msg=f"{mode} from a file")
    picture.convert("CMYK").save(tmp_path / "file.tiff")
    expected = segment(picture.convert("CMYK").convert("RGB"))["segmentation"]
    np.testing.assert_array_equal(segment(str(tmp_path / "file.tiff"))["segmentation"], expected)


def test_exif_rotation_is_applied_and_the_result_is_upright(segment, picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, to be turned by 270 degrees
    path = tmp_path / "lying.png"
    picture.save(path, exif=exif)
    upright = picture.rotate(270, expand=True)
    expected = segment(upright)["segmentation"]
    assert expected.shape == (90, 60)
    for source in (str(path), Image.open(path)):
        np.testing.assert_array_equal(segment(source)["segmentation"], expected)


def bomb():
    """A PNG of 30,000 x 30,000 black pixels in a few kB."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def broken_files(picture):
    whole = png(picture)
    jpeg = BytesIO()
    picture.save(jpeg, "JPEG")
    return {
        "truncated PNG": (whole[: len(whole) // 2], "cannot (read|decode)"),
        "truncated JPEG": (jpeg.getvalue()[:-200], "truncated"),
        "header only": (whole[:40], "cannot (read|decode)"),
        "text": (b"hello", "cannot read"),
        "empty": (b"", "cannot read"),
        "bomb": (bomb(), "MAX_IMAGE_PIXELS"),
    }


@pytest.mark.parametrize("kind", ["truncated PNG", "truncated JPEG", "header only", "text", "empty", "bomb"])
def test_broken_files(segment, picture, tmp_path, kind):
    content, message = broken_files(picture)[kind]
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        segment(str(path))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("/no/such/file.png", ValueError, "no such file"),
        ("ftp://server/file.png", ValueError, "no such file"),
        (b"no picture", ValueError, "cannot read it"),
        (BytesIO(b"an open file"), TypeError, "BytesIO"),
        (3, TypeError, "int"),
        (None, TypeError, "NoneType"),
        ([3], TypeError, "int"),
        ({"picture": "street.png"}, ValueError, "'image'"),
        (np.full((8, 8, 3), np.nan, np.float32), ValueError, "NaN"),
        (np.full((8, 8, 3), np.inf), ValueError, "infinite"),
        (np.full((8, 8, 3), -1.0), ValueError, r"0\.\.1"),
        (np.zeros((8, 8, 7), np.uint8), ValueError, "channels"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, r"\[0, 8, 3\]"),
        (np.zeros((8, 8, 3), complex), ValueError, "complex"),
        (np.zeros((8, 8, 3), object), ValueError, "object"),
        ([[np.zeros((8, 8, 3), np.uint8)] * 2], ValueError, "One picture"),
        ([{"image": [np.zeros((8, 8, 3), np.uint8)] * 2}], ValueError, "One picture"),
    ],
)
def test_things_that_are_no_pictures(segment, source, error, message):
    with pytest.raises(error, match=message):
        segment(source)


def test_a_folder_is_no_picture(segment, tmp_path):
    with pytest.raises(ValueError, match=r"is a folder: give the picture files in it"):
        segment(tmp_path)


# ---------------------------------------------------------------------- names out of the ordinary


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ([], ValueError, "at least one"),
        ("", ValueError, "blank"),
        ("car, , tree", ValueError, "class 1 is blank"),
        (["car", "  "], ValueError, "class 1 is blank"),
        (["car", "tree", "car"], ValueError, "'car'"),
        ("car,tree,car", ValueError, "'car'"),
        ({"car", "tree"}, TypeError, "ordered"),
        ([1, 2], TypeError, "Class 0"),
        (5, TypeError, "int"),
    ],
)
def test_names_that_cannot_be_used(segment, picture, names, error, message):
    with pytest.raises(error, match=message):
        segment(picture, names)
    with pytest.raises(error, match=message):
        segment({"image": picture, "candidate_labels": names})


def test_no_names_at_all(picture):
    model, processor = SAN.parts()
    segment = pipeline(TASK, model=model, processor=processor, device="cpu")
    with pytest.raises(ValueError, match="candidate_labels="):
        segment(picture)
    with pytest.raises(ValueError, match="candidate_labels="):
        segment([{"image": picture, "candidate_labels": ["car"]}, picture])


def test_one_name_owns_everything(segment, picture):
    (mask,) = segment(picture, ["car"], output_type="masks")
    assert mask["label"] == "car"
    assert np.array(mask["mask"]).min() == 255
    assert mask["score"] == pytest.approx(1)


@pytest.mark.parametrize("number", [847, 2000])
def test_many_names(segment, picture, number):
    names = [f"thing {k}" for k in range(number)]
    result = segment(picture, names)
    assert result["labels"] == names
    assert len(result["scores"]) == number
    present = np.unique(result["segmentation"])
    assert sum(score > 0 for score in result["scores"]) == len(present)
    # in reverse, the other indices: none is cut to 8 bits
    backwards = segment(picture, names[::-1])["segmentation"]
    assert max(present.max(), backwards.max()) > 255
    assert (backwards != number - 1 - result["segmentation"]).mean() <= 1e-3


def test_names_longer_than_the_context(segment, picture):
    names = ["car", "a very long name " * 30]
    with pytest.warns(UserWarning, match="are cut"):
        assert segment(picture, names)["labels"] == names


def test_names_alike_up_to_case_warn_and_stay(segment, picture):
    with pytest.warns(UserWarning, match="'car', 'Car'"):
        result = segment(picture, ["car", "Car"])
    assert result["labels"] == ["car", "Car"]
    assert (result["segmentation"] == 0).all()  # the same text, so the first wins


def test_vocabularies_keep_their_background(segment, picture):
    vocabulary = Vocabulary(NAMES, background=NAMES[1:])
    assert set(np.unique(segment(picture, vocabulary)["segmentation"])) <= {0, 1}
    assert (segment(picture, vocabulary, background=range(len(NAMES)))["segmentation"] == 0).all()


@torch.no_grad()
def test_no_object_competes_where_asked_for(segment, picture):
    model, processor = SAN.parts()
    embeds = model.encode_image(**processor(images=picture, return_tensors="pt")).mask_embeds[0]
    usual = torch.nn.functional.normalize(embeds.mean(dim=0), dim=-1)
    kept = model.background_embedding.clone()
    results = {}
    try:
        for name, embedding in (("like the masks", usual), ("unlike", -usual)):
            model.background_embedding.copy_(embedding[None])
            results[name] = segment(picture, ["zebra", "ape"], background="no_object")
            assert (segment(picture, ["zebra", "ape"])["segmentation"] >= 0).all()
    finally:
        model.background_embedding.copy_(kept)
    assert (results["like the masks"]["segmentation"] == -1).all()
    assert results["like the masks"]["scores"] == [0, 0]
    assert (results["unlike"]["segmentation"] >= 0).all()


# ---------------------------------------------------------------------- options


def test_unknown_options_list_the_known_ones(segment, picture):
    with pytest.raises(TypeError, match=r"does not take labels\..*candidate_labels.*SANFor.*sliding_window"):
        segment(picture, labels=["car"])
    model, processor = SAN.parts()
    with pytest.raises(TypeError, match="rejection_top_k"):
        pipeline(TASK, model=model, processor=processor, device="cpu", rejection_top_k=3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threshold": 1.5}, ValueError, "between 0 and 1"),
        ({"threshold": -0.1}, ValueError, "between 0 and 1"),
        ({"threshold": "0.5"}, TypeError, "between 0 and 1, got '0.5'"),
        ({"output_type": "polygons"}, ValueError, "masks, map"),
        ({"background": ["roof"]}, ValueError, "'roof'"),
        ({"background": 99}, ValueError, "99"),
        ({"output_type": "masks", "return_confidence": True}, ValueError, "output_type"),
    ],
)
def test_options_that_cannot_be_used(segment, picture, options, error, message):
    with pytest.raises(error, match=message):
        segment(picture, **options)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batches_that_cannot_be_made(segment, picture, batch_size):
    with pytest.raises(ValueError, match=f"batch_size={batch_size}"):
        segment([picture], batch_size=batch_size)


def test_options_at_construction_hold_until_overridden(picture):
    model, processor = SAN.parts()
    segment = pipeline(
        TASK,
        model=model,
        processor=processor,
        device="cpu",
        output_type="map",
        candidate_labels="car, sky",
        threshold=1.0,
    )
    assert (segment(picture)["segmentation"] == -1).all()
    assert segment(picture)["scores"] == [0, 0]
    assert segment(picture, output_type="masks") == []
    assert segment(picture, threshold=None)["labels"] == ["car", "sky"]
    assert (segment(picture, threshold=None, candidate_labels=["tree"])["segmentation"] == 0).all()
    assert (segment(picture)["segmentation"] == -1).all()


def test_changed_templates_are_seen(segment, picture):
    before = segment(picture, return_confidence=True)["confidence"]
    templates = segment.processor.prompt_templates
    try:
        segment.processor.prompt_templates = ["not a {}"]
        assert not np.allclose(segment(picture, return_confidence=True)["confidence"], before)
    finally:
        segment.processor.prompt_templates = templates
    np.testing.assert_array_equal(segment(picture, return_confidence=True)["confidence"], before)


def test_changed_weights_are_seen(segment, picture):
    model, _ = SAN.parts()
    before = segment(picture, return_confidence=True)
    weight = model.clip.text_projection.weight
    kept = weight.data.clone()
    try:
        with torch.no_grad():
            weight.mul_(-1)
        after = segment(picture, return_confidence=True)
    finally:
        weight.data.copy_(kept)
    assert not np.allclose(before["confidence"], after["confidence"])
    np.testing.assert_allclose(segment(picture, return_confidence=True)["confidence"], before["confidence"], atol=1e-6)


def test_pictures_of_equal_padded_size_and_names_share_a_forward(segment, monkeypatch):
    sizes = []
    original = type(segment.model).forward

    def spy(self, pixel_values=None, **kwargs):
        sizes.append((len(pixel_values), *pixel_values.shape[2:]))
        return original(self, pixel_values=pixel_values, **kwargs)

    monkeypatch.setattr(type(segment.model), "forward", spy)
    segment(block_pictures((60, 90), (90, 60), (60, 90), (60, 90), (64, 64)), batch_size=4)
    assert sizes == [(3, 64, 96), (1, 96, 64), (1, 64, 64)]


# ---------------------------------------------------------------------- construction and registration


def test_what_the_pipeline_cannot_be_built_from(tmp_path):
    model, processor = SAN.parts()
    with pytest.raises(TypeError, match="processor with a tokenizer, got NoneType"):
        OpenVocabularySegmentationPipeline(model)
    with pytest.raises(TypeError, match="CLIPModel is not a model"):
        OpenVocabularySegmentationPipeline(CLIPModel(model.config.clip_config), processor)
    # a converted checkpoint without a tokenizer
    model.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is type(processor.image_processor)
    with pytest.raises(ValueError, match=r"holds no tokenizer .*SANProcessor\(SANImageProcessor"):
        pipeline(TASK, model=str(tmp_path), device="cpu")
    with pytest.raises(TypeError, match="processor with a tokenizer, got SANImageProcessor"):
        pipeline(TASK, model=model, processor=processor.image_processor, device="cpu")
    assert pipeline(TASK, model=str(tmp_path), processor=processor, device="cpu").processor is processor


def test_device_and_dtype_are_the_models(segment):
    assert segment.device == torch.device("cpu")
    assert segment.dtype == torch.float32


def test_registration_is_quiet_and_leaves_no_trace_for_saving(caplog):
    assert PIPELINE_REGISTRY.check_task(TASK)[1]["impl"] is OpenVocabularySegmentationPipeline
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register_pipeline()
    assert not caplog.records
    assert not hasattr(OpenVocabularySegmentationPipeline, "_registered_impl")
    assert ov_segmentation.OpenVocabularySegmentationPipeline is OpenVocabularySegmentationPipeline


def test_saved_folder_works_in_a_fresh_process(tmp_path, picture):
    model, processor = SAN.parts()
    segment = pipeline(TASK, model=model, processor=processor, device="cpu", candidate_labels=NAMES)
    segment.save_pretrained(tmp_path)
    picture.save(tmp_path / "street.png")
    code = (
        "import sys, ov_segmentation\nfrom transformers import pipeline\n"
        f"segment = pipeline({TASK!r}, model=sys.argv[1], device='cpu')\n"
        "print([m['label'] for m in segment(sys.argv[1] + '/street.png', candidate_labels=sys.argv[2])])"
    )
    command = [sys.executable, "-c", code, str(tmp_path), ",".join(NAMES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([mask["label"] for mask in segment(picture)])
