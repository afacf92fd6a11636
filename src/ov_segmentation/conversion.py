"""Conversion of original checkpoints: safe reading, key rules, and a complete-or-error loading.

A method's `convert_<m>.py` lists rules. Each source key must match a rule or a reason to drop it, each key of our model
must be filled, and shapes must agree: anything else is a `ConversionError` that names the keys.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .numpy_pickles import read_numpy_pickle

StateDict = dict[str, torch.Tensor]
NESTS = ("model", "state_dict")
LISTED_KEYS = 40
# what torch.save writes for numpy arrays and scalars, which some training states hold beside the weights
_NUMPY_CLASSES = [
    np.ndarray,
    np.dtype,
    np.empty(0).__reduce__()[0],  # multiarray._reconstruct, whose module numpy 2 has renamed
    *{type(np.dtype(kind)) for kind in ("float32", "float64", "int32", "int64", "uint8", "bool")},
]


class ConversionError(ValueError):
    """A checkpoint that cannot be converted. `keys`: all keys concerned (the message lists the first ones)."""

    def __init__(self, message: str, keys: Iterable[str] = ()) -> None:
        self.keys = list(keys)
        super().__init__(message + list_keys(self.keys))


def list_keys(keys: Sequence[str]) -> str:
    """Keys, one per line, cut after the first `LISTED_KEYS`."""
    lines = [f"\n  {key}" for key in keys[:LISTED_KEYS]]
    return "".join(lines) + (f"\n  ... and {len(keys) - LISTED_KEYS} more" if len(keys) > LISTED_KEYS else "")


# ---------------------------------------------------------------------- reading


def read_checkpoint(path: str | os.PathLike) -> StateDict:
    """The weights in a checkpoint file, without ever running code from it.

    Args:
        path: a file of `torch.save` (weights directly or under "model" or "state_dict", names with or without "module."
            in front), safetensors, or a plain pickle of numpy arrays with the ending .pkl, as detectron2 has them.

    Raises:
        FileNotFoundError: there is no such file.
        ConversionError: the file is truncated, holds objects that are no weights, or no weights at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    content = _read(path)
    for nest in NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            content = content[nest]
    if not isinstance(content, Mapping):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a dictionary of weights.")
    weights = {key: torch.as_tensor(value) for key, value in content.items() if _is_array(value)}
    if not weights:
        raise ConversionError(f"{path} holds no tensors.", map(str, content))
    if all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
    return weights


def _is_array(value: object) -> bool:
    return isinstance(value, (torch.Tensor, np.ndarray))


def _read(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".pkl" and not zipfile.is_zipfile(path):
            return read_numpy_pickle(path)
        with torch.serialization.safe_globals(_NUMPY_CLASSES):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|WeightsUnpickler error: Unsupported \w+|class) ([\w.]+)", str(error))
        what = f" ({refused[1]})" if refused else ""
        raise ConversionError(
            f"{path} is damaged or holds objects{what} that would run code when read. Only plain weights are read "
            f"(weights_only=True, arrays of a .pkl); nothing was executed. A file that you trust can be saved again as "
            f"torch.save(module.state_dict(), file) or in safetensors format."
        ) from error
    except (EOFError, RuntimeError, SafetensorError, OSError, ValueError, KeyError) as error:
        if "TorchScript" in str(error):
            reason = "it is a TorchScript archive: save its state_dict() with torch.save first"
        else:
            reason = f"is the download complete? ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        raise ConversionError(f"{path} ({path.stat().st_size:,} bytes) cannot be read: {reason}.") from error


# ---------------------------------------------------------------------- rules


@dataclass(frozen=True)
class Rule:
    r"""One source key to one or several target keys.

    Args:
        pattern: a regular expression for the whole source key.
        targets: templates of the target keys (`\1`: the pattern's first group).
        transform: the source tensor to the target tensor, or to a tuple of them; None: as it is.
    """

    pattern: str
    targets: str | tuple[str, ...]
    transform: Callable[[torch.Tensor], torch.Tensor | tuple[torch.Tensor, ...]] | None = None


@dataclass(frozen=True)
class Drop:
    """Source keys, by regular expression, that our model has no use for, and why."""

    pattern: str
    reason: str


