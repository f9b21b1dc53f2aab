"""The step that follows a step by phases which chose tokens: ``kernels/decoder_step_head.cl`` describes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from marlin_cy.decoder.program import PAGE_TOKENS

if TYPE_CHECKING:
    from marlin_cy.decoder.program import Batch
    from marlin_cy.opencl.decoder.step import Ints

__all__ = ["Following"]


class Following:
    """The step that the device's description names after a step that chose tokens.

    Parameters
    ----------
    positions : list of int
        Of its rows.
    pages : int32 ``[rows, pages]``
        The page tables of the description. They are not changed afterwards.

    Attributes
    ----------
    tokens : list of int
        Of its rows; empty until the host has read them.
    """

    def __init__(self, positions: list[int], pages: Ints) -> None:
        self._positions, self._pages = positions, pages
        self.tokens: list[int] = []

    @property
    def num_pages(self) -> int:
        """Pages of a row's table."""
        return len(self._pages[0])

    def is_step_of(self, batch: Batch) -> bool:
        """Whether a batch has these tokens at these positions."""
        positions: list[int] = batch.segments[:, 2].tolist()
        return batch.tokens.tolist() == self.tokens and positions == self._positions

    def has_pages_of(self, batch: Batch) -> bool:
        """Whether the description has the page of each row's position, and a batch has the same page tables."""
        return self._has_pages() and np.array_equal(self._pages, batch.pages[:, : self.num_pages])

    def can_be_computed(self, context_length: int) -> bool:
        """Whether the description has the page of each row's position, and the model has these positions."""
        return self._has_pages() and max(self._positions) < context_length

    def next(self) -> Following:
        """The step after this one."""
        return Following([position + 1 for position in self._positions], self._pages)

    def _has_pages(self) -> bool:
        places = [position // PAGE_TOKENS for position in self._positions]
        return all(place < self.num_pages and self._pages[row, place] >= 0 for row, place in enumerate(places))
