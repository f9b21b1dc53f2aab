"""Finds a checkpoint folder's quantisation configs, and the format that they describe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats import auto_round, awq, compressed_tensors, deepseek_fp4, gptq, marlin, mxfp4
from marlin_cy.formats.json_fields import JsonObject, StrPath, optional, read_json
from marlin_cy.formats.scheme import Scheme

__all__ = ["FILES", "METHODS", "read_scheme", "scheme_of"]

FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json")
"""The files that tools write next to ``config.json``: AutoGPTQ and GPTQModel, AutoAWQ, AutoRound."""

METHODS: Mapping[str, Callable[[JsonObject, StrPath], Scheme]] = {
    "gptq": gptq.parse,
    "awq": awq.parse,
    "auto-round": auto_round.parse,
    "compressed-tensors": compressed_tensors.parse,
    "mxfp4": mxfp4.parse,
    "marlin": marlin.parse,
    "fp8": deepseek_fp4.parse,
}
"""The function that reads the quantisation config of each method."""

METHOD_ALIASES = {"intel/auto-round": "auto-round", "compressed_tensors": "compressed-tensors"}

METHOD_HINTS = {
    "packing_format": "auto-round",
    "config_groups": "compressed-tensors",
    "w_bit": "awq",
    "zero_point": "awq",
}
"""Fields that identify the method if the file does not name it. The files of AutoGPTQ have no such field."""

LAYOUTS = {"gptq": ("checkpoint_format", "format"), "awq": ("version", "format", "checkpoint_format")}
"""The fields in which a method's config may name Marlin's layout."""

MODELOPT = "modelopt"
MODELOPT_FILE = "hf_quant_config.json"
"""What ModelOpt writes, beside ``config.json`` or in place of its ``quantization_config``."""

CONSISTENT_FIELDS = (
    "quant_method",
    "method",
    "bits",
    "w_bit",
    "group_size",
    "q_group_size",
    "desc_act",
    "sym",
    "zero_point",
    "checkpoint_format",
    "format",
    "version",
    "packing_format",
)
"""Fields that must be equal if two files have them. Other fields may record how the model was quantised."""


def read_scheme(folder: Path, config: JsonObject) -> Scheme:
    """The scheme that all quantisation configs of a checkpoint together describe.

    Parameters
    ----------
    folder : Path
    config : dict
        ``config.json``. It may have a ``quantization_config``, itself or in its ``text_config``.

    Raises
    ------
    CheckpointError
        There is no quantisation config, or it is damaged, or two configs contradict each other.
    UnsupportedError
        The method, or one of its settings, is not supported.
    """
    found = _found(folder, config)
    if not found:
        _refuse_modelopt(folder / MODELOPT_FILE)
    merged, file = _merged(found, folder)
    if _method(merged, file) == "fp8":
        deepseek_fp4.check_experts(config, folder / "config.json")
    return scheme_of(merged, file)


def scheme_of(config: JsonObject, file: StrPath) -> Scheme:
    """The scheme that a quantisation config describes; ``file`` is for messages. Raises as :func:`read_scheme`."""
    method = _method(config, file)
    if method in LAYOUTS:
        layout = optional(config, LAYOUTS[method], str, file, default="")
        if layout.lower() == "marlin" or optional(config, ("is_marlin_format",), bool, file):
            method = "marlin"
    return METHODS[method](config, file)


def _found(folder: Path, config: JsonObject) -> list[tuple[str, Path, Any]]:
    """``(name for messages, file, JSON value)`` of each quantisation config."""
    found: list[tuple[str, Path, Any]] = [
        (name, folder / name, read_json(folder / name)) for name in FILES if (folder / name).exists()
    ]
    text_config = config.get("text_config")
    for owner in (config, text_config if isinstance(text_config, dict) else {}):
        if owner.get("quantization_config") is not None:
            found.append(("quantization_config", folder / "config.json", owner["quantization_config"]))
    return found


def _merged(found: list[tuple[str, Path, Any]], folder: Path) -> tuple[JsonObject, Path]:
    """The fields of all configs, and the file that messages name: the last one."""
    if not found:
        raise CheckpointError(f"no {FILES[0]} and no quantization_config in config.json", file=folder)
    merged: JsonObject = {}
    said_by: dict[str, str] = {}
    for name, file, config in found:
        if not isinstance(config, dict):
            raise CheckpointError(f"{name}: got {config!r}, expected an object", file=file)
        for key, value in config.items():
            if value is None:
                continue
            if key in CONSISTENT_FIELDS and key in merged and _folded(value) != _folded(merged[key]):
                raise CheckpointError(
                    f"{key}: got {value!r} in {name}, but {said_by[key]} says {merged[key]!r}", file=file
                )
            merged[key], said_by[key] = value, name
    return merged, found[-1][1]


def _folded(value: Any) -> Any:
    """A value to compare: AutoAWQ writes its layout's name in upper case in one file and in lower case in another."""
    return value.lower() if isinstance(value, str) else value


def _method(config: JsonObject, file: StrPath) -> str:
    method = optional(config, ("quant_method", "method"), str, file)
    if method is None:
        method = next((method for name, method in METHOD_HINTS.items() if name in config), "gptq")
    method = METHOD_ALIASES.get(method, method)
    if method not in METHODS:
        kind = f" {config['quant_algo']}" if isinstance(config.get("quant_algo"), str) else ""
        raise UnsupportedError(f"{file}: quantisation method {method!r}{kind}, supported: {', '.join(METHODS)}")
    return method


def _refuse_modelopt(file: Path) -> None:
    """Refuse a folder whose only quantisation config is ModelOpt's own file."""
    if file.exists():
        settings = read_json(file).get("quantization")
        _method({**(settings if isinstance(settings, dict) else {}), "quant_method": MODELOPT}, file)
