"""Combination: the weighted sum of the experts' products for each token."""

from libc.stdint cimport int32_t, int64_t

from marlin_cy.cpu._arena cimport arena
from marlin_cy.cpu._dispatch cimport ukernel_table
from marlin_cy.cpu._team cimport member

cdef struct combination:
    const ukernel_table *table
    int num_threads
    const float *products       # [tokens, top_k, width]
    const int32_t *ids          # [tokens, top_k]
    const float *weights        # [tokens, top_k], or NULL for 1
    int64_t top_k
    int64_t width
    const float *shared         # [tokens, width] of the shared expert, or NULL
    const float *gate_weight    # [k] of the shared expert's gate, or NULL for 1
    const char *input           # [tokens, k]
    int input_dtype
    int64_t k
    char *output                # [tokens, width]
    int dtype
    float *sums                 # [num_threads, width], which carve_combination takes

cdef void carve_combination(arena *memory, combination *c) noexcept nogil
cdef void combine_tokens(const combination *c, int64_t tokens, const member *m) noexcept nogil
cdef void combine_token(const combination *c, int64_t token, int thread) noexcept nogil
