"""Log-probabilities of tokens, from logits."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from marlin_cy.decoder.draw import largest_of
from marlin_cy.decoder.protocol import Logits

__all__ = ["Scores", "exp", "scores_of"]

Values = npt.NDArray[np.float64]

LEAST_EXPONENT = -37.0
"""The least exponent of a weight. A weight of 2**-53 of the largest one does not change a sum."""


class Scores(NamedTuple):
    """Log-probabilities by the model's logits, before temperature and penalties.

    Attributes
    ----------
    token : int
    score : float
        Of the token.
    top : tuple of (int, float)
        The most likely tokens and their scores, from the most likely down; of equal ones the smaller id comes first.
    """

    token: int
    score: float
    top: tuple[tuple[int, float], ...]


def scores_of(logits: Logits, token: int, count: int) -> Scores:
    """The score of a token and of the ``count`` most likely ones.

    Parameters
    ----------
    logits : float32 ``[vocab_size]``
        The largest is finite.
    token : int
    count : int
        At least 0. If it is larger than the vocabulary, all tokens are given.
    """
    values = logits.astype(np.float64)
    values -= values.max()
    weights = values.copy()
    exp(weights)
    values -= math.log(weights.cumsum()[-1])  # a sum in ascending order has the same bits everywhere
    found = largest_of(values, min(count, len(values))) if count else np.empty(0, np.intp)
    found = found[np.argsort(-values[found], kind="stable")]
    return Scores(token, float(values[token]), tuple((int(one), float(values[one])) for one in found))


def exp(x: Values) -> None:
    """Replace ``x <= 0`` by ``e**x``, to a relative error of 1e-10; below :data:`LEAST_EXPONENT` by about its power.

    NumPy's own differs by a bit between CPUs. Multiplication and addition do not. ``x = -(i + f) / STEPS`` with an
    integer ``i`` and ``0 <= f < 1``; the power of ``i`` is in a table, that of ``f`` is a sum of four terms.
    """
    for begin in range(0, len(x), BLOCK):
        power = x[begin : begin + BLOCK]
        f = power * -STEPS
        np.minimum(f, len(POWERS) - 1, out=f)
        i = f.astype(np.int64)
        f -= i
        f *= -1 / STEPS
        np.multiply(f, 1 / 6, out=power)
        for term in (1 / 2, 1.0):
            power += term
            power *= f
        power += 1.0
        power *= POWERS[i]


def _powers() -> Values:
    """``e**(-i / STEPS)``: by the first terms of the series for ``e**(x / 1024)``, and its 1024th power."""
    x = np.arange(1 - LEAST_EXPONENT * STEPS) * (-1 / STEPS / 1024)
    power = x * (1 / 720)
    for term in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0):
        power += term
        power *= x
    power += 1.0
    for _ in range(10):
        power *= power
    return power


STEPS = 256
BLOCK = 8192  # numbers of a block, so that they stay in the cache
POWERS = _powers()
