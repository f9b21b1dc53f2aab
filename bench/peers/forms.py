"""Conversions and checks of weights that several peers share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from bench.peers.interface import Array
from marlin_cy.errors import UnsupportedError
from marlin_cy.weights.canonical import CanonicalWeight

__all__ = [
    "columns_of",
    "pack_rows",
    "require_matching",
    "require_nibble_zeros",
    "require_plain",
    "require_routing",
    "require_symmetric",
    "zeros_of",
]


def columns_of(weight: CanonicalWeight, columns: slice) -> CanonicalWeight:
    """Some of a weight's columns, as a weight."""
    zero = zeros_of(weight)[:, columns]
    return replace(weight, words=weight.words[:, columns], scale=weight.scale[:, columns], zero=zero)


def zeros_of(weight: CanonicalWeight) -> Array:
    """The zero points, which all weights with integer codes have."""
    assert weight.zero is not None, "require_plain is called before"
    return weight.zero


def pack_rows(codes: Array) -> npt.NDArray[np.uint8]:
    """uint8 ``[N, ceil(X/2)]`` from codes ``[N, X]`` in 0..15: low nibble first; an odd row is padded with 0."""
    padded = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return np.ascontiguousarray(padded[:, 0::2] | padded[:, 1::2] << 4)


def require_plain(weight: CanonicalWeight, group_sizes: Collection[int] | None = None) -> None:
    """Raise UnsupportedError unless a weight has integer codes and whole groups, of one of these sizes if given."""
    if weight.codes != "uint4":
        raise UnsupportedError(f"weight: got codes {weight.codes!r}, expected 'uint4'")
    if weight.g_idx is not None:
        raise UnsupportedError("weight: got a g_idx, expected groups of consecutive rows")
    if weight.k % weight.group_size:
        raise UnsupportedError(f"weight: got K {weight.k}, expected a multiple of its group size {weight.group_size}")
    if group_sizes is not None and weight.group_size not in group_sizes:
        raise UnsupportedError(f"weight: got group_size {weight.group_size}, expected one of {group_sizes}")


def require_symmetric(weight: CanonicalWeight) -> None:
    """Raise UnsupportedError unless all zero points are 8."""
    if (zeros_of(weight) != 8).any():
        raise UnsupportedError("weight: got zero points other than 8, expected a symmetric weight")


def require_nibble_zeros(weight: CanonicalWeight) -> None:
    """Raise UnsupportedError unless all zero points are below 16, so that 4 bits hold them."""
    if (zeros_of(weight) > 15).any():
        raise UnsupportedError("weight: got a zero point of 16, expected at most 15, which 4 bits hold")


def require_matching(gate_up: Sequence[CanonicalWeight], down: Sequence[CanonicalWeight]) -> None:
    """Raise ValueError unless the shapes and numbers of both products' weights fit together in a layer."""
    if (down[0].k, down[0].n, len(down)) != (gate_up[0].n // 2, gate_up[0].k, len(gate_up)):
        raise ValueError(
            f"down: got {len(down)} weights [{down[0].k}, {down[0].n}], "
            f"expected {len(gate_up)} weights [{gate_up[0].n // 2}, {gate_up[0].k}]"
        )


def require_routing(x: Array, ids: Array, weights: Array | None, hidden: int, num_experts: int) -> None:
    """Raise ValueError or IndexError unless tokens, their experts and weights (if any) fit each other and a layer."""
    if x.ndim != 2 or x.shape[1] != hidden:
        raise ValueError(f"x: got shape {x.shape}, expected [T, {hidden}]")
    if ids.ndim != 2 or len(ids) != len(x):
        raise ValueError(f"topk_ids: got shape {ids.shape}, expected [{len(x)}, top_k]")
    if weights is not None and ids.shape != weights.shape:
        raise ValueError(f"topk_weights: got shape {weights.shape}, expected {ids.shape}, the shape of topk_ids")
    if ids.size and not 0 <= ids.min() <= ids.max() < num_experts:
        raise IndexError(f"topk_ids: got {ids.min()} to {ids.max()}, expected 0 to {num_experts - 1}")
