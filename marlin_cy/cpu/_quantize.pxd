"""Quantisation of activations, one row at a time, in parallel."""

from libc.stdint cimport int8_t, int32_t, int64_t

from marlin_cy.cpu._arena cimport arena
from marlin_cy.cpu._dispatch cimport act_meta, ukernel_table
from marlin_cy.cpu._exchange cimport section
from marlin_cy.cpu._rows cimport row_plan
from marlin_cy.cpu._team cimport member, queue

cdef struct quantize_job:
    const ukernel_table *table
    int num_threads
    int planes
    const char *input           # [*, k], row-major
    int dtype
    const section *gathered     # not NULL: input rows are float32, and their columns come from several hosts
    int64_t k                   # elements in an input row
    int64_t packed_k            # elements in a quantised row
    int group_size
    # The rows, as in row_plan.
    int64_t num_rows            # quantised rows
    int64_t num_distinct        # rows to quantise; the others are copies
    const int64_t *input_rows   # [num_rows], or NULL for 0 .. num_rows - 1
    const int32_t *distinct     # [num_distinct], or NULL for 0 .. num_distinct - 1
    const int32_t *copy_of      # [num_rows] the row that this one is a copy of, or -1; NULL: no copies
    const int32_t *row_orders   # [num_rows] the order of each row, or NULL for the first
    const int32_t *orders       # [*, packed_k] input element at each packed position, or NULL for the input's order
    const float *weights        # of input rows; the scales are multiplied by them; NULL for 1
    # Memory that carve_quantized takes.
    void *memory                # for a and meta of as many rows as it was asked for
    float *row_buffers          # [num_threads][row_buffer_floats(k, packed_k)]
    # The result, which place_quantized puts into memory.
    int8_t *a                   # [groups][group_rows(num_rows)][group_size * planes]
    act_meta *meta              # [groups][group_rows(num_rows)]
    char[64] before_counters    # keeps the counters, which threads write, off the cache lines that they read
    queue distinct_rows
    queue places                # to look at for copying
    int64_t num_quantised       # distinct rows
    int64_t num_copied          # places that were looked at
    char[64] after_counters

cdef inline int64_t group_rows(int64_t num_rows) noexcept nogil:
    """Rows from one group to the next: an odd number.

    A micro-kernel reads the groups of a row again for every tile. With an even number of rows, groups may fall into
    the same sets of the cache.
    """
    return num_rows | 1

cdef void carve_quantized(arena *memory, quantize_job *job, int64_t max_rows) noexcept nogil
cdef void begin_quantizing(quantize_job *job, const row_plan *plan) noexcept nogil
cdef void quantize_rows(quantize_job *job, const member *m) noexcept nogil
cdef void quantize_one(const quantize_job *job, int64_t row, int thread) noexcept nogil
