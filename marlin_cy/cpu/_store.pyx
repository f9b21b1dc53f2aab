"""The packed weights of a stack, with the fast packer.

The layout is drawn in ``weights/tile_layout.py``, and ``layout.py`` implements it in plain NumPy.
"""

import mmap
from typing import NamedTuple

import numpy as np

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t

from marlin_cy.cpu._dispatch cimport CHUNK_K, LANE_K, SCALE_BLOCK_K, TILE_N

from marlin_cy.cpu._dispatch import KERNEL_CODE_TYPES, KERNEL_SCALE_RECORDS
from marlin_cy.stacks.builder import checked_stack_sizes
from marlin_cy.weights.code_types import code_type
from marlin_cy.weights.order import distinct_orders, packed_group_size, rows_of_orders
from marlin_cy.weights.scale_records import scale_record
from marlin_cy.weights.tile_layout import TileLayout

cdef extern from "pack.h" nogil:
    void pack_tile(uint32_t *lanes, const uint32_t *words, ptrdiff_t stride, const int32_t *rows, int64_t blocks,
                   int columns, int bits)
    void copy_columns(void *to, const void *source, int columns, int bytes)

cdef enum:
    # The packer cuts K into strips of this many blocks, and packs a strip of all tiles before the next strip. The
    # source of a strip, 32 rows of N words, stays in the second-level cache, and each tile is written in runs of 2 KiB.
    STRIP_BLOCKS = 32
    ALIGNMENT = 64


