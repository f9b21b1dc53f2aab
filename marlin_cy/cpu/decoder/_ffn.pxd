"""Feed-forward networks as phases of a decoder's step."""

from libc.stdint cimport int64_t

from marlin_cy.cpu._arena cimport arena
from marlin_cy.cpu._dense cimport dense_job
from marlin_cy.cpu._exchange cimport Hosts, exchange
from marlin_cy.cpu._layer cimport layer_job
from marlin_cy.cpu._team cimport member, queue
from marlin_cy.cpu._workspace cimport Workspace
from marlin_cy.cpu.decoder._projections cimport plain_rows, projection_group, row_fn

cdef struct mlp_job:
    projection_group gate_up
    projection_group down
    int activation
    bint divided                # several hosts have the columns of gate and up
    exchange inner
    queue activated

cdef struct moe_job:
    dense_job router
    layer_job layer
    bint has_shared             # an expert that is not in `layer`
    mlp_job shared
    const float *shared_gate    # [hidden], or NULL
    int64_t num_rows
    int64_t hidden
    int64_t width               # of the output: the hidden size, or this host's columns of it
    float *input                # [num_rows, hidden]
    float *output               # [num_rows, width]
    row_fn *prepare             # fills a row of the input
    void *prepared
    queue prepared_rows
    queue added_rows
    # Memory that carve_moe takes.
    float *logits

cdef int set_mlp(mlp_job *job, Workspace workspace, plan, list owners, Hosts hosts) except -1
cdef void set_mlp_rows(mlp_job *job, plain_rows *rows) noexcept nogil
cdef void carve_mlp(arena *memory, mlp_job *job, int64_t max_rows) noexcept nogil
cdef void begin_mlp(mlp_job *job, int64_t num_rows) noexcept nogil
cdef void run_mlp(mlp_job *job, member *m) noexcept nogil

cdef int set_moe(moe_job *job, Workspace workspace, plan, list owners, Hosts hosts) except -1
cdef void carve_moe(arena *memory, moe_job *job, int64_t max_rows) noexcept nogil
cdef void begin_moe(moe_job *job, int64_t num_rows) noexcept nogil
cdef void run_moe(moe_job *job, member *m) noexcept nogil
