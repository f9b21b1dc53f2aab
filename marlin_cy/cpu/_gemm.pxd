"""Products of quantised rows with packed experts: one flat list of items, which threads share."""

from libc.stdint cimport int8_t, int32_t, int64_t

from marlin_cy.cpu._arena cimport arena
from marlin_cy.cpu._buffers cimport matrix
from marlin_cy.cpu._dispatch cimport MAX_MC, PAIR_N, act_meta, gemm_scratch, ukernel_table
from marlin_cy.cpu._quantize cimport quantize_job
from marlin_cy.cpu._rows cimport row_block, row_plan
from marlin_cy.cpu._store cimport CpuGptqStore, packed_view
from marlin_cy.cpu._team cimport member
from marlin_cy.cpu._workspace cimport Workspace

cdef enum:
    OUT_FLOATS = MAX_MC * PAIR_N      # the sums of an item, at most

cdef struct thread_area:
    gemm_scratch scratch
    float[OUT_FLOATS] out
    int64_t next_item           # the first item of this thread's share that no thread has taken
    int64_t end_item
    int64_t[6] padding          # to a whole number of cache lines

cdef struct column_range:
    int64_t begin               # columns of an expert
    int64_t end
    int64_t out_begin           # where column `begin` goes in an output row

cdef struct gemm_job:
    const ukernel_table *table
    int num_threads
    int planes
    packed_view store
    # Columns.
    column_range all_columns    # of each expert
    const column_range *ranges  # what row_block.columns counts
    int64_t inner               # > 0: columns are inner gates, then inner ups; the output is activation(gate, up)
    int64_t panels              # items that a block's columns are cut into; set_columns has the formula
    # Epilogue.
    bint rectified              # the output is max(x, 0) squared; float32
    int activation              # with inner: ACTIVATION_SILU (0) or another number of ukernel.h
    char *output                # row 0
    int out_dtype
    int64_t out_width           # elements from one output row to the next
    const float *bias           # added before the activation; NULL for none
    int64_t bias_stride         # elements from one expert's bias to the next's; 0: one bias, indexed as an output row
    # The rows, as in row_plan and quantize_job; begin_items sets them.
    const int8_t *a
    const act_meta *meta
    int64_t num_quantized
    const int32_t *in_rows
    const int64_t *out_rows
    const row_block *blocks
    int64_t num_blocks
    # Memory that carve_gemm takes.
    thread_area *areas          # [num_threads]
    float *slots                # split-K: sums of each item and chunk, [items][chunks][slot_floats]
    int64_t *arrivals           # split-K: finished chunks of each item

cdef void set_quantize_job(quantize_job *job, Workspace workspace, CpuGptqStore store) noexcept
cdef void set_gemm_job(gemm_job *job, Workspace workspace, CpuGptqStore store, const float[:, ::1] bias) noexcept
cdef void set_columns(gemm_job *job, const column_range *ranges, int64_t count) noexcept
cdef void set_activation(gemm_job *job, int64_t inner, int activation) noexcept
cdef void set_rectified(gemm_job *job) noexcept
cdef void set_output(gemm_job *job, const matrix *output) noexcept
cdef void carve_gemm(arena *memory, gemm_job *job) noexcept nogil
cdef void multiply(gemm_job *job, quantize_job *rows, const row_plan *plan) noexcept nogil
cdef void begin_product(gemm_job *job, quantize_job *rows, const row_plan *plan) noexcept nogil
cdef void run_product(gemm_job *job, quantize_job *rows, const member *m) noexcept nogil
cdef void begin_items(gemm_job *job, const quantize_job *rows, const row_plan *plan) noexcept nogil
cdef void do_items(const gemm_job *job, const member *m) noexcept nogil
