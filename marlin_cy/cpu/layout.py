"""The packed store's layout, in plain NumPy: what the tests hold the fast packer against.

An expert's N columns are cut into tiles of 16; a tile is drawn in ``ukernels/ukernel.h``. Tiles lie
one after another, experts too, each tile a multiple of 64 bytes::

    | expert 0: tile 0 | tile 1 | ... | expert 1: tile 0 | ... |

K is cut into groups of :func:`packed_group_size` rows. A weight group that is longer than that is
several packed groups with the same scale and zero point.
"""

from dataclasses import dataclass

import numpy as np

__all__ = ["GroupOrder", "TileLayout", "group_order", "pack_tiles", "packed_group_size", "unpack_tiles"]

TILE_N = 16
BLOCK_K = 8
BLOCK_BYTES = 64
GROUP_HEADER_BYTES = 48
MAX_GROUP_K = 128
GROUP_K_STEP = 32


def packed_group_size(group_size):
    """Rows of K that are quantised together: the weight's group, at most 128 of them."""
    return min(group_size, MAX_GROUP_K)


@dataclass(frozen=True)
class GroupOrder:
    """Where each packed row of K comes from.

    Attributes
    ----------
    rows : int32 ``[packed_k]`` or None
        Row of K at each packed position, -1 for padding (a weight of 0); None for K's own order.
    scale_rows : int32 ``[packed_groups]``
        Row of ``scale`` and ``zero`` that each packed group uses.
    packed_k : int
        Rows after packing: K, more when ``g_idx`` makes groups of unequal lengths.
    """

    rows: np.ndarray | None
    scale_rows: np.ndarray
    packed_k: int


def group_order(g_idx, k, group_size):
    """The order in which rows of K are packed, so that each group's rows lie together.

    Rows of one group keep their order. A group whose length is not a multiple of the packed group
    size is padded to one, except the last.
    """
    step = packed_group_size(group_size)
    if g_idx is None:
        scale_rows = np.arange(0, k, step) // group_size
        return GroupOrder(None, scale_rows.astype(np.int32), k)
    rows, scale_rows = [], []
    for group in np.unique(g_idx):
        members = np.flatnonzero(g_idx == group)
        pieces = -(-len(members) // step)
        rows.append(np.pad(members, (0, pieces * step - len(members)), constant_values=-1))
        scale_rows += [group] * pieces
    rows = np.concatenate(rows)
    last_row = int(np.flatnonzero(rows >= 0)[-1])
    packed_k = -(-(last_row + 1) // GROUP_K_STEP) * GROUP_K_STEP
    return GroupOrder(rows[:packed_k].astype(np.int32), np.array(scale_rows, np.int32), packed_k)


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
    scale : float16 ``[G, N]``
    zero : uint8 ``[G, N]``
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
            header[2 * TILE_N + lane] = zero[scale_row, column]
        body = tile[layout.header_bytes :]
        for position, row in enumerate(rows):
            if row >= 0:
                block, value = divmod(position, BLOCK_K)
                nibble = int(q[row, column]) << (4 * (value // 4))
                body[block * BLOCK_BYTES + 4 * lane + value % 4] |= nibble
    return packed.reshape(-1)


def unpack_tiles(packed, order, layout, k):
    """``(w, q)`` of one packed expert: the weight float64 ``[K, N]`` and its codes uint8 ``[K, N]``."""
    tiles = packed.reshape(layout.tiles, layout.tile_stride)
    headers = tiles[:, : layout.num_groups * GROUP_HEADER_BYTES].reshape(layout.tiles, layout.num_groups, -1)
    scale = np.ascontiguousarray(headers[:, :, : 2 * TILE_N]).view(np.float16).astype(np.float64)
    zero = headers[:, :, 2 * TILE_N :].astype(np.float64)
    body = tiles[:, layout.header_bytes :].reshape(layout.tiles, -1, TILE_N, 4)
    nibbles = np.stack([body & 15, body >> 4], axis=2)  # [tile, block, half, lane, t]
    codes = nibbles.transpose(1, 2, 4, 0, 3).reshape(layout.packed_k, layout.tiles * TILE_N)
    group = np.arange(layout.packed_k) // layout.group_size
    spread = [part.transpose(1, 0, 2).reshape(layout.num_groups, -1)[group] for part in (scale, zero)]
    weights = spread[0] * (codes - spread[1])
    rows = np.arange(order.packed_k) if order.rows is None else order.rows
    kept = np.flatnonzero(rows >= 0)
    w, q = np.empty((k, layout.n)), np.empty((k, layout.n), np.uint8)
    w[rows[kept]] = weights[kept, : layout.n]
    q[rows[kept]] = codes[kept, : layout.n]
    return w, q
