"""Log-probabilities of tokens, from logits."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from marlin_cy.decoder.protocol import Logits
from marlin_cy.decoder.sampling import exp, largest_of

__all__ = ["Scores", "scores_of"]


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
