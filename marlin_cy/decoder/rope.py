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

MAX_THETA = 1e30
MAX_ORIGINAL = 1 << 24
BLOCK = 1024
"""Positions of a table that are computed at a time, so that float64 values stay in the cache."""

LEAST, MOST = 1e-6, 1e6
"""Limits of the other numbers. Within them, no frequency and no factor overflows."""


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
    """Cosines and sines of positions 0 to ``context_length - 1``."""
    frequencies = ROPE_TYPES[rope.rope_type](rope, context_length)
    cos = np.empty((context_length, len(frequencies)), np.float32)
    sin = np.empty_like(cos)
    for begin in range(0, context_length, BLOCK):
        rows = slice(begin, min(begin + BLOCK, context_length))
        angles = np.arange(rows.start, rows.stop)[:, None] * frequencies
        cos[rows] = np.cos(angles) * rope.attention_factor
        sin[rows] = np.sin(angles) * rope.attention_factor
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
    if not 1 < base <= MAX_THETA:
        raise CheckpointError(f"rope_theta: got {base}, expected more than 1 and at most {MAX_THETA}", file=file)
    max_positions = positive(config, ("max_position_embeddings",), file)
    common: dict[str, Any] = {
        "rope_type": rope_type,
        "dim": _rotated(given, config, head_dim, partial, file),
        "theta": base,
        "max_positions": max_positions,
    }
    if rope_type == "default":
        return RopeConfig(**common)
    if rope_type == "dynamic" and common["dim"] == 2:
        raise UnsupportedError(f"{file}: rope_type 'dynamic' with 2 rotated values, expected more")
    original = _original_positions(given, config, max_positions, file)
    ratio = max_positions / original if rope_type == "yarn" else None
    factor = _number(given, "factor", (1.0, MOST), ratio, file)
    all_dim = _number(given, "mscale_all_dim", (0.0, MOST), 0.0, file)
    common |= {
        "original_positions": original,
        "factor": factor,
        "score_factor": _mscale(factor, all_dim) ** 2 if all_dim else 1.0,
    }
    if rope_type == "yarn":
        common |= _read_yarn(given, factor, all_dim, file)
    if rope_type == "llama3":
        low, high = (_number(given, f"{name}_freq_factor", (LEAST, MOST), None, file) for name in ("low", "high"))
        if high <= low:
            raise CheckpointError(f"high_freq_factor: got {high}, expected more than low_freq_factor, {low}", file=file)
        common |= {"low_freq_factor": low, "high_freq_factor": high}
    return RopeConfig(**common)


def _read_yarn(given: dict[str, Any], factor: float, all_dim: float, file: StrPath) -> dict[str, Any]:
    mscale = _number(given, "mscale", (0.0, MOST), 0.0, file)
    inferred = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1.0)
    return {
        "attention_factor": _number(given, "attention_factor", (LEAST, MOST), inferred, file),
        "beta_fast": _number(given, "beta_fast", (LEAST, MOST), 32.0, file),
        "beta_slow": _number(given, "beta_slow", (LEAST, MOST), 1.0, file),
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
    inner = {f"rope_parameters: {name}": given.get(name), name: config.get(name)}
    original = positive(inner, tuple(inner), file, default=max_positions)
    if original > MAX_ORIGINAL:
        raise CheckpointError(f"{name}: got {original}, expected at most {MAX_ORIGINAL}", file=file)
    return original


def _one_of_both(given: dict[str, Any], config: JsonObject, name: str, default: float, file: StrPath) -> float:
    """A number from the RoPE settings or from the config itself, which must not contradict each other."""
    values = [finite(entry, name, file, default) for entry in (given, config) if entry.get(name) is not None]
    if any(value != values[0] for value in values):
        raise CheckpointError(f"{name}: got {values[0]} and {values[1]}, which contradict each other", file=file)
    return values[0] if values else default


def _number(
    given: dict[str, Any], name: str, limits: tuple[float, float], default: float | None, file: StrPath
) -> float:
    """A number within limits. Without a default, a missing value is an error."""
    if given.get(name) is None and default is None:
        raise CheckpointError(f"{name}: missing", file=file)
    value = finite(given, name, file, default or 0.0)
    if not limits[0] <= value <= limits[1]:
        raise CheckpointError(f"{name}: got {value}, expected {limits[0]} to {limits[1]}", file=file)
    return value
