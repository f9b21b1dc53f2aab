"""Products of quantised rows with packed experts: one flat list of work, one prange."""

from libc.stdint cimport int8_t, int32_t, int64_t

from marlin_cy.cpu._dispatch cimport MAX_MC, PAIR_N, act_meta, gemm_scratch, ukernel_table
from marlin_cy.cpu._quantize cimport quantize_job
from marlin_cy.cpu._store cimport CpuGptqStore, packed_view
from marlin_cy.cpu._workspace cimport Workspace

cdef enum:
    OUT_FLOATS = MAX_MC * PAIR_N      # the sums of an item, at most

cdef struct thread_area:
    gemm_scratch scratch
    float[OUT_FLOATS] out
    int64_t next_item           # of this thread's share of the list; all threads take from it
    int64_t end_item
    int64_t[6] padding          # to a whole number of cache lines

cdef struct row_block:
    int64_t expert
    int64_t begin       # in the row lists
    int64_t count       # 1 to ukernel_table's mc

# Where pairs find their rows quantised: how quantize_job and gemm_job have it.
cdef struct row_places:
    int64_t num_rows            # quantised rows
    int64_t num_distinct
    int32_t *in_rows            # [pairs] quantised row
    int64_t *input_rows         # [num_rows] row of the input
    int32_t *row_orders         # [num_rows] order of K that it is quantised in
    int32_t *next_copy          # [num_rows]
    int32_t *distinct           # [num_distinct]
    int32_t *row_place          # [input_rows] a quantised row of each, -1 for none yet

cdef struct row_plan:
    int64_t num_pairs           # rows to compute
    int64_t num_blocks
    int32_t *pair_rows          # [num_pairs] row of the input
    int64_t *out_rows           # [num_pairs] row of the output
    row_block *blocks           # [num_blocks] runs of one expert's pairs
    row_places places

cdef struct gemm_job:
    const ukernel_table *table
    packed_view store
    int planes
    const int8_t *a
    const act_meta *meta
    int64_t num_quantized
    const int32_t *in_rows
    const int64_t *out_rows
    const row_block *blocks
    int64_t num_blocks
    int64_t column_begin        # columns of each expert to compute
    int64_t column_end
    int64_t inner               # > 0: columns are inner gates, then inner ups; the output is activation(gate, up)
    int activation              # then: ACTIVATION_SILU (0) and the others of ukernel.h
    char *output                # first element of the first column's place in row 0
    int out_dtype
    int64_t out_width           # elements from one output row to the next
    const float *bias           # of expert 0's column column_begin, or NULL; added before the activation
    int64_t bias_stride         # elements from one expert's to the next's; 0: the same for all
    thread_area *areas          # [num_threads]
    float *slots                # split_bytes(job) of them

cdef void set_quantize_job(quantize_job *job, Workspace workspace, CpuGptqStore store) noexcept
cdef void set_gemm_job(gemm_job *job, Workspace workspace, CpuGptqStore store, const float[:, ::1] bias) noexcept
cdef int64_t split_bytes(const gemm_job *job, int num_threads) noexcept nogil
cdef void run_gemm(const gemm_job *job, quantize_job *rows, int num_threads) noexcept nogil
cdef int64_t row_places_bytes(int64_t pairs, int64_t input_rows) noexcept nogil
cdef void set_row_places(row_places *places, void *memory, int64_t pairs, int64_t input_rows) noexcept nogil
cdef void place_rows(row_places *places, const row_block *blocks, int64_t num_blocks, const int32_t *pair_rows,
                     const int32_t *order_of, bint one_order, int64_t input_rows,
                     int min_matrix_rows) noexcept nogil
cdef void use_row_places(quantize_job *job, const row_places *places) noexcept nogil
cdef int64_t max_blocks(const ukernel_table *table, int64_t runs, int64_t pairs) noexcept nogil
cdef int64_t cut_into_blocks(row_block *blocks, int64_t expert, int64_t begin, int64_t count,
                             const ukernel_table *table) noexcept nogil
