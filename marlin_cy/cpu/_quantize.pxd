"""Quantisation of activations, a row at a time, in parallel."""

from libc.stdint cimport int8_t, int32_t, int64_t

from marlin_cy.cpu._dispatch cimport act_meta, ukernel_table

cdef struct quantize_job:
    const ukernel_table *table
    const char *input           # [*, k], row-major
    int dtype
    int64_t k                   # elements in an input row
    int64_t packed_k            # elements in a quantised row
    int group_size
    int planes
    int64_t num_rows            # quantised rows
    const int64_t *input_rows   # [num_rows], or NULL for 0 .. num_rows - 1
    int64_t num_distinct        # of them, those to quantise; the others are copies of these
    const int32_t *distinct     # [num_distinct], or NULL for 0 .. num_distinct - 1
    const int32_t *next_copy    # [num_rows] the next quantised row that is the same, or -1; NULL: no copies
    const int32_t *orders       # [*, packed_k], or NULL
    const int32_t *row_orders   # [num_rows] which order each row takes, or NULL for the first
    const float *weights        # of input rows, what their scales are multiplied by; NULL for 1
    int8_t *a                   # [groups][group_rows(num_rows)][group_size * planes]
    act_meta *meta              # [groups][group_rows(num_rows)]
    float *row_buffers          # [threads][row_buffer_floats(k, packed_k)]
    char[64] apart              # what threads write lies in other cache lines than what they read
    int64_t next_distinct       # that no thread has begun
    int64_t num_done            # distinct rows
    char[64] apart_from_others

cdef inline int64_t group_rows(int64_t num_rows) noexcept nogil:
    """Rows from one group to the next: an odd number, so that the groups of a row, which a micro-kernel
    reads again for every tile, do not all fall into the same sets of the cache."""
    return num_rows | 1

cdef int64_t row_buffer_floats(int64_t k, int64_t packed_k) noexcept nogil
cdef int64_t quantized_bytes(int64_t num_rows, int64_t packed_k, int group_size, int planes) noexcept nogil
cdef void place_quantized(quantize_job *job, void *memory) noexcept nogil
cdef void begin_quantizing(quantize_job *job) noexcept nogil
cdef void quantize_rows(quantize_job *job, int thread, int num_threads) noexcept nogil
