"""The interface of a backend's program for a whole model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from marlin_cy.errors import MarlinError

if TYPE_CHECKING:
    from marlin_cy.decoder.sampling import Sampler

__all__ = ["PAGE_TOKENS", "Batch", "DecoderProgram", "picked"]

PAGE_TOKENS = 16
"""Positions of a page of the cache."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Tokens of one or more sequences. The rows of a sequence follow each other, and so do their positions.

    Attributes
    ----------
    tokens : int32 ``[rows]``
        At least one.
    segments : int64 ``[segments, 4]``
        Of each sequence: its first row, the number of its rows, the position of its first row, and the slot of its
        recurrent state (-1 if the model has none).
    pages : int32 ``[segments, any number]``
        The pages of each sequence, in order: page ``i`` has positions ``PAGE_TOKENS * i`` to
        ``PAGE_TOKENS * (i + 1) - 1``. There is one for each position of the sequence, those of the batch included.
    wanted : int32 ``[any number]``
        The rows whose logits are wanted, ascending.
    """

    tokens: npt.NDArray[np.int32]
    segments: npt.NDArray[np.int64]
    pages: npt.NDArray[np.int32]
    wanted: npt.NDArray[np.int32]


def picked(sampler: Sampler, position: int, logits: npt.NDArray[np.float32]) -> int | MarlinError:
    """What a sampler picks from logits, or the error that it raises."""
    try:
        return sampler.pick(logits, position)
    except MarlinError as error:
        return error


class DecoderProgram(ABC):
    """A plan that is ready to run, and the memory of its cache. Made by :meth:`marlin_cy.Backend.new_decoder`.

    Arguments are not checked: :class:`~marlin_cy.decoder.model.Model` does that.
    """

    @abstractmethod
    def step(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Append a batch to the cache. Returns a new array: the logits ``[wanted, vocab_size]``.

        A token's logits have the same bits whatever the rest of the batch is, and whichever batches its sequence's
        earlier tokens came in, on backends that promise it (the CPU does).
        """

    def pick(self, batch: Batch, choices: Sequence[tuple[Sampler, int]]) -> list[int | MarlinError]:
        """Append a batch to the cache, and choose the token that follows each wanted row.

        Parameters
        ----------
        batch : Batch
        choices : sequence of (Sampler, int)
            For each wanted row, what chooses the token, and the token's position in its sequence.

        Returns
        -------
        list of int or MarlinError
            The tokens of :meth:`Sampler.pick <marlin_cy.decoder.sampling.Sampler.pick>`, or its error. The samplers
            have counted the tokens.
        """
        if not choices:
            self.step(batch)
            return []
        return [picked(*choice, row) for choice, row in zip(choices, self.step(batch), strict=True)]

    def provide_pages(self, num_pages: int) -> int:
        """Provide the memory of pages 0 to ``num_pages - 1``. Returns the number of pages that have memory.

        Steps and copies only use pages that this method has returned. ``num_pages`` is at most that of
        :meth:`~marlin_cy.Backend.new_decoder`. The default is for programs that have all memory from the beginning.

        Raises
        ------
        MemoryError
            There is too little memory. The program goes on with the pages that it has.
        """
        return num_pages

    @abstractmethod
    def copy_page(self, source: int, target: int) -> None:
        """Copy the keys and values of one page to another, in all layers."""

    @abstractmethod
    def state_length(self, slot: int) -> int:
        """Number of tokens that a slot of recurrent state has seen; -1 if a change of the slot was interrupted.

        An exception such as KeyboardInterrupt may come after a step has ended and before :meth:`step` returns. This
        number says which of the two is true for a slot.
        """

    @abstractmethod
    def clear_state(self, slot: int) -> None:
        """Reset a slot of recurrent state to that of an empty sequence."""

    @abstractmethod
    def copy_state(self, source: int, target: int) -> None:
        """Copy one slot of recurrent state to another, in all layers."""

    @abstractmethod
    def save_state(self, slot: int) -> Any:
        """A copy of a slot of recurrent state, in all layers, for :meth:`restore_state`."""

    @abstractmethod
    def restore_state(self, slot: int, saved: Any) -> None:
        """Set a slot of recurrent state to what :meth:`save_state` returned."""

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """Bytes of the cache's memory. The system may provide it only as it is used."""
