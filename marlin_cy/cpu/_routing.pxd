"""Routing: the experts of each token, and their weights."""

from libc.stdint cimport int32_t, int64_t

from marlin_cy.cpu._arena cimport arena
from marlin_cy.cpu._buffers cimport matrix
from marlin_cy.cpu._dispatch cimport ukernel_table
from marlin_cy.cpu._team cimport member
from marlin_cy.cpu._workspace cimport Workspace

cdef enum scoring_kind:
    SOFTMAX
    SOFTMAX_TOPK
    SIGMOID
    SQRT_SOFTPLUS
    SPARSEMIXER

cdef struct routing:
    const ukernel_table *table
    int num_threads
    const char *logits      # [tokens, num_experts]
    int dtype
    int64_t num_experts
    int64_t top_k
    scoring_kind scoring
    bint normalise
    const float *bias       # [num_experts], or NULL
    int64_t num_groups
    int64_t topk_groups
    bint top2_group_score   # a group's score is the sum of its two largest scores; otherwise its largest
    float factor
    const float *scale      # [num_experts], or NULL
    float jitter            # of SPARSEMIXER
    int32_t *ids            # [tokens, top_k]
    float *weights          # [tokens, top_k]
    float *buffers          # the threads' scratch, which carve_routing takes

cdef int set_routing(routing *r, Workspace workspace, const matrix *logits, kind) except -1
cdef void carve_routing(arena *memory, void *job) noexcept nogil
cdef void route_tokens(const routing *r, int64_t tokens, const member *m) noexcept nogil
