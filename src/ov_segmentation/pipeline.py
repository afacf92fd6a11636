"""The pipeline task "open-vocabulary-segmentation": pictures and class names in, masks or a label map out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset
from transformers import BatchFeature
from transformers.pipelines import PIPELINE_REGISTRY, Pipeline
from transformers.utils import logging

from .auto import AutoModelForOpenVocabularySegmentation
from .loading import processor_for
from .pipeline_inputs import TIMEOUT, Preparation, Prepared, is_single, prepared_dataset
from .post_processing import check_threshold
from .pushing import PushToHub
from .text_encoding import CACHED_VOCABULARIES
from .vocabulary import Vocabulary, resolve_background, split_names

logger = logging.get_logger(__name__)

TASK = "open-vocabulary-segmentation"
DEFAULT_MODEL = ("openai/clip-vit-base-patch16", "main")
"""Id and revision of the task's default: a plain CLIP, with which DeOP segments without training."""
OUTPUT_TYPES = ("masks", "map")
OPTIONS = ("candidate_labels", "background", "threshold", "output_type", "return_confidence", "timeout")


class OpenVocabularySegmentationPipeline(PushToHub, Pipeline):
    """Segments pictures with class names chosen by the caller.

    `pipeline("open-vocabulary-segmentation", model=path)`, or with a model instance and `processor=`. A plain CLIP is
    taken too: DeOP segments with it without training, with a warning that says what it is. The options below
    may be given here, and again in each call:

    Args:
        candidate_labels: class names: a list of names or lists of synonyms, a comma-separated text, or a `Vocabulary`.
        background: labels or indices of classes that are folded into one, and "no_object": the method's own no-object
            score competes, and its pixels are unlabelled. Default: the vocabulary's own.
        threshold: confidence (0 to 1) below which a pixel is unlabelled.
        output_type: "masks" or "map".
        return_confidence: adds the confidence of each pixel to a map.
        timeout: seconds to wait for a URL.
        batch_size: pictures that are prepared together; those of equal padded size and equal names share a forward.
        num_workers: processes that read and prepare pictures.
        Any inference switch of the model's `forward` ("rejection_top_k", "sliding_window", ...).
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False

    def __init__(self, model: Any, processor: Any = None, **kwargs: Any) -> None:
        if not hasattr(model, "encode_vocabulary"):
            raise TypeError(f"{type(model).__name__} is not a model for {TASK}.")
        processor = processor_for(model, processor)
        self._tokens = lru_cache(CACHED_VOCABULARIES)(self._tokenize)
        super().__init__(model, processor=processor, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # `datasets.map` pickles what its function refers to; a cache of a method cannot be
        return {name: value for name, value in self.__dict__.items() if name != "_tokens"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokens = lru_cache(CACHED_VOCABULARIES)(self._tokenize)

    # ------------------------------------------------------------------ options

    def _sanitize_parameters(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        switches = self.model.switches | self.model.picture_switches
        if unknown := sorted(set(options) - set(OPTIONS) - switches):
            raise TypeError(
                f"The pipeline does not take {', '.join(unknown)}. It takes {', '.join(OPTIONS)}, batch_size, "
                f"num_workers; switches of {type(self.model).__name__}: {', '.join(sorted(switches)) or 'none'}."
            )
        if options.get("candidate_labels") is None:
            options.pop("candidate_labels", None)
        else:
            options["candidate_labels"] = as_vocabulary(options["candidate_labels"])
        check_threshold(options.get("threshold"))
        if options.get("output_type", "masks") not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {options['output_type']!r}.")

        def chosen(*names: str) -> dict[str, Any]:
            return {name: options[name] for name in names if name in options}

        return (
            chosen("timeout"),
            chosen("candidate_labels", "background", "threshold", *switches),
            chosen("output_type", "return_confidence"),
        )

    # ------------------------------------------------------------------ calls

    def __call__(
        self,
        inputs: Any,
        candidate_labels: Any = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        **options: Any,
    ) -> Any:
        """Segment one picture, or several.

        Args:
            inputs: a picture: path, http(s) URL, base64 text, data URI, bytes of a file, PIL picture, array or tensor
                (height x width x 3 or 3 x height x width); a dict `{"image": picture, "candidate_labels": names}` for
                its own names; or a list, tuple, dataset (of pictures, or of rows with a column "image") or generator
                of such.
            candidate_labels, options: see the class.

        Returns:
            Per picture, with `output_type="masks"`, `[{"score": mean confidence, "label": str, "mask": PIL "L" picture
            of 0 and 255}, ...]` in the caller's order of classes, without those that own no pixel; with "map"
            `{"segmentation": int32 [H, W], -1 = unlabelled, "labels": all K, "scores": K floats, 0 for absent}`.
            A list for a list or tuple; an iterator for a dataset or generator.
        """
        sanitized = self._sanitize_parameters(candidate_labels=candidate_labels, **options)
        given = (self._preprocess_params, self._forward_params, self._postprocess_params)
        preprocess, forward, postprocess = ({**old, **new} for old, new in zip(given, sanitized))
        if postprocess.get("return_confidence") and postprocess.get("output_type", "masks") != "map":
            raise ValueError('return_confidence=True needs output_type="map".')
        embed = lru_cache(CACHED_VOCABULARIES)(self._embed)

        def segment(items: list[Prepared]) -> list[Any]:
            return self._segment_together(items, embed, forward, postprocess)

        if is_single(inputs):
            return segment([self.preprocess(inputs, **preprocess)])[0]
        batch_size = next(size for size in (batch_size, self._batch_size, 1) if size is not None)
        num_workers = self._num_workers or 0 if num_workers is None else num_workers
        dataset = prepared_dataset(inputs, Preparation(self.processor.image_processor, **preprocess))
        if num_workers > 1 and isinstance(dataset, IterableDataset):
            logger.warning_once("Several workers would each read the whole stream: num_workers is set to 1.")
            num_workers = 1
        loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=list)
        results = Results(loader, segment)
        return list(results) if isinstance(inputs, (list, tuple, np.ndarray, torch.Tensor)) else results

    def preprocess(self, inputs: Any, timeout: float | None = TIMEOUT) -> Prepared:
        """Load one picture and run the image processor on it."""
        return Preparation(self.processor.image_processor, timeout)(inputs)

    def _segment_together(
        self, items: list[Prepared], embed: Callable, forward: dict[str, Any], postprocess: dict[str, Any]
    ) -> list[Any]:
        """Results of prepared pictures; those of equal padded size and equal class names share a forward."""
        options = dict(forward)
        default = options.pop("candidate_labels", None)
        groups: dict[tuple, list[int]] = {}
        for index, item in enumerate(items):
            own = item.candidate_labels
            vocabulary = default if own is None else as_vocabulary(own)
            if vocabulary is None:
                raise ValueError('Give class names: candidate_labels=["road", "car", ...], in the call or per picture.')
            shapes = tuple((key, value.shape) for key, value in item.inputs.items())
            groups.setdefault((vocabulary, shapes), []).append(index)
        results: list[Any] = [None] * len(items)
        for (vocabulary, _), indices in groups.items():
            columns = {key: torch.cat([items[i].inputs[key] for i in indices]) for key in items[indices[0]].inputs}
            maps = self.forward(BatchFeature(columns), vocabulary=vocabulary, embed=embed, **options)
            for index, one in zip(indices, maps):
                results[index] = self.postprocess(one, labels=vocabulary.labels, **postprocess)
        return results

    def _forward(
        self,
        inputs: BatchFeature,
        vocabulary: Vocabulary,
        embed: Callable[[Vocabulary], torch.Tensor],
        threshold: float | None = None,
        **options: Any,
    ) -> list[dict[str, torch.Tensor]]:
        background = resolve_background(options.pop("background", vocabulary.background), vocabulary.labels)
        was_training = self.model.training
        self.model.eval()
        try:
            outputs = self.model(**inputs, text_embeds=embed(vocabulary), **options)
        finally:
            if was_training:
                self.model.train()
        found = self.processor.post_process_semantic_segmentation(
            outputs,
            target_sizes=[tuple(size) for size in inputs["original_sizes"].tolist()],
            return_confidence=True,
            background=background,
            threshold=threshold,
        )
        return [{"segmentation": one.segmentation, "confidence": one.confidence} for one in found]

    def postprocess(
        self,
        result: dict[str, torch.Tensor],
        labels: list[str],
        output_type: str = "masks",
        return_confidence: bool = False,
    ) -> Any:
        """Masks or a map from one picture's label map and confidences `[H, W]`."""
        segmentation = result["segmentation"].numpy().astype(np.int32)
        confidence = result["confidence"].float().numpy()
        owners = segmentation.ravel() + 1  # 0: unlabelled
        areas = np.bincount(owners, minlength=len(labels) + 1)[1:]
        sums = np.bincount(owners, weights=confidence.ravel(), minlength=len(labels) + 1)[1:]
        scores = (sums / np.maximum(areas, 1)).tolist()
        if output_type == "map":
            found = {"segmentation": segmentation, "labels": list(labels), "scores": scores}
            return {**found, "confidence": confidence} if return_confidence else found
        return [
            {
                "score": scores[k],
                "label": labels[k],
                "mask": Image.fromarray((segmentation == k).astype(np.uint8) * 255),
            }
            for k in areas.nonzero()[0].tolist()
        ]

    # ------------------------------------------------------------------ text

    def _tokenize(self, vocabulary: Vocabulary, templates: tuple[str, ...]) -> BatchFeature:
        """`templates`: the processor's own, so that the cache notices when they are changed."""
        return self.processor(text=vocabulary, return_tensors="pt")

    def _embed(self, vocabulary: Vocabulary) -> torch.Tensor:
        return self.model.encode_vocabulary(**self._tokens(vocabulary, tuple(self.processor.prompt_templates)))

    # ------------------------------------------------------------------ saving

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save model and processor; `pipeline("open-vocabulary-segmentation", model=save_directory)` loads them."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