def allocate_pages(int64_t nbytes):
    """Zeroed, page-aligned memory, uint8 ``[nbytes]``, in huge pages if the system provides them.

    With pages of 4 KiB, reading gigabytes of weights costs a page walk every 64 cache lines.
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        pages = mmap.mmap(-1, nbytes, **private)
    except OSError as error:
        raise MemoryError(f"packed weights: could not allocate {nbytes} bytes ({error.strerror})") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            pages.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # the operating system has no transparent huge pages; normal pages work as well
            pass
    return np.frombuffer(pages, np.uint8, nbytes)


class TilePlace(NamedTuple):
    """Where tiles lie in ``data``, in bytes: one run of tiles of each expert, or two.

    Attributes
    ----------
    nbytes : int
        Size of the data.
    expert_stride : int
        From one expert to the next.
    begin : int
        The first tile of the first expert.
    run_tiles : int
        Tiles of the first run.
    skip : int
        From the end of the first run to the second run.
    """

    nbytes: int
    expert_stride: int
    begin: int
    run_tiles: int
    skip: int


def place_of(sizes, columns):
    """The place of some columns in a store of ``sizes``."""
    orders, _ = distinct_orders(sizes.g_idx, sizes.k, sizes.group_size)
    layout = TileLayout(
        max(order.packed_k for order in orders), sizes.n_per_expert, packed_group_size(sizes.group_size), sizes.codes,
        sizes.scales)
    (begin, end), *others = columns
    second = others[0][0] if others else end
    if len(others) > 1 or begin % TILE_N or (others and (end % TILE_N or second % TILE_N)):
        raise ValueError(f"columns: got {columns}, expected one or two runs of whole tiles of {TILE_N}")
    return TilePlace(
        nbytes=sizes.num_experts * layout.expert_stride,
        expert_stride=layout.expert_stride,
        begin=begin // TILE_N * layout.tile_stride,
        run_tiles=-(-(end - begin) // TILE_N),
        skip=(second - end) // TILE_N * layout.tile_stride if others else 0,
    )


def checked_data(data, int64_t nbytes):
    """``data``, a uint8 array, after a check that it is ``nbytes`` contiguous bytes aligned for the kernels."""
    if data.shape != (nbytes,) or not data.flags.c_contiguous:
        raise ValueError(f"data: got shape {data.shape} with strides {data.strides}, expected contiguous ({nbytes},)")
    if data.ctypes.data % ALIGNMENT:
        raise ValueError(f"data: got address {data.ctypes.data:#x}, expected a multiple of {ALIGNMENT}")
    return data


cdef class CpuGptqStore:
    """The weights of ``num_experts`` experts in one aligned allocation, in huge pages if available.

    A new store is empty (all bytes are zero); :meth:`pack` fills it.

    Parameters
    ----------
    sizes : StackSizes
        Checked.
    data : uint8, optional
        See :meth:`from_packed`.
    place : TilePlace, optional
        See :meth:`from_packed`.

    Attributes
    ----------
    layout : TileLayout
    nbytes : int
        Size of the packed weights.
    data : uint8 ``[nbytes]``; larger if the store has a ``place``
    group_orders : list of GroupOrder
        The distinct orders of the experts' rows.
    order_of : int32 ``[num_experts]``
        Index in ``group_orders`` of each expert's order.
    """

    def __init__(self, sizes, data=None, place=None):
        self.num_experts, self.k, self.n = sizes.num_experts, sizes.k, sizes.n_per_expert
        self.weight_group_size, self.codes, self.scales = sizes.group_size, sizes.codes, sizes.scales
        self.group_orders, self.order_of = distinct_orders(sizes.g_idx, self.k, self.weight_group_size)
        packed_k = max(order.packed_k for order in self.group_orders)
        self.layout = layout = TileLayout(
            packed_k, self.n, packed_group_size(self.weight_group_size), self.codes, self.scales)
        self.nbytes = self.num_experts * self.layout.expert_stride
        self.own = data is None
        if place is None:
            place = TilePlace(self.num_experts * layout.expert_stride, layout.expert_stride, 0, layout.tiles, 0)
        self.data = allocate_pages(self.nbytes) if data is None else checked_data(data, place.nbytes)
        self.orders = rows_of_orders(self.group_orders, self.k)
        cdef const uint8_t[::1] packed = self.data
        cdef int64_t first = place.begin
        cdef const int32_t[::1] orders_of_experts = self.order_of
        cdef const int32_t[:, ::1] orders
        self.view = packed_view(
            data=&packed[first],
            expert_stride=place.expert_stride,
            tile_stride=layout.tile_stride,
            run_tiles=place.run_tiles,
            skip=place.skip,
            header_bytes=self.layout.header_bytes,
            packed_k=packed_k,
            n=self.n,
            group_size=self.layout.group_size,
            num_groups=self.layout.num_groups,
            codes=KERNEL_CODE_TYPES[self.codes]["number"],
            scales=KERNEL_SCALE_RECORDS[self.scales]["number"],
            block_bytes=layout.block_bytes,
            chunk_header_bytes=CHUNK_K // layout.group_size * layout.group_bytes
            + CHUNK_K // SCALE_BLOCK_K * layout.scale_block_bytes,
            orders=NULL,
            order_of=&orders_of_experts[0],
        )
        if self.orders is not None:
            orders = self.orders
            self.view.orders = &orders[0, 0]

    @staticmethod
    def from_packed(num_experts, k, n, group_size, g_idx, codes, scales, data, columns=None):
        """A store over the ``data`` of another store. Nothing is copied, and :meth:`pack` raises ``ValueError``.

        Parameters
        ----------
        num_experts, k, n, group_size, g_idx, codes, scales
            The arguments that the other store was made with.
        data : uint8 ``[nbytes]``
            Contiguous, at an address that is a multiple of 64; may be read-only, such as a memory map. It is kept,
            and must not change.
        columns : one or two pairs of int, optional
            Use only the columns ``begin`` to ``end - 1`` of each pair. They begin at tiles, and all but the last end
            with a tile.

        Raises
        ------
        TypeError, ValueError, IndexError, UnsupportedError
            The message names the argument.
        """
        sizes = checked_stack_sizes(num_experts, k, n, group_size, g_idx, codes, scales)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
            raise TypeError(f"data: got {getattr(data, 'dtype', type(data).__name__)}, expected a uint8 array")
        if columns is None:
            return CpuGptqStore(sizes, data)
        part = checked_stack_sizes(
            num_experts, k, sum(end - begin for begin, end in columns), group_size, g_idx, codes, scales)
        return CpuGptqStore(part, data, place_of(sizes, columns))

    cdef const int32_t *rows_of(self, int64_t expert) noexcept:
        """Row of K at each packed position of an expert; NULL if the rows are not permuted."""
        if self.group_orders[self.order_of[expert]].rows is None:
            return NULL
        return self.view.orders + self.view.order_of[expert] * self.view.packed_k

    @property
    def act_order(self):
        """Whether the rows of K of any expert are permuted."""
        return self.orders is not None

    def pack(self, int64_t expert, int64_t column_offset, weight):
        """Write an :class:`CanonicalWeight` into columns ``[column_offset, column_offset + weight.n)`` of an expert.

        The caller has checked that it fits. Releases the GIL, and may run in several threads at once
        for different columns.
        """
        if not self.own:
            raise ValueError("pack: the store was made from packed data, which is read-only")
        order = self.group_orders[self.order_of[expert]]
        cdef const uint32_t[:, ::1] words = np.ascontiguousarray(weight.words)
        cdef const int32_t *rows = self.rows_of(expert)
        cdef uint8_t *base = <uint8_t *>self.view.data + expert * self.view.expert_stride
        cdef uint8_t *tile
        cdef int64_t stride = words.shape[1], end = column_offset + stride, blocks = order.packed_k // LANE_K
        cdef int bits = code_type(self.codes).bits
        cdef int64_t words_per_block = LANE_K * bits // 32
        # A strip is a range of K, so rows in another order cannot be cut into strips.
        cdef int64_t strip = STRIP_BLOCKS if rows is NULL else blocks
        cdef int64_t block = 0, column
        cdef int lane, count
        with nogil:
            while block < blocks:
                column = column_offset
                while column < end:
                    lane = column % TILE_N
                    count = <int>min(TILE_N - lane, end - column)
                    tile = base + column // TILE_N * self.view.tile_stride
                    pack_tile(
                        <uint32_t *>(tile + self.view.header_bytes + block * self.view.block_bytes) + lane,
                        &words[block * words_per_block, column - column_offset], stride, rows,
                        min(strip, blocks - block), count, bits)
                    column += count
                block += strip
        row, record = code_type(self.codes), scale_record(self.scales)
        for name in record.group_parts(row):
            stored = getattr(weight, name)
            if stored is None:  # a code type without zero points
                stored = np.full(weight.scale.shape, row.symmetric_zero, row.zero_dtype)
            self.pack_part(base, column_offset, name, stored, order.scale_rows)
        for name in record.block_parts():
            stored = getattr(weight, name)
            self.pack_part(base, column_offset, name, stored, np.arange(len(stored), dtype=np.int32))

    def pack_stored(self, int64_t expert, int64_t column_offset, weight):
        """As :meth:`pack`, for a :class:`StoredWeight`."""
        if not self.own:
            raise ValueError("pack: the store was made from packed data, which is read-only")
        if self.rows_of(expert) is not NULL:
            raise ValueError(f"pack: the rows of expert {expert} are in another order")
        begin = expert * self.layout.expert_stride
        weight.write_tiles(self.data[begin:begin + self.layout.expert_stride], column_offset, self.layout)

    cdef int pack_part(self, uint8_t *base, int64_t column_offset, name, stored, const int32_t[::1] rows) except -1:
        """Write a part of the scale records: ``stored[rows[i]]`` goes to the ``i``-th place of each tile."""
        places, dtype = self.layout.part_places(name)
        cdef const int64_t[::1] at = np.array(places, np.int64)
        cdef const uint8_t[:, ::1] values = np.ascontiguousarray(stored).view(np.uint8)
        cdef int size = dtype.itemsize, lane, count
        cdef int64_t column = column_offset, end = column_offset + values.shape[1] // size, i
        cdef uint8_t *tile
        with nogil:
            while column < end:
                lane = column % TILE_N
                count = <int>min(TILE_N - lane, end - column)
                tile = base + column // TILE_N * self.view.tile_stride + lane * size
                for i in range(rows.shape[0]):
                    copy_columns(tile + at[i], &values[rows[i], (column - column_offset) * size], count, size)
                column += count
        return 0