class KeyRules:
    """The rules of one checkpoint layout, tried in order.

    Args:
        rules: `Rule` and `Drop`.
        rename: applied to a source key before the rules see it (renumbered blocks, other prefixes).
    """

    def __init__(self, rules: Iterable[Rule | Drop], rename: Callable[[str], str] | None = None) -> None:
        self._rules = [(re.compile(rule.pattern), rule) for rule in rules]
        self._rename = rename or (lambda key: key)

    def _find(self, key: str) -> tuple[list[str] | str, Rule | None] | None:
        renamed = self._rename(key)
        for pattern, rule in self._rules:
            match = pattern.fullmatch(renamed)
            if match is None:
                continue
            if isinstance(rule, Drop):
                return rule.reason, None
            targets = (rule.targets,) if isinstance(rule.targets, str) else rule.targets
            return [match.expand(target) for target in targets], rule
        return None

    def map_keys(self, keys: Iterable[str]) -> dict[str, list[str] | str]:
        """Each source key -> its target keys, or the reason why it is dropped.

        Raises:
            ConversionError: keys without a rule.
        """
        found = {key: self._find(key) for key in keys}
        unknown = [key for key, result in found.items() if result is None]
        if unknown:
            raise ConversionError(
                f"{len(unknown)} of {len(found)} keys have no place in this model; is the checkpoint of another method "
                f"or variant? Unknown keys:",
                unknown,
            )
        return {key: result[0] for key, result in found.items()}

    def convert(self, source: StateDict) -> StateDict:
        """The source tensors under target keys.

        Raises:
            ConversionError: keys without a rule, or tensors that a rule cannot take apart.
        """
        self.map_keys(source)
        target: StateDict = {}
        for key, tensor in source.items():
            names, rule = self._find(key)
            if rule is None:
                continue
            try:
                tensors = rule.transform(tensor) if rule.transform else tensor
            except (RuntimeError, IndexError, ValueError) as error:
                raise ConversionError(f"A tensor of shape {list(tensor.shape)} does not fit:", [key]) from error
            tensors = (tensors,) if isinstance(tensors, torch.Tensor) else tensors
            for name, value in zip(names, tensors, strict=True):
                target[name] = value.contiguous()
        return target


def split_in_three(packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Query, key and value from a packed projection, in this order."""
    return packed.chunk(3)


def transposed(weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight` to the weight of a Linear."""
    return weight.T


def pointwise(weight: torch.Tensor) -> torch.Tensor:
    """The weight of a 1x1 convolution to that of a Linear."""
    return weight.flatten(1)


def load_converted(model: nn.Module, weights: StateDict, later_parts: str | None = None) -> None:
    """Fill `model` with converted weights.

    Args:
        later_parts: a regular expression of keys that may be left as they were initialised; a warning names their
            parts. None: every key must be filled.

    Raises:
        ConversionError: keys left over or not filled, or shapes that differ.
    """
    wanted = model.state_dict()
    unknown = [key for key in weights if key not in wanted]
    if unknown:
        raise ConversionError("The configuration has no place for these weights; is it of another variant?", unknown)
    wrong = [
        f"{key}: {list(value.shape)} in the checkpoint, {list(wanted[key].shape)} in the model"
        for key, value in weights.items()
        if value.shape != wanted[key].shape
    ]
    if wrong:
        raise ConversionError(
            f"{len(wrong)} weights have another shape than the configuration asks for; is the checkpoint of another "
            f"variant?",
            wrong,
        )
    unset = [key for key in wanted if key not in weights]
    later = [key for key in unset if later_parts is not None and re.match(later_parts, key)]
    if empty := [key for key in unset if key not in later]:
        raise ConversionError(f"The checkpoint leaves {len(empty)} of {len(wanted)} weights of the model unset:", empty)
    if later:
        parts = ", ".join(sorted({key.partition(".")[0] for key in later}))
        warnings.warn(
            f"The checkpoint is of an earlier training stage and holds nothing of {parts}: left as initialised, still "
            f"to be trained.",
            stacklevel=3,
        )
    model.load_state_dict(weights, strict=False)


def fits(weights: StateDict, wanted: Mapping[str, torch.Tensor]) -> bool:
    """Whether converted weights have exactly the keys and shapes of a model's state dict."""
    return {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in wanted.items()}
