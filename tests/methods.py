"""Every method at tiny size, with its stages and variants, for tests that ask all of them the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from tests.mixins.model import ModelTesterMixin
from tests.models.test_cat_seg import TestCATSeg as CATSegTester
from tests.models.test_deop import TestDeOP as DeOPTester
from tests.models.test_esc_net import TestESCNet as ESCNetTester
from tests.models.test_ovseg import RESNET
from tests.models.test_ovseg import TestOVSeg as OVSegTester
from tests.models.test_san import TestSAN as SANTester
from tests.models.test_sed import PLAIN
from tests.models.test_sed import TestSED as SEDTester


@dataclass(frozen=True)
class Case:
    """A method.

    Args:
        tester: its tests, which know its tiny configuration and inputs.
        variants: name -> changes of the configuration; "" is the tiny configuration itself.
        stages: those of the variants that are stages of the published training.
        unread: parts of the released weights that the published training keeps trainable though nothing reads them.
    """

    tester: type[ModelTesterMixin]
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    stages: tuple[str, ...] = ("",)
    unread: tuple[str, ...] = ()

    def model(self, variant: str = "") -> Any:
        """The same weights at every call, in evaluation mode."""
        return self.tester().model(**({} if variant == "" else self.variants[variant]))

    def inputs(self, model: Any, batch: int = 2) -> dict[str, torch.Tensor]:
        """A training batch, whose pictures differ in what they show and how much of it is labelled."""
        inputs = self.tester().training_inputs(model, batch)
        labels = inputs["labels"].clone()
        for index, label_map in enumerate(labels):
            label_map[:, : 8 * index] = -100
            if index % 2:
                label_map[label_map == 2] = 0
        if getattr(model.config, "training_stage", None) == "prompt":  # pictures of one class each
            for index, label_map in enumerate(labels):
                label_map[label_map >= 0] = index % 3
        return {**inputs, "labels": labels}

    def gradients(self, model: Any) -> dict[str, torch.Tensor]:
        """Of a training step, by parameter."""
        model.zero_grad()
        model(**self.inputs(model)).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


SAN = Case(SANTester)
OVSEG = Case(
    OVSegTester,
    {
        "resnet": {"mask_config": {**OVSegTester().config_values()["mask_config"], "backbone_config": RESNET}},
        "text_prompt": {"num_context_vectors": 4, "dot_token_id": 3},
    },
    stages=("", "resnet"),
)
DEOP = Case(
    DeOPTester,
    {stage: {"training_stage": stage} for stage in ("prompt", "proposals")},
    stages=("prompt", "proposals", ""),
    unread=DeOPTester.unused,
)
SED = Case(
    SEDTester,
    {"plain": {"vision_config": PLAIN, "projection_type": "linear"}},
    stages=("", "plain"),
)
CAT_SEG = Case(CATSegTester)
ESC_NET = Case(ESCNetTester, {"boxes": {"prompt_types": ("boxes",)}, "no_sam": {"use_sam_blocks": False}})
CASE_OF = {"san": SAN, "ovseg": OVSEG, "deop": DEOP, "sed": SED, "cat_seg": CAT_SEG, "esc_net": ESC_NET}
