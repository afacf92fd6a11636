"""What every method's image processor must do. A test class names the processor and inherits the tests."""

import inspect
import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor

from ov_segmentation.image_processing import OpenVocabularySegmentationImageProcessor


class ImageProcessorTesterMixin:
    """Tests of an image processor class.

    Attributes:
        image_processor_class: the method's class.
        small: constructor arguments that make its pictures small.
    """

    image_processor_class: type[OpenVocabularySegmentationImageProcessor]
    small: dict[str, Any] = {"size": {"shortest_edge": 48, "longest_edge": 96}}

    def small_processor(self, **changes: Any) -> OpenVocabularySegmentationImageProcessor:
        return self.image_processor_class(**{**self.small, **changes})

    def test_class_only_sets_attributes(self):
        assert len(inspect.getsource(self.image_processor_class).splitlines()) <= 20
        functions = [name for name, value in vars(self.image_processor_class).items() if inspect.isfunction(value)]
        assert functions == []

    def test_batch_of_two_sizes(self):
        processor = self.small_processor()
        pictures = [np.full((30, 40, 3), 200, np.uint8), np.full((50, 20, 3), 7, np.uint8)]
        maps = [np.full((30, 40), 3, np.uint16), np.full((50, 20), 300, np.uint16)]
        batch = processor(pictures, segmentation_maps=maps, return_tensors="pt")
        assert set(batch) == {*processor.model_input_names, "labels"}
        height, width = batch["padded_sizes"][0].tolist()
        assert batch["pixel_values"].shape == (2, 3, height, width)
        assert batch["pixel_values"].dtype == torch.float32
        multiple = processor.pad_multiple or 1
        assert height % multiple == width % multiple == 0
        assert batch["original_sizes"].tolist() == [[30, 40], [50, 20]]
        assert batch["reshaped_input_sizes"].tolist() == [[48, 64], [96, 38]]  # 96 is the cap, 38.4 is rounded
        for index, (h, w) in enumerate(batch["reshaped_input_sizes"].tolist()):
            inside = torch.zeros(height, width, dtype=torch.bool)
            inside[:h, :w] = True
            assert torch.equal(batch["pixel_mask"][index].bool(), inside)
            assert (batch["pixel_values"][index][:, ~inside] == 0).all()
            assert (batch["pixel_values"][index][:, inside] != 0).all()
            assert torch.equal(batch["labels"][index] != -100, inside)
            assert (batch["labels"][index][inside] == maps[index][0, 0]).all()

    def test_default_size_is_the_published_one(self):
        size = self.image_processor_class().size
        assert (size.shortest_edge, size.longest_edge) in {(640, 2560), (512, 2560), (512, 2048)}

    def test_save_and_load(self, tmp_path):
        changed = {"pad_multiple": 5, "ignore_index": [255, 0], "image_mean": [0.1, 0.2, 0.3], "resample": 3}
        for index, changes in enumerate([{}, changed, {"pad_multiple": None}, {"do_pad": False, "ignore_index": 7}]):
            processor = self.small_processor(**changes)
            processor.save_pretrained(tmp_path / str(index))
            loaded = self.image_processor_class.from_pretrained(tmp_path / str(index))
            assert loaded.to_dict() == processor.to_dict()
            for name, value in {**self.small, **changes}.items():
                found = getattr(loaded, name)
                assert list(found) == list(value) if isinstance(value, list) else found == value or name == "size"
            picture = np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3)
            assert np.array_equal(loaded(picture)["pixel_values"], processor(picture)["pixel_values"])

    def test_auto_image_processor_finds_the_class(self, tmp_path):
        self.small_processor().save_pretrained(tmp_path)
        assert json.loads((tmp_path / "preprocessor_config.json").read_text())["image_processor_type"] == (
            self.image_processor_class.__name__
        )
        for backend in ({}, {"backend": "pil"}):
            assert type(AutoImageProcessor.from_pretrained(tmp_path, **backend)) is self.image_processor_class

    def test_unknown_arguments_are_errors(self):
        with pytest.raises(TypeError, match=r"no argument do_center_crop.*do_resize"):
            self.small_processor()(np.zeros((4, 4, 3), np.uint8), do_center_crop=True)

    def test_callers_arrays_stay(self):
        picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        label_map = np.random.default_rng(1).integers(0, 5, (20, 30)).astype(np.int32)
        before = picture.copy(), label_map.copy()
        tensor = torch.from_numpy(picture.copy())
        processor = self.small_processor(ignore_index=0)
        processor([picture, tensor], segmentation_maps=[label_map, torch.from_numpy(label_map)])
        assert np.array_equal(picture, before[0])
        assert np.array_equal(label_map, before[1])
        assert np.array_equal(tensor.numpy(), before[0])
