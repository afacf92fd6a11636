"""Losses of mask classification: Hungarian matching and the set criterion of MaskFormer, dense or on sampled points.

Sources: MaskFormer (Cheng et al., 2021), section 3.3: focal and dice losses on whole masks; Mask2Former (Cheng et al.,
2022), section 3.2: the same on points, most of them where the prediction is uncertain (PointRend). SAN uses the second,
OVSeg and DeOP's proposal network the first.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import distributed
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, grid_sample, interpolate, softplus

from .precision import full_precision


class MaskTargets(NamedTuple):
    """The masks of one picture: `classes` `[T]` int64, ascending, and `masks` `[T, H, W]` uint8."""

    classes: torch.Tensor
    masks: torch.Tensor


class Match(NamedTuple):
    """Matched pairs of one picture: `queries` `[T]`, ascending, and the index of the `targets` `[T]` of each."""

    queries: torch.Tensor
    targets: torch.Tensor


class Prediction(NamedTuple):
    """One supervised output: `class_logits` `[B, N, K+1]` (last column: no object), `mask_logits` `[B, N, h, w]`.

    `suffix` marks its loss terms: "" for the last layer, "_0", "_1", ... for auxiliary ones.
    """

    suffix: str
    class_logits: torch.Tensor
    mask_logits: torch.Tensor


class Draws(Protocol):
    """Where random points come from."""

    def uniform(self, name: str, picture: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Uniform numbers in [0, 1); `name` is "matcher", "candidates" or "extra", then the output's suffix."""


class SeededDraws:
    """Random numbers of each picture from a generator of its own: they depend on neither batch, worker nor process."""

    def __init__(self, sample_seeds: torch.Tensor) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in sample_seeds.tolist()]

    def uniform(self, name: str, picture: int, shape: tuple[int, ...]) -> torch.Tensor:
        """The next draw of this picture's generator, whatever it is for."""
        return torch.rand(shape, generator=self._generators[picture])


def masks_from_labels(labels: torch.Tensor) -> list[MaskTargets]:
    """One binary mask per class that occurs in each of `labels` `[B, H, W]`; negative labels are in no mask."""
    targets = []
    for label_map in labels:
        classes = label_map.unique()
        classes = classes[classes >= 0]
        targets.append(MaskTargets(classes, (label_map[None] == classes[:, None, None]).to(torch.uint8)))
    return targets


def masks_per_picture(labels: torch.Tensor) -> torch.Tensor:
    """How many masks, `[B]`, [`masks_from_labels`] makes of each label map."""
    return torch.stack([(label_map.unique() >= 0).sum() for label_map in labels])


_accumulated: ContextVar[Sequence[Mapping[str, torch.Tensor]]] = ContextVar("accumulated", default=())


@contextlib.contextmanager
def accumulated_batches(batches: Sequence[Mapping[str, torch.Tensor]]) -> Iterator[None]:
    """Within it, losses are normalised over all `batches`, arguments of the model's forward pass: the mean of their
    gradients is the gradient of one batch with all their pictures."""
    before = _accumulated.set(batches)
    try:
        yield
    finally:
        _accumulated.reset(before)


def mean_of_step(count: Callable[..., torch.Tensor], least_sum: float = 0.0, **batch: torch.Tensor) -> torch.Tensor:
    """Mean of a count over all processes and [`accumulated_batches`]: the normaliser with which averaged gradients
    equal those of one batch on one process.

    Args:
        count: scalar of the arguments `batch`, of the same names in every batch.
        least_sum: of all together, so that nothing is divided by zero. A least mean would be another normaliser where
            there are fewer masks than processes.
        batch: what is counted in this batch, by the names that it has in the model's forward pass.
    """
    batches = _accumulated.get() or [batch]
    counts = [count(**{name: other[name].to(value.device) for name, value in batch.items()}) for other in batches]
    total, parts = torch.stack(counts).sum().float(), len(batches)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
        parts *= distributed.get_world_size()
    return total.clamp(min=least_sum) / parts


