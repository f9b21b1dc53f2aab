"""A stack in the tile layout of packed folders and of the CPU's kernels, and its conversion to canonical form.

The columns of an expert are cut into tiles of 16. Tiles follow each other, and experts too::

    | expert 0: tile 0 | tile 1 | ... | expert 1: tile 0 | ... |

    tile    | group 0 | group 1 | ... | padding to 64 bytes | block 0 | block 1 | ... |
    group   16 scales (2 bytes each), then 16 zero points (1 byte each): 48 bytes
    block   8 packed rows of 16 columns: 64 bytes. Byte 4*c + t belongs to column c;
            its low nibble is the code of packed row t, its high nibble that of packed row t + 4.

A code type without zero points stores its ``symmetric_zero`` in their place. :mod:`marlin_cy.weights.order` says which
row of K each packed row is. ``marlin_cy/cpu/layout.py`` implements the same layout in plain loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.weights._nibbles import group_values_of_tiles, words_of_tiles
from marlin_cy.weights.canonical import CanonicalWeight
from marlin_cy.weights.code_types import code_type
from marlin_cy.weights.order import GroupOrder, distinct_orders, packed_group_size
from marlin_cy.weights.scale_records import scale_record
from marlin_cy.weights.sizes import checked_stack_sizes

__all__ = ["BLOCK_BYTES", "GROUP_HEADER_BYTES", "LANE_K", "TILE_N", "PackedTiles"]

# These sizes are those of cpu/ukernels/ukernel.h; tests/test_constants.py compares them.
TILE_N = 16
"""Columns of a tile."""

SCALE_BYTES = 2
GROUP_HEADER_BYTES = (SCALE_BYTES + 1) * TILE_N
"""Bytes of one group's scales and zero points in a tile."""

LANE_K = 8
"""Packed rows of a block."""

BLOCK_BYTES = 64
"""Bytes of 8 packed rows of a tile. A tile's header is padded to a multiple of this."""


@dataclass(frozen=True, eq=False)
class PackedTiles:
    """The weights of a stack's experts, packed as tiles.

    Attributes
    ----------
    data : uint8 ``[num_experts, bytes]``
        C-contiguous. May be read-only, such as a memory map. Nothing may write to it while it is in use.
    num_experts, k, n : int
        Number of experts, and the shape ``[k, n]`` of each.
    group_size : int
        Number of rows of K that share a scale; -1 is resolved.
    g_idx : sequence of int32 ``[k]`` or None, one per expert
        The group of each row of K; None for ``row // group_size``.
    codes : str
        The name of the code type.
    scales : str
        The name of the scale record.
    bias : float32 ``[num_experts, n]`` or None
        Added to every row of an expert's product.

    Raises
    ------
    TypeError, ValueError, IndexError, UnsupportedError
        A size that is not supported, or ``data`` of another dtype or size. The message names the attribute.
    """

    data: npt.NDArray[np.uint8]
    num_experts: int
    k: int
    n: int
    group_size: int
    g_idx: Sequence[npt.NDArray[np.int32] | None]
    codes: str
    scales: str
    bias: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        sizes = checked_stack_sizes(
            self.num_experts, self.k, self.n, self.group_size, self.g_idx, self.codes, self.scales
        )
        # The order of K is derived from these private copies.
        object.__setattr__(self, "g_idx", tuple(sizes.g_idx))
        if not isinstance(self.data, np.ndarray) or self.data.dtype != np.uint8:
            raise TypeError(f"data: got {getattr(self.data, 'dtype', type(self.data).__name__)}, expected uint8")
        expected = (self.num_experts, self._tiles * self._tile_bytes)
        if self.data.shape != expected or not self.data.flags.c_contiguous:
            raise ValueError(
                f"data: got shape {self.data.shape} with strides {self.data.strides}, expected contiguous {expected}"
            )

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the code type's symmetric one. Reads the zero points of all experts."""
        row = code_type(self.codes)
        return not row.has_zero_points or all(
            bool((self._zero(expert)[self._order(expert).scale_rows] == row.symmetric_zero).all())
            for expert in range(self.num_experts)
        )

    def canonical(self, expert: int) -> CanonicalWeight:
        """The canonical weight of one expert. The GIL is released.

        Packed tiles do not store a group that has no rows: its scale and zero point become 0.

        Raises
        ------
        IndexError
            There is no such expert.
        """
        if not 0 <= expert < self.num_experts:
            raise IndexError(f"expert: got {expert}, expected 0 to {self.num_experts - 1}")
        order, row = self._order(expert), code_type(self.codes)
        positions = None
        if order.rows is not None:
            kept = np.flatnonzero(order.rows >= 0).astype(np.int32)
            positions = np.empty(self.k, np.int32)
            positions[order.rows[kept]] = kept
        return CanonicalWeight(
            words=words_of_tiles(self._expert(expert), self._header_bytes, self.k, self.n, positions),
            scale=self._scale(expert),
            zero=self._zero(expert) if row.has_zero_points else None,
            group_size=self.group_size,
            g_idx=self.g_idx[expert],
            codes=self.codes,
        )

    # Places in the layout ----------------------------------------------------------------------

    @cached_property
    def _orders(self) -> tuple[list[GroupOrder], npt.NDArray[np.int32]]:
        return distinct_orders(self.g_idx, self.k, self.group_size)

    def _order(self, expert: int) -> GroupOrder:
        orders, order_of = self._orders
        return orders[int(order_of[expert])]

    @property
    def _packed_k(self) -> int:
        """Packed rows of every expert: the number of rows in the longest order."""
        return max(order.packed_k for order in self._orders[0])

    @property
    def _groups(self) -> int:
        """Packed groups of a tile."""
        return -(-self._packed_k // packed_group_size(self.group_size))

    @property
    def _header_bytes(self) -> int:
        return -(-GROUP_HEADER_BYTES * self._groups // BLOCK_BYTES) * BLOCK_BYTES

    @property
    def _tile_bytes(self) -> int:
        return self._header_bytes + self._packed_k // LANE_K * BLOCK_BYTES

    @property
    def _tiles(self) -> int:
        return -(-self.n // TILE_N)

    def _expert(self, expert: int) -> npt.NDArray[np.uint8]:
        """uint8 ``[tiles, bytes of a tile]``."""
        tiles: npt.NDArray[np.uint8] = self.data[expert].reshape(self._tiles, self._tile_bytes)
        return tiles

    def _scale(self, expert: int) -> npt.NDArray[Any]:
        """float16 or bfloat16 ``[groups, n]``; 0 for a group that has no rows."""
        return self._group_values(expert, 0, SCALE_BYTES).view(scale_record(self.scales).scale)

    def _zero(self, expert: int) -> npt.NDArray[np.uint8]:
        """uint8 ``[groups, n]``; 0 for a group that has no rows."""
        return self._group_values(expert, SCALE_BYTES * TILE_N, 1)

    def _group_values(self, expert: int, offset: int, size: int) -> npt.NDArray[np.uint8]:
        groups, rows = -(-self.k // self.group_size), self._order(expert).scale_rows
        return group_values_of_tiles(self._expert(expert), offset, size, rows, groups, self.n)
