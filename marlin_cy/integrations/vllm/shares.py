"""The part of a weight that one process of vLLM computes: columns or rows, as tensor parallelism divides them."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

import numpy as np

from marlin_cy.weights.canonical import CanonicalWeight
from marlin_cy.weights.code_types import code_type

__all__ = ["columns", "deinterleaved", "rows", "share", "start_of_share"]


def share(weight: CanonicalWeight, k: int, n: int, rank: int, ranks: int) -> CanonicalWeight:
    """The ``[k, n]`` of a weight that belong to a rank. A weight of this size is the rank's share already.

    Raises
    ------
    ValueError
        The weight's sizes are not multiples of ``k`` and ``n``.
    """
    if weight.n != n:
        weight = columns(weight, start_of_share(weight.n, n, rank, ranks), n)
    if weight.k != k:
        weight = rows(weight, start_of_share(weight.k, k, rank, ranks), k)
    return weight


def start_of_share(total: int, size: int, rank: int, ranks: int) -> int:
    """Where a rank's share begins, of ``total`` columns or rows in shares of ``size``.

    Where there are fewer shares than ranks, neighbouring ranks have the same: vLLM's copies of key heads.

    Raises
    ------
    ValueError
        ``total`` is not a multiple of ``size``, or the shares cannot be dealt out evenly.
    """
    shares, rest = divmod(total, size)
    if rest or not shares or ranks % shares:
        raise ValueError(f"got {total} columns or rows, expected shares of {size} for {ranks} ranks")
    return rank // (ranks // shares) * size


def columns(weight: CanonicalWeight, start: int, size: int) -> CanonicalWeight:
    """Columns ``[start, start + size)``."""
    return weight.columns(slice(start, start + size))


def rows(weight: CanonicalWeight, start: int, size: int) -> CanonicalWeight:
    """Rows ``[start, start + size)`` of K, exactly.

    Groups that the cut would divide become smaller groups with equal scales. With ``g_idx``, all groups remain, and
    each is smaller on average.

    Raises
    ------
    ValueError
        The rows do not fill whole words; or, with ``g_idx``, the groups cannot be numbered.
    """
    codes = code_type(weight.codes).codes_per_word
    if start % codes or size % codes:
        raise ValueError(f"got rows {start} to {start + size}, expected multiples of {codes}")
    words = weight.words[start // codes : (start + size) // codes]
    if weight.g_idx is not None:
        # ceil(size / group_size) must stay the number of groups.
        if weight.group_size * size % weight.k:
            raise ValueError(f"got {size} of {weight.k} rows in groups of {weight.group_size} in the order of g_idx")
        group_size = weight.group_size * size // weight.k
        return replace(weight, words=words, group_size=group_size, g_idx=weight.g_idx[start : start + size].copy())
    whole = weight.group_size >= weight.k
    group_size = size if whole else gcd(weight.group_size, start, size)
    groups = np.arange(start, start + size, group_size) // weight.group_size
    return replace(
        weight,
        words=words,
        scale=weight.scale[groups],
        zero=None if weight.zero is None else weight.zero[groups],
        group_size=group_size,
    )


def deinterleaved(weight: CanonicalWeight) -> tuple[CanonicalWeight, CanonicalWeight]:
    """``(gate, up)`` of a weight with alternating gate and up columns."""
    return weight.columns(slice(0, None, 2)), weight.columns(slice(1, None, 2))
