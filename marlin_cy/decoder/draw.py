"""How a token is drawn from logits: arithmetic of integers, which is the same on every CPU and every OpenCL device.

``opencl/kernels/decoder_sample.cl`` computes the same. ``F`` is FRACTION_BITS::

    s[v] = rint(clamp(logit[v], -8192, 8192) * 2**F)                        scores, 38 bits and a sign
    d[v] = max(s) - s[v]                                                    distances
    x[v] = d[v] * rate >> shift                                             d / temperature to base 2, in 2**-24
    w[v] = t0[x >> 16 & 255] * t1[x >> 8 & 255] * t2[x & 255] >> (x >> 24)  weights: 2**40 for the largest score

Tokens are ordered by ``(d, id)``. top_k keeps the first ones, top_p then the fewest whose weights have the share of the
sum, and min_p those whose weights are large enough. The kept weights are added up by id. The token is the first whose
sum is above ``random * total >> 64``.

The tables hold powers of two in 31 bits, and a product is cut to 31 bits. A weight is off by 2e-6 of itself at most,
which is due to the 24 bits of the rate, and by 1. Weights never grow with the distance: a limit of weights is one of
distances, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "TABLES",
    "DrawSettings",
    "Factor",
    "amounts_of",
    "draw",
    "largest_of",
    "penalised",
    "settings_of",
    "weights_of",
]

Int64s = npt.NDArray[np.int64]
Indices = npt.NDArray[np.intp]
Floats = npt.NDArray[np.float32]

FRACTION_BITS = 24
LARGEST_LOGIT = 8192.0
LARGEST_SCORE = int(LARGEST_LOGIT) << FRACTION_BITS
RATE_BITS = 24
WEIGHT_BITS = 40
MOST_SHIFT = 63
LN_2 = 0.6931471805599453
POWER_BITS = 31
EXPONENT_BITS = 24  # of x, after the binary point


def powers() -> npt.NDArray[np.uint32]:
    """``2**(31 - i / 256**(j + 1))`` for ``i`` below 256, uint32 ``[3, 256]``: computed with integers."""
    bits = 256
    root = 1 << (bits - 1)  # 2**-1
    table = np.empty((3, 256), np.uint32)
    for part in table:
        for _ in range(8):
            root = math.isqrt(root << bits)
        power = 1 << bits
        for i in range(256):
            part[i] = (power + (1 << (bits - POWER_BITS - 1))) >> (bits - POWER_BITS)
            power = power * root >> bits
    return table


TABLES = powers()
TABLES.setflags(write=False)
WIDE_TABLES = TABLES.astype(np.int64)


@dataclass(frozen=True)
class Factor:
    """The number ``mantissa * 2**-shift``; a mantissa has RATE_BITS bits, a shift is 0 to MOST_SHIFT."""

    mantissa: int
    shift: int

    @classmethod
    def of(cls, value: float) -> Factor:
        """The nearest factor to a positive number; at most ``2**RATE_BITS - 1``, and 0 below ``2**-40``."""
        fraction, exponent = math.frexp(min(value, 2.0**RATE_BITS))
        mantissa, shift = round(math.ldexp(fraction, RATE_BITS)), RATE_BITS - exponent
        if mantissa >> RATE_BITS:
            mantissa, shift = mantissa // 2, shift - 1
        if shift < 0:
            return cls((1 << RATE_BITS) - 1, 0)
        return cls(mantissa, shift) if shift <= MOST_SHIFT else cls(0, 0)


@dataclass(frozen=True)
class DrawSettings:
    """How tokens are drawn.

    Attributes
    ----------
    rate : Factor
        ``log2(e) / temperature``.
    limit : int
        Distances from this one on have the weight 0.
    min_limit : int
        Distances from this one on are left out by min_p.
    top_k : int
        0: all.
    share : int
        top_p times ``2**64``; 0: all.
    """

    rate: Factor
    limit: int
    min_limit: int
    top_k: int = 0
    share: int = 0


@lru_cache(maxsize=64)
def settings_of(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> DrawSettings:
    """The settings for the options of :class:`~marlin_cy.decoder.sampling.SamplingParams`."""
    rate = Factor.of(1 / (LN_2 * temperature))
    least = math.ceil(math.ldexp(min_p or 0.0, WEIGHT_BITS))
    return DrawSettings(
        rate,
        first_below(rate, 1),
        first_below(rate, max(1, least)),
        top_k or 0,
        0 if top_p is None or top_p >= 1 else max(1, int(math.ldexp(top_p, 64))),
    )


def first_below(rate: Factor, weight: int) -> int:
    """The least distance whose weight is less than ``weight``; ``2 * LARGEST_SCORE + 1`` if there is none."""
    low, high = 0, 2 * LARGEST_SCORE + 1
    while low < high:
        middle = (low + high) // 2
        if int(weights_of(np.array([middle], np.int64), rate)[0]) < weight:
            high = middle
        else:
            low = middle + 1
    return low


def weights_of(distances: Int64s, rate: Factor) -> Int64s:
    """The weights of distances."""
    x = distances * rate.mantissa
    x >>= rate.shift
    weights: Int64s = WIDE_TABLES[0][x >> 16 & 255] * WIDE_TABLES[1][x >> 8 & 255]
    weights >>= POWER_BITS
    weights *= WIDE_TABLES[2][x & 255]
    weights >>= POWER_BITS
    weights <<= WEIGHT_BITS - POWER_BITS
    weights >>= np.minimum(x >> EXPONENT_BITS, MOST_SHIFT)
    return weights


def scores_of(logits: Floats) -> Int64s:
    """Logits without a NaN as integers."""
    limited: npt.NDArray[np.float64] = np.clip(logits, -LARGEST_LOGIT, LARGEST_LOGIT).astype(np.float64)
    return np.rint(limited * (1 << FRACTION_BITS)).astype(np.int64)  # the product is exact


def penalised(logits: Floats, above: Factor, below: Factor, amounts: Int64s) -> Floats:
    """Logits with penalties.

    Parameters
    ----------
    logits : float32 ``[n]``
    above, below : Factor
        What positive and negative logits are multiplied by.
    amounts : int64 ``[n]``
        What is then subtracted, in ``2**-FRACTION_BITS``; at most LARGEST_SCORE.

    Returns
    -------
    float32 ``[n]``
        Rounded to nearest. A logit that is not finite stays as it is.
    """
    finite = np.isfinite(logits)
    scores = scores_of(np.where(finite, logits, np.float32(0)))
    multiplied = np.where(scores > 0, scores * above.mantissa >> above.shift, scores * below.mantissa >> below.shift)
    scores = np.clip(multiplied, -LARGEST_SCORE, LARGEST_SCORE) - amounts
    lowered: Floats = scores.astype(np.float32) * np.float32(2.0**-FRACTION_BITS)
    return np.where(finite, lowered, logits)


def amounts_of(amounts: npt.NDArray[np.float64]) -> Int64s:
    """Numbers as the ``amounts`` of :func:`penalised`."""
    limited = np.clip(amounts, -LARGEST_LOGIT, LARGEST_LOGIT) * (1 << FRACTION_BITS)
    return np.rint(limited).astype(np.int64)


def draw(logits: Floats, settings: DrawSettings, random: int) -> int:
    """The token that a random number of 64 bits draws. The logits have no NaN, and the largest is finite."""
    scores = scores_of(logits)
    largest = scores.max()
    tokens = np.flatnonzero(scores > largest - settings.limit)
    distances = largest - scores[tokens]
    if 0 < settings.top_k < len(tokens):
        kept = largest_of(-distances, settings.top_k)
        tokens, distances = tokens[kept], distances[kept]
    weights = weights_of(distances, settings.rate)
    if settings.share:
        kept = most_likely(distances, weights, settings.share)
        tokens, distances, weights = tokens[kept], distances[kept], weights[kept]
    if settings.min_limit < settings.limit:
        likely = distances < settings.min_limit
        tokens, weights = tokens[likely], weights[likely]
    sums = weights.cumsum()
    return int(tokens[sums.searchsorted(random * int(sums[-1]) >> 64, "right")])


def largest_of(scores: npt.NDArray[Any], count: int) -> Indices:
    """Indices of the ``count`` largest scores, ascending. Of equal scores the first are taken."""
    least = np.partition(scores, len(scores) - count)[len(scores) - count]
    found = np.flatnonzero(scores >= least)
    if len(found) > count:
        equal = np.flatnonzero(scores[found] == least)
        found = np.delete(found, equal[count - len(found) :])
    return found


def most_likely(distances: Int64s, weights: Int64s, share: int) -> Indices:
    """Indices, ascending, of the fewest tokens that have this share of all weights, from the least distance on."""
    total = int(weights.sum())
    least = -(-total * share >> 64)
    # Weights that are smaller have less than the rest of the sum together.
    found = np.flatnonzero(weights > (total - least) // len(weights))
    order = np.argsort(distances[found], kind="stable")
    count = int(weights[found[order]].cumsum().searchsorted(least)) + 1
    return np.sort(found[order[:count]])
