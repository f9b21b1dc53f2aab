"""Rotary position embedding: its settings in ``config.json``, and the tables of a plan.

The formulas are those of transformers, ``modeling_rope_utils.py``, in float64; tables are rounded to float32. All
frequencies are fixed when a model is loaded. "dynamic", whose frequencies depend on the length of a sequence in
transformers, has those of the longest sequence that the tables allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from marlin_cy.decoder.plan import RopeTable
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats.json_fields import JsonObject, StrPath, finite, optional, positive

__all__ = ["ROPE_TYPES", "RopeConfig", "read_rope", "rope_table"]

Floats: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RopeConfig:
    """The settings of a rotary position embedding.

    Attributes
    ----------
    rope_type : str
        A key of :data:`ROPE_TYPES`.
    dim : int
        Number of values of a head that are rotated. Even.
    theta : float
        The base of the wavelengths.
    max_positions : int
        The number of positions for which the model was made, by ``max_position_embeddings``.
    original_positions : int
        The number of positions before the context was extended. "yarn" and "llama3".
    factor : float
        How much longer the context becomes. All types but "default".
    attention_factor : float
        Multiplies cosines and sines. Other than 1 only for "yarn".
    score_factor : float
        Multiplies the scale of latent attention. Source: DeepSeek-V2, ``mscale_all_dim``.
    beta_fast, beta_slow : float
        Frequencies with more than ``beta_fast`` rotations in the original context stay, those with fewer than
        ``beta_slow`` are divided by ``factor``, and those between are blended. "yarn".
    truncate : bool
        Whether the bounds of the blend are rounded to whole frequencies. "yarn".
    low_freq_factor, high_freq_factor : float
        As ``beta_slow`` and ``beta_fast``, for "llama3".
    """

    rope_type: str
    dim: int
    theta: float
    max_positions: int
    original_positions: int = 1
    factor: float = 1.0
    attention_factor: float = 1.0
    score_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


# ---------------------------------------------------------------------------------------------
# Tables


def rope_table(rope: RopeConfig, context_length: int, interleaved: bool = False) -> RopeTable:
    """Cosines and sines of positions 0 to ``context_length - 1``.

    Raises
    ------
    CheckpointError
        The settings give a frequency that is not finite.
    """
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        frequencies = ROPE_TYPES[rope.rope_type](rope, context_length)
    if not np.isfinite(frequencies).all():
        raise CheckpointError(f"rope_parameters: got {rope}, which give frequencies that are not finite")
    cos = np.empty((context_length, rope.dim // 2), np.float32)
    sin = np.empty_like(cos)
    for pair, frequency in enumerate(frequencies):
        angles = np.arange(context_length) * frequency
        cos[:, pair] = np.cos(angles) * rope.attention_factor
        sin[:, pair] = np.sin(angles) * rope.attention_factor
    return RopeTable(cos, sin, interleaved)


def _powers(rope: RopeConfig, theta: float) -> Floats:
    """``theta ** (2 i / dim)``, one value for each pair."""
    exponents: Floats = np.arange(0, rope.dim, 2) / rope.dim
    result: Floats = np.float64(theta) ** exponents
    return result


def _default(rope: RopeConfig, context_length: int) -> Floats:
    del context_length
    frequencies: Floats = 1 / _powers(rope, rope.theta)
    return frequencies


def _linear(rope: RopeConfig, context_length: int) -> Floats:
    return _default(rope, context_length) / rope.factor


def _dynamic(rope: RopeConfig, context_length: int) -> Floats:
    length = max(context_length, rope.max_positions)
    growth = np.float64(rope.factor * length / rope.max_positions - (rope.factor - 1))
    frequencies: Floats = 1 / _powers(rope, rope.theta * growth ** (rope.dim / (rope.dim - 2)))
    return frequencies


def _yarn(rope: RopeConfig, context_length: int) -> Floats:
    def pair_of(rotations: float) -> float:
        """The pair, as a fraction, that rotates so many times in the original context."""
        wavelength = rope.original_positions / (rotations * 2 * math.pi)
        return rope.dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low if high != low else 0.001
    scaled: Floats = np.clip((np.arange(rope.dim // 2) - low) / width, 0, 1)
    frequencies = _default(rope, context_length)
    return frequencies / rope.factor * scaled + frequencies * (1 - scaled)


def _llama3(rope: RopeConfig, context_length: int) -> Floats:
    frequencies = _default(rope, context_length)
    rotations = rope.original_positions * frequencies / (2 * math.pi)
    kept = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = np.clip(kept, 0, 1)
    result: Floats = (1 - kept) * frequencies / rope.factor + kept * frequencies
    return result


ROPE_TYPES: Mapping[str, Callable[[RopeConfig, int], Floats]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
}
"""``frequencies(rope, context_length)``, radians per position of each pair, by ``rope_type``."""


# ---------------------------------------------------------------------------------------------
# config.json


def read_rope(
    config: JsonObject, head_dim: int, layer_types: frozenset[str], partial: float | None, theta: float, file: StrPath
) -> dict[str, RopeConfig | None]:
    """The settings for each type of attention layer; None for a type that does not rotate.

    ``rope_parameters`` is transformers 5's key, which may hold an object for each layer type. ``rope_scaling`` and
    ``rope_theta`` are transformers 4's.

    Parameters
    ----------
    config : dict
        The language model's part of ``config.json``.
    head_dim : int
        Number of values of a head that the family rotates where nothing is partial.
    layer_types : frozenset of str
    partial : float or None
        The family's default of ``partial_rotary_factor``; None if it always rotates whole heads.
    theta : float
        The family's default of ``rope_theta``.
    file : path-like
        For messages.

    Raises
    ------
    CheckpointError, UnsupportedError
        A value is missing, invalid or not supported.
    """
    given: dict[str, Any] = optional(config, ("rope_parameters", "rope_scaling"), dict, file, default={})
    nested = [key for key in given if key in layer_types]
    if not nested:
        rope = _read_one(given, config, head_dim, partial, theta, file)
        return dict.fromkeys(layer_types, rope)
    ropes: dict[str, RopeConfig | None] = {}
    for layer_type in sorted(layer_types):
        if layer_type not in given:
            raise CheckpointError(f"rope_parameters: {layer_type}: missing", file=file)
        entry = optional(given, (layer_type,), dict, file)
        ropes[layer_type] = None if entry is None else _read_one(entry, config, head_dim, partial, theta, file)
    return ropes


def _read_one(
    given: dict[str, Any], config: JsonObject, head_dim: int, partial: float | None, theta: float, file: StrPath
) -> RopeConfig:
    rope_type = optional(given, ("rope_type", "type"), str, file, default="default")
    if rope_type not in ROPE_TYPES:
        raise UnsupportedError(f"{file}: rope_type {rope_type!r}, supported: {', '.join(ROPE_TYPES)}")
    base = _one_of_both(given, config, "rope_theta", theta, file)
    if base <= 1:
        raise CheckpointError(f"rope_theta: got {base}, expected more than 1", file=file)
    max_positions = positive(config, ("max_position_embeddings",), file)
    common: dict[str, Any] = {
        "rope_type": rope_type,
        "dim": _rotated(given, config, head_dim, partial, file),
        "theta": base,
        "max_positions": max_positions,
    }
    if rope_type == "default":
        return RopeConfig(**common)
    original = _original_positions(given, config, max_positions, file)
    common["original_positions"] = original
    ratio = max_positions / original if rope_type == "yarn" else None
    factor = common["factor"] = _at_least(given, "factor", 1.0, ratio, file)
    all_dim = _at_least(given, "mscale_all_dim", 0.0, 0.0, file)
    common["score_factor"] = _mscale(factor, all_dim) ** 2 if all_dim else 1.0
    if rope_type == "dynamic" and common["dim"] == 2:
        raise UnsupportedError(f"{file}: rope_type 'dynamic' with 2 rotated values, expected more")
    if rope_type == "yarn":
        common |= _read_yarn(given, factor, all_dim, file)
    if rope_type == "llama3":
        low = common["low_freq_factor"] = _above_zero(given, "low_freq_factor", None, file)
        high = common["high_freq_factor"] = _above_zero(given, "high_freq_factor", None, file)
        if high <= low:
            raise CheckpointError(f"high_freq_factor: got {high}, expected more than low_freq_factor, {low}", file=file)
    return RopeConfig(**common)


def _read_yarn(given: dict[str, Any], factor: float, all_dim: float, file: StrPath) -> dict[str, Any]:
    mscale = _at_least(given, "mscale", 0.0, 0.0, file)
    inferred = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1.0)
    return {
        "attention_factor": _above_zero(given, "attention_factor", inferred, file),
        # As in transformers, 0 counts as missing.
        "beta_fast": _at_least(given, "beta_fast", 0.0, 0.0, file) or 32.0,
        "beta_slow": _at_least(given, "beta_slow", 0.0, 0.0, file) or 1.0,
        "truncate": optional(given, ("truncate",), bool, file, default=True),
    }


def _mscale(factor: float, mscale: float) -> float:
    """YaRN's factor on attention's logits. Source: Peng et al., "YaRN", 2023, section 3.4."""
    return 0.1 * mscale * math.log(factor) + 1


def _rotated(given: dict[str, Any], config: JsonObject, head_dim: int, partial: float | None, file: StrPath) -> int:
    """Number of values of a head that are rotated."""
    factor = _one_of_both(given, config, "partial_rotary_factor", 1.0 if partial is None else partial, file)
    if partial is None and factor != 1:
        raise UnsupportedError(f"{file}: partial_rotary_factor {factor}, this family rotates whole heads")
    rotated = int(head_dim * factor) if 0 < factor <= 1 else 0
    if rotated < 2 or rotated % 2:
        raise CheckpointError(
            f"partial_rotary_factor: got {factor} of {head_dim} values of a head, expected an even number of values",
            file=file,
        )
    return rotated


def _original_positions(given: dict[str, Any], config: JsonObject, max_positions: int, file: StrPath) -> int:
    name = "original_max_position_embeddings"
    both = {f"{where} {name}".strip(): entry.get(name) for where, entry in (("rope", given), ("", config))}
    return positive(both, tuple(both), file, default=max_positions)


def _one_of_both(given: dict[str, Any], config: JsonObject, name: str, default: float, file: StrPath) -> float:
    """A number from the RoPE settings or from the config itself, which must not contradict each other."""
    values = [finite(entry, name, file, default) for entry in (given, config) if entry.get(name) is not None]
    if any(value != values[0] for value in values):
        raise CheckpointError(f"{name}: got {values[0]} and {values[1]}, which contradict each other", file=file)
    return values[0] if values else default


def _at_least(given: dict[str, Any], name: str, least: float, default: float | None, file: StrPath) -> float:
    """A finite number of at least ``least``. Without a default, a missing value is an error."""
    value = finite(given, name, file, math.nan if default is None else default)
    if math.isnan(value):
        raise CheckpointError(f"{name}: missing", file=file)
    if value < least:
        raise CheckpointError(f"{name}: got {value}, expected at least {least}", file=file)
    return value


def _above_zero(given: dict[str, Any], name: str, default: float | None, file: StrPath) -> float:
    value = _at_least(given, name, 0.0, default, file)
    if value == 0:
        raise CheckpointError(f"{name}: got {value}, expected more than 0", file=file)
    return value
