"""How well a model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from marlin_cy.decoder.protocol import DecoderModel, Logits, Progress

__all__ = ["perplexity"]

LOGITS = 1 << 24  # at most in a call, so that they take 64 MiB


def perplexity(
    model: DecoderModel, tokens: Sequence[int], window: int, windows: int, progress: Progress | None = None
) -> float:
    """``exp`` of the mean negative log-likelihood of tokens, in windows one after another.

    Parameters
    ----------
    model : DecoderModel
    tokens : sequence of int
    window : int
        Tokens of a window, at least 2. The first token of each window is not scored.
    windows : int
        Number of whole windows.
    progress : callable, optional
        Called as ``progress(done, total, description)`` after each window.

    Returns
    -------
    float
        Infinity if the logits are not finite.
    """
    total = 0.0
    for done in range(windows):
        total += _negative_log_likelihood(model, tokens[done * window : (done + 1) * window])
        if progress is not None:
            progress(done + 1, windows, f"window {done + 1}")
    mean = total / (windows * (window - 1))
    return math.exp(mean) if mean < 700 else math.inf


def _negative_log_likelihood(model: DecoderModel, window: Sequence[int]) -> float:
    """Of all tokens after the first."""
    part = max(1, LOGITS // model.vocab_size)
    sequence = model.new_sequence()
    total = 0.0
    try:
        for begin in range(0, len(window) - 1, part):
            end = min(begin + part, len(window) - 1)
            logits = model.forward(window[begin:end], sequence=sequence, all_logits=True)
            total += _of_rows(logits, np.asarray(window[begin + 1 : end + 1]))
    finally:
        model.free(sequence)
    return total


def _of_rows(logits: Logits, targets: np.ndarray[tuple[int], np.dtype[np.int64]]) -> float:
    """The sum of ``log(sum(exp(row))) - row[target]`` over the rows."""
    largest = logits.max(axis=1)
    if not np.isfinite(largest).all():
        return math.inf
    scored = logits[np.arange(len(targets)), targets].astype(np.float64) - largest
    sums = np.exp(logits - largest[:, None]).sum(axis=1, dtype=np.float64)
    return float((np.log(sums) - scored).sum())