class Results:
    """The results of a dataset or generator, made while iterating; has a length where the input has one."""

    def __init__(self, loader: DataLoader, segment: Callable[[list[Prepared]], list[Any]]) -> None:
        self._loader, self._segment, self._running = loader, segment, None

    def __iter__(self) -> Iterator[Any]:
        for items in self._loader:
            yield from self._segment(items)

    def __next__(self) -> Any:
        if self._running is None:
            self._running = iter(self)
        return next(self._running)

    def __len__(self) -> int:
        return len(self._loader.dataset)


def as_vocabulary(candidate_labels: Any) -> Vocabulary:
    """A `Vocabulary` from one, from a list of names or lists of synonyms, or from a comma-separated text."""
    if isinstance(candidate_labels, Vocabulary):
        return candidate_labels
    return Vocabulary(split_names(candidate_labels) if isinstance(candidate_labels, str) else candidate_labels)


def register_pipeline() -> None:
    """Make `transformers.pipeline` know the task."""
    known = PIPELINE_REGISTRY.supported_tasks.get(TASK)
    if known is not None and known["impl"] is OpenVocabularySegmentationPipeline:
        return
    PIPELINE_REGISTRY.register_pipeline(
        TASK,
        pipeline_class=OpenVocabularySegmentationPipeline,
        pt_model=AutoModelForOpenVocabularySegmentation,
        default={"model": DEFAULT_MODEL},
        type="multimodal",
    )
    # set by the registry; saving would write it into config.json, and such a folder can't be loaded without our code
    del OpenVocabularySegmentationPipeline._registered_impl
