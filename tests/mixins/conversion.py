"""The checks that every conversion has to pass; a method's test class names its fixtures."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoImageProcessor, AutoProcessor

from ov_segmentation import AutoModelForOpenVocabularySegmentation, conversion_cli
from ov_segmentation.auto import METHODS, Method
from ov_segmentation.conversion import ConversionError
from tests.parity.hparams import build
from tests.tiny import TOKENIZER

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"


class PickleBomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


class ConversionTesterMixin:
    """Subclass it as `class TestXConversion(ConversionTesterMixin)` and give the attributes.

    Attributes:
        method: model type.
        case: folder of a fixture below `tests/fixtures`.
        manifests: folder of the `keys_full_*.json` below `tests/fixtures`, and the names that this method converts.
        partial_variants: variants that fill a part of the model.
        relatives: fixtures among another method's that this method converts too.
    """

    method: ClassVar[str]
    case: ClassVar[str]
    manifests: ClassVar[tuple[str, tuple[str, ...]]]
    partial_variants: ClassVar[tuple[str, ...]] = ()
    relatives: ClassVar[tuple[str, ...]] = ()

    @property
    def rules(self) -> ModuleType:
        return importlib.import_module(f"conversion.convert_{self.method}")

    @property
    def row(self) -> Method:
        return next(method for method in METHODS if method.model_type == self.method)

    @property
    def checkpoint(self) -> Path:
        return FIXTURES / self.case / "original.pth"

    @property
    def clip_checkpoint(self) -> Path | None:
        """Where the checkpoint lacks CLIP."""
        return None

    def config(self) -> Any:
        """The configuration of the fixture."""
        return build(self.method, json.loads((FIXTURES / self.case / "hparams.json").read_text()))[0]

    def weights(self) -> dict[str, torch.Tensor]:
        """The original weights of the fixture."""
        content = torch.load(self.checkpoint, weights_only=True)
        return dict(content.get("model", content))

    def convert(self, checkpoint: Path, config: Any | None = None) -> torch.nn.Module:
        return self.rules.convert(checkpoint, config or self.config(), self.clip_checkpoint)

    def saved(self, weights: Any, path: Path) -> Path:
        torch.save(weights, path)
        return path

    # ------------------------------------------------------------------ keys

    def test_released_key_sets_are_complete(self) -> None:
        folder, names = self.manifests
        assert set(names) <= set(self.rules.VARIANTS)
        for name in names:
            config = self.rules.VARIANTS[name]()
            keys = list(json.loads((FIXTURES / folder / f"keys_full_{name}.json").read_text()))
            mapping = self.rules.map_keys(keys, config)
            assert set(mapping) == set(keys)
            with torch.device("meta"):
                wanted = set(AutoModelForOpenVocabularySegmentation.from_config(config).state_dict())
            filled = [key for targets in mapping.values() if not isinstance(targets, str) for key in targets]
            assert len(filled) == len(set(filled)), "two source keys for one target"
            assert set(filled) <= wanted
            assert set(filled) == wanted or name in self.partial_variants
            reasons = [targets for targets in mapping.values() if isinstance(targets, str)]
            assert all(len(reason) > 10 for reason in reasons)

    def test_every_weight_arrives(self) -> None:
        """No weight of the converted model is what initialisation left there."""
        torch.manual_seed(0)
        first = self.convert(self.checkpoint).state_dict()
        torch.manual_seed(1)
        second = self.convert(self.checkpoint).state_dict()
        assert [name for name in first if not torch.equal(first[name], second[name])] == []

    def test_wrapping_does_not_matter(self, tmp_path: Path) -> None:
        weights = self.weights()
        parallel = {f"module.{key}": value for key, value in weights.items()}
        expected = self.convert(self.checkpoint).state_dict()
        for content in (weights, {"state_dict": weights, "epoch": 3}, {"model": parallel}):
            found = self.convert(self.saved(content, tmp_path / "wrapped.pth")).state_dict()
            assert all(torch.equal(found[name], value) for name, value in expected.items())

    def test_unknown_and_missing_keys_are_errors(self, tmp_path: Path) -> None:
        weights = self.weights()
        with pytest.raises(ConversionError, match="something_new"):
            self.convert(self.saved({**weights, "something_new.weight": torch.zeros(1)}, tmp_path / "more.pth"))
        mapping = self.rules.map_keys(weights, self.config())
        gone = next(key for key, targets in mapping.items() if not isinstance(targets, str))
        lost = mapping[gone][0]
        del weights[gone]
        with pytest.raises(ConversionError, match=lost.replace(".", r"\.")) as caught:
            self.convert(self.saved(weights, tmp_path / "fewer.pth"))
        assert lost in caught.value.keys

    # ------------------------------------------------------------------ bad files

    def test_a_missing_file_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
            self.convert(tmp_path / "nowhere.pth")

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
    def test_a_truncated_file_is_an_error(self, tmp_path: Path, share: float) -> None:
        content = self.checkpoint.read_bytes()
        path = tmp_path / "truncated.pth"
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ConversionError, match=r"truncated\.pth"):
            self.convert(path)

    @pytest.mark.parametrize("zipped", [True, False])
    def test_code_in_a_pickle_is_refused(self, tmp_path: Path, zipped: bool) -> None:
        mark = tmp_path / "executed"
        path = tmp_path / "malicious.pth"
        content = {"model": self.weights(), "extra": PickleBomb(mark)}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ConversionError, match="nothing was executed"):
            self.convert(path)
        assert not mark.exists()

    def test_something_else_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ConversionError, match="list"):
            self.convert(self.saved([1, 2], tmp_path / "list.pth"))
        with pytest.raises(ConversionError, match="no tensors"):
            self.convert(self.saved({"epoch": 3}, tmp_path / "empty.pth"))
        (tmp_path / "page.pth").write_text("<html>Please log in</html>")
        with pytest.raises(ConversionError, match=r"page\.pth"):
            self.convert(tmp_path / "page.pth")

    def test_another_method_is_an_error(self) -> None:
        mine = FIXTURES / Path(self.case).parts[0]
        foreign = [path for path in FIXTURES.glob("*/*/original.pth") if mine not in path.parents]
        strangers = [path for path in foreign if path.parent.name not in self.relatives]
        assert strangers
        for stranger in strangers:
            with pytest.raises(ConversionError, match="another method") as caught:
                self.convert(stranger)
            assert caught.value.keys

    def test_another_variant_is_an_error(self) -> None:
        with pytest.raises(ConversionError, match="variant"), torch.device("meta"):
            self.convert(self.checkpoint, next(iter(self.rules.VARIANTS.values()))())

    # ------------------------------------------------------------------ command line

    def arguments(self, tmp_path: Path) -> list[str]:
        self.config().save_pretrained(tmp_path / "config")
        files = ["--config", str(tmp_path / "config" / "config.json")]
        if self.clip_checkpoint:
            files += ["--clip-checkpoint", str(self.clip_checkpoint)]
        return ["--checkpoint", str(self.checkpoint), "--output", str(tmp_path / "out"), *files]

    def assert_converted(self, folder: Path) -> None:
        loaded = AutoModelForOpenVocabularySegmentation.from_pretrained(folder)
        expected = self.convert(self.checkpoint).state_dict()
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in expected.items())
        assert {n for n, p in loaded.named_parameters() if p.requires_grad}

    def test_command_line_in_a_process(self, tmp_path: Path) -> None:
        """With neither tokenizer nor network: model and image processor, and a warning."""
        command = [sys.executable, f"conversion/convert_{self.method}.py", *self.arguments(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=self.environment())
        assert done.returncode == 0, done.stderr
        assert "--tokenizer names a local folder" in done.stderr
        self.assert_converted(tmp_path / "out")
        assert type(AutoImageProcessor.from_pretrained(tmp_path / "out")).__name__ == self.row.image_processor
        card = ROOT / "model_cards" / f"{self.method}.md"
        assert (tmp_path / "out" / "README.md").is_file() == card.is_file()

    @staticmethod
    def environment() -> dict[str, str]:
        import os

        return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}

    def test_command_line_with_a_tokenizer(self, tmp_path: Path) -> None:
        TOKENIZER.save_pretrained(tmp_path / "tokenizer")
        conversion_cli.main(self.method, [*self.arguments(tmp_path), "--tokenizer", str(tmp_path / "tokenizer")])
        processor = AutoProcessor.from_pretrained(tmp_path / "out")
        assert type(processor).__name__ == self.row.processor
        assert processor(text=["road"], return_tensors="pt")["input_ids"].ndim == 3
        self.assert_converted(tmp_path / "out")

    def test_a_tokenizer_that_was_asked_for_must_be_there(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="no_such_tokenizer"):
            conversion_cli.main(
                self.method, [*self.arguments(tmp_path), "--tokenizer", str(tmp_path / "no_such_tokenizer")]
            )
        assert not (tmp_path / "out").exists()

    def test_unknown_variants_are_refused(self, capsys: pytest.CaptureFixture) -> None:
        with pytest.raises(SystemExit):
            conversion_cli.main(self.method, ["--checkpoint", "x", "--output", "y", "--variant", "huge"])
        assert next(iter(self.rules.VARIANTS)) in capsys.readouterr().err

    def test_a_configuration_of_something_else_is_an_error(self, tmp_path: Path) -> None:
        file, arguments = tmp_path / "config.json", self.arguments(tmp_path)
        arguments[arguments.index("--config") + 1] = str(file)
        for content, message in (
            ("{", "is no JSON"),
            ("[1]", "holds a list"),
            ('{"model_type": "esc_net"}', f"model type 'esc_net', not one of '{self.method}'"),
        ):
            file.write_text(content)
            with pytest.raises(ConversionError, match=message):
                conversion_cli.main(self.method, arguments)

    def test_a_size_that_no_release_has_needs_a_configuration(self, tmp_path: Path) -> None:
        arguments = ["--checkpoint", str(self.checkpoint), "--output", str(tmp_path / "out")]
        if self.clip_checkpoint:
            arguments += ["--clip-checkpoint", str(self.clip_checkpoint)]
        with pytest.raises(ConversionError, match="--config"):
            conversion_cli.main(self.method, arguments)
