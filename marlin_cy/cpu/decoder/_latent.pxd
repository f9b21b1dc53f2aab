"""Multi-head latent attention, from normalised rows to the output projection."""

from libc.stdint cimport int32_t, int64_t

from marlin_cy.cpu._arena cimport arena
from marlin_cy.cpu._exchange cimport Hosts, exchange, section
from marlin_cy.cpu._team cimport member, queue
from marlin_cy.cpu._workspace cimport Workspace
from marlin_cy.cpu.decoder._attention cimport attention_job
from marlin_cy.cpu.decoder._batch cimport batch
from marlin_cy.cpu.decoder._grouped cimport rope_table
from marlin_cy.cpu.decoder._projections cimport plain_rows, projection_group

# A matrix for each head.
cdef struct head_matrices:
    const char *weights         # [num_heads][n][k]
    int dtype
    int64_t n
    int64_t k

cdef struct latent_job:
    projection_group first      # q_a and kv_a, or q_b and kv_a
    bint has_second
    projection_group second     # q_b
    attention_job attend
    projection_group out
    head_matrices k_up          # [latent_dim][nope_dim]
    head_matrices v_up          # [v_head_dim][latent_dim]
    rope_table rope
    const float *q_norm         # [q_a outputs]
    const float *kv_norm        # [latent_dim]
    float norm_eps
    int64_t nope_dim
    int64_t rope_dim
    int64_t latent_dim
    const batch *rows
    const int32_t *out_rows     # the row of the batch for each row of the output, or NULL: all rows
    queue latent_rows
    queue absorbed
    queue merged_rows
    queue expanded
    bint divided                # several hosts have the heads, and the columns of q_a and kv_a
    exchange low                # the outputs of q_a, if there is one, and of kv_a
    const section *latent       # the outputs of kv_a in it
    exchange values             # what the output projection reads
    # Memory that carve_latent takes.
    float *q                    # [rows, num_heads, nope_dim + rope_dim]
    float *kv                   # [rows, latent_dim + rope_dim]
    float *query                # [rows, num_heads, latent_dim + rope_dim]
    float *merged               # [out rows, num_heads, latent_dim]

cdef int set_latent(latent_job *job, Workspace workspace, plan, pool, list owners, Hosts hosts) except -1
cdef void set_latent_rows(latent_job *job, plain_rows *rows, plain_rows *out_rows) noexcept nogil
cdef void carve_latent(arena *memory, latent_job *job, int64_t max_rows, int64_t max_out_rows,
                       int64_t max_chunks) noexcept nogil
cdef void begin_latent(latent_job *job, const batch *rows, int64_t out_rows) noexcept nogil
cdef void run_latent(latent_job *job, member *m) noexcept nogil
