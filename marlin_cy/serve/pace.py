"""How many tokens of prompts a step computes, so that answers that are being written do not wait long."""

from __future__ import annotations

__all__ = ["Pace"]

FIRST, LEAST, MOST = 256, 32, 1024
"""Tokens of prompts in the first step; bounds for the others. A model computes 1024 tokens at once."""


class Pace:
    """The number of tokens that take about a given time.

    Parameters
    ----------
    seconds : float
        The longest time that a step should take.

    Attributes
    ----------
    tokens : int
        Tokens of prompts that the next step computes at most.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.tokens = FIRST

    def record(self, tokens: int, seconds: float) -> None:
        """Learn from a step: its tokens of prompts, and its time."""
        if seconds > self._seconds:
            self.tokens = max(self.tokens // 2, LEAST)
        elif tokens == self.tokens and seconds < self._seconds / 2:
            self.tokens = min(self.tokens * 2, MOST)
