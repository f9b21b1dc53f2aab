"""Which rows a product multiplies with which experts: what WORK_ARGS of ``common.cl`` say."""

from typing import NamedTuple

import numpy as np

from marlin_cy.opencl.buffers import Vector

__all__ = ["TileList", "RoutedBlocks"]

BUFFER, INT, ULONG = None, np.int32, np.uint64  # for Kernel.set_arg_types


class RoutedBlocks(NamedTuple):
    """Rows by vLLM's routing arrays, on the device."""

    sorted_ids: Vector
    expert_ids: Vector
    past: Vector | None  # None: ``limit`` alone counts
    limit: int  # slots
    valid: int  # ids below this are rows of the output
    block_size: int
    top_k: int

    argument_types = (BUFFER, ULONG, BUFFER, ULONG, BUFFER, ULONG, INT, INT, INT, INT, INT)

    def kind(self):
        """What calls for which the same configuration suits have in common."""
        return self.block_size, self.valid.bit_length(), self.limit.bit_length()

    def input_rows(self):
        """Rows that are read, unless they are gathered by slot."""
        return -(-self.valid // self.top_k)

    def arguments(self, ctx, by_slot):
        """The arguments of common.cl's WORK_ARGS."""
        past = self.past
        return (
            self.sorted_ids.data,
            self.sorted_ids.offset,
            self.expert_ids.data,
            self.expert_ids.offset,
            ctx.unlimited() if past is None else past.data,
            0 if past is None else past.offset,
            self.limit,
            self.valid,
            self.block_size,
            self.top_k,
            by_slot,
        )


class TileList(NamedTuple):
    """Rows by a list made on the host.

    ``runs`` is int32 ``[runs, 7]``: expert, first column, columns, first output column, first input row,
    first output row, rows. With ``one_order`` they are one view's: all experts order K alike, and all
    runs are the same rows, from 0 on.
    """

    runs: np.ndarray
    one_order: bool = False

    argument_types = (BUFFER, INT)

    def kind(self):
        """What calls for which the same configuration suits have in common."""
        return len(self.runs).bit_length(), self.total_rows().bit_length(), int(self.runs[:, 2].max())

    def total_rows(self):
        """Rows of all runs."""
        return int(self.runs[:, 6].sum(dtype=np.int64))

    def tiles(self, rows):
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

    def span(self):
        """``(first, count, work)``: the input rows from the first to the last, and the work as counted from there."""
        runs = self.runs.copy()
        first = int(runs[:, 4].min())
        count = int((runs[:, 4].astype(np.int64) + runs[:, 6]).max()) - first
        runs[:, 4] -= first
        return first, count, self._replace(runs=runs)

    def mapped(self):
        """``(map, work)``: int32 ``[rows, 2]``, the input row and the expert of each row, and the work on these."""
        if self.one_order:
            m = int(self.runs[0, 6])
            expert = np.full(m, self.runs[0, 0], np.int32)
            return np.stack([np.arange(m, dtype=np.int32), expert], axis=1), self
        runs = self.runs.copy()
        m = runs[:, 6].astype(np.int64)
        begins = np.cumsum(m) - m
        run = np.repeat(np.arange(len(m)), m)
        row_map = np.stack([runs[run, 4] + np.arange(len(run)) - begins[run], runs[run, 0]], axis=1)
        runs[:, 4] = begins
        return np.ascontiguousarray(row_map, np.int32), self._replace(runs=runs)
