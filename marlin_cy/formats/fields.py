"""Fields that several tools' quantisation configs have in common."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats.json_fields import JsonObject, StrPath
from marlin_cy.weights import sizes

__all__ = ["check_bits", "compiled", "refuse_rotation"]


def check_bits(bits: int, where: StrPath, supported: Sequence[int] = sizes.BITS) -> None:
    """Refuse a width of codes that is not supported; ``where``, a file or a module, begins the message."""
    sizes.check_bits(f"{where}: bits", bits, supported)


def compiled(pattern: str, name: str, file: StrPath) -> re.Pattern[str]:
    """A regular expression from the field ``name`` of a file; an invalid one is a :class:`CheckpointError`."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise CheckpointError(f"{name}: got {pattern!r}, expected a regular expression ({error})", file=file) from None


def refuse_rotation(config: JsonObject, name: str, file: StrPath) -> None:
    """Refuse a checkpoint whose field ``name`` is set: its layers expect rotated activations."""
    value: Any = config.get(name)
    if value:
        raise UnsupportedError(f"{file}: {name}: got {value!r}, activations that are rotated are not supported")
