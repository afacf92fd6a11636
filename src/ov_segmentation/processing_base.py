"""What all processors share: class names to token ids beside the image processor's outputs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from .modeling_outputs import OpenVocabularySegmentationOutput
from .pushing import PushToHub
from .vocabulary import Vocabulary, load_prompt_templates, resolve_background

# class names, or lists of synonyms, in class order
ClassNames = Iterable[str | Sequence[str]] | Vocabulary


class OpenVocabularySegmentationProcessor(PushToHub, ProcessorMixin):
    """Base of the six `<X>Processor`: an image processor and a tokenizer, and the texts made of class names.

    A method's subclass names its published templates and its rule for commas inside a name (see `Vocabulary`).

    Args:
        image_processor: the method's image processor.
        tokenizer: CLIP's byte-pair tokenizer, or one with the same start and end tokens.
        prompt_templates: each holding `{}` once, or the name of a set ("vild_14"). None: the method's. Saved with the
            processor.
    """

    default_templates: ClassVar[str]
    comma_rule: ClassVar[str]
    # tokens of a text, start and end included; a tokenizer's own smaller limit counts
    context_length: ClassVar[int] = 77

    def __init__(self, image_processor=None, tokenizer=None, prompt_templates=None) -> None:
        self.prompt_templates = list(load_prompt_templates(prompt_templates or self.default_templates))
        super().__init__(image_processor, tokenizer)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """transformers' `from_pretrained`; a folder without a tokenizer is an error that says so."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (ValueError, OSError) as error:
            if "tokenizer" not in str(error):
                raise
            image_processor = cls.__name__.replace("Processor", "ImageProcessor")
            raise ValueError(
                f"{pretrained_model_name_or_path} holds no tokenizer that can be loaded (it may have been converted "
                f"without one). Save {cls.__name__}({image_processor}.from_pretrained(path), tokenizer) there, "
                f"with CLIP's tokenizer."
            ) from error

    def __call__(
        self,
        images: Any = None,
        text: ClassNames | None = None,
        segmentation_maps: Any = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs for pictures, class names, or both.

        Args:
            images: whatever the image processor takes.
            text: the class names, each a name or a list of synonyms, or a `Vocabulary`: one list for all pictures.
            segmentation_maps: label maps of the pictures, for `labels`.
            return_tensors: "pt", "np", or None for lists.
            kwargs: options of the image processor.

        Returns:
            The image processor's keys for `images`; for `text` int64 `input_ids` and `attention_mask` `[K, P, L]`, or
            `[K, P, S, L]` when a class has synonyms, a row of zeros in the mask being an absent synonym. L is the
            length of the longest text.
        """
        # names are padded to the longest and cut to the context in any case: asking for it is no mistake
        for option, usual in (("padding", (True, "longest")), ("truncation", (True, "longest_first"))):
            if text is not None and kwargs.get(option) in usual:
                del kwargs[option]
        if images is None and text is None:
            raise ValueError("Give images=, text= (the class names), or both.")
        if images is None and (segmentation_maps is not None or kwargs):
            given = [*(["segmentation_maps"] if segmentation_maps is not None else []), *kwargs]
            raise TypeError(f"Without images= there is no use for {', '.join(given)}.")
        data: dict[str, Any] = {}
        if images is not None:
            maps = {} if segmentation_maps is None else {"segmentation_maps": segmentation_maps}
            data.update(self.image_processor(images, return_tensors=return_tensors, **maps, **kwargs))
        if text is not None:
            tokens = self._tokenize(text if isinstance(text, Vocabulary) else Vocabulary(text))
            data.update(tokens if return_tensors else {key: ids.tolist() for key, ids in tokens.items()})
        return BatchFeature(data, tensor_type=return_tensors)

    def _tokenize(self, vocabulary: Vocabulary) -> dict[str, np.ndarray]:
        prompts = vocabulary.prompts_with(self.prompt_templates, self.comma_rule)
        rows = {text: row for row, text in enumerate(dict.fromkeys(t for k in prompts for p in k for t in p))}
        ids = self.tokenizer(list(rows), return_attention_mask=False, verbose=False)["input_ids"]
        limit = min(self.tokenizer.model_max_length, self.context_length)
        end = self.tokenizer.eos_token_id
        kept = [tokens if len(tokens) <= limit else [*tokens[: limit - 1], end] for tokens in ids]
        lengths = np.array([*map(len, kept), 0])
        # the last row is empty: absent synonyms point to it. Padded with 0, as the originals do
        mask = np.arange(lengths.max()) < lengths[:, None]
        table = np.zeros(mask.shape, dtype=np.int64)
        table[mask] = np.concatenate(kept)
        broken = {row for row, tokens in enumerate(ids) if end in tokens[:-1]}
        if broken:
            raise ValueError(
                f"The tokenizer knows no token for a character of, or reads its end token in, the class names "
                f"{_labels_of(broken, vocabulary, prompts, rows)}: the text would end there. Spell them differently."
            )
        cut = {row for row, tokens in enumerate(ids) if len(tokens) > limit}
        if cut:
            warnings.warn(
                f"Texts longer than the context of {limit} tokens are cut, of the class names "
                f"{_labels_of(cut, vocabulary, prompts, rows)}.",
                stacklevel=3,
            )
        synonyms = max(len(texts) for by_template in prompts for texts in by_template)
        grid = np.full((len(prompts), len(prompts[0]), synonyms), -1)
        for k, by_template in enumerate(prompts):
            for p, texts in enumerate(by_template):
                grid[k, p, : len(texts)] = [rows[text] for text in texts]
        grid = grid if synonyms > 1 else grid[..., 0]
        return {"input_ids": table[grid], "attention_mask": mask[grid].astype(np.int64)}

    def post_process_semantic_segmentation(
        self,
        outputs: OpenVocabularySegmentationOutput,
        target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None,
        return_segmentation_scores: bool = False,
        return_confidence: bool = False,
        background: str | int | Iterable[str | int] | None = None,
        threshold: float | None = None,
        labels: Sequence[str] | Vocabulary | None = None,
    ) -> list[Any]:
        """The image processor's `post_process_semantic_segmentation`; with `labels`, `background` may hold names."""
        return self.image_processor.post_process_semantic_segmentation(
            outputs,
            target_sizes=target_sizes,
            return_segmentation_scores=return_segmentation_scores,
            return_confidence=return_confidence,
            background=resolve_background(background, None if labels is None else list(labels)),
            threshold=threshold,
        )


def _labels_of(bad_rows: set[int], vocabulary: Vocabulary, prompts: list[list[list[str]]], rows: dict[str, int]) -> str:
    labels = [
        label
        for label, by_template in zip(vocabulary.labels, prompts)
        if any(rows[text] in bad_rows for texts in by_template for text in texts)
    ]
    return ", ".join(map(repr, labels[:5])) + (", ..." if len(labels) > 5 else "")
