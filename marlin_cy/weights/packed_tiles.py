"""A stack in the tile layout of packed folders and of the CPU's kernels, and its conversion to canonical form.

Tiles follow each other, and experts too::

    | expert 0: tile 0 | tile 1 | ... | expert 1: tile 0 | ... |

:mod:`marlin_cy.weights.tile_layout` draws a tile, and ``marlin_cy/cpu/layout.py`` implements it in plain loops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
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
from marlin_cy.weights.tile_layout import LINE_BYTES, TILE_N, TileLayout

__all__ = ["PackedTiles"]


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
    map_parts : callable or None
        Maps parts of the file that ``data`` is mapped from: ``map_parts(parts)`` is uint8 of the size of ``data``, of
        which only the bytes ``first`` to ``end - 1`` of each part may be read. None if it cannot.

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
    map_parts: Callable[[Iterable[tuple[int, int]]], npt.NDArray[np.uint8] | None] | None = None

    def __post_init__(self) -> None:
        sizes = checked_stack_sizes(
            self.num_experts, self.k, self.n, self.group_size, self.g_idx, self.codes, self.scales
        )
        # The order of K is derived from these private copies.
        object.__setattr__(self, "g_idx", tuple(sizes.g_idx))
        if not isinstance(self.data, np.ndarray) or self.data.dtype != np.uint8:
            raise TypeError(f"data: got {getattr(self.data, 'dtype', type(self.data).__name__)}, expected uint8")
        expected = (self.num_experts, self._layout.expert_stride)
        if self.data.shape != expected or not self.data.flags.c_contiguous:
            raise ValueError(
                f"data: got shape {self.data.shape} with strides {self.data.strides}, expected contiguous {expected}"
            )

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the code type's symmetric one. Reads the zero points of all experts."""
        row, record = code_type(self.codes), scale_record(self.scales)
        if not record.has_zero_points(row):
            return record.constant_zero(row) == row.symmetric_zero
        return all(
            bool((self._part(expert, "zero")[self._order(expert).scale_rows] == row.symmetric_zero).all())
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
        order, row, record = self._order(expert), code_type(self.codes), scale_record(self.scales)
        positions = None
        if order.rows is not None:
            kept = np.flatnonzero(order.rows >= 0).astype(np.int32)
            positions = np.empty(self.k, np.int32)
            positions[order.rows[kept]] = kept
        names = [*record.group_parts(row), *record.block_parts()]
        parts = {name: self._part(expert, name) for name in names}
        zero = parts.pop("zero", None)
        return CanonicalWeight(
            words=words_of_tiles(
                self._expert(expert), self._layout.header_bytes, self.k, self.n, positions, bits=row.bits
            ),
            zero=zero if record.has_zero_points(row) else None,
            group_size=self.group_size,
            g_idx=self.g_idx[expert],
            codes=self.codes,
            **parts,
        )

    def columns(self, runs: Sequence[tuple[int, int]]) -> PackedTiles:
        """A copy of some columns: those from ``begin`` to ``end - 1`` of each run.

        Every run begins at a multiple of 16, and all but the last end at one.
        """
        tiles = np.concatenate([np.arange(begin // TILE_N, -(-end // TILE_N)) for begin, end in runs])
        columns = np.concatenate([np.arange(begin, end) for begin, end in runs])
        layout = self._layout
        data = self.data.reshape(self.num_experts, layout.tiles, layout.tile_stride)
        # Kernels need tiles that begin at cache lines.
        memory = np.empty(self.num_experts * len(tiles) * layout.tile_stride + LINE_BYTES, np.uint8)
        begin = -memory.ctypes.data % LINE_BYTES
        kept = memory[begin : len(memory) - LINE_BYTES + begin].reshape(self.num_experts, len(tiles), -1)
        np.take(data, tiles, axis=1, out=kept)
        return replace(
            self,
            data=kept.reshape(self.num_experts, -1),
            n=len(columns),
            bias=None if self.bias is None else np.ascontiguousarray(self.bias[:, columns]),
        )

    def mapped(self, runs: Sequence[tuple[int, int]]) -> PackedTiles:
        """The same tiles, of which only the columns ``begin`` to ``end - 1`` of each run may be read.

        No other part of the file is mapped, where the system can do that.
        """
        layout = self._layout
        places = [(begin // TILE_N * layout.tile_stride, -(-end // TILE_N) * layout.tile_stride) for begin, end in runs]
        experts = range(0, self.num_experts * layout.expert_stride, layout.expert_stride)
        parts = ((expert + first, expert + end) for expert in experts for first, end in places)
        data = None if self.map_parts is None else self.map_parts(parts)
        return self if data is None else replace(self, data=data.reshape(self.data.shape))

    # Places in the layout ----------------------------------------------------------------------

    @cached_property
    def _orders(self) -> tuple[list[GroupOrder], npt.NDArray[np.int32]]:
        return distinct_orders(self.g_idx, self.k, self.group_size)

    def _order(self, expert: int) -> GroupOrder:
        orders, order_of = self._orders
        return orders[int(order_of[expert])]

    @cached_property
    def _layout(self) -> TileLayout:
        """The layout of every expert. The packed rows are those of the longest order."""
        packed_k = max(order.packed_k for order in self._orders[0])
        return TileLayout(packed_k, self.n, packed_group_size(self.group_size), self.codes, self.scales)

    def _expert(self, expert: int) -> npt.NDArray[np.uint8]:
        """uint8 ``[tiles, bytes of a tile]``."""
        tiles: npt.NDArray[np.uint8] = self.data[expert].reshape(self._layout.tiles, self._layout.tile_stride)
        return tiles

    def _part(self, expert: int, name: str) -> npt.NDArray[Any]:
        """A part of an expert's records, ``[groups, n]`` or ``[scale blocks, n]``; 0 for a group that has no rows."""
        places, dtype = self._layout.part_places(name)
        if name.startswith("block"):
            rows, count = np.arange(len(places), dtype=np.int32), len(places)
        else:
            rows, count = self._order(expert).scale_rows, -(-self.k // self.group_size)
        at = np.array(places[: len(rows)], np.int64)
        return group_values_of_tiles(self._expert(expert), at, dtype.itemsize, rows, count, self.n).view(dtype)
