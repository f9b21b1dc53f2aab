"""The Mixture-of-Experts layer, as a part of a parallel region."""

from libc.stdint cimport int32_t, int64_t

from marlin_cy.cpu._arena cimport arena
from marlin_cy.cpu._combine cimport combination
from marlin_cy.cpu._exchange cimport Hosts, exchange
from marlin_cy.cpu._gemm cimport gemm_job
from marlin_cy.cpu._quantize cimport quantize_job
from marlin_cy.cpu._routing cimport routing
from marlin_cy.cpu._rows cimport expert_orders, row_plan
from marlin_cy.cpu._team cimport member
from marlin_cy.cpu._workspace cimport Workspace

# The two products of some experts for the tokens that have chosen them. Every token chooses a shared expert.
cdef struct expert_pass:
    int64_t num_experts
    int64_t top_k
    int64_t max_tokens
    expert_orders gate_up_orders
    expert_orders down_orders
    quantize_job quantize_input
    gemm_job gate_up
    quantize_job quantize_inner
    gemm_job down
    # Memory that carve_pass takes.
    int64_t *offsets            # [num_experts + 1] the first sorted pair of each expert
    row_plan gate_up_plan       # pair p, sorted by expert, is row p of the inner activations
    row_plan down_plan          # row p of these goes to row (token * top_k + choice) of the products


cdef struct layer_job:
    expert_pass routed
    expert_pass shared
    combination combine
    routing router
    bint routes                 # the router chooses ids and weights; otherwise the caller has
    int64_t routed_pairs        # of max_tokens, if the layer routes
    int64_t slice_tokens        # at most
    bint has_shared
    bint weigh_input            # multiply inputs by the weights, not products
    # Several hosts: each has some columns of the passes' intermediate values and of the output.
    bint divided
    exchange inner              # the intermediate values of both passes
    exchange outputs            # the output, unless the caller exchanges it
    bint gathers_outputs
    int64_t full_inner          # intermediate values of a token, of one pass and all hosts
    int64_t full_width          # of the output, of all hosts
    # The call.
    int64_t tokens
    const char *input           # [tokens, k]
    int input_dtype
    char *output                # [tokens, width]; [tokens, full_width] if the outputs are gathered
    const int32_t *ids          # [tokens, top_k], the caller's or the router's
    const float *weights
    int32_t *shared_ids         # [slice_tokens] zeros

cdef int set_layer(layer_job *job, Workspace workspace, layer, int64_t top_k, int64_t max_tokens, Hosts hosts) except -1
cdef void set_max_tokens(layer_job *job, int64_t max_tokens) noexcept nogil
cdef void carve_layer(arena *memory, void *layer) noexcept nogil
cdef void forward(void *layer, member *m) noexcept nogil
