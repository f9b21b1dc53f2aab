"""Typed fields of a header. A :class:`CheckpointError` names an invalid value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from marlin_cy.checkpoints.gguf.reader import Header, StoredTensor
from marlin_cy.errors import CheckpointError

__all__ = ["Metadata"]

T = TypeVar("T")


class Metadata:
    """The fields of one architecture, and which tensors there are.

    Parameters
    ----------
    header : Header

    Attributes
    ----------
    header : Header
    architecture : str
        ``general.architecture``.
    """

    def __init__(self, header: Header) -> None:
        self.header = header
        self.architecture = self.required(self.text("general.architecture"), "general.architecture")

    def key(self, name: str) -> str:
        """The whole name of a field of the architecture."""
        return name if name.startswith(("general.", "tokenizer.")) else f"{self.architecture}.{name}"

    def get(self, name: str) -> Any:
        """A field as it is, or None."""
        return self.header.fields.get(self.key(name))

    def text(self, name: str) -> str | None:
        """A field that is a string."""
        return self._typed(name if name.startswith("general.") else self.key(name), str, "a string")

    def flag(self, name: str) -> bool | None:
        """A field that is a truth value."""
        return self._typed(self.key(name), bool, "a truth value")

    def integer(self, name: str) -> int | None:
        """A field that is an integer. An array of one value for each layer must have equal ones; 0 is none."""
        value = self.get(name)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
            kinds = sorted({int(entry) for entry in value} - {0})
            if len(kinds) > 1:
                raise self.error(name, value, "the same value for all layers")
            return kinds[0] if kinds else None
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise self.error(name, value, "an integer")

    def number(self, name: str) -> float | None:
        """A field that is a finite number, with the digits that its float32 has."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(name, value, "a finite number")
        return float(str(np.float32(value))) if abs(value) < np.finfo(np.float32).max else float(value)

    def flags(self, name: str) -> list[bool] | None:
        """A field that is an array of truth values."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biu":
            raise self.error(name, value, "an array of truth values")
        return [bool(entry) for entry in value]

    def strings(self, name: str) -> list[str] | None:
        """A field that is an array of strings."""
        return self._typed(self.key(name), list, "an array of strings")

    def required(self, value: T | None, name: str) -> T:
        """A value that must be there."""
        if value is None:
            raise CheckpointError(f"{self.key(name)}: missing", file=self.header.files[0])
        return value

    def size(self, name: str) -> int:
        """A field that is a positive integer and must be there."""
        value = self.required(self.integer(name), name)
        if value < 1:
            raise self.error(name, value, "a positive integer")
        return value

    # Tensors -----------------------------------------------------------------------------------

    def tensor(self, name: str) -> StoredTensor:
        """A tensor that must be there."""
        if name not in self.header.tensors:
            raise CheckpointError("missing", file=self.header.files[0], tensor=name)
        return self.header.tensors[name]

    def layers_with(self, name: str, layers: Sequence[int]) -> list[int]:
        """The layers that have a tensor."""
        return [layer for layer in layers if f"blk.{layer}.{name}" in self.header.tensors]

    # Errors ------------------------------------------------------------------------------------

    def error(self, name: str, value: Any, expected: str) -> CheckpointError:
        """An error about a field's value."""
        shown = f"{value!r}"
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        return CheckpointError(f"{self.key(name)}: got {shown}, expected {expected}", file=self.header.files[0])

    def _typed(self, key: str, kind: type[T], words: str) -> T | None:
        value = self.header.fields.get(key)
        if value is not None and not isinstance(value, kind):
            raise CheckpointError(f"{key}: got {str(value)[:80]!r}, expected {words}", file=self.header.files[0])
        return value
