"""Sequences, and the pages of the cache that they hold.

::

    sequence a, 40 tokens     pages   [ 0 ][ 1 ][ 2 . ]        PAGE_TOKENS positions each; "." is not written yet
    fork b of a               pages   [ 0 ][ 1 ][ 2 . ]        shared: each page counts its holders
    b grows                   pages   [ 0 ][ 1 ][ 3 . ]        the last page is copied before it is written
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from marlin_cy.decoder.program import PAGE_TOKENS
from marlin_cy.errors import MarlinError

__all__ = ["CacheFull", "PagePool", "Sequence", "pages_of"]


class CacheFull(MarlinError, MemoryError):
    """The cache has too few free pages for a call. The call has changed nothing."""


def pages_of(tokens: int) -> int:
    """Pages that ``tokens`` positions take."""
    return -(-tokens // PAGE_TOKENS)


class PagePool:
    """The pages of a cache: which are free, and how many sequences hold each of the others.

    Parameters
    ----------
    num_pages : int
    provide : callable, optional
        :meth:`~marlin_cy.decoder.program.DecoderProgram.provide_pages` of the program that has the memory.
    """

    def __init__(self, num_pages: int, provide: Callable[[int], int] = lambda num_pages: num_pages) -> None:
        self._holders = np.zeros(num_pages, np.int32)
        self._provide = provide
        self._free: list[int] = []  # those that have memory
        self._provided = 0

    @property
    def num_free(self) -> int:
        """Number of free pages, those included whose memory is not there yet."""
        return len(self._free) + len(self._holders) - self._provided

    def make_free(self, count: int) -> None:
        """Have memory for ``count`` free pages.

        Raises
        ------
        CacheFull
            So many pages are not free, or there is no memory for them.
        """
        missing = count - len(self._free)
        if missing <= 0:
            return
        if count > self.num_free:
            raise CacheFull(
                f"cache: got {count} pages of {PAGE_TOKENS} tokens to add, {self.num_free} are free; free "
                "sequences, or load the model with more cache_tokens"
            )
        try:
            provided = self._provide(self._provided + missing)
        except MemoryError as error:
            raise CacheFull(
                f"cache: got {count} pages of {PAGE_TOKENS} tokens to add, {len(self._free)} are free, and there is no "
                f"memory for others ({error}); free sequences"
            ) from error
        # The lowest number is taken first, so that the pages of a single sequence follow each other.
        self._free[:0] = range(provided - 1, self._provided - 1, -1)
        self._provided = provided

    def take(self) -> int:
        """A free page, held once."""
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def share(self, page: int) -> None:
        """Count another holder of a page."""
        self._holders[page] += 1

    def is_shared(self, page: int) -> bool:
        """Whether a page has more than one holder."""
        return bool(self._holders[page] > 1)

    def drop(self, page: int) -> None:
        """Count one holder less. A page without holders is free."""
        self._holders[page] -= 1
        if self._holders[page] == 0:
            self._free.append(page)


class Sequence:
    """Tokens that a model has seen, one after another. Made by :meth:`~marlin_cy.decoder.model.Model.new_sequence`.

    Attributes
    ----------
    length : int
        Number of tokens in the cache.
    state : int
        The slot of recurrent state, or -1 if the model has none.
    """

    def __init__(self, pool: PagePool, max_pages: int, state: int = -1) -> None:
        self.length = 0
        self.state = state
        self._pool: PagePool | None = pool
        self._table = np.full(max_pages, -1, np.int32)
        self._num_pages = 0

    def __repr__(self) -> str:
        return f"Sequence({'freed' if self._pool is None else f'{self.length} tokens'})"

    @property
    def freed(self) -> bool:
        """Whether the sequence was freed, and can no longer be used."""
        return self._pool is None

    @property
    def page_table(self) -> npt.NDArray[np.int32]:
        """int32 ``[pages of a whole context]``: the pages held, then -1."""
        return self._table

    def pages_needed(self, tokens: int) -> int:
        """Free pages that appending ``tokens`` tokens takes, a copy of a shared last page included."""
        return pages_of(self.length + tokens) - self._num_pages + self._must_copy_last(tokens)

    def grow(self, tokens: int, copy_page: Callable[[int, int], None]) -> None:
        """Hold pages for ``tokens`` more tokens. The pool has :meth:`pages_needed` free pages."""
        pool = self._held_pool()
        if self._must_copy_last(tokens):
            shared, own = int(self._table[self._num_pages - 1]), pool.take()
            copy_page(shared, own)
            self._table[self._num_pages - 1] = own
            pool.drop(shared)
        while self._num_pages < pages_of(self.length + tokens):
            self._table[self._num_pages] = pool.take()
            self._num_pages += 1

    def shrink(self, length: int) -> None:
        """Keep the first ``length`` tokens, and drop the pages of the others."""
        pool = self._held_pool()
        while self._num_pages > pages_of(length):
            self._num_pages -= 1
            pool.drop(int(self._table[self._num_pages]))
            self._table[self._num_pages] = -1
        self.length = length

    def fork(self, state: int = -1) -> Sequence:
        """A sequence with the same tokens. It shares all pages."""
        pool = self._held_pool()
        other = Sequence(pool, len(self._table), state)
        other.length, other._num_pages = self.length, self._num_pages
        other._table[:] = self._table
        for page in self._table[: self._num_pages]:
            pool.share(int(page))
        return other

    def free(self) -> None:
        """Drop all pages. The sequence can no longer be used."""
        self.shrink(0)
        self._pool = None

    def _must_copy_last(self, tokens: int) -> bool:
        """Whether appending tokens writes to a last page that another sequence holds too."""
        if tokens == 0 or self.length == self._num_pages * PAGE_TOKENS:
            return False
        return self._held_pool().is_shared(int(self._table[self._num_pages - 1]))

    def _held_pool(self) -> PagePool:
        if self._pool is None:
            raise ValueError("sequence: was freed")
        return self._pool
