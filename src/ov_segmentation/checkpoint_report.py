"""What a checkpoint is, and whether it is whole: the report of `ov-segment doctor`."""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor, PreTrainedModel
from transformers.utils import logging

from .auto import METHODS, Method, load_class
from .conversion import ConversionError, StateDict, read_checkpoint
from .conversion_cli import narrowed
from .download_errors import loading_explained
from .layers.clip_stem import load_clip

LISTED = 10
ORIGINAL_SUFFIXES = (".pth", ".pt", ".bin", ".pkl", ".ckpt", ".safetensors")


@dataclass
class CheckpointReport:
    """A report, built up fact by fact.

    Attributes:
        facts: name and value.
        problems: what keeps the checkpoint from being used; empty for a whole one.
        advice: what to do next.
    """

    facts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def add(self, name: str, value: Any) -> None:
        """Note a fact."""
        self.facts.append((name, str(value)))

    def text(self) -> str:
        """For a terminal."""
        width = max((len(name) for name, _ in self.facts), default=0)
        lines = [f"{name:{width}}  {value}" for name, value in self.facts]
        if self.problems:
            lines += ["", f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}:"]
            lines += [f"  - {problem}" for problem in self.problems]
        elif not self.advice:
            lines += ["", "No problems found."]
        return "\n".join([*lines, *([""] if self.advice else []), *self.advice])


def examine(checkpoint: str | Path, revision: str | None = None) -> CheckpointReport:
    """Examine a folder or Hub id of a converted model, or the file of an original's checkpoint."""
    report, path = CheckpointReport(), Path(checkpoint)
    report.add("checkpoint", checkpoint)
    if path.is_file():
        if path.suffix == ".safetensors" and (path.parent / "config.json").is_file():
            report.advice.append(f"This is the weights file of a folder, so the folder is examined: {path.parent}")
            _examine_folder(report, path.parent, None)
        else:
            _examine_original(report, path)
    else:
        _examine_folder(report, checkpoint, revision)
    return report


# ---------------------------------------------------------------------- folders and Hub ids


def _examine_folder(report: CheckpointReport, checkpoint: str | Path, revision: str | None) -> None:
    path = Path(checkpoint)
    if path.is_dir() and not (path / "config.json").is_file():
        report.problems.append("The folder has no config.json: it is no checkpoint that from_pretrained loads.")
        if (path / "model" / "config.json").is_file():
            report.advice.append(f"It is the folder of a training run: its checkpoint is {path / 'model'}")
        originals = sorted(file for file in path.iterdir() if file.suffix in ORIGINAL_SUFFIXES)
        report.advice += [f"It holds {file.name}: try `ov-segment doctor {file}`" for file in originals[:LISTED]]
        return
    try:
        with loading_explained(checkpoint):
            config = AutoConfig.from_pretrained(checkpoint, revision=revision)
    except (OSError, ValueError) as error:
        report.problems.append(f"The configuration cannot be read: {_first_line(error)}")
        return
    method = next((method for method in METHODS if method.model_type == config.model_type), None)
    if config.model_type == "clip":
        report.add("method", "none: a plain CLIP, with which DeOP segments without training")
        _add_facts(report, _load(report, load_clip, checkpoint, revision))
        return
    if method is None:
        known = ", ".join(method.model_type for method in METHODS)
        report.problems.append(f"Its model type is {config.model_type!r}, which is none of {known}.")
        return
    report.add("method", f"{method.name} ({method.model})")
    model = _load(report, load_class(method.model).from_pretrained, checkpoint, revision)
    if model is not None:
        report.add("variant", " or ".join(released_variants(method, model)) or "no released size")
    _add_facts(report, model)
    report.add("licence of the weights", config.weights_license or "not stated")
    _examine_processor(report, checkpoint, revision, method, config)


def _add_facts(report: CheckpointReport, model: PreTrainedModel | None) -> None:
    if model is None:
        return
    report.add("parameters", f"{sum(p.numel() for p in model.parameters()):,}")
    report.add("dtype", ", ".join(f"{dtype} ({n} tensors)".removeprefix("torch.") for dtype, n in _dtypes(model)))
    for name, grid in position_grids(model):
        report.add("position grid", f"{grid} ({name})")


