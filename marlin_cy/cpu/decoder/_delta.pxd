"""Gated DeltaNet, from normalised rows to the output projection."""

from libc.stdint cimport int32_t, int64_t

from marlin_cy.cpu._arena cimport arena
from marlin_cy.cpu._dispatch cimport ukernel_table
from marlin_cy.cpu._exchange cimport Hosts, exchange
from marlin_cy.cpu._team cimport member, queue
from marlin_cy.cpu._workspace cimport Workspace
from marlin_cy.cpu.decoder._batch cimport batch
from marlin_cy.cpu.decoder._projections cimport plain_rows, projection_group

cdef struct delta_job:
    const ukernel_table *table
    projection_group projections    # qkv, z, b, a
    projection_group out
    const float *conv               # [conv_width][channels]
    const float *a_log              # [num_v_heads]
    const float *dt_bias
    const float *norm               # [value_dim]
    float norm_eps
    int64_t num_k_heads
    int64_t num_v_heads
    int64_t key_dim
    int64_t value_dim
    int64_t conv_width
    int64_t channels
    float *conv_state               # [slots][conv_width - 1][channels]
    float *state                    # [slots][num_v_heads][key_dim][value_dim]
    const batch *rows
    const int32_t *out_rows         # the row of the batch for each row of the output, or NULL: all rows
    queue mixed
    queue gated
    queue normed_rows
    queue heads
    bint divided                    # several hosts have the heads
    exchange values                 # what the output projection reads
    queue finished
    # Memory that carve_delta takes.
    float *qkv                      # [rows, channels]
    float *z                        # [rows, num_v_heads, value_dim]
    float *b                        # [rows, outputs of b]: a multiple of 8 if b is quantised and shared out
    float *a                        # [rows, outputs of a]
    float *beta                     # [rows, num_v_heads]
    float *decay                    # [rows, num_v_heads]
    float *y                        # [rows, num_v_heads, value_dim]

cdef int set_delta(delta_job *job, Workspace workspace, plan, pool, list owners, Hosts hosts) except -1
cdef void set_delta_rows(delta_job *job, plain_rows *rows, plain_rows *out_rows) noexcept nogil
cdef void carve_delta(arena *memory, delta_job *job, int64_t max_rows, int64_t max_out_rows) noexcept nogil
cdef void begin_delta(delta_job *job, const batch *rows, int64_t out_rows) noexcept nogil
cdef void run_delta(delta_job *job, member *m) noexcept nogil
