"""The checks that a peer must pass before it is timed: errors against float64, within bounds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from bench.common.shapes import random_ids
from bench.peers.interface import Array, Experts, Peer, Projection, RoutedProduct
from marlin_cy import reference
from marlin_cy.weights.canonical import CanonicalWeight

__all__ = ["WrongResult", "bound", "check", "check_moe", "check_routed", "random_routing", "relative_error"]

ROWS = (1, 5, 33)  # libraries have different kernels for one row, for a few, and for many
TOKENS = (1, 7)

Dense = npt.NDArray[np.float64]


class WrongResult(ArithmeticError):
    """A peer's result is not the product of its operands."""


def check(peer: Peer, weight: CanonicalWeight, rng: np.random.Generator, loaded: Projection | None = None) -> float:
    """The relative error of a peer's products against float64: the largest over a few numbers of rows.

    The result is the error of the product with ``weight``. Two parts of it are bounded separately: the error of the
    product with the values that the peer keeps (:meth:`Peer.kept`), and the error of these values.

    Parameters
    ----------
    peer : Peer
        An available one.
    weight : CanonicalWeight
    rng : numpy.random.Generator
    loaded : Projection, optional
        ``weight`` as the peer loaded it; loaded here by default.

    Raises
    ------
    WrongResult
        The error of the product exceeds :func:`bound` or is NaN, the shape or dtype is wrong, or the error of the kept
        values exceeds :meth:`Peer.rounding`.
    """
    dense, kept = reference.dequantize_weight(weight), _kept(peer, weight)
    loaded = peer.load(weight) if loaded is None else loaded
    errors = []
    for rows in ROWS:
        x = rng.standard_normal((rows, weight.k), np.float32)
        y = loaded.rows(x)
        _require_error(peer, y, x.astype(np.float64) @ kept, bound(peer.accuracy, weight.k))
        errors.append(relative_error(y, x.astype(np.float64) @ dense))
    return max(errors)


def check_routed(
    peer: Peer, weights: Sequence[CanonicalWeight], top_k: int, rng: np.random.Generator, loaded: RoutedProduct
) -> float:
    """Like :func:`check`, for a :class:`RoutedProduct` of these weights."""
    dense, kept = (_of_each(make, weights) for make in _dense_and_kept(peer))
    errors = []
    for tokens in TOKENS:
        x = rng.standard_normal((tokens, weights[0].k), np.float32)
        ids, _ = random_routing(rng, tokens, len(weights), top_k)
        y = loaded.slots(x, ids)
        _require_error(peer, y, _slots(x, kept, ids), bound(peer.accuracy, weights[0].k))
        errors.append(relative_error(y, _slots(x, dense, ids)))
    return max(errors)


def check_moe(
    peer: Peer,
    gate_up: Sequence[CanonicalWeight],
    down: Sequence[CanonicalWeight],
    top_k: int,
    rng: np.random.Generator,
    loaded: Experts | None = None,
) -> float:
    """Like :func:`check`, for a layer's output. The bound is three times a product's: gate, up and down add up.

    Parameters
    ----------
    peer, rng
        As for :func:`check`.
    gate_up, down : sequence of CanonicalWeight
        As for :meth:`Peer.load_moe`.
    top_k : int
        Experts per token.
    loaded : Experts, optional
        The weights as the peer loaded them; loaded here by default.
    """
    dense, kept = ([_of_each(make, weights) for weights in (gate_up, down)] for make in _dense_and_kept(peer))
    loaded = peer.load_moe(gate_up, down) if loaded is None else loaded
    limit = 3 * bound(peer.accuracy, max(gate_up[0].k, down[0].k))
    errors = []
    for tokens in TOKENS:
        x = rng.standard_normal((tokens, gate_up[0].k), np.float32)
        ids, weights = random_routing(rng, tokens, len(gate_up), top_k)
        y = loaded.tokens(x, ids, weights)
        expected, ideal = (
            reference.moe_layer(x, gate_up_w, down_w, ids, weights) for gate_up_w, down_w in (kept, dense)
        )
        _require_error(peer, y, expected, limit)
        errors.append(relative_error(y, ideal))
    return max(errors)


def bound(accuracy: str, k: int) -> float:
    """The largest relative error (Frobenius norms) of a product over K normal activations, by accuracy.

    ==========  =================================================================================================
    "float32"   K independent roundings, with some slack because sums are cut into lanes in any order
    "int16"     as "int8", with steps of 5/32639
    "bf16"      four roundings of at most 2**-8 each: of activations, scales, zero points and outputs
    "int8"      the largest activation is at most 5 standard deviations, so a step is 5/127 of one; the error of
                rounding is the step over the square root of 12; doubled for scales in 16 bits and sums of offsets
    ==========  =================================================================================================

    Zero points that are wrong by one exceed every bound by a factor of five and more.
    """
    bounds = {
        "float32": (4 + 2 * math.sqrt(k)) * 2.0**-24,
        "int16": 2 * 5 / 32639 / 12**0.5,
        "bf16": 4 * 2.0**-8,
        "int8": 2 * 5 / 127 / 12**0.5,
    }
    return bounds[accuracy]


def _dense_and_kept(peer: Peer) -> tuple[Callable[[CanonicalWeight], Dense], Callable[[CanonicalWeight], Dense]]:
    """Two functions from a weight to float64: its dequantised values, and the values that the peer keeps."""
    return reference.dequantize_weight, functools.partial(_kept, peer)


def _of_each(make: Callable[[CanonicalWeight], Dense], weights: Sequence[CanonicalWeight]) -> list[Dense]:
    """``make`` of every weight. Experts of a benchmark share a few weights, each of which is converted once."""
    made = {id(weight): make(weight) for weight in {id(weight): weight for weight in weights}.values()}
    return [made[id(weight)] for weight in weights]


def _slots(x: Array, dense: Sequence[Dense], topk_ids: Array) -> Dense:
    """float64 ``[T, top_k, N]``: each token's product with each of its experts."""
    return np.stack(
        [[row @ dense[e] for e in chosen] for row, chosen in zip(x.astype(np.float64), topk_ids, strict=True)]
    )


def random_routing(
    rng: np.random.Generator, tokens: int, num_experts: int, top_k: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """``(topk_ids, topk_weights)``, int32 and float32 ``[tokens, top_k]``; the weights of a token sum to 1."""
    ids = random_ids(rng, tokens, num_experts, top_k)
    weights = rng.uniform(0.1, 1, ids.shape)
    return ids, (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def relative_error(actual: Array, expected: Array) -> float:
    """The Frobenius norm of the difference, divided by the norm of ``expected``."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def _kept(peer: Peer, weight: CanonicalWeight) -> Dense:
    """The values that a peer keeps of a weight, after a check that they are as close to it as the peer says."""
    kept, limit = peer.kept(weight), peer.rounding(weight)
    error = relative_error(kept, reference.dequantize_weight(weight))
    if not error <= limit:
        raise WrongResult(
            f"{peer.name}: got weights with a relative error of {error:.2e}, expected at most {limit:.2e}"
        )
    return kept


def _require_error(peer: Peer, actual: Array, expected: Array, limit: float) -> None:
    if actual.shape != expected.shape or actual.dtype != np.float32:
        raise WrongResult(f"{peer.name}: got {actual.dtype} {actual.shape}, expected float32 {expected.shape}")
    error = relative_error(actual, expected)
    if not error <= limit:
        raise WrongResult(f"{peer.name}: got a relative error of {error:.2e}, expected at most {limit:.2e}")
