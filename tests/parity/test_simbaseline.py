"""SimBaseline, a configuration of OVSeg, against the original: every recorded tensor, and everything end to end.

The fixture's README says that the padded picture, normalised as MaskFormer has it, feeds both branches. The recorded
crops say otherwise: they come from the resized picture without padding, in CLIP's normalisation, as `crops` makes them.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch.nn.functional import normalize

from ov_segmentation.modeling_outputs import OpenVocabularySegmentationOutput
from ov_segmentation.models.ovseg.convert_ovseg import convert

from .common import Case, Comparison, assert_close, check_recorded, each_case, each_recorded_tensor

MAPS, CROPS, CROP_LOGITS, SCORES, NORMALISED, TEXT, LOSSES = 1e-4, 1e-4, 1e-3, 5e-5, 1e-6, 1e-5, 1e-4
PROBABILITIES = 1e-4
# it lies among DeOP's fixtures
PLACE = ("deop", "simbaseline")


class SimBaselineCase(Case):
    """The SimBaseline fixture, its model, and the stages between recorded tensors."""

    def __init__(self, folder: Path) -> None:
        super().__init__("ovseg", folder)
        self.model = convert(self.checkpoint, self.config).eval()

    @functools.cached_property
    def batch(self) -> dict[str, torch.Tensor]:
        return self.image_processor(images=self.inputs["image_uint8_rgb"].numpy(), return_tensors="pt")

    @property
    def text(self) -> torch.Tensor:
        return self.expected["text.with_no_object_last"][:-1]

    @property
    def resized_size(self) -> list[int]:
        return list(self.expected["pre.resized_image_uint8"].shape[-2:])

    def resized_picture(self) -> torch.Tensor:
        plain = self.image_processor(
            images=self.inputs["image_uint8_rgb"].numpy(), do_rescale=False, do_normalize=False, return_tensors="pt"
        )
        height, width = self.resized_size
        return plain["pixel_values"][0, :, :height, :width]

    @torch.no_grad()
    def classifier(self) -> torch.Tensor:
        """Names behind the learned context, and "no object"."""
        ids, lengths = self.inputs["class_token_ids"], self.inputs["class_token_lengths_with_sot_eot"]
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        names = self.model.encode_vocabulary(ids[:, None], mask[:, None])
        return torch.cat([names, normalize(self.model.no_object_embedding, dim=-1)])

    # ---------------------------------------------------------------- proposals and crops

    @functools.cached_property
    def proposals(self) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return self.model.proposal_network(self.expected["pre.normalized_padded"])[-1]

    @functools.cached_property
    def masks(self) -> torch.Tensor:
        """Binary masks `[N, H, W]` of the recorded proposals."""
        padded = self.expected["pre.normalized_padded"].shape[-2:]
        return self.model._binary_masks(self.expected["proposal.mask_logits"][0], padded, self.resized_size)

    @functools.cached_property
    def crops(self) -> tuple[torch.Tensor, torch.Tensor]:
        picture = self.model._clip_pixels(self.expected["pre.normalized_padded"])[0]
        return self.model._crop(picture, self.masks[self.masks.flatten(1).any(1)], self.resized_size)

    @functools.cached_property
    def crop_features(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model._encode_crops(*self.crops)

    def crop_logits(self) -> torch.Tensor:
        features = self.expected["region.clip_features_l2"]
        return self.config.temperature * features @ self.expected["text.with_no_object_last"].T

    # ---------------------------------------------------------------- end to end

    @functools.cached_property
    def outputs(self) -> OpenVocabularySegmentationOutput:
        with torch.no_grad():
            return self.model(**self.batch, text_embeds=self.text)

    def scores(self, size: tuple[int, int]) -> torch.Tensor:
        (result,) = self.image_processor.post_process_semantic_segmentation(
            self.outputs, target_sizes=[size], return_segmentation_scores=True
        )
        return result.segmentation_scores

    @functools.cached_property
    def losses(self) -> dict[str, torch.Tensor]:
        """The weighted terms; the original recorded them in evaluation mode."""
        labels = self.inputs["train_target_segmentation"].clone()
        labels[labels == 255] = -100
        pictures = [picture.permute(1, 2, 0).numpy() for picture in self.inputs["train_images_uint8_rgb_chw"]]
        batch = self.image_processor(images=pictures, do_resize=False, return_tensors="pt")
        with torch.no_grad():
            return self.model(**batch, text_embeds=self.text, labels=labels).loss_dict


COMPARISONS = [
    Comparison(r"pre\.resized_image_uint8", lambda c, m: c.resized_picture(), 0),
    Comparison(r"pre\.normalized_padded", lambda c, m: c.batch["pixel_values"], NORMALISED),
    Comparison(r"proposal\.class_embeddings", lambda c, m: c.proposals.embeddings, MAPS),
    Comparison(r"proposal\.mask_logits", lambda c, m: c.proposals.mask_logits, MAPS),
    Comparison(r"text\.with_no_object_last", lambda c, m: c.classifier(), TEXT),
    Comparison(
        r"cls\.proposal_stream_logits",
        lambda c, m: c.model._proposal_logits(c.expected["proposal.class_embeddings"], c.text),
        CROP_LOGITS,
    ),
    Comparison(
        r"cls\.proposal_stream_probs_without_no_object",
        lambda c, m: c.expected["cls.proposal_stream_logits"].softmax(-1)[..., :-1],
        NORMALISED,
    ),
    Comparison(r"region\.valid_flag", lambda c, m: c.masks.flatten(1).any(1).long(), 0),
    Comparison(r"region\.crops_normalized_224_first3", lambda c, m: c.crops[0][:3], CROPS),
    Comparison(r"region\.all_crops_channel_mean", lambda c, m: c.crops[0].mean((-2, -1)), CROPS),
    Comparison(r"region\.clip_features_l2", lambda c, m: c.crop_features, MAPS),
    Comparison(r"region\.logits_valid_only", lambda c, m: c.crop_logits(), CROP_LOGITS),
    Comparison(r"cls\.ensembled", lambda c, m: c.outputs.class_queries_scores[0], PROBABILITIES),
    Comparison(r"post\.scores_at_resized_size", lambda c, m: c.scores(tuple(c.resized_size)), SCORES),
    Comparison(r"final\.semantic_scores", lambda c, m: c.scores(tuple(c.inputs["image_uint8_rgb"].shape[:2])), SCORES),
    Comparison(r"train\.weighted_(loss_(ce|mask|dice)(_0)?)", lambda c, m: c.losses[m[1]].reshape(1), LOSSES),
]
EXCUSED = {
    r"final\.argmax": "the argmax of final.semantic_scores, whose smallest gap (6e-8) is below float32 agreement; "
    "compared below where scores are apart",
}


@each_recorded_tensor(*PLACE)
def test_recorded_tensor(folder: Path, name: str) -> None:
    check_recorded(SimBaselineCase.load(folder), name, COMPARISONS, EXCUSED)


@each_case(*PLACE)
def test_prediction_agrees_where_scores_are_apart(folder: Path) -> None:
    case = SimBaselineCase.load(folder)
    best, second = case.expected["final.semantic_scores"].topk(2, dim=0).values
    clear = best - second > 2 * SCORES
    assert clear.float().mean() > 0.95
    found = case.scores(tuple(case.inputs["image_uint8_rgb"].shape[:2])).argmax(0)
    assert torch.equal(found[clear], case.expected["final.argmax"][clear])


@each_case(*PLACE)
def test_seen_classes_take_the_other_share(folder: Path) -> None:
    """Without the flags all classes are unseen: those that were seen score otherwise."""
    case = SimBaselineCase.load(folder)
    with torch.no_grad():
        outputs = case.model(**case.batch, text_embeds=case.text, class_is_seen=None)
    seen = case.inputs["trainable_flag"].bool()
    found, flagged = outputs.class_queries_scores[0], case.expected["cls.ensembled"]
    assert_close(found[:, ~seen], flagged[:, ~seen], PROBABILITIES)
    assert not torch.allclose(found[:, seen], flagged[:, seen], atol=1e-3)
