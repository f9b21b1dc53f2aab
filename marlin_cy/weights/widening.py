"""Weights in a wider form: exactly, for experts that share a stack, and rounded to 8 bits, for float weights.

All experts of a stack have one group size, code type and scale record. :func:`joined` finds the narrowest that hold
several weights exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from marlin_cy.weights.canonical import CanonicalWeight, unpack_words
from marlin_cy.weights.code_types import code_type
from marlin_cy.weights.sizes import GROUP_STEP

__all__ = ["ROUNDED", "StackKind", "joined", "rounded", "widened"]


class StackKind(NamedTuple):
    """What all weights of a stack have in common.

    Attributes
    ----------
    group_size : int
    codes : str
        The name of the code type.
    scales : str
        The name of a scale record. :func:`joined` and :func:`widened` take those of one level without minima.
    """

    group_size: int
    codes: str
    scales: str


ROUNDED = StackKind(32, "uint8", "float32")
"""The kind of float weights that :func:`rounded` rounds. It takes 9.5 bits a weight. A weight changes by at most
1 / 254 of the largest magnitude in its group, and a random matrix by 5e-3 of its norm."""

ZERO = 128
STEPS = 127
"""Codes run from ``ZERO - STEPS`` to ``ZERO + STEPS``."""


def joined(kinds: Iterable[StackKind]) -> StackKind:
    """The narrowest kind that holds weights of several kinds exactly."""
    sizes, codes, scales = (set(values) for values in zip(*kinds, strict=True))
    group_size = math.gcd(*sizes)
    if len(sizes) > 1 and group_size % GROUP_STEP:
        group_size &= -group_size  # the largest power of two that divides all sizes: 16, 32 or 64
    # Scales are divided by the units, which may leave the range of a 16-bit float.
    same = len(scales) == 1 and (len(codes) == 1 or all(code_type(name).units_per_one == 1 for name in codes))
    return StackKind(
        group_size,
        codes.pop() if len(codes) == 1 else ROUNDED.codes,
        scales.pop() if same else ROUNDED.scales,
    )


def widened(weight: CanonicalWeight, kind: StackKind) -> CanonicalWeight:
    """A weight in another kind, which :func:`joined` found for it and for others: the same numbers.

    A weight with ``g_idx`` keeps its groups: only codes and scales may differ then.
    """
    if (weight.group_size, weight.codes, weight.scales) == kind:
        return weight
    row, wide = code_type(weight.codes), code_type(kind.codes)
    scale = weight.scale.astype(np.float32) if kind.scales == "float32" else weight.scale
    zero, is_recoded = weight.zero, weight.codes != kind.codes
    if is_recoded:
        scale = scale / scale.dtype.type(row.units_per_one)
        if zero is None:
            zero = np.full(scale.shape, row.symmetric_zero)
        zero = zero.astype(wide.zero_dtype)
    if weight.group_size != kind.group_size:
        times, groups = weight.group_size // kind.group_size, -(-weight.k // kind.group_size)
        scale = np.repeat(scale, times, axis=0)[:groups]
        zero = None if zero is None else np.repeat(zero, times, axis=0)[:groups]
    if not is_recoded:
        return CanonicalWeight(weight.words, scale, zero, kind.group_size, weight.g_idx, kind.codes)
    # Multiplicands of every code type fit a byte.
    codes = row.multiplicands[unpack_words(weight.words, row.bits)]
    return CanonicalWeight.from_codes(
        codes, scale, group_size=kind.group_size, codes=kind.codes, zero=zero, g_idx=weight.g_idx
    )


def rounded(weight: npt.NDArray[Any], group_size: int, g_idx: npt.NDArray[np.int32] | None = None) -> CanonicalWeight:
    """A float weight in 8 bits: codes from 1 to 255, zero points of 128, float32 scales.

    Parameters
    ----------
    weight : float ``[N, K]``
    group_size : int
        Number of rows of K that share a scale.
    g_idx : int32 ``[K]``, optional
        The group of each row of K. Groups are of equal size.

    Raises
    ------
    ValueError
        A weight is not finite.
    """
    rows = np.ascontiguousarray(weight.T.astype(np.float32))
    if not np.isfinite(rows).all():
        k, n = np.argwhere(~np.isfinite(rows))[0]
        raise ValueError(f"got {rows[k, n]} at [{n}, {k}], expected finite values")
    k = len(rows)
    group = np.arange(k) // group_size if g_idx is None else g_idx
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(-(-k // group_size)))
    largest = np.maximum.reduceat(np.abs(rows[order]), starts)
    scale = np.maximum(largest / STEPS, np.finfo(np.float32).tiny)
    codes = (np.rint(rows / scale[group]) + ZERO).astype(np.uint8)
    zero = np.full(scale.shape, ZERO, code_type(ROUNDED.codes).zero_dtype)
    return CanonicalWeight.from_codes(codes, scale, group_size=group_size, codes=ROUNDED.codes, zero=zero, g_idx=g_idx)
