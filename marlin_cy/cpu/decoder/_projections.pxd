"""Linear layers that read the same rows, as a phase of a decoder's step."""

from libc.stdint cimport int32_t, int64_t

from marlin_cy.cpu._arena cimport arena
from marlin_cy.cpu._dense cimport dense_job
from marlin_cy.cpu._dispatch cimport ukernel_table
from marlin_cy.cpu._exchange cimport section
from marlin_cy.cpu._gemm cimport gemm_job
from marlin_cy.cpu._quantize cimport quantize_job
from marlin_cy.cpu._rows cimport row_plan
from marlin_cy.cpu._team cimport member, queue
from marlin_cy.cpu._workspace cimport Workspace

cdef enum:
    MAX_PROJECTIONS = 4

# Prepares input row `row`, before it is quantised.
ctypedef void row_fn(void *job, int64_t row, int thread) noexcept nogil

cdef struct projection:
    bint quantised
    int quantised_by            # index of the group's quantize_job
    gemm_job gemm
    dense_job dense
    int64_t n
    float *output               # [rows, n]

# Rows 0, 1, 2, ... of a product with one expert.
cdef struct plain_rows:
    row_plan plan
    int64_t max_rows

cdef struct projection_group:
    const ukernel_table *table
    int num_projections
    projection[MAX_PROJECTIONS] projections
    int num_quantised
    quantize_job[MAX_PROJECTIONS] quantised      # different orders of K, or sizes of groups, of the input rows
    int64_t k
    int64_t num_rows
    float *input                # [num_rows, k]
    const section *gathered     # not NULL: the columns of an input row come from several hosts
    row_fn *prepare             # NULL: the input is complete, once gathered
    void *prepared              # the job of `prepare`
    plain_rows *rows
    queue row_items

cdef int set_group(projection_group *group, Workspace workspace, list projections, list owners) except -1
cdef void carve_plain(arena *memory, plain_rows *rows, const ukernel_table *table) noexcept nogil
cdef void plan_plain(plain_rows *rows, const ukernel_table *table, int64_t count) noexcept nogil
cdef void carve_group(arena *memory, projection_group *group, int64_t max_rows) noexcept nogil
cdef void begin_group(projection_group *group, int64_t num_rows) noexcept nogil
cdef void run_group(projection_group *group, member *m) noexcept nogil
cdef void run_rows(queue *items, int64_t rows, row_fn *prepare, void *job, member *m) noexcept nogil

cdef int set_dense(dense_job *job, Workspace workspace, layer, list owners) except -1
