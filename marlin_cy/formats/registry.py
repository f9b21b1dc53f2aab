"""Which format a checkpoint folder is in, and its settings: the files that say so, and who reads them."""

from marlin_cy.checkpoints.json_fields import optional
from marlin_cy.checkpoints.safetensors import read_json
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats import auto_round, awq, compressed_tensors, gptq, marlin, mxfp4
from marlin_cy.formats.scheme import Scheme

__all__ = ["METHODS", "read_scheme"]

FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json")
"""What tools name the file beside ``config.json``: AutoGPTQ and GPTQModel, AutoAWQ, AutoRound."""

METHODS = {
    "gptq": gptq.parse,
    "awq": awq.parse,
    "auto-round": auto_round.parse,
    "compressed-tensors": compressed_tensors.parse,
    "mxfp4": mxfp4.parse,
    "marlin": marlin.parse,
}
"""Who reads the quantisation config of each method."""

METHOD_ALIASES = {"intel/auto-round": "auto-round"}

METHOD_HINTS = {
    "packing_format": "auto-round",
    "config_groups": "compressed-tensors",
    "w_bit": "awq",
    "zero_point": "awq",
}
"""Fields that tell the method where none is named. AutoGPTQ, the first to write these files, has none of them."""

LAYOUTS = {"gptq": ("checkpoint_format", "format"), "awq": ("version", "format", "checkpoint_format")}
"""The fields in which a method's configuration may say that its tensors are Marlin's."""

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
"""Fields that have to be the same where two files have them. Others may tell of the quantisation's history."""


def read_scheme(folder, config) -> Scheme:
    """The scheme that a checkpoint's configuration files give, in agreement.

    Parameters
    ----------
    folder : Path
    config : dict
        ``config.json``, with a ``quantization_config`` of its own or in its ``text_config``.

    Raises
    ------
    CheckpointError
        There is no quantisation config, or it is damaged or contradicts itself.
    UnsupportedError
        A method, or settings, that cannot be read.
    """
    merged, file = _merged(_found(folder, config), folder)
    method = _method(merged, file)
    if method in LAYOUTS:
        layout = optional(merged, LAYOUTS[method], str, file, default="")
        if layout.lower() == "marlin" or optional(merged, ("is_marlin_format",), bool, file):
            method = "marlin"
    return METHODS[method](merged, file)


def _found(folder, config):
    """``(what to call it, its file, the JSON object)`` of each quantisation config."""
    found = [(name, folder / name, read_json(folder / name)) for name in FILES if (folder / name).exists()]
    text_config = config.get("text_config")
    for owner in (config, text_config if isinstance(text_config, dict) else {}):
        if owner.get("quantization_config") is not None:
            found.append(("quantization_config", folder / "config.json", owner["quantization_config"]))
    return found


def _merged(found, folder):
    """All fields that the configs have, and the file to blame: the last one."""
    if not found:
        raise CheckpointError(f"no {FILES[0]} and no quantization_config in config.json", file=folder)
    merged, said_by = {}, {}
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


def _folded(value):
    """AutoAWQ writes its layout's name in capitals in one file, and in small letters in the other."""
    return value.lower() if isinstance(value, str) else value


def _method(config, file):
    method = optional(config, ("quant_method", "method"), str, file)
    if method is None:
        method = next((method for name, method in METHOD_HINTS.items() if name in config), "gptq")
    method = METHOD_ALIASES.get(method, method)
    if method not in METHODS:
        raise UnsupportedError(f"{file}: quantisation method {method!r}, supported: {', '.join(METHODS)}")
    return method
