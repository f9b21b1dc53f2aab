"""The packed weights of a stack, and how they are packed.

The layout is drawn in ``ukernels/ukernel.h`` and written out in plain NumPy in ``layout.py``.
"""

import mmap

import numpy as np

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t

from marlin_cy.cpu._dispatch cimport BLOCK_BYTES, BLOCK_K, CODES_E2M1, CODES_UINT4, DTYPE_BF16, DTYPE_F16, E2M1_ZERO, GROUP_HEADER_BYTES, TILE_N

from marlin_cy.cpu.layout import TileLayout, unpack_tiles
from marlin_cy.formats.order import distinct_orders, packed_group_size, rows_of_orders

cdef enum:
    # Blocks of K that are packed for all tiles before the next are: their source, 32 rows of N words,
    # stays in the second-level cache, and each tile is written in runs of 2 KiB.
    STRIP_BLOCKS = 32


def allocate_pages(int64_t nbytes):
    """Zeroed, page-aligned uint8 ``[nbytes]``, in huge pages where the system gives them.

    Streaming gigabytes of weights through 4 KiB pages costs a page walk every 64 cache lines.
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        pages = mmap.mmap(-1, nbytes, **private)
    except OSError as error:
        raise MemoryError(f"packed weights: could not allocate {nbytes} bytes ({error.strerror})") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            pages.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel built without transparent huge pages: the advice is all that is lost
            pass
    return np.frombuffer(pages, np.uint8, nbytes)


cdef inline uint32_t interleave(uint32_t word) noexcept nogil:
    """Eight nibbles 0..7 of a word to bytes (0, 4), (1, 5), (2, 6), (3, 7), low nibble first."""
    cdef uint32_t low = word & 0xffff, high = word >> 16
    low = (low | low << 8) & 0x00ff00ff
    low = (low | low << 4) & 0x0f0f0f0f
    high = (high | high << 8) & 0x00ff00ff
    high = (high | high << 4) & 0x0f0f0f0f
    return low | high << 4


cdef void pack_block(uint32_t *lanes, const uint32_t *words, int64_t stride, const int32_t *rows, int64_t block,
                     int count) noexcept nogil:
    """One block of ``count`` columns; ``words`` is at the first column, ``stride`` words to the next row."""
    cdef uint32_t[16] gathered
    cdef const uint32_t *source
    cdef int c, i, shift
    cdef int32_t row
    if rows is NULL:
        source = words + block * stride
        for c in range(count):
            lanes[c] = interleave(source[c])
        return
    for c in range(count):
        gathered[c] = 0
    for i in range(BLOCK_K):
        row = rows[block * BLOCK_K + i]
        if row < 0:
            continue
        source = words + row // BLOCK_K * stride
        shift = 4 * (row % BLOCK_K)
        for c in range(count):
            gathered[c] |= (source[c] >> shift & 15) << (4 * i)
    for c in range(count):
        lanes[c] = interleave(gathered[c])


cdef class CpuGptqStore:
    """The int4 weights of ``num_experts`` experts in one aligned, huge-page-advised allocation.

    Made empty (all weights zero); :meth:`pack` fills it.

    Parameters
    ----------
    num_experts, k, n : int
        Experts, and the shape ``[k, n]`` of each.
    group_size : int
        Rows of K that share a scale.
    g_idx : sequence of int32 ``[k]`` or None, one an expert
        Group of each row; None for ``row // group_size``.
    codes : {"uint4", "e2m1"}
    scale_dtype : {float16, bfloat16}

    Attributes
    ----------
    layout : TileLayout
    nbytes : int
        Of the packed weights.
    data : uint8 ``[nbytes]``
    group_orders : list of GroupOrder, the distinct ones
    order_of : int32 ``[num_experts]``
        Which of them each expert uses.
    """

    def __init__(self, int64_t num_experts, int64_t k, int64_t n, int64_t group_size, g_idx, str codes="uint4",
                 scale_dtype=np.float16):
        self.codes, self.scale_dtype = codes, np.dtype(scale_dtype)
        self.num_experts, self.k, self.n, self.weight_group_size = num_experts, k, n, group_size
        self.group_orders, self.order_of = distinct_orders(g_idx, k, group_size)
        packed_k = max(order.packed_k for order in self.group_orders)
        self.layout = TileLayout(packed_k, n, packed_group_size(group_size))
        self.nbytes = num_experts * self.layout.expert_stride
        self.data = allocate_pages(self.nbytes)
        self.orders = rows_of_orders(self.group_orders, k)
        cdef const uint8_t[::1] data = self.data
        cdef const int32_t[::1] orders_of_experts = self.order_of
        cdef const int32_t[:, ::1] orders
        self.view = packed_view(
            data=&data[0],
            expert_stride=self.layout.expert_stride,
            tile_stride=self.layout.tile_stride,
            header_bytes=self.layout.header_bytes,
            packed_k=packed_k,
            n=n,
            group_size=self.layout.group_size,
            num_groups=self.layout.num_groups,
            codes=CODES_UINT4 if codes == "uint4" else CODES_E2M1,
            scale_dtype=DTYPE_F16 if self.scale_dtype == np.float16 else DTYPE_BF16,
            orders=NULL,
            order_of=&orders_of_experts[0],
        )
        if self.orders is not None:
            orders = self.orders
            self.view.orders = &orders[0, 0]

    @property
    def act_order(self):
        """True when some expert's rows of K are packed in another order than their own."""
        return self.orders is not None

    def pack(self, int64_t expert, int64_t column_offset, weight):
        """Write an :class:`Int4Weight` into columns ``[column_offset, column_offset + weight.n)`` of an expert.

        The caller has checked that it fits. Releases the GIL, and may run in several threads at once
        for different columns.
        """
        order = self.group_orders[self.order_of[expert]]
        cdef const uint32_t[:, ::1] words = np.ascontiguousarray(weight.words)
        cdef const uint16_t[:, ::1] scale = np.ascontiguousarray(weight.scale).view(np.uint16)
        cdef const uint8_t[:, ::1] zero = None if weight.zero is None else np.ascontiguousarray(weight.zero)
        cdef bint has_zero = weight.zero is not None
        cdef const int32_t[::1] scale_rows = order.scale_rows
        cdef const int32_t *rows = NULL
        cdef const int32_t[:, ::1] orders
        if order.rows is not None:
            orders = self.orders
            rows = &orders[self.order_of[expert], 0]
        cdef uint8_t *base = <uint8_t *>self.view.data + expert * self.view.expert_stride
        cdef uint8_t *tile
        cdef uint8_t *header
        cdef int64_t stride = words.shape[1], end = column_offset + stride
        cdef int64_t num_groups = scale_rows.shape[0], blocks = order.packed_k // BLOCK_K
        cdef int64_t strip, first_block, block, column, source, g
        cdef int lane, count, c
        with nogil:
            for strip in range((blocks + STRIP_BLOCKS - 1) // STRIP_BLOCKS):
                first_block = strip * STRIP_BLOCKS
                column = column_offset
                while column < end:
                    lane = column % TILE_N
                    count = <int>min(TILE_N - lane, end - column)
                    source = column - column_offset
                    tile = base + column // TILE_N * self.view.tile_stride
                    for block in range(first_block, min(first_block + STRIP_BLOCKS, blocks)):
                        pack_block(
                            <uint32_t *>(tile + self.view.header_bytes + block * BLOCK_BYTES) + lane,
                            &words[0, source], stride, rows, block, count)
                    column += count
            column = column_offset
            while column < end:
                lane = column % TILE_N
                count = <int>min(TILE_N - lane, end - column)
                source = column - column_offset
                tile = base + column // TILE_N * self.view.tile_stride
                for g in range(num_groups):
                    header = tile + g * GROUP_HEADER_BYTES
                    for c in range(count):
                        (<uint16_t *>header)[lane + c] = scale[scale_rows[g], source + c]
                        header[2 * TILE_N + lane + c] = zero[scale_rows[g], source + c] if has_zero else E2M1_ZERO
                column += count

    def unpack(self, int64_t expert):
        """``(w, q)`` of an expert as it was given: float64 and uint8 ``[k, n]``. Slow; for tests and inspection."""
        begin = expert * self.layout.expert_stride
        packed = self.data[begin : begin + self.layout.expert_stride]
        order = self.group_orders[self.order_of[expert]]
        return unpack_tiles(packed, order, self.layout, self.k, self.codes, self.scale_dtype)