def _load(
    report: CheckpointReport, load: Callable[..., Any], checkpoint: str | Path, revision: str | None
) -> PreTrainedModel | None:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of keys is what this report says
    try:
        model, info = load(
            checkpoint,
            revision=revision,
            dtype="auto",
            allow_missing_keys=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    # whatever a damaged file makes the libraries raise is a finding
    except Exception as error:
        report.problems.append(f"The weights cannot be loaded: {type(error).__name__}: {_first_line(error)}")
        return None
    finally:
        logging.set_verbosity(verbosity)
    mismatched = [f"{key} ({list(found)} instead of {list(wanted)})" for key, found, wanted in info["mismatched_keys"]]
    missing = set(info["missing_keys"]) - {key for key, _, _ in info["mismatched_keys"]}
    unset = {key for key, _, _ in info["mismatched_keys"]} | missing
    bad = [name for name, value in model.state_dict().items() if name not in unset and not _is_finite(value)]
    for names, what in (
        (sorted(missing), "weights are missing"),
        (sorted(info["unexpected_keys"]), "keys have no place in the model"),
        (mismatched, "weights have another shape than the configuration asks for"),
        (bad, "weights hold NaN or infinite values"),
    ):
        if names:
            report.problems.append(f"{len(names)} {what}: {_listed(names)}")
    return model


def _is_finite(value: torch.Tensor) -> bool:
    return not value.is_floating_point() or bool(value.isfinite().all())


def _dtypes(model: PreTrainedModel) -> list[tuple[torch.dtype, int]]:
    return Counter(value.dtype for value in model.state_dict().values()).most_common()


def released_variants(method: Method, model: PreTrainedModel) -> list[str]:
    """The releases that have the model's keys and shapes; training on other data may be all that tells them apart."""
    rules, shapes = _rules(method), _shapes(model)
    fitting = []
    for name, make_config in (rules.VARIANTS if rules else {}).items():
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if _shapes(load_class(method.model)(make_config())) == shapes:
                fitting.append(name)
    return fitting


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def position_grids(model: torch.nn.Module) -> list[tuple[str, str]]:
    """Name and form of every learned position embedding of pictures."""
    grids = []
    for name, value in model.named_parameters():
        last = name.removesuffix(".weight").rpartition(".")[2]
        if not last.startswith("pos") or "embed" not in last or "text_model" in name:
            continue
        if "shared_embedding" in name:  # SAM's random frequencies, for points anywhere
            continue
        shape = [size for size in value.shape if size != 1]
        if len(shape) == 3:  # channels first or last
            grids.append((name, " x ".join(map(str, shape))))
            continue
        positions = shape[0]
        for tokens in (0, 1):
            side = math.isqrt(positions - tokens)
            if side * side == positions - tokens:
                grids.append((name, f"{side} x {side}" + (" and a class token" if tokens else "")))
                break
        else:
            grids.append((name, f"{positions} positions"))
    return grids


def _examine_processor(
    report: CheckpointReport, checkpoint: str | Path, revision: str | None, method: Method, config: Any
) -> None:
    try:
        processor = AutoProcessor.from_pretrained(checkpoint, revision=revision)
    # whatever a damaged file makes the libraries raise is a finding
    except Exception as error:
        report.problems.append(f"The processor cannot be loaded: {type(error).__name__}: {_first_line(error)}")
        return
    tokenizer, image_processor = processor.tokenizer, processor.image_processor
    report.add("processor", f"{type(processor).__name__} with {type(tokenizer).__name__}")
    report.add("picture size", _plain(image_processor.size))
    if type(image_processor).__name__ != method.image_processor:
        report.problems.append(
            f"Its image processor is {type(image_processor).__name__}, not {method.image_processor}."
        )
    text = next(
        (c.text_config for c in (getattr(config, "clip_config", None), config) if hasattr(c, "text_config")), None
    )
    if text is None:
        return
    if len(tokenizer) > text.vocab_size:
        report.problems.append(f"The tokenizer has {len(tokenizer)} tokens, the text tower {text.vocab_size}.")
    if tokenizer.eos_token_id != text.eos_token_id:
        report.problems.append(
            f"The end of a text is token {tokenizer.eos_token_id} to the tokenizer, {text.eos_token_id} to the model."
        )


def _plain(size: Any) -> str:
    return ", ".join(
        f"{key} {size[key]}" for key in ("shortest_edge", "longest_edge", "height", "width") if size.get(key)
    )


# ---------------------------------------------------------------------- files of the originals


def _examine_original(report: CheckpointReport, file: Path) -> None:
    try:
        weights = read_checkpoint(file)
    except ConversionError as error:
        report.problems.append(str(error))
        return
    report.add("tensors", f"{len(weights)}, {sum(value.numel() for value in weights.values()):,} values")
    fitting, similar = [], []
    for method in METHODS:
        rules = _rules(method)
        variants = _variants_with_these_keys(rules, weights) if rules else []
        similar += [method] if variants else []
        variants = [name for name in variants if _converts(rules, file, name)]
        fitting += [(method, name) for name in narrowed(rules, file, variants)]
    for method, name in fitting:
        report.add("method", f"{method.name}, as its authors saved it")
        report.add("variant", name)
        report.advice.append(
            f"Convert it: python conversion/convert_{method.model_type}.py --checkpoint {file} --variant {name} "
            f"--output DIR"
        )
    if fitting:
        return
    if similar:
        names = " or ".join(method.name for method in similar)
        report.problems.append(f"The keys are those of {names}, but no released size has these shapes.")
        report.advice += [
            f"Give the size: python conversion/convert_{method.model_type}.py --checkpoint {file} --config config.json "
            f"--output DIR (where CLIP's weights are in a file of their own, also --clip-checkpoint FILE)"
            for method in similar
        ]
    else:
        report.problems.append(f"Its keys are of no method that is known here: {_listed(list(weights))}")


def _rules(method: Method) -> ModuleType | None:
    """The conversion rules of a method; None where there is no original to convert."""
    name = f"{__package__}.models.{method.model_type}.convert_{method.model_type}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def _variants_with_these_keys(rules: ModuleType, weights: StateDict) -> list[str]:
    names = []
    for name, make_config in rules.VARIANTS.items():
        try:
            rules.map_keys(list(weights), make_config())
        except ConversionError:
            continue
        names.append(name)
    return names


def _converts(rules: ModuleType, file: Path, variant: str) -> bool:
    try:
        # shapes are all that matters here
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rules.convert(file, rules.VARIANTS[variant]())
    except ConversionError:
        return False
    return True


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - LISTED
    return ", ".join(_upto(names)) + (f" and {rest} more" if rest > 0 else "")


def _upto(names: Iterable[str]) -> list[str]:
    return [name for _, name in zip(range(LISTED), names)]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no reason given"
