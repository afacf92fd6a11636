"""What is trained: the options of every method, low-rank updates, and their merging."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import pytest
import torch

from ov_segmentation.strict_mapping import RecipeError
from ov_segmentation.training.lora import LoRARecipe, merge_lora
from ov_segmentation.training.trainable import OPTIONS, available_options, select_trainable
from tests.methods import CAT_SEG, DEOP, ESC_NET, OVSEG, SAN, SED, Case

ALL_BUT_PROMPTS = ["method", "adapter", "attention", "all", "lora"]


class TrainableTester:
    """A method's options train exactly what the loss reaches.

    Attributes:
        case: the method.
        options: stage or variant -> what it offers.
        frozen: parts of released weights that every option but "all" of the method's own may leave without gradient.
    """

    case: ClassVar[Case]
    variants: ClassVar[dict[str, list[str]]]

    def cases(self) -> list[tuple[str, str]]:
        return [(variant, option) for variant, options in self.variants.items() for option in options]

    def test_options_are_those_that_are_listed(self) -> None:
        for variant, options in self.variants.items():
            assert sorted(available_options(self.case.model(variant))) == sorted(options), variant
            for option in set(OPTIONS) - set(options):
                with pytest.raises(RecipeError, match=f"has no .*'{option}'.*{options[-1]}"):
                    select_trainable(self.case.model(variant), option)

    def test_each_option_trains_what_the_loss_reaches(self) -> None:
        for variant, option in self.cases():
            model = self.case.model(variant).train()
            select_trainable(model, option)
            trained = {name for name, p in model.named_parameters() if p.requires_grad}
            assert trained
            gradients = self.case.gradients(model)
            unread = trained - set(gradients)
            if option == "method":
                unread = {name for name in unread if not name.startswith(self.case.unread)}
            assert not unread, (variant, option, sorted(unread)[:5])
            assert set(gradients) <= trained, (variant, option)
            assert any(value.any() for value in gradients.values()), (variant, option)

    def test_all_is_more_than_everything_else(self) -> None:
        for variant in self.variants:
            model = self.case.model(variant)
            select_trainable(model, "all")
            everything = {name for name, p in model.named_parameters() if p.requires_grad}
            for option in set(self.variants[variant]) - {"all", "lora"}:
                model = self.case.model(variant)
                select_trainable(model, option)
                trained = {name for name, p in model.named_parameters() if p.requires_grad}
                extra = {name for name in trained - everything if not name.startswith(self.case.unread)}
                assert not extra, (variant, option, extra)

    def test_updates_start_at_nothing_and_merge_exactly(self) -> None:
        variant = next(variant for variant, options in self.variants.items() if "lora" in options)
        plain, model = self.case.model(variant), self.case.model(variant)
        inputs = self.case.inputs(plain)
        with torch.no_grad():
            before = plain(**inputs).loss
            select_trainable(model, ["lora"], LoRARecipe(rank=3, alpha=1.5))
            assert torch.equal(model(**inputs).loss, before)
            generator = torch.Generator().manual_seed(0)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            updated = model(**inputs).loss
            assert not torch.isclose(updated, before, atol=1e-6)
            merged = merge_lora(model.state_dict(), 0.5)
            assert merged.keys() == plain.state_dict().keys()
            plain.load_state_dict(merged)
            torch.testing.assert_close(plain(**inputs).loss, updated, rtol=1e-5, atol=1e-5)


class TestSAN(TrainableTester):
    case = SAN
    variants: ClassVar[dict[str, Any]] = {"": list(OPTIONS)}


class TestOVSeg(TrainableTester):
    case = OVSEG
    variants: ClassVar[dict[str, Any]] = {"": list(OPTIONS), "resnet": list(OPTIONS), "text_prompt": list(OPTIONS)}


class TestDeOP(TrainableTester):
    case = DEOP
    variants: ClassVar[dict[str, Any]] = {
        "": list(OPTIONS),
        "proposals": list(OPTIONS),
        "prompt": ["method", "prompts", "all"],
    }


class TestSED(TrainableTester):
    case = SED
    variants: ClassVar[dict[str, Any]] = {"": ["method", "adapter", "all", "lora"], "plain": ALL_BUT_PROMPTS}


class TestCATSeg(TrainableTester):
    case = CAT_SEG
    variants: ClassVar[dict[str, Any]] = {"": ALL_BUT_PROMPTS}


class TestESCNet(TrainableTester):
    case = ESC_NET
    variants: ClassVar[dict[str, Any]] = {
        "": list(OPTIONS),
        "boxes": list(OPTIONS),
        "no_sam": ALL_BUT_PROMPTS,
    }


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_options_and_expressions_add_up() -> None:
    model = CAT_SEG.model()
    as_published = trained(model)
    select_trainable(model, ["adapter", "attention"])
    assert trained(model) == as_published
    model = SAN.model()
    select_trainable(model, ["prompts", "lora", "^clip[.]logit_scale$"], LoRARecipe(targets=["^side_adapter.*fc1$"]))
    names = trained(model)
    assert {"clip.logit_scale", "background_embedding", "side_adapter.query_embedding"} < names
    updates = {name for name in names if "lora_" in name}
    assert len(updates) == 2 * model.config.side_num_layers
    assert all(name.startswith("side_adapter.blocks.") and ".fc1.lora_" in name for name in updates)


@pytest.mark.parametrize(
    ("trainable", "lora", "message"),
    [
        ("sidecar", None, "'sidecar' is no option .*method, adapter, prompts.* finds none of the"),
        (["("], None, "no regular expression"),
        ("adapter", LoRARecipe(), "does not ask for them"),
        ("lora", LoRARecipe(targets=["nowhere"]), "nowhere find no linear layer of SAN"),
    ],
)
def test_mistakes_are_named(trainable: Any, lora: LoRARecipe | None, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        select_trainable(SAN.model(), trainable, lora)


def test_a_rank_of_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="rank must be at least 1"):
        LoRARecipe(rank=0)


def test_without_peft_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install \"ov_segmentation\[lora\]\""):
        select_trainable(SAN.model(), "lora")


def test_merging_is_peft_s() -> None:
    """Against `merge_and_unload`, through half precision too."""
    import peft

    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    wrapped = peft.get_peft_model(layers, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    found = merge_lora(wrapped.base_model.model.state_dict(), 3.0)
    expected = wrapped.merge_and_unload().state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
