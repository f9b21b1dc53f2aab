"""How many tokens of prompts a step computes, so that texts that are being written do not wait long."""

from __future__ import annotations

__all__ = ["Pace"]

FIRST, LEAST, MOST = 256, 128, 1024
"""Tokens of prompts in the first step beside texts; bounds for the others.

A model computes 1024 tokens at once. A step reads most experts of a layer for 128 tokens as for 32: smaller parts would
take about as long, and prompts as many times longer.
"""


class Pace:
    """The number of tokens that take about a given time.

    Parameters
    ----------
    seconds : float
        The time that a step should take at most, while texts wait for it.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._tokens = FIRST

    def most(self, *, beside_texts: bool) -> int:
        """Tokens of prompts that the next step computes at most. Where no text waits, a step may take any time."""
        return self._tokens if beside_texts else MOST

    def record(self, tokens: int, seconds: float) -> None:
        """Learn from a step beside texts: its tokens of prompts, and its time."""
        if seconds > self._seconds:
            self._tokens = max(self._tokens // 2, LEAST)
        elif tokens == self._tokens and seconds < self._seconds / 2:
            self._tokens = min(self._tokens * 2, MOST)
