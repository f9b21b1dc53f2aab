"""The packed store's layout, in plain NumPy: what the tests hold the fast packer against.

An expert's N columns are cut into tiles of 16; a tile is drawn in ``ukernels/ukernel.h``. Tiles lie
one after another, experts too, each tile a multiple of 64 bytes::

    | expert 0: tile 0 | tile 1 | ... | expert 1: tile 0 | ... |

K is cut into groups, see ``marlin_cy.weights.order``.
"""

from dataclasses import dataclass

import numpy as np

from marlin_cy.weights.int4 import E2M1_VALUES

__all__ = ["TileLayout", "pack_tiles", "unpack_tiles"]

TILE_N = 16
BLOCK_K = 8
BLOCK_BYTES = 64
GROUP_HEADER_BYTES = 48
E2M1_ZERO = 12  # of twice the values, plus 12


@dataclass(frozen=True)
class TileLayout:
    """Sizes of a packed expert, in bytes unless said otherwise."""

    packed_k: int  # rows
    n: int  # columns
    group_size: int  # rows in a packed group

    @property
    def num_groups(self):
        """Packed groups."""
        return -(-self.packed_k // self.group_size)

    @property
    def tiles(self):
        """Tiles of 16 columns; the last may be padded."""
        return -(-self.n // TILE_N)

    @property
    def header_bytes(self):
        """Scales and zeros of a tile, padded to a cache line."""
        return -(-GROUP_HEADER_BYTES * self.num_groups // BLOCK_BYTES) * BLOCK_BYTES

    @property
    def tile_stride(self):
        """One tile."""
        return self.header_bytes + self.packed_k // BLOCK_K * BLOCK_BYTES

    @property
    def expert_stride(self):
        """One expert."""
        return self.tiles * self.tile_stride


def pack_tiles(q, scale, zero, order, layout):
    """One packed expert, uint8 ``[expert_stride]``, by loops one can check by hand.

    Parameters
    ----------
    q : uint8 ``[K, N]`` in 0..15
    scale : float16 or bfloat16 ``[G, N]``
    zero : uint8 ``[G, N]``, or None: 12, of 4-bit floats
    order : GroupOrder
    layout : TileLayout
    """
    packed = np.zeros((layout.tiles, layout.tile_stride), np.uint8)
    rows = np.arange(order.packed_k) if order.rows is None else order.rows
    for column in range(layout.n):
        tile, lane = packed[column // TILE_N], column % TILE_N
        for group, scale_row in enumerate(order.scale_rows):
            header = tile[group * GROUP_HEADER_BYTES : (group + 1) * GROUP_HEADER_BYTES]
            header[2 * lane : 2 * lane + 2] = scale[scale_row, column : column + 1].view(np.uint8)
            header[2 * TILE_N + lane] = E2M1_ZERO if zero is None else zero[scale_row, column]
        body = tile[layout.header_bytes :]
        for position, row in enumerate(rows):
            if row >= 0:
                block, value = divmod(position, BLOCK_K)
                nibble = int(q[row, column]) << (4 * (value // 4))
                body[block * BLOCK_BYTES + 4 * lane + value % 4] |= nibble
    return packed.reshape(-1)


def unpack_tiles(packed, order, layout, k, codes, scale_dtype):
    """``(w, q)`` of one packed expert: the weight float64 ``[K, N]`` and its codes uint8 ``[K, N]``."""
    tiles = packed.reshape(layout.tiles, layout.tile_stride)
    headers = tiles[:, : layout.num_groups * GROUP_HEADER_BYTES].reshape(layout.tiles, layout.num_groups, -1)
    scale = np.ascontiguousarray(headers[:, :, : 2 * TILE_N]).view(scale_dtype).astype(np.float64)
    zero = headers[:, :, 2 * TILE_N :].astype(np.float64)
    body = tiles[:, layout.header_bytes :].reshape(layout.tiles, -1, TILE_N, 4)
    nibbles = np.stack([body & 15, body >> 4], axis=2)  # [tile, block, half, lane, t]
    nibbles = nibbles.transpose(1, 2, 4, 0, 3).reshape(layout.packed_k, layout.tiles * TILE_N)
    group = np.arange(layout.packed_k) // layout.group_size
    spread = [part.transpose(1, 0, 2).reshape(layout.num_groups, -1)[group] for part in (scale, zero)]
    if codes == "uint4":
        weights = spread[0] * (nibbles - spread[1])
    else:
        weights = spread[0] / 2 * (2 * E2M1_VALUES.astype(np.float64)[nibbles] + E2M1_ZERO - spread[1])
    rows = np.arange(order.packed_k) if order.rows is None else order.rows
    kept = np.flatnonzero(rows >= 0)
    w, q = np.empty((k, layout.n)), np.empty((k, layout.n), np.uint8)
    w[rows[kept]] = weights[kept, : layout.n]
    q[rows[kept]] = nibbles[kept, : layout.n]
    return w, q