def sample_points(maps: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Bilinear samples `[N, P]` of `maps` `[N, h, w]` at `points` `[N, P, 2]`, (x, y) in 0..1; zero outside."""
    grid = 2 * points[:, :, None] - 1
    return grid_sample(maps[:, None], grid, align_corners=False, padding_mode="zeros")[:, 0, :, 0]


def focal_terms(logits: torch.Tensor, targets: torch.Tensor, alpha: float = 0.25, gamma: float = 2.0) -> torch.Tensor:
    """Focal loss (Lin et al., 2017, equation 5) element by element."""
    error = binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probability = logits.sigmoid()
    missing = probability + targets - 2 * probability * targets
    return (alpha * targets + (1 - alpha) * (1 - targets)) * missing**gamma * error


def dice_terms(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Dice loss `[N]` of `logits` and `targets` `[N, P]`, smoothed by 1 (MaskFormer, section 3.3)."""
    probability = logits.sigmoid()
    overlap = 2 * (probability * targets).sum(-1) + 1
    return 1 - overlap / (probability.sum(-1) + targets.sum(-1) + 1)


def _pairwise_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (softplus(-logits) @ targets.T + softplus(logits) @ (1 - targets).T) / logits.shape[-1]


def _pairwise_focal(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    ones, zeros = torch.ones_like(logits), torch.zeros_like(logits)
    return (focal_terms(logits, ones) @ targets.T + focal_terms(logits, zeros) @ (1 - targets).T) / logits.shape[-1]


def _pairwise_dice(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    probability = logits.sigmoid()
    overlap = 2 * probability @ targets.T + 1
    return 1 - overlap / (probability.sum(-1)[:, None] + targets.sum(-1)[None] + 1)


def _no_costs() -> dict[str, float]:
    return {"class": 1.0, "mask": 1.0, "dice": 1.0}


@dataclass
class MaskClassificationCriterion:
    """Set criterion over one or more supervised outputs.

    Args:
        costs: weights of "class", "mask" and "dice" in the matching.
        weights: weights of "ce", "mask" and "dice" in the loss.
        mask_loss: "bce" or "focal".
        num_points: points per mask; None compares whole masks (matching on the prediction's grid, loss at full size).
        oversample_ratio, importance_sample_ratio: candidates per point, and the share of points that are the most
            uncertain candidates; the rest is uniform.
        no_object_weight: class weight of "no object" in the cross entropy.
        normalise_per_process: divide the cross entropy by the sum of class weights of the process's own micro-batch, as
            the originals do, and not by that of the whole optimizer step.
    """

    costs: dict[str, float] = field(default_factory=_no_costs)
    weights: dict[str, float] = field(default_factory=dict)
    mask_loss: str = "bce"
    num_points: int | None = None
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75
    no_object_weight: float = 0.1
    normalise_per_process: bool = False

    def __call__(
        self,
        predictions: Sequence[Prediction],
        labels: torch.Tensor,
        draws: Draws,
        matches: dict[str, list[Match]] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Weighted terms `loss_ce<suffix>`, `loss_mask<suffix>`, `loss_dice<suffix>`; the loss is their sum.

        Args:
            predictions: the supervised outputs, the last layer first.
            labels: `[B, H, W]` int64 at full size; negative = in no mask.
            draws: source of the random points; unused without `num_points`.
            matches: suffix -> matches to use in place of the Hungarian ones.

        Computed in full precision whatever the predictions' type.
        """
        with full_precision(labels):
            return self._losses(predictions, labels, draws, matches)

    def _losses(
        self,
        predictions: Sequence[Prediction],
        labels: torch.Tensor,
        draws: Draws,
        matches: dict[str, list[Match]] | None,
    ) -> dict[str, torch.Tensor]:
        targets = masks_from_labels(labels)
        num_masks = mean_of_step(lambda labels: masks_per_picture(labels).sum(), least_sum=1, labels=labels)
        sum_weights = functools.partial(self._sum_of_class_weights, num_queries=predictions[0].class_logits.shape[1])
        sum_of_weights = sum_weights(labels) if self.normalise_per_process else mean_of_step(sum_weights, labels=labels)
        losses = {}
        for prediction in predictions:
            found = matches[prediction.suffix] if matches else self.match(prediction, targets, draws)
            mask, dice = self._mask_terms(prediction, targets, found, draws)
            ce = self._class_term(prediction.class_logits.float(), targets, found)
            losses[f"loss_ce{prediction.suffix}"] = self.weights["ce"] * ce / sum_of_weights
            losses[f"loss_mask{prediction.suffix}"] = self.weights["mask"] * mask / num_masks
            losses[f"loss_dice{prediction.suffix}"] = self.weights["dice"] * dice / num_masks
        return losses

    @torch.no_grad()
    def match(self, prediction: Prediction, targets: list[MaskTargets], draws: Draws) -> list[Match]:
        """Hungarian matching of queries and target masks, picture by picture."""
        from scipy.optimize import linear_sum_assignment

        pairwise_mask = _pairwise_focal if self.mask_loss == "focal" else _pairwise_cross_entropy
        matches = []
        for i, target in enumerate(targets):
            logits, device = prediction.mask_logits[i].float(), prediction.mask_logits.device
            wanted = target.masks.float()
            if self.num_points is None:
                wanted = interpolate(wanted[:, None], size=logits.shape[-2:], mode="nearest").flatten(1)
                logits = logits.flatten(1)
            else:
                points = draws.uniform(f"matcher{prediction.suffix}", i, (1, self.num_points, 2)).to(device)
                wanted = sample_points(wanted, points.expand(len(wanted), -1, -1))
                logits = sample_points(logits, points.expand(len(logits), -1, -1))
            probability = prediction.class_logits[i].float().softmax(-1)
            cost = (
                self.costs["mask"] * pairwise_mask(logits, wanted)
                - self.costs["class"] * probability[:, target.classes]
                + self.costs["dice"] * _pairwise_dice(logits, wanted)
            )
            if not torch.isfinite(cost).all():
                raise FloatingPointError(
                    f"Masks or class logits of picture {i} of the batch are NaN or infinite: the training has "
                    f"diverged. Lower the learning rate, clip the gradient, or train in full precision."
                )
            queries, chosen = linear_sum_assignment(cost.cpu().numpy())
            matches.append(Match(torch.as_tensor(queries).to(device), torch.as_tensor(chosen).to(device)))
        return matches

    def uncertain_points(self, mask_logits: torch.Tensor, suffix: str, counts: list[int], draws: Draws) -> torch.Tensor:
        """Points `[M, P, 2]` for masks `[M, h, w]`, `counts` of which belong to each picture in turn."""
        device = mask_logits.device
        num_candidates = int(self.num_points * self.oversample_ratio)
        num_uncertain = int(self.importance_sample_ratio * self.num_points)
        candidates = _draw_for_masks(draws, f"candidates{suffix}", counts, num_candidates).to(device)
        uncertainty = -sample_points(mask_logits, candidates).abs()
        chosen = uncertainty.topk(num_uncertain, dim=1).indices
        points = candidates.gather(1, chosen[:, :, None].expand(-1, -1, 2))
        extra = _draw_for_masks(draws, f"extra{suffix}", counts, self.num_points - num_uncertain).to(device)
        return torch.cat([points, extra], dim=1)

    def _mask_terms(
        self, prediction: Prediction, targets: list[MaskTargets], matches: list[Match], draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.cat([p[m.queries] for p, m in zip(prediction.mask_logits, matches, strict=True)]).float()
        if not len(logits):
            nothing = prediction.mask_logits.sum() * 0.0
            return nothing, nothing
        wanted = torch.cat([t.masks[m.targets] for t, m in zip(targets, matches, strict=True)]).float()
        if self.num_points is None:
            logits = interpolate(logits[:, None], size=wanted.shape[-2:], mode="bilinear", align_corners=False)
            logits, wanted = logits.flatten(1), wanted.flatten(1)
        else:
            with torch.no_grad():
                counts = [len(m.queries) for m in matches]
                points = self.uncertain_points(logits, prediction.suffix, counts, draws)
                wanted = sample_points(wanted, points)
            logits = sample_points(logits, points)
        if self.mask_loss == "focal":
            mask = focal_terms(logits, wanted)
        else:
            mask = binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        return mask.mean(-1).sum(), dice_terms(logits, wanted).sum()

    def _class_term(self, class_logits: torch.Tensor, targets: list[MaskTargets], matches: list[Match]) -> torch.Tensor:
        no_object = class_logits.shape[-1] - 1
        wanted = torch.full(class_logits.shape[:2], no_object, device=class_logits.device)
        for row, target, match in zip(wanted, targets, matches, strict=True):
            row[match.queries] = target.classes[match.targets]
        class_weights = class_logits.new_ones(no_object + 1)
        class_weights[-1] = self.no_object_weight
        return cross_entropy(class_logits.flatten(0, 1), wanted.flatten(), weight=class_weights, reduction="sum")

    def _sum_of_class_weights(self, labels: torch.Tensor, num_queries: int) -> torch.Tensor:
        """Over all queries: 1 for each that is matched, and the weight of "no object" for the others."""
        matched = masks_per_picture(labels).clamp(max=num_queries).sum()
        return matched + self.no_object_weight * (len(labels) * num_queries - matched)


def _draw_for_masks(draws: Draws, name: str, counts: list[int], num_points: int) -> torch.Tensor:
    return torch.cat([draws.uniform(name, i, (count, num_points, 2)) for i, count in enumerate(counts) if count])


def sum_losses(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    """The scalar loss of weighted terms."""
    return torch.stack(list(losses.values())).sum()


__all__ = [
    "Draws",
    "MaskClassificationCriterion",
    "MaskTargets",
    "Match",
    "Prediction",
    "SeededDraws",
    "accumulated_batches",
    "dice_terms",
    "focal_terms",
    "masks_from_labels",
    "mean_of_step",
    "sample_points",
    "sum_losses",
]
