"""Grouped-query attention, from normalised rows to the output projection."""

from libc.stdint cimport int32_t, int64_t

from marlin_cy.cpu._arena cimport arena
from marlin_cy.cpu._exchange cimport Hosts, exchange
from marlin_cy.cpu._team cimport member, queue
from marlin_cy.cpu._workspace cimport Workspace
from marlin_cy.cpu.decoder._attention cimport attention_job
from marlin_cy.cpu.decoder._batch cimport batch
from marlin_cy.cpu.decoder._projections cimport projection_group

# Positions of rotary embedding.
cdef struct rope_table:
    const float *cos            # [context_length, pairs], or NULL: no rotation
    const float *sin
    int64_t pairs
    bint interleaved

cdef struct grouped_job:
    projection_group qkv
    attention_job attend
    projection_group out
    rope_table rope
    const float *q_norm         # [head_dim], or NULL
    const float *k_norm
    float norm_eps
    bint gated
    const batch *rows
    const int32_t *out_rows     # the row of the batch for each row of the output, or NULL: all rows
    queue head_items
    bint divided                # several hosts have the heads
    exchange values             # what the output projection reads
    queue finished
    # Memory that carve_grouped takes.
    float *q
    float *k
    float *v

cdef int set_rope(rope_table *table, rope, list owners) except -1
cdef int set_grouped(grouped_job *job, Workspace workspace, plan, pool, float norm_eps, list owners,
                     Hosts hosts) except -1
cdef void carve_grouped(arena *memory, grouped_job *job, int64_t max_rows, int64_t max_out_rows,
                        int64_t max_chunks) noexcept nogil
cdef void begin_grouped(grouped_job *job, const batch *rows, int64_t out_rows) noexcept nogil
cdef void run_grouped(grouped_job *job, member *m) noexcept nogil
