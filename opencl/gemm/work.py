"""Which rows a product multiplies with which experts: the arguments WORK_ARGS of ``common.cl``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from marlin_cy.opencl.arguments import listed_values, routed_values
from marlin_cy.opencl.buffers import Vector

if TYPE_CHECKING:
    from marlin_cy.opencl.context import OpenClContext

__all__ = ["RoutedBlocks", "TileList", "Work"]

Int32Array = npt.NDArray[np.int32]


class RoutedBlocks(NamedTuple):
    """Rows by vLLM's routing arrays, on the device.

    Attributes
    ----------
    sorted_ids, expert_ids : Vector
    past : Vector or None
        The number of slots in use; None if all ``limit`` slots are in use.
    limit : int
        The largest number of slots that may be in use.
    valid : int
        Ids below this are rows of the output.
    block_size, top_k : int
    """

    sorted_ids: Vector
    expert_ids: Vector
    past: Vector | None
    limit: int
    valid: int
    block_size: int
    top_k: int

    def kind(self) -> tuple[int, ...]:
        """A key that is the same for all calls that use the same configuration."""
        return self.block_size, self.valid.bit_length(), self.limit.bit_length()

    def input_rows(self) -> int:
        """Rows that are read, unless they are gathered by slot."""
        return -(-self.valid // self.top_k)

    def arguments(self, ctx: OpenClContext, by_slot: int) -> tuple[Any, ...]:
        """WORK_ARGS with ROUTED; ``by_slot`` is 1 if slot s reads input row s."""
        sorted_ids, expert_ids, past, limit, valid, block_size, top_k = self
        return routed_values(
            sorted_ids=sorted_ids.data,
            sorted_offset=sorted_ids.offset,
            expert_ids=expert_ids.data,
            expert_offset=expert_ids.offset,
            past=ctx.unlimited() if past is None else past.data,
            past_offset=0 if past is None else past.offset,
            past_limit=limit,
            valid=valid,
            block_size=block_size,
            top_k=top_k,
            slot_input=by_slot,
        )


class TileList(NamedTuple):
    """Rows by a list made on the host.

    Attributes
    ----------
    runs : int32 ``[runs, 7]``
        Expert, first column, columns, first output column, first input row, first output row, rows.
    one_order : bool
        The runs belong to one view: all experts have the same order of K, and every run has the same rows, from row 0
        on.
    """

    runs: Int32Array
    one_order: bool = False

    def kind(self) -> tuple[int, ...]:
        """A key that is the same for all calls that use the same configuration."""
        return len(self.runs).bit_length(), self.total_rows().bit_length(), int(self.runs[:, 2].max())

    def total_rows(self) -> int:
        """Rows of all runs."""
        return int(self.runs[:, 6].sum(dtype=np.int64))

    def arguments(self, ctx: OpenClContext, rows: int) -> tuple[Any, ...]:
        """WORK_ARGS without ROUTED: the runs in tiles of at most ``rows`` rows."""
        tiles = self.tiles(rows)
        return listed_values(list=ctx.upload("row tiles", tiles), listed=len(tiles))

    def tiles(self, rows: int) -> Int32Array:
        """int32 ``[tiles, 8]`` for the device: the runs cut into tiles of at most ``rows`` rows."""
        parts = -(-self.runs[:, 6] // rows)
        run = np.repeat(np.arange(len(parts)), parts)
        done = (np.arange(len(run)) - np.repeat(np.cumsum(parts) - parts, parts)) * rows
        tiles = np.zeros((len(run), 8), np.int32)
        tiles[:, :7] = self.runs[run]
        tiles[:, 4] += done
        tiles[:, 5] += done
        tiles[:, 6] = np.minimum(rows, tiles[:, 6] - done)
        return tiles

    def span(self) -> tuple[int, int, TileList]:
        """``(first, count, work)``: the first input row, the number of input rows up to the last, and the work with
        input rows counted from the first."""
        runs = self.runs.copy()
        first = int(runs[:, 4].min())
        count = int((runs[:, 4].astype(np.int64) + runs[:, 6]).max()) - first
        runs[:, 4] -= first
        return first, count, self._replace(runs=runs)

    def mapped(self) -> tuple[Int32Array, TileList]:
        """``(map, work)``: int32 ``[rows, 2]``, the input row and the expert of each gathered row, and the work on the
        gathered rows."""
        if self.one_order:
            m = int(self.runs[0, 6])
            expert = np.full(m, self.runs[0, 0], np.int32)
            return np.stack([np.arange(m, dtype=np.int32), expert], axis=1), self
        runs = self.runs.copy()
        m_of_run = runs[:, 6].astype(np.int64)
        begins = np.cumsum(m_of_run) - m_of_run
        run = np.repeat(np.arange(len(m_of_run)), m_of_run)
        row_map = np.stack([runs[run, 4] + np.arange(len(run)) - begins[run], runs[run, 0]], axis=1)
        runs[:, 4] = begins
        return np.ascontiguousarray(row_map, np.int32), self._replace(runs=runs)


Work = RoutedBlocks | TileList
