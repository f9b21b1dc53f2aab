"""Sequences that are kept after their request, for requests that begin with the same tokens."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from marlin_cy.decoder.program import PAGE_TOKENS

__all__ = ["Prefix", "PrefixStore", "common_length"]

MOST_KEPT = 256
"""Sequences that are kept at most: a search compares with each that has the same first page, in some 5 µs."""


def common_length(a: array[int], b: array[int]) -> int:
    """Number of tokens at the start that both have in common."""
    length = min(len(a), len(b))
    different = np.flatnonzero(np.frombuffer(a, np.intc)[:length] != np.frombuffer(b, np.intc)[:length])
    return int(different[0]) if len(different) else length


class Prefix(NamedTuple):
    """A sequence that no request uses, and its tokens: at least a page."""

    tokens: array[int]
    sequence: Any


class PrefixStore:
    """Kept sequences, from the one that was used longest ago to the latest.

    Less than a page of tokens in common is not worth sharing. Sequences are therefore found by their first page.

    Parameters
    ----------
    free : callable
        Called with a sequence that is no longer kept.
    """

    def __init__(self, free: Callable[[Any], None]) -> None:
        self._free = free
        self._kept: dict[int, Prefix] = {}  # by id, in the order of use
        self._starts: dict[bytes, dict[int, Prefix]] = {}  # by the first page, then by id

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, tokens: array[int], sequence: Any) -> None:
        """Keep a sequence of at least a page. Kept ones that it begins with are not needed beside it."""
        for one in self._alike(tokens):
            if common_length(one.tokens, tokens) == len(one.tokens):
                self._free(self.take(one))
        prefix = Prefix(tokens, sequence)
        self._kept[id(prefix)] = prefix
        self._starts.setdefault(_first_page(tokens), {})[id(prefix)] = prefix
        if len(self._kept) > MOST_KEPT:
            self.evict()

    def find(self, tokens: array[int], whole: bool) -> tuple[Prefix | None, int]:
        """The kept sequence that has most tokens in common, and how many: at least a page.

        Parameters
        ----------
        tokens : array of int
        whole : bool
            Only sequences all of whose tokens are in common.
        """
        best, most = None, 0
        for one in self._alike(tokens):
            common = common_length(one.tokens, tokens)
            if common >= max(most, PAGE_TOKENS) and not (whole and common < len(one.tokens)):
                best, most = one, common
        return best, most

    def touch(self, prefix: Prefix) -> None:
        """Count a sequence as used now."""
        self._kept[id(prefix)] = self._kept.pop(id(prefix))

    def take(self, prefix: Prefix) -> Any:
        """The sequence, which is no longer kept and not freed."""
        del self._kept[id(prefix)]
        start = _first_page(prefix.tokens)
        del self._starts[start][id(prefix)]
        if not self._starts[start]:
            del self._starts[start]
        return prefix.sequence

    def evict(self, spared: Prefix | None = None) -> bool:
        """Free the sequence that was used longest ago, apart from a spared one; whether there was one."""
        for one in self._kept.values():
            if one is not spared:
                self._free(self.take(one))
                return True
        return False

    def clear(self) -> None:
        """Free all sequences."""
        while self.evict():
            pass

    def _alike(self, tokens: array[int]) -> list[Prefix]:
        """The kept sequences with the same first page."""
        return list(self._starts.get(_first_page(tokens), {}).values())


def _first_page(tokens: array[int]) -> bytes:
    return tokens[:PAGE_TOKENS].tobytes()
