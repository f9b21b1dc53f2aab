"""RMS norms of the residual stream, as a part of the phase that quantises rows."""

from libc.stdint cimport int32_t, int64_t

from marlin_cy.cpu._dispatch cimport ukernel_table
from marlin_cy.cpu._exchange cimport section
from marlin_cy.cpu.decoder._batch cimport batch

# An RMS norm, and what is done to a row of the residual stream before it.
cdef struct norm_job:
    const ukernel_table *table
    const float *weight
    float eps
    int64_t width
    const batch *embedded       # the first norm: x is the embedding of the batch's tokens
    const char *embedding       # [vocab, width]
    int embedding_dtype
    float *x                    # [rows, width]
    const float *delta          # [rows, width], added to x; NULL for the first norm, and on several hosts
    const section *gathered_delta       # the same on several hosts
    const int32_t *gathered     # row of `source` for each row of x, or NULL: x is complete
    const float *source
    float *normed               # [rows, width]

cdef void norm_row(void *norm, int64_t row, int thread) noexcept nogil
cdef void add_delta(const norm_job *job, int64_t row, float *x) noexcept nogil
