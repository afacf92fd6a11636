"""The command line of all `conversion/convert_<method>.py`."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedConfig, PreTrainedModel

from .auto import METHODS, Method, load_class
from .conversion import ConversionError
from .hub import HubError, push_checkpoint
from .model_card import CARD, History, write_card


def main(model_type: str, arguments: Sequence[str] | None = None) -> None:
    """Convert a checkpoint of a method: `python conversion/convert_<method>.py --checkpoint FILE --output DIR ...`."""
    method = next(method for method in METHODS if method.model_type == model_type)
    rules = importlib.import_module(f"{__package__}.models.{model_type}.convert_{model_type}")
    options = _parser(method, rules).parse_args(arguments)
    config, variant = _config(method, rules, options)
    tokenizer = _tokenizer(options.tokenizer, rules.DEFAULT_TOKENIZER)
    model = rules.convert(options.checkpoint, config, options.clip_checkpoint)
    processors = image_processor_of(method, rules, config), tokenizer, prompt_templates_of(rules, config)
    save_folder(method, model, *processors, options.output)
    history = History("converted", settings={"Checkpoint": options.checkpoint.name, "Variant": variant or "own size"})
    if not write_card(options.output, model_name=options.output.resolve().name, history=history):
        print(f"{options.output / CARD} was written or edited by somebody and stays as it is.")
    print(f"{method.model} ({sum(p.numel() for p in model.parameters()):,} parameters) written to {options.output}")
    if options.push_to_hub:
        print(f"Uploaded: {push_checkpoint(options.output, options.push_to_hub).url}")


def run(model_type: str) -> None:
    """`main` for scripts: what is wrong with a file is a message, which a traceback would bury."""
    try:
        main(model_type)
    except (ConversionError, OSError, HubError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _parser(method: Method, rules: ModuleType) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=f"Convert an original {method.name} checkpoint to a folder for transformers."
    )
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="FILE", help="the original checkpoint")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--variant", choices=sorted(rules.VARIANTS), help="release; default: the one whose shapes fit")
    size.add_argument("--config", type=Path, metavar="FILE", help="config.json of another size")
    parser.add_argument("--clip-checkpoint", type=Path, metavar="FILE", help="CLIP, where the checkpoint lacks it")
    parser.add_argument(
        "--tokenizer", metavar="ID-OR-DIR", help=f"tokenizer of the processor (default: {rules.DEFAULT_TOKENIZER})"
    )
    parser.add_argument("--push-to-hub", metavar="ID", help="also upload the folder to this repository")
    return parser


def _config(method: Method, rules: ModuleType, options: argparse.Namespace) -> tuple[PreTrainedConfig, str | None]:
    if options.config is not None:
        return _given_config(method, options.config), None
    variant = options.variant or find_variant(rules, options.checkpoint, options.clip_checkpoint)
    return rules.VARIANTS[variant](), variant


def _given_config(method: Method, file: Path) -> PreTrainedConfig:
    """The configuration in a file.

    Raises:
        ConversionError: it holds no configuration of the method.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{file} is no JSON ({error}): --config takes a config.json.") from error
    found = values.get("model_type", method.model_type) if isinstance(values, dict) else None
    if found != method.model_type:
        what = type(values).__name__ if found is None else f"configuration of model type {found!r}"
        raise ConversionError(f"{file} holds a {what}, not one of {method.model_type!r}, which --config takes here.")
    return load_class(method.config).from_dict(values)


def find_variant(rules: ModuleType, checkpoint: Path, clip_checkpoint: Path | None = None) -> str:
    """The release whose keys and shapes a checkpoint has.

    Raises:
        ConversionError: none fits, or several do.
    """
    failures, fitting = [], []
    for name, make_config in rules.VARIANTS.items():
        try:
            # shapes are all that matters here
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rules.convert(checkpoint, make_config(), clip_checkpoint)
        except ConversionError as error:
            # what is wrong, and the first key of which it is true
            failures.append(f"{name}: {' '.join(line.strip() for line in str(error).splitlines()[:2])}")
        else:
            fitting.append(name)
    fitting = narrowed(rules, checkpoint, fitting)
    if len(fitting) != 1:
        raise ConversionError(
            f"{checkpoint} fits {len(fitting) or 'none of the'} releases: name one with --variant, or give its size "
            f"with --config.",
            fitting or failures,
        )
    return fitting[0]


def narrowed(rules: ModuleType, checkpoint: Path, fitting: list[str]) -> list[str]:
    """Of several releases that a checkpoint fits, the one that its rules' `preferred_variant`, if any, names."""
    prefer = getattr(rules, "preferred_variant", None)
    return fitting if prefer is None or len(fitting) < 2 else [prefer(checkpoint)]


def _tokenizer(given: str | None, default: str) -> Any | None:
    """The tokenizer asked for, or the default one where it can be had."""
    if given is not None:
        return _given_tokenizer(given)
    try:
        return AutoTokenizer.from_pretrained(default)
    except OSError:
        warnings.warn(
            f"The tokenizer {default} is neither in the cache nor to be had from the Hub: the folder holds model and "
            f"image processor only. --tokenizer names a local folder.",
            stacklevel=2,
        )
        return None


def _given_tokenizer(place: str) -> Any:
    """The tokenizer of a folder or Hub id; a folder of OpenAI's two files alone, which name no class, is CLIP's.

    Raises:
        ConversionError: a folder without a tokenizer.
    """
    files = {file.name for file in Path(place).glob("*") if file.suffix in (".json", ".txt")}
    if files == {"vocab.json", "merges.txt"}:
        return CLIPTokenizer.from_pretrained(place)
    try:
        return AutoTokenizer.from_pretrained(place)
    except ValueError as error:
        raise ConversionError(
            f"There is no tokenizer in {place}: it holds what CLIPTokenizer.save_pretrained writes, or vocab.json and "
            f"merges.txt."
        ) from error


def image_processor_of(method: Method, rules: ModuleType, config: PreTrainedConfig) -> Any:
    """The method's image processor, with the values that its rules' `image_processor_values(config)`, if any, gives."""
    values_of = getattr(rules, "image_processor_values", None)
    return load_class(method.image_processor)(**({} if values_of is None else values_of(config)))


def prompt_templates_of(rules: ModuleType, config: PreTrainedConfig) -> list[str] | None:
    """The templates that the method's rules' `prompt_templates(config)`, if any, gives; None: the processor's own."""
    templates_of = getattr(rules, "prompt_templates", None)
    return None if templates_of is None else templates_of(config)


def save_folder(
    method: Method,
    model: PreTrainedModel,
    image_processor: Any,
    tokenizer: Any | None,
    prompt_templates: list[str] | None,
    output: Path,
) -> None:
    """Write the model, and its processor, or its image processor alone when there is no tokenizer."""
    model.save_pretrained(output)
    if tokenizer is None:
        image_processor.save_pretrained(output)
    else:
        load_class(method.processor)(image_processor, tokenizer, prompt_templates).save_pretrained(output)
