"""The sizes and places of the tile layout, in which packed folders and the CPU's kernels hold an expert.

The columns of an expert are cut into tiles of 16. A tile holds all of K: a header with the scale records of its groups,
then the codes::

    tile     | header | padding to 64 bytes | block 0 | block 1 | ... |
    header   | group 0 | group 1 | ... |                                                     one level
             | scale block 0 | its groups | scale block 1 | its groups | ... |               two levels
    group    16 scales or sub-scales, then 16 minima, sub-minima or zero points, if the scale record has them
    scale    16 block scales, then 16 block minima if the scale record has minima: for 256 packed rows
    block
    block    8 packed rows of 16 columns: 64 bytes. Byte 4*c + t belongs to column c;
             its low nibble is the code of packed row t, its high nibble that of packed row t + 4.
             With codes of 8 bits 128 bytes: byte 4*c + t is packed row t, byte 64 + 4*c + t packed row t + 4.

A code type without zero points stores its ``symmetric_zero`` where a record has zero points.
:mod:`marlin_cy.weights.order` says which row of K each packed row is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.weights.code_types import code_type
from marlin_cy.weights.scale_records import BLOCK_ROWS, scale_record

__all__ = ["LANE_K", "LINE_BYTES", "TILE_N", "TileLayout"]

# These sizes are those of cpu/ukernels/ukernel.h; tests/test_constants.py compares them.
TILE_N = 16
"""Columns of a tile."""

LANE_K = 8
"""Packed rows of a block."""

LINE_BYTES = 64
"""A tile's header is padded to a multiple of this."""


@dataclass(frozen=True)
class TileLayout:
    """Sizes of a packed expert, in bytes unless stated otherwise.

    Attributes
    ----------
    packed_k, n : int
        Rows and columns.
    group_size : int
        Rows of a packed group.
    codes, scales : str
        The names of the code type and of the scale record.
    """

    packed_k: int
    n: int
    group_size: int
    codes: str = "uint4"
    scales: str = "float16"

    @property
    def num_groups(self) -> int:
        """Number of packed groups."""
        return -(-self.packed_k // self.group_size)

    @property
    def tiles(self) -> int:
        """Number of tiles of 16 columns; the last may be padded."""
        return -(-self.n // TILE_N)

    @property
    def group_bytes(self) -> int:
        """Size of the record of a group of a tile."""
        return bytes_of(scale_record(self.scales).group_parts(code_type(self.codes)))

    @property
    def scale_block_bytes(self) -> int:
        """Size of the scales of a scale block of a tile; 0 with one level."""
        return bytes_of(scale_record(self.scales).block_parts())

    @property
    def groups_per_scale_block(self) -> int:
        """Packed groups in a scale block; with one level, all of them."""
        return BLOCK_ROWS // self.group_size if self.scale_block_bytes else self.num_groups

    @property
    def block_bytes(self) -> int:
        """Size of 8 packed rows of a tile."""
        return TILE_N * LANE_K * code_type(self.codes).bits // 8

    @property
    def header_bytes(self) -> int:
        """Size of a tile's header, padded to a cache line."""
        return -(-self.records_bytes(self.packed_k) // LINE_BYTES) * LINE_BYTES

    @property
    def tile_stride(self) -> int:
        """Size of a tile."""
        return self.header_bytes + self.packed_k // LANE_K * self.block_bytes

    @property
    def expert_stride(self) -> int:
        """Size of an expert."""
        return self.tiles * self.tile_stride

    def records_bytes(self, rows: int) -> int:
        """Size of the records of the first ``rows`` packed rows of a tile, which are whole groups and scale blocks."""
        groups = -(-rows // self.group_size)
        return groups * self.group_bytes + rows // BLOCK_ROWS * self.scale_block_bytes

    def part_places(self, name: str) -> tuple[npt.NDArray[np.int64], np.dtype[Any]]:
        """Where a part of the records lies in a tile.

        Parameters
        ----------
        name : str
            A key of :meth:`~marlin_cy.weights.scale_records.ScaleRecord.group_parts` or ``block_parts``.

        Returns
        -------
        places : int64 ``[groups or blocks]``
            The byte at which the 16 values of each packed group, or of each scale block, begin.
        dtype : dtype
        """
        return _places(self, name)


@lru_cache(maxsize=64)  # every weight that is packed asks
def _places(layout: TileLayout, name: str) -> tuple[npt.NDArray[np.int64], np.dtype[Any]]:
    """As :meth:`TileLayout.part_places`; the array is read-only."""
    record = scale_record(layout.scales)
    groups, blocks = record.group_parts(code_type(layout.codes)), record.block_parts()
    step = layout.groups_per_scale_block * layout.group_bytes + layout.scale_block_bytes
    if name in blocks:
        places, dtype = offset_in(blocks, name) + step * np.arange(layout.packed_k // BLOCK_ROWS), blocks[name]
    else:
        block, group = np.divmod(np.arange(layout.num_groups), layout.groups_per_scale_block)
        places = layout.scale_block_bytes + offset_in(groups, name) + step * block + layout.group_bytes * group
        dtype = groups[name]
    places.flags.writeable = False
    return places, dtype


def bytes_of(parts: dict[str, np.dtype[Any]]) -> int:
    """Bytes of the parts of a record, for the columns of a tile."""
    return sum(TILE_N * dtype.itemsize for dtype in parts.values())


def offset_in(parts: dict[str, np.dtype[Any]], name: str) -> int:
    """Where a part begins in a record."""
    before = list(parts)[: list(parts).index(name)]
    return bytes_of({part: parts[part] for part in before})
