"""AutoRound's quantisation config. The tensors of its checkpoints are in GPTQ's or AWQ's format.

==========================================  ================================================================
``packing_format``                          tensors
==========================================  ================================================================
auto_round:auto_gptq, auto_round:gptq       GPTQ's, the zero point stored minus one
auto_round, auto_round:gptqmodel            GPTQ's, the zero point itself stored; the former has no ``g_idx``
auto_round:auto_awq, auto_round:awq         AWQ's
==========================================  ================================================================

Older releases write ``backend`` instead, which begins with the same words, or neither.

Source: AutoRound, ``auto_round/export/export_to_autoround/export.py`` and ``auto_round/inference``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats import awq, gptq
from marlin_cy.formats.fields import check_bits, compiled, refuse_rotation
from marlin_cy.formats.json_fields import JsonObject, StrPath, optional, required
from marlin_cy.formats.overrides import Override, ReadSettings
from marlin_cy.formats.scheme import Scheme

__all__ = ["ExtraConfig", "parse"]

PACKING_FORMATS = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
}
DEFAULT_PACKING_FORMAT = "auto_round:auto_gptq"
"""Without ``packing_format`` and ``backend``. Source: AutoRound, ``auto_round/inference/convert_model.py``."""

UNQUANTISED_BITS = 16
"""Weights, or activations, of this many bits or more are not quantised."""

REGEX_CHARACTERS = frozenset(r"\*^$|()[]?+{}")


@dataclass(frozen=True)
class ExtraConfig:
    """``extra_config``: settings by module name, and by regular expressions for modules that are not named.

    The first expression that is found anywhere in a module's name decides. See :mod:`marlin_cy.formats.overrides`.

    Attributes
    ----------
    by_name : dict
        From name to settings.
    by_regex : tuple of (Pattern, dict)
    """

    by_name: dict[str, dict[str, Any]] = field(hash=False)
    by_regex: tuple[tuple[re.Pattern[str], dict[str, Any]], ...] = field(hash=False)

    @classmethod
    def parse(cls, config: JsonObject, read_settings: ReadSettings, file: StrPath) -> ExtraConfig:
        """From the JSON object.

        Raises
        ------
        CheckpointError
            A key is not a regular expression, or a value is not an object.
        """
        by_name, by_regex = {}, []
        for name, given in config.items():
            if not isinstance(given, dict):
                raise CheckpointError(f"extra_config: got {given!r} for {name!r}, expected an object", file=file)
            settings = read_settings(given, file)
            # AutoRound itself looks up whether the model has a module of this name. Its own expressions contain ".*".
            if REGEX_CHARACTERS.isdisjoint(name):
                by_name[name] = settings
            else:
                by_regex.append((compiled(name, "extra_config", file), settings))
        return cls(by_name, tuple(by_regex))

    def settings(self, module: str) -> dict[str, Any]:
        found = self.by_name.get(module)
        if found is None:
            found = next((settings for regex, settings in self.by_regex if regex.search(module)), {})
        if found.get("bits", 4) >= UNQUANTISED_BITS:
            raise UnsupportedError(f"{module}: not quantised, its bits are {found['bits']} in extra_config")
        return _of_integers(found, module)


def parse(config: JsonObject, file: StrPath) -> Scheme:
    """The scheme that a quantisation config of AutoRound describes: GPTQ's or AWQ's.

    Parameters
    ----------
    config : dict
    file : path-like
        For messages.

    Raises
    ------
    CheckpointError
    UnsupportedError
        Also if activations are quantised: such layers have further tensors.
    """
    layout = _layout(config, file)
    read_settings = _read_awq_settings if layout == "awq" else _read_gptq_settings
    refuse_rotation(config, "rotation_config", file)
    scheme: type[Scheme] = awq.AwqScheme if layout == "awq" else gptq.GptqScheme
    check_bits(required(config, ("bits",), int, file), file, scheme.widths)
    required(config, ("group_size",), int, file)
    settings = _of_integers(read_settings(config, file), file)
    extra_config = optional(config, ("extra_config",), dict, file)
    overrides: tuple[Override, ...] = (ExtraConfig.parse(extra_config, read_settings, file),) if extra_config else ()
    if layout == "awq":
        return awq.AwqScheme(overrides=overrides, **settings)
    return gptq.GptqScheme(checkpoint_format=layout, overrides=overrides, **settings)


def _layout(config: JsonObject, file: StrPath) -> str:
    """A value of :data:`PACKING_FORMATS`."""
    name, found = "packing_format", optional(config, ("packing_format",), str, file)
    if found is None:
        name, backend = "backend", optional(config, ("backend",), str, file)
        # Such as "auto_round:gptq:exllamav2", where the last part is the kernel that the tool would use. Names without
        # "auto_round" say nothing about the tensors: "auto", "cpu".
        said = backend is not None and backend.startswith("auto_round")
        found = ":".join((backend or "").split(":")[:2]) if said else DEFAULT_PACKING_FORMAT
    if found not in PACKING_FORMATS:
        raise UnsupportedError(f"{file}: {name} {found!r}, supported: {', '.join(PACKING_FORMATS)}")
    return PACKING_FORMATS[found]


def _read_gptq_settings(config: JsonObject, file: StrPath) -> dict[str, Any]:
    return gptq.read_settings(config, file) | _read_kind(config, file)


def _read_awq_settings(config: JsonObject, file: StrPath) -> dict[str, Any]:
    return awq.read_settings(config, file) | _read_kind(config, file)


def _read_kind(config: JsonObject, file: StrPath) -> dict[str, Any]:
    """The kind of quantisation. :func:`_of_integers` checks it when the module that uses it is known."""
    kind = {
        "data_type": optional(config, ("data_type",), str, file),
        "act_bits": optional(config, ("act_bits",), int, file),
    }
    return {name: value for name, value in kind.items() if value is not None}


def _of_integers(settings: dict[str, Any], where: StrPath) -> dict[str, Any]:
    """``settings`` without the kind of quantisation, which must be integer weights and float activations."""
    settings = dict(settings)
    data_type, act_bits = settings.pop("data_type", "int"), settings.pop("act_bits", UNQUANTISED_BITS)
    if not data_type.startswith("int"):
        raise UnsupportedError(f"{where}: data_type: got {data_type!r}, only integers are supported")
    if act_bits < UNQUANTISED_BITS:
        raise UnsupportedError(f"{where}: act_bits: got {act_bits}, quantised activations are not supported")
    return settings
