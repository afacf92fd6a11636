"""Strict dataclasses from YAML mappings: unknown keys, wrong types and forgotten keys are errors that say where."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

T = TypeVar("T")


class RecipeError(ValueError):
    """A recipe that cannot be used, with the place in it and what to do."""


def from_mapping(cls: type[T], values: Any, where: str = "") -> T:
    """Build a dataclass from a mapping, nested dataclasses included.

    Args:
        cls: a dataclass; its annotations are the schema.
        values: the mapping, as YAML gives it.
        where: dotted path of `values` in the file, for messages.

    Raises:
        RecipeError: unknown key (with the closest known one), missing key, value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where or 'The recipe'} must be a mapping of keys to values, got {values!r}.")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in values:
        if key not in fields:
            raise RecipeError(unknown_key(_join(where, str(key)), str(key), fields))
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise RecipeError(f"{where or 'The recipe'} lacks {', '.join(_join(where, name) for name in missing)}.")
    return cls(**{key: convert(value, hints[key], _join(where, key)) for key, value in values.items()})


def unknown_key(where: str, key: str, known: typing.Iterable[str]) -> str:
    """Message about an unknown key, naming the closest known one."""
    return f"Unknown key {where!r} in the recipe. {known_names(key, known)}"


def known_names(name: str, known: typing.Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest known one, and all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known here: {', '.join(known)}."


def convert(value: Any, annotation: Any, where: str) -> Any:
    """`value` as the annotation asks, or a `RecipeError`.

    Integers count as floats, and so does text like `1e-4`, which YAML 1.1 reads as a string.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, where)
    if origin is Literal:
        if value in arguments:
            return value
        raise RecipeError(f"{where} must be one of {', '.join(map(repr, arguments))}, got {value!r}.")
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise RecipeError(f"{where} must be a list, got {value!r}.")
        fixed = origin is tuple and Ellipsis not in arguments
        if fixed and len(value) != len(arguments):
            raise RecipeError(f"{where} must hold {len(arguments)} values, got {len(value)}.")
        inner = arguments if fixed else [arguments[0]] * len(value)
        return origin(convert(item, inner[index], f"{where}.{index}") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise RecipeError(f"{where} must be a mapping, got {value!r}.")
        return {str(key): convert(item, arguments[1], _join(where, str(key))) for key, item in value.items()}
    if dataclasses.is_dataclass(annotation):
        return from_mapping(annotation, value, where)
    return _convert_scalar(value, annotation, where)


def _convert_union(value: Any, members: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in members:
        return None
    errors = []
    for member in members:
        if member is type(None):
            continue
        try:
            return convert(value, member, where)
        except RecipeError as error:
            errors.append(str(error))
    raise RecipeError("; or ".join(errors))


def _convert_scalar(value: Any, annotation: type, where: str) -> Any:
    if annotation is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(value, annotation) and not (annotation is int and isinstance(value, bool)):
        return value
    raise RecipeError(f"{where} must be of type {annotation.__name__}, got {value!r} ({type(value).__name__}).")


def override(values: Any, assignment: str) -> None:
    """Apply `key.inner.0=value` to a nested mapping in place; the value is YAML. `from_mapping` finds unknown keys.

    Raises:
        RecipeError: no `=`, or a path through something that is neither a mapping nor a list.
    """
    path, separator, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise RecipeError(f"--set takes key=value with a dotted key, got {assignment!r}.")
    for depth, key in enumerate(keys):
        where = ".".join(keys[:depth]) or "the recipe"
        last = depth == len(keys) - 1
        if isinstance(values, list):
            if not key.isdigit() or int(key) >= len(values):
                raise RecipeError(f"--set {path}: {where} is a list of {len(values)}, {key!r} is no index of it.")
            key = int(key)
        elif not isinstance(values, dict):
            raise RecipeError(f"--set {path}: {where} is {values!r}, it has no key {key!r}.")
        if last:
            values[key] = yaml.safe_load(text)
        elif isinstance(values, dict) and values.get(key) is None:
            values[key] = {}
        values = None if last else values[key]


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
