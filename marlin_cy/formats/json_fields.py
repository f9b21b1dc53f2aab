"""Reading JSON files, and typed fields of their objects. A :class:`CheckpointError` names an invalid value."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, overload

from marlin_cy.errors import CheckpointError

__all__ = [
    "JsonObject",
    "StrPath",
    "check_fetched",
    "finite",
    "optional",
    "positive",
    "read_json",
    "required",
]

LFS_POINTER = b"version https://git-lfs"
"""The beginning of a Git LFS pointer. Source: the Git LFS specification, ``docs/spec.md``."""

StrPath: TypeAlias = "str | os.PathLike[str]"
JsonObject: TypeAlias = "dict[str, Any]"

T = TypeVar("T")


def read_json(path: StrPath) -> JsonObject:
    """The object that a JSON file holds.

    Raises
    ------
    CheckpointError
        There is no such file, or it does not hold a JSON object.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(error.strerror or str(error), file=path) from error
    check_fetched(data, path)
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not JSON: {error}", file=path) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"got a JSON {type(value).__name__}, expected an object", file=path)
    return value


def check_fetched(beginning: bytes, path: StrPath) -> None:
    """Refuse a file that stands for another one, by its first bytes: a Git LFS pointer, a web page, an empty file.

    Raises
    ------
    CheckpointError
        The message says what the file is.
    """
    found = None
    if beginning.startswith(LFS_POINTER):
        found = "is a Git LFS pointer: the file itself was not fetched; run `git lfs pull` in the folder"
    elif beginning.lstrip()[:1] == b"<":
        found = "is a web page or XML, as of a failed download"
    elif not beginning:
        found = "is empty, as after a failed download"
    if found is not None:
        raise CheckpointError(found, file=path)


@overload
def optional(
    config: Mapping[str, Any], names: Sequence[str], kind: type[T], file: StrPath, default: None = None
) -> T | None: ...
@overload
def optional(config: Mapping[str, Any], names: Sequence[str], kind: type[T], file: StrPath, default: T) -> T: ...
def optional(
    config: Mapping[str, Any], names: Sequence[str], kind: type[T], file: StrPath, default: T | None = None
) -> T | None:
    """The value of the first of several synonymous keys; null counts as missing.

    Parameters
    ----------
    config : dict
    names : sequence of str
        The synonymous keys.
    kind : type
        bool, int, str, list or dict.
    file : path-like
        For messages.
    default
        The result if no key has a value.

    Raises
    ------
    CheckpointError
        A value has another type, or two keys have different values.
    """
    given = {name: config[name] for name in names if config.get(name) is not None}
    for name, value in given.items():
        # In Python, but not in JSON, a bool is an int.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"{name}: got {value!r}, expected {kind.__name__}", file=file)
    values: list[T] = list(given.values())
    if any(value != values[0] for value in values):
        said = " and ".join(f"{name} {value!r}" for name, value in given.items())
        raise CheckpointError(f"got {said}, which contradict each other", file=file)
    return values[0] if values else default


def required(config: Mapping[str, Any], names: Sequence[str], kind: type[T], file: StrPath) -> T:
    """As :func:`optional`; a missing value is a :class:`CheckpointError`."""
    value = optional(config, names, kind, file)
    if value is None:
        raise CheckpointError(f"{names[0]}: missing", file=file)
    return value


def positive(config: Mapping[str, Any], names: Sequence[str], file: StrPath, default: int | None = None) -> int:
    """As :func:`optional`, for an int of at least 1. Without a default, a missing value is a CheckpointError."""
    value = optional(config, names, int, file) if default is None else optional(config, names, int, file, default)
    if value is None:
        raise CheckpointError(f"{' or '.join(names)}: missing", file=file)
    if value <= 0:
        raise CheckpointError(f"{names[0]}: got {value}, expected a positive number", file=file)
    return value


def finite(config: Mapping[str, Any], name: str, file: StrPath, default: float) -> float:
    """A finite number, int or float, as a float; ``default`` if it is missing."""
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not _fits_a_float(value):
        raise CheckpointError(f"{name}: got {value!r}, expected a finite number", file=file)
    return float(value)


def _fits_a_float(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int of more than 1024 bits
        return False
