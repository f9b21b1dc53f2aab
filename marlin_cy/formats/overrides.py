"""Settings that a checkpoint gives for single modules, by name.

Each class here, and AutoRound's :class:`~marlin_cy.formats.auto_round.ExtraConfig`, reads one tool's way to write such
settings. All have the method of :class:`Override`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats.fields import check_bits, compiled
from marlin_cy.formats.json_fields import JsonObject, StrPath

__all__ = ["Dynamic", "NotConverted", "Override", "ReadSettings", "overridden"]

ReadSettings = Callable[[JsonObject, StrPath], dict[str, Any]]
"""Reads the settings of one rule: ``read_settings(json_object, file)``."""


class Override(Protocol):
    """The settings of single modules."""

    def settings(self, module: str) -> dict[str, Any]:
        """The settings in which a module differs from the checkpoint, with ``bits`` among them; usually empty.

        Raises
        ------
        UnsupportedError
            The module is not quantised.
        """


S = TypeVar("S", bound=Any)


def overridden(scheme: S, module: str) -> S:
    """The scheme for one module, with per-module overrides applied.

    Parameters
    ----------
    scheme : dataclass with the fields ``bits``, and ``overrides``, a tuple of :class:`Override`
    module : str

    Raises
    ------
    UnsupportedError
        The module is not quantised, or its codes have an unsupported width.
    """
    if not scheme.overrides:
        return scheme
    settings: dict[str, Any] = {}
    for override in scheme.overrides:
        settings |= override.settings(module)
    check_bits(settings.get("bits", scheme.bits), module, scheme.widths)
    return replace(scheme, overrides=(), **settings)


@dataclass(frozen=True)
class Dynamic:
    """GPTQModel's ``dynamic``: regular expressions with settings.

    The first expression that matches the beginning of the module's name decides. An expression that begins with
    ``-:`` says that the module is not quantised; ``+:`` has no effect. Source: GPTQModel,
    ``gptqmodel/quantization/config.py``, ``dynamic_get``.

    Attributes
    ----------
    rules : tuple of (str, Pattern, dict or None)
        The expression as written, compiled, and the settings; None if the module is not quantised.
    """

    rules: tuple[tuple[str, re.Pattern[str], dict[str, Any] | None], ...] = field(hash=False)

    @classmethod
    def parse(cls, config: JsonObject, read_settings: ReadSettings, file: StrPath) -> Dynamic:
        """From the JSON object.

        Raises
        ------
        CheckpointError
            A key is not a regular expression, or a value is not an object.
        """
        rules = []
        for text, given in config.items():
            if not isinstance(given, dict):
                raise CheckpointError(f"dynamic: got {given!r} for {text!r}, expected an object", file=file)
            regex = compiled(text[2:] if text[:2] in ("+:", "-:") else text, "dynamic", file)
            rules.append((text, regex, None if text.startswith("-:") else read_settings(given, file)))
        return cls(tuple(rules))

    def settings(self, module: str) -> dict[str, Any]:
        for text, regex, settings in self.rules:
            if regex.match(module):
                if settings is None:
                    raise UnsupportedError(f"{module}: not quantised, by {text!r} of dynamic")
                return settings
        return {}


@dataclass(frozen=True)
class NotConverted:
    """``modules_to_not_convert``: names of modules that are not quantised.

    An entry matches the end of a module's name. As a regular expression, it also matches the beginning of a name, up
    to a dot. Source: transformers, ``quantizers/quantizers_utils.py``, ``should_convert_module``.

    Attributes
    ----------
    rules : tuple of (str, Pattern)
    """

    rules: tuple[tuple[str, re.Pattern[str]], ...]

    @classmethod
    def parse(cls, names: Sequence[Any], file: StrPath) -> NotConverted:
        """From the JSON list.

        Raises
        ------
        CheckpointError
            An entry is not a string, or not a regular expression.
        """
        rules = []
        for name in names:
            if not isinstance(name, str):
                raise CheckpointError(f"modules_to_not_convert: got {name!r}, expected strings", file=file)
            compiled(name, "modules_to_not_convert", file)
            rules.append((name, re.compile(rf"(?:{name})(?:(?<=\.)|(?=\.|$))")))
        return cls(tuple(rules))

    def settings(self, module: str) -> dict[str, Any]:
        for name, regex in self.rules:
            if regex.match(module) or module.endswith(name):
                raise UnsupportedError(f"{module}: not quantised, by {name!r} of modules_to_not_convert")
        return {}
