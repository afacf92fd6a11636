"""A model that knows the answers, for the chain from pictures to scores: `python tests/fake_model.py ARGUMENTS` is
`examples/evaluate.py` with that model registered.

It recognises a picture by its pixels and a class by its texts, so that a label map is only found again if picture,
resolution, names, their order, and the ids of the label maps are all right.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ov_segmentation.auto import MODEL_FOR_OPEN_VOCABULARY_SEGMENTATION_MAPPING as MODELS
from ov_segmentation.modeling_outputs import OpenVocabularySegmentationOutput
from ov_segmentation.models.cat_seg.image_processing_cat_seg import CATSegImageProcessor
from ov_segmentation.models.cat_seg.modeling_cat_seg import CATSegForOpenVocabularySegmentation
from ov_segmentation.models.cat_seg.processing_cat_seg import CATSegProcessor
from ov_segmentation.vocabulary import Vocabulary
from tests.official_trees import HEIGHT
from tests.tiny import tiny_tokenizer

ANSWERS = "answers.pt"
WIDTH_OF_TEXT = 48


class FakeConfig(PreTrainedConfig):
    model_type = "fake_segmentation"
    sliding_window: bool = True
    class_attention_pooling: int = 1
    max_classes: int = 256


class FakeModel(PreTrainedModel):
    config_class = FakeConfig
    main_input_name = "pixel_values"
    family = "classes"
    calls = 0
    kill_after: int | None = None
    # every switch of the protocols it is asked under
    switches = CATSegForOpenVocabularySegmentation.switches
    picture_switches = CATSegForOpenVocabularySegmentation.picture_switches

    def __init__(self, config: FakeConfig) -> None:
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.post_init()

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, **kwargs: Any) -> FakeModel:
        model = super().from_pretrained(path, *args, **kwargs)
        model.answers = torch.load(Path(path) / ANSWERS, weights_only=True)
        return model

    def encode_vocabulary(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **unused: Any) -> torch.Tensor:
        return embed(input_ids * attention_mask)

    def forward(self, pixel_values: torch.Tensor, text_embeds: torch.Tensor, **inputs: Any) -> Any:
        FakeModel.calls += 1
        if FakeModel.kill_after is not None and FakeModel.calls > FakeModel.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        label_map, names = self.answers[key(pixel_values, len(text_embeds))]
        # -1, where nothing is known, becomes the first name
        wanted = (text_embeds @ names.t()).argmax(0)[label_map.clamp(min=0)]
        sizes = {name: inputs[name] for name in ("original_sizes", "reshaped_input_sizes", "padded_sizes")}
        if self.family == "classes":
            logits = torch.nn.functional.one_hot(wanted, len(text_embeds)).permute(2, 0, 1)[None] * 40.0 - 20
            return OpenVocabularySegmentationOutput(logits=logits, score_function="sigmoid", **sizes)
        present = wanted.unique()
        scores = torch.nn.functional.one_hot(present, len(text_embeds)).float()[None]
        masks = (wanted == present[:, None, None]).float()[None] * 40 - 20
        return OpenVocabularySegmentationOutput(class_queries_scores=scores, masks_queries_logits=masks, **sizes)


def embed(input_ids: torch.Tensor) -> torch.Tensor:
    """A unit vector `[K, D]` for each class's token ids."""
    rows = []
    for ids in input_ids.flatten(1):
        tokens = ids[ids > 0].numpy().tobytes()
        seed = int.from_bytes(hashlib.sha256(tokens).digest()[:7], "big")
        rows.append(torch.randn(WIDTH_OF_TEXT, generator=torch.Generator().manual_seed(seed)))
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def key(pixel_values: torch.Tensor, num_names: int) -> str:
    return f"{hashlib.sha256(pixel_values.numpy().tobytes()).hexdigest()}-{num_names}"


def processor() -> CATSegProcessor:
    """Pictures of the trees keep their size."""
    size = {"shortest_edge": HEIGHT, "longest_edge": 2560}
    return CATSegProcessor(CATSegImageProcessor(size=size), tiny_tokenizer())


def remember(
    answers: dict[str, Any],
    pictures: Sequence[Any],
    label_maps: Sequence[np.ndarray],
    names: Mapping[int, str],
    vocabulary: Vocabulary,
) -> None:
    """Add pictures and what the model shall say about them: maps of any integers, and the name behind each."""
    maker = processor()
    values = sorted(names)
    texts = Vocabulary([names[value] for value in values], vocabulary.templates, comma_rule=vocabulary.comma_rule)
    vectors = embed(torch.tensor(maker(text=texts, return_tensors="np")["input_ids"]))
    for picture, label_map in zip(pictures, label_maps, strict=True):
        pixels = maker(images=picture, return_tensors="pt")["pixel_values"]
        place = np.full(label_map.shape, -1)
        for row, value in enumerate(values):
            place[label_map == value] = row
        answers[key(pixels, len(vocabulary))] = (torch.from_numpy(place), vectors)


def save(folder: Path, answers: dict[str, Any]) -> Path:
    FakeModel(FakeConfig()).save_pretrained(folder)
    processor().save_pretrained(folder)
    torch.save(answers, folder / ANSWERS)
    return folder


AutoConfig.register(FakeConfig.model_type, FakeConfig, exist_ok=True)
MODELS.register(FakeConfig, FakeModel, exist_ok=True)

if __name__ == "__main__":
    from examples.evaluate import main
    from ov_segmentation.process_group import process_group_ended

    torch.set_num_threads(1)
    with process_group_ended():
        main(sys.argv[1:])
