"""The layout of the packed store in plain NumPy. The tests compare the fast packer with it.

The N columns of an expert are cut into tiles of 16; a tile is drawn in ``ukernels/ukernel.h``. The size of a tile is a
multiple of 64 bytes. Tiles follow each other without gaps, as do experts::

    | expert 0: tile 0 | tile 1 | ... | expert 1: tile 0 | ... |

K is cut into groups, see ``marlin_cy.weights.order``.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from marlin_cy.weights.code_types import code_type
from marlin_cy.weights.order import GroupOrder
from marlin_cy.weights.packed_tiles import BLOCK_BYTES, GROUP_HEADER_BYTES, LANE_K, TILE_N
from marlin_cy.weights.scale_records import scale_record

__all__ = ["TileLayout", "pack_tiles", "unpack_tiles"]


@dataclass(frozen=True)
class TileLayout:
    """Sizes of a packed expert, in bytes unless stated otherwise."""

    packed_k: int  # rows
    n: int  # columns
    group_size: int  # rows of a packed group

    @property
    def num_groups(self) -> int:
        """Number of packed groups."""
        return -(-self.packed_k // self.group_size)

    @property
    def tiles(self) -> int:
        """Number of tiles of 16 columns; the last may be padded."""
        return -(-self.n // TILE_N)

    @property
    def header_bytes(self) -> int:
        """Size of the scales and zeros of a tile, padded to a cache line."""
        return -(-GROUP_HEADER_BYTES * self.num_groups // BLOCK_BYTES) * BLOCK_BYTES

    @property
    def tile_stride(self) -> int:
        """Size of a tile."""
        return self.header_bytes + self.packed_k // LANE_K * BLOCK_BYTES

    @property
    def expert_stride(self) -> int:
        """Size of an expert."""
        return self.tiles * self.tile_stride


def pack_tiles(
    q: npt.NDArray[np.uint8],
    scale: npt.NDArray[np.generic],
    zero: npt.NDArray[np.uint8] | None,
    order: GroupOrder,
    layout: TileLayout,
    codes: str = "uint4",
) -> npt.NDArray[np.uint8]:
    """One packed expert, uint8 ``[expert_stride]``, by loops that can be checked by hand.

    Parameters
    ----------
    q : uint8 ``[K, N]`` in 0..15
    scale : float16 or bfloat16 ``[G, N]``
    zero : uint8 ``[G, N]``, or None if the code type has no zero points
    order : GroupOrder
    layout : TileLayout
    codes : str
        Name of the code type.
    """
    symmetric_zero = code_type(codes).symmetric_zero
    packed = np.zeros((layout.tiles, layout.tile_stride), np.uint8)
    rows = np.arange(order.packed_k) if order.rows is None else order.rows
    for column in range(layout.n):
        tile, lane = packed[column // TILE_N], column % TILE_N
        for group, scale_row in enumerate(order.scale_rows):
            header = tile[group * GROUP_HEADER_BYTES : (group + 1) * GROUP_HEADER_BYTES]
            header[2 * lane : 2 * lane + 2] = scale[scale_row, column : column + 1].view(np.uint8)
            header[2 * TILE_N + lane] = symmetric_zero if zero is None else zero[scale_row, column]
        body = tile[layout.header_bytes :]
        for position, row in enumerate(rows):
            if row >= 0:
                block, value = divmod(position, LANE_K)
                nibble = int(q[row, column]) << (4 * (value // 4))
                body[block * BLOCK_BYTES + 4 * lane + value % 4] |= nibble
    return packed.reshape(-1)


def unpack_tiles(
    packed: npt.NDArray[np.uint8],
    order: GroupOrder,
    layout: TileLayout,
    k: int,
    codes: str,
    scales: str,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8]]:
    """``(w, q)`` of one packed expert: the weight float64 ``[K, N]`` and its codes uint8 ``[K, N]``.

    Parameters
    ----------
    packed : uint8 ``[expert_stride]``
    order : GroupOrder
    layout : TileLayout
    k : int
        Rows of the weight, without padding.
    codes : str
        Name of the code type.
    scales : str
        Name of the scale record.
    """
    row = code_type(codes)
    tiles = packed.reshape(layout.tiles, layout.tile_stride)
    headers = tiles[:, : layout.num_groups * GROUP_HEADER_BYTES].reshape(layout.tiles, layout.num_groups, -1)
    scale = np.ascontiguousarray(headers[:, :, : 2 * TILE_N]).view(scale_record(scales).scale).astype(np.float64)
    zero = headers[:, :, 2 * TILE_N :].astype(np.float64)
    body = tiles[:, layout.header_bytes :].reshape(layout.tiles, -1, TILE_N, 4)
    nibbles = np.stack([body & 15, body >> 4], axis=2)  # [tile, block, half, lane, t]
    nibbles = nibbles.transpose(1, 2, 4, 0, 3).reshape(layout.packed_k, layout.tiles * TILE_N)
    group = np.arange(layout.packed_k) // layout.group_size
    scale, zero = (part.transpose(1, 0, 2).reshape(layout.num_groups, -1)[group] for part in (scale, zero))
    weights = scale / row.units_per_one * (row.multiplicands.astype(np.float64)[nibbles] - zero)
    rows = np.arange(order.packed_k) if order.rows is None else order.rows
    kept = np.flatnonzero(rows >= 0)
    w, q = np.empty((k, layout.n)), np.empty((k, layout.n), np.uint8)
    w[rows[kept]] = weights[kept, : layout.n]
    q[rows[kept]] = nibbles[kept, : layout.n]
    return w, q
