"""Sequences that are kept after their request, for requests that begin with the same tokens."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Prefix", "PrefixStore", "common_length"]

MOST_KEPT = 256
"""Sequences that are kept at most: a search compares with each of them, in a few µs."""


def common_length(a: array[int], b: array[int]) -> int:
    """Number of tokens at the start that both have in common."""
    length = min(len(a), len(b))
    different = np.flatnonzero(np.frombuffer(a, np.intc)[:length] != np.frombuffer(b, np.intc)[:length])
    return int(different[0]) if len(different) else length


class Prefix(NamedTuple):
    """A sequence that no request uses, and its tokens."""

    tokens: array[int]
    sequence: Any


class PrefixStore:
    """Kept sequences, from the one that was used longest ago to the latest.

    Parameters
    ----------
    free : callable
        Called with a sequence that is no longer kept.
    """

    def __init__(self, free: Callable[[Any], None]) -> None:
        self._free = free
        self._kept: list[Prefix] = []

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, tokens: array[int], sequence: Any) -> None:
        """Keep a sequence. Kept ones that it begins with are not needed beside it."""
        covered = [one for one in self._kept if common_length(one.tokens, tokens) == len(one.tokens)]
        for one in covered:
            self._remove(one)
            self._free(one.sequence)
        self._kept.append(Prefix(tokens, sequence))
        if len(self._kept) > MOST_KEPT:
            self.evict()

    def find(self, tokens: array[int], whole: bool) -> tuple[Prefix | None, int]:
        """The kept sequence that has most tokens in common, and how many.

        Parameters
        ----------
        tokens : array of int
        whole : bool
            Only sequences all of whose tokens are in common.
        """
        best, most = None, 0
        for one in self._kept:
            common = common_length(one.tokens, tokens)
            if common >= max(most, 1) and not (whole and common < len(one.tokens)):
                best, most = one, common
        return best, most

    def touch(self, prefix: Prefix) -> None:
        """Count a sequence as used now."""
        self._remove(prefix)
        self._kept.append(prefix)

    def take(self, prefix: Prefix) -> Any:
        """The sequence, which is no longer kept and not freed."""
        self._remove(prefix)
        return prefix.sequence

    def evict(self, spared: Prefix | None = None) -> bool:
        """Free the sequence that was used longest ago, apart from a spared one; whether there was one."""
        for position, one in enumerate(self._kept):
            if one is not spared:
                del self._kept[position]
                self._free(one.sequence)
                return True
        return False

    def clear(self) -> None:
        """Free all sequences."""
        while self.evict():
            pass

    def _remove(self, prefix: Prefix) -> None:
        self._kept = [one for one in self._kept if one is not prefix]
