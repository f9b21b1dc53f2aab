"""The buffer in which the host describes a step to the device: one write a step. ``kernels/decoder.cl`` draws it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import pyopencl as cl

from marlin_cy.decoder.program import PAGE_TOKENS, Batch
from marlin_cy.opencl.memory import zeroed_buffers

if TYPE_CHECKING:
    from marlin_cy.opencl.memory import Memory

__all__ = ["Cuts", "Description", "Known", "StepLayout", "describe_rows", "describe_step", "rows_recorded"]

Ints = npt.NDArray[np.int32]

HEADER = 16
EXACT_ROWS = 16
FEW_ROWS = 4
"""Segments of fewer rows are attended to row by row: see ``attend``."""


class Description:
    """A buffer of ints that the host writes for each step. It grows by doubling.

    Parameters
    ----------
    runtime : Memory
    ints : int
        The room at first.
    what : str
        Names the buffer in errors.

    Attributes
    ----------
    buffer : pyopencl.Buffer
    """

    def __init__(self, runtime: Memory, ints: int, what: str) -> None:
        self._runtime, self._what = runtime, what
        (self.buffer,) = zeroed_buffers(runtime, [4 * ints], what)
        self._written: cl.Event | None = None

    def grow(self, ints: int) -> bool:
        """Make room for so many ints. Returns whether kernel objects refer to a buffer that was too small."""
        if 4 * ints <= self.buffer.size:
            return False
        (self.buffer,) = zeroed_buffers(self._runtime, [4 << (ints - 1).bit_length()], self._what)
        return True

    def write(self, queue: cl.CommandQueue, ints: Ints, place: int = 0) -> None:
        """Enqueue a write; there is room for it, and ``ints`` is not changed afterwards."""
        # Dropping the event of a write waits for it: so it is kept until the next one.
        self._written = cl.enqueue_copy(queue, self.buffer, ints, dst_offset=4 * place, is_blocking=False)


def rows_recorded(rows: int) -> int:
    """Rows of the recording that runs ``rows`` rows: as many, or the next of four numbers for each power of two.

    The additional rows repeat the last one. They take time, but need no experts of their own.
    """
    if rows <= EXACT_ROWS:
        return rows
    unit = 1 << max((rows - 1).bit_length() - 3, 0)
    return -(-rows // unit) * unit


class StepLayout(NamedTuple):
    """Where the parts of a step begin, in ints, for a recording of ``rows`` rows."""

    rows: int

    @property
    def few_tiles(self) -> int:
        """Tiles of one row each."""
        return HEADER + 4 * self.rows

    @property
    def many_tiles(self) -> int:
        """Tiles of several rows."""
        return HEADER + 8 * self.rows

    @property
    def segments(self) -> int:
        return HEADER + 12 * self.rows

    @property
    def picked(self) -> int:
        """Rows whose logits are wanted."""
        return HEADER + 16 * self.rows

    @property
    def tables(self) -> int:
        return HEADER + 17 * self.rows


class Known(NamedTuple):
    """What decides how many work-groups a step's launches have.

    Attributes
    ----------
    few_tiles, many_tiles : int
        Tiles of one row, and of several.
    splits : int
        Runs of positions into which tiles of one row are cut.
    segments : int
    tile_splits : int
        The same for tiles of several rows.
    """

    few_tiles: int
    many_tiles: int
    splits: int
    segments: int
    tile_splits: int = 1


class Cuts(NamedTuple):
    """How attention of a step is cut into work-groups.

    Attributes
    ----------
    tile_rows : int
        Rows of a tile of several rows, at most.
    most_splits : int
        Splits of all single rows together, at most, unless they have one split each.
    most_tile_splits : int
        Splits of all tiles of several rows together, at most; 1: no tile has any.
    """

    tile_rows: int
    most_splits: int
    most_tile_splits: int = 1


def describe_step(
    batch: Batch, layout: StepLayout, cuts: Cuts, split_tokens: int, tile_split_tokens: int = 1
) -> tuple[Ints, Known]:
    """A batch as the device reads it.

    Parameters
    ----------
    batch : Batch
    layout : StepLayout
    cuts : Cuts
    split_tokens, tile_split_tokens : int
        The fewest positions of a split of a single row, and of a tile of several rows.
    """
    if len(batch.tokens) == len(batch.segments) == layout.rows:
        return describe_single_rows(batch, layout, cuts, split_tokens)
    return describe_segments(batch, layout, cuts, split_tokens, tile_split_tokens)


def describe_segments(
    batch: Batch, layout: StepLayout, cuts: Cuts, split_tokens: int, tile_split_tokens: int
) -> tuple[Ints, Known]:
    """:func:`describe_step` for any batch."""
    first, counts, positions, slots = (column.astype(np.int64) for column in batch.segments.T)
    rows, number = len(batch.tokens), len(counts)
    used = min((int((positions + counts).max()) - 1) // PAGE_TOKENS + 1, batch.pages.shape[1])
    step = np.zeros(layout.tables + number * used, np.int32)
    segment = np.repeat(np.arange(number), counts)
    row_positions = positions[segment] + np.arange(rows) - first[segment]
    records = write_rows(step, layout.tables, batch, row_positions, segment, used)
    if rows < layout.rows:
        repeated = step[HEADER + 4 * rows : HEADER + 4 * layout.rows].reshape(-1, 4)
        repeated[:] = records[-1]
        repeated[:, 3] = -1
    described = step[layout.segments : layout.segments + 4 * number].reshape(-1, 4)
    described[:, 0], described[:, 1], described[:, 2] = first, counts, slots
    few, many = tiles(first, counts, rows, layout.rows, cuts.tile_rows)
    for begin, found in ((layout.few_tiles, few), (layout.many_tiles, many)):
        step[begin : begin + 4 * len(found)] = found.reshape(-1)
    picked = batch.wanted[: layout.rows]
    step[layout.picked : layout.picked + len(picked)] = picked
    step[0] = splits_of(few, cuts.most_splits, split_tokens, row_positions)
    step[1] = splits_of(many, cuts.most_tile_splits, tile_split_tokens, row_positions)
    return step, Known(len(few), len(many), int(step[0]), number, int(step[1]))


def describe_single_rows(batch: Batch, layout: StepLayout, cuts: Cuts, split_tokens: int) -> tuple[Ints, Known]:
    """:func:`describe_step` for one row of each sequence.

    The device waits for this, and Python's integers take a fifth of the time of NumPy's.
    """
    rows = layout.rows
    _, _, positions, slots = batch.segments.T.tolist()
    last = max(positions)
    pages = batch.pages[:, : last // PAGE_TOKENS + 1]
    records: list[int] = []
    tiles: list[int] = []
    segments: list[int] = []
    place, used = layout.tables, pages.shape[1]
    for row, token in enumerate(batch.tokens.tolist()):
        records += token, positions[row], place, row
        tiles += row, 1, 0, 0
        segments += row, 1, slots[row], 0
        place += used
    picked = batch.wanted[:rows].tolist()
    splits = max(1, min(cuts.most_splits // rows, (last + 1) // split_tokens))
    step = np.empty(place, np.int32)
    step[:HEADER] = 0
    step[0], step[1] = splits, 1
    step[HEADER : layout.tables] = records + tiles + [0] * (4 * rows) + segments + picked + [0] * (rows - len(picked))
    step[layout.tables :] = pages.reshape(-1)
    return step, Known(rows, 0, splits, rows)


def splits_of(found: Ints, most: int, tokens: int, positions: npt.NDArray[np.int64]) -> int:
    """Splits of each tile: ``most`` of all tiles together, of ``tokens`` positions at least."""
    if not len(found):
        return 1
    last = np.minimum(found[:, 0] + found[:, 1], len(positions)) - 1  # later rows repeat the last one
    return max(1, min(most // len(found), (int(positions[last].max()) + 1) // tokens))


def describe_rows(batch: Batch) -> tuple[Ints, int]:
    """``(step, pages)``: a batch of one row for each sequence, without tiles, and the pages of the longest sequence.

    The device waits for this: for a few rows, Python's integers take a third of the time of NumPy's.
    """
    positions = batch.segments[:, 2].tolist()
    pages = max(positions) // PAGE_TOKENS + 1
    tables = HEADER + 4 * len(positions)
    records = [
        number
        for row, (token, position) in enumerate(zip(batch.tokens.tolist(), positions, strict=True))
        for number in (token, position, tables + row * pages, row)
    ]
    step = np.empty(tables + len(positions) * pages, np.int32)
    step[HEADER:tables] = records
    step[tables:] = batch.pages[:, :pages].reshape(-1)
    return step, pages


def write_rows(
    step: Ints,
    tables: int,
    batch: Batch,
    positions: npt.NDArray[np.int64],
    segments: npt.NDArray[np.int64],
    pages: int,
) -> Ints:
    """Write a batch's rows, and ``pages`` pages of each of its page tables from ``tables`` on.

    ``positions`` and ``segments`` are those of each row. Returns the rows as they were written, ``[rows, 4]``.
    """
    rows, number = len(batch.tokens), len(batch.pages)
    records = step[HEADER : HEADER + 4 * rows].reshape(rows, 4)
    records.T[:] = batch.tokens, positions, tables + segments * pages, segments
    step[tables : tables + number * pages].reshape(number, pages)[:] = batch.pages[:, :pages]
    return records


def tiles(
    first: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], rows: int, all_rows: int, tile_rows: int
) -> tuple[Ints, Ints]:
    """``(few, many)``, int32 ``[tiles, 4]`` each: tiles of one row, and of up to ``tile_rows`` rows of one segment.

    The rows from ``rows`` on, up to ``all_rows``, repeat the last one.
    """
    few, many = [], []
    ends = first + counts
    if len(ends):
        ends[-1] += all_rows - rows
    for begin, end in zip(first.tolist(), ends.tolist(), strict=True):
        if end - begin < FEW_ROWS:
            few += [(row, 1, 0, 0) for row in range(begin, end)]
        else:
            many += [(row, min(tile_rows, end - row), 0, 0) for row in range(begin, end, tile_rows)]
    shape = -1, 4
    return np.array(few, np.int32).reshape(shape), np.array(many, np.int32).reshape(shape)
