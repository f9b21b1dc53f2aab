"""The packed weights of a stack, as the code around the kernels sees them."""

from libc.stdint cimport int32_t, int64_t, uint8_t

cdef struct packed_view:
    const uint8_t *data
    int64_t expert_stride
    int64_t tile_stride
    int64_t run_tiles           # an expert's tiles from this one on lie `skip` bytes further
    int64_t skip
    int64_t header_bytes
    int64_t packed_k
    int64_t n
    int group_size
    int num_groups
    int codes                   # index into code_types
    int scales                  # index into scale_records
    int64_t block_bytes         # of 8 packed rows of a tile
    int64_t chunk_header_bytes  # of the records of a chunk of K, in each tile
    const int32_t *orders       # [num_orders][packed_k] row of K at each packed position; NULL: all in their own order
    const int32_t *order_of     # [num_experts]

cdef inline int64_t tile_offset(const packed_view *view, int64_t tile) noexcept nogil:
    """Where a tile begins in its expert."""
    return tile * view.tile_stride + (view.skip if tile >= view.run_tiles else 0)


cdef class CpuGptqStore:
    cdef packed_view view
    cdef readonly int64_t num_experts
    cdef readonly int64_t k
    cdef readonly int64_t n
    cdef readonly int64_t weight_group_size
    cdef readonly str codes
    cdef readonly str scales
    cdef readonly object layout
    cdef readonly int64_t nbytes
    cdef readonly object data
    cdef readonly object orders
    cdef readonly object order_of
    cdef readonly list group_orders
    cdef bint own               # whether `data` was allocated here, so that it may be written

    cdef const int32_t *rows_of(self, int64_t expert) noexcept
    cdef int pack_part(self, uint8_t *base, int64_t column_offset, name, stored, const int32_t[::1] rows) except -1
