"""The layout of the packed store in plain NumPy. The tests compare the fast packer with it.

:mod:`marlin_cy.weights.tile_layout` draws a tile. Tiles follow each other without gaps, as do experts. K is cut into
groups, see ``marlin_cy.weights.order``.
"""

import numpy as np
import numpy.typing as npt

from marlin_cy.weights.canonical import CanonicalWeight, unpack_words
from marlin_cy.weights.code_types import code_type
from marlin_cy.weights.order import GroupOrder
from marlin_cy.weights.scale_records import BLOCK_ROWS, scale_record
from marlin_cy.weights.tile_layout import LANE_K, LINE_BYTES, TILE_N, TileLayout

__all__ = ["pack_tiles", "unpack_tiles"]


def pack_tiles(
    weight: CanonicalWeight,
    order: GroupOrder,
    layout: TileLayout,
) -> npt.NDArray[np.uint8]:
    """One packed expert, uint8 ``[expert_stride]``, by loops that can be checked by hand.

    Parameters
    ----------
    weight : CanonicalWeight
        Its code type and scale record are the layout's.
    order : GroupOrder
    layout : TileLayout
    """
    row, record = code_type(layout.codes), scale_record(layout.scales)
    q = unpack_words(weight.words, row.bits)
    packed = np.zeros((layout.tiles, layout.tile_stride), np.uint8)
    rows = (np.arange(order.packed_k) if order.rows is None else order.rows).tolist()
    block_bytes = layout.block_bytes
    for column in range(layout.n):
        tile, lane = packed[column // TILE_N], column % TILE_N
        for name in (*record.group_parts(row), *record.block_parts()):
            places, dtype = layout.part_places(name)
            stored = getattr(weight, name)
            if stored is None:  # a code type without zero points
                stored = np.full((len(weight.scale), layout.n), row.symmetric_zero, dtype)
            stored_rows = range(len(places)) if name.startswith("block") else order.scale_rows
            for place, stored_row in zip(places, stored_rows, strict=False):
                begin = place + dtype.itemsize * lane
                tile[begin : begin + dtype.itemsize] = stored[stored_row, column : column + 1].view(np.uint8)
        body, codes = tile[layout.header_bytes :], q[:, column].tolist()
        for position, k in enumerate(rows):
            if k >= 0:
                block, value = divmod(position, LANE_K)
                begin, code = block * block_bytes + 4 * lane + value % 4, codes[k]
                if row.bits == 8:
                    body[begin + LINE_BYTES * (value // 4)] = code
                else:
                    body[begin] |= code << (4 * (value // 4))
    return packed.reshape(-1)


def unpack_tiles(
    packed: npt.NDArray[np.uint8], order: GroupOrder, layout: TileLayout, k: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8]]:
    """``(w, q)`` of one packed expert: the weight float64 ``[K, N]`` and its codes uint8 ``[K, N]``.

    Parameters
    ----------
    packed : uint8 ``[expert_stride]``
    order : GroupOrder
    layout : TileLayout
    k : int
        Rows of the weight, without padding.
    """
    row, record = code_type(layout.codes), scale_record(layout.scales)
    tiles = packed.reshape(layout.tiles, layout.tile_stride)
    columns = layout.tiles * TILE_N
    body = tiles[:, layout.header_bytes :].reshape(layout.tiles, -1, layout.block_bytes)
    if row.bits == 8:
        halves = body.reshape(layout.tiles, -1, 2, TILE_N, 4)
    else:
        lanes = body.reshape(layout.tiles, -1, TILE_N, 4)
        halves = np.stack([lanes & 15, lanes >> 4], axis=2)  # [tile, block, half, lane, t]
    codes = halves.transpose(1, 2, 4, 0, 3).reshape(layout.packed_k, columns)

    def part(name: str) -> npt.NDArray[np.float64]:
        """Of each packed row, float64 ``[packed_k, columns]``."""
        places, dtype = layout.part_places(name)
        size = TILE_N * dtype.itemsize
        values = [np.ascontiguousarray(tiles[:, place : place + size]).view(dtype).reshape(-1) for place in places]
        rows = BLOCK_ROWS if name.startswith("block") else layout.group_size
        of_rows: npt.NDArray[np.float64] = np.array(values).astype(np.float64)[np.arange(layout.packed_k) // rows]
        return of_rows

    parts = {name: part(name) for name in (*record.group_parts(row), *record.block_parts())}
    scale = parts["scale"] * parts.get("block_scale", 1)
    minimum = parts.get("minimum", 0) * parts.get("block_minimum", 1)
    zero = parts.get("zero", record.constant_zero(row))
    weights = scale / row.units_per_one * (row.multiplicands.astype(np.float64)[codes] - zero) - minimum
    rows = np.arange(order.packed_k) if order.rows is None else order.rows
    kept = np.flatnonzero(rows >= 0)
    w, q = np.empty((k, layout.n)), np.empty((k, layout.n), np.uint8)
    w[rows[kept]] = weights[kept, : layout.n]
    q[rows[kept]] = codes[kept, : layout.n]
    return w, q
