"""The Mixture-of-Experts layer, which runs without the GIL from routing to output.

Phases of a call:

1. *check* every argument, and *reserve* the memory of all phases;
2. *route* all tokens, unless the caller has chosen their experts (``_routing.pyx``);
3. for each *slice* of the tokens:

   a. a *pass* of the shared expert, if there is one, and a pass of the routed experts. A pass *groups* its tokens by
      expert, *plans* their rows, and runs two products (``_rows.pyx``, ``_gemm.pyx``). The epilogue of the first
      product is the activation; the second product quantises the result;
   b. *combine* the products of each token (``_combine.pyx``).
"""

from libc.stdint cimport int32_t, int64_t
from libc.string cimport memset

from marlin_cy.cpu._arena cimport arena, carve, take
from marlin_cy.cpu._buffers cimport float_matrix, matrix, refuse_overlap
from marlin_cy.cpu._combine cimport carve_combination, combination, combine_tokens
from marlin_cy.cpu._dispatch cimport DTYPE_F32
from marlin_cy.cpu._gemm cimport (
    carve_gemm, gemm_job, multiply, set_activation, set_gemm_job, set_quantize_job,
)
from marlin_cy.cpu._quantize cimport carve_quantized, quantize_job
from marlin_cy.cpu._routing cimport carve_routing, route_tokens, routing, set_routing
from marlin_cy.cpu._rows cimport carve_blocks, carve_places, cut_into_blocks, expert_orders, place_rows, row_plan
from marlin_cy.cpu._store cimport CpuGptqStore
from marlin_cy.cpu._workspace cimport Workspace

from marlin_cy.activations import ACTIVATIONS

cdef enum:
    # Tokens are taken in slices, so that the rows between the two products stay small compared with the weights. A
    # slice still has enough tokens to fill the row blocks of all experts.
    SLICE_BYTES = 64 << 20
    MAX_INT32 = 0x7fffffff


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
    int64_t routed_pairs        # ids and weights that the router gives; 0 if the caller has chosen
    int64_t slice_tokens        # at most
    bint has_shared
    bint weigh_input            # multiply inputs by the weights, not products
    int32_t *shared_ids         # [slice_tokens] zeros


def moe_forward(Workspace workspace, layer, hidden_states, out, router_logits, const int32_t[:, ::1] topk_ids,
                const float[:, ::1] topk_weights):
    """Fill ``out`` with the output of a ``MoeLayer``, given ``router_logits``, or ``topk_ids`` and ``topk_weights``.

    No other thread may write to ``topk_ids``: pass a private copy.
    """
    gate_up, down, shared = layer.gate_up, layer.down, layer.shared_expert
    cdef CpuGptqStore gate_up_store = gate_up.store, down_store = down.store
    cdef matrix hidden = float_matrix(hidden_states, "hidden_states", gate_up_store.k, False)
    cdef matrix result = float_matrix(out, "out", down_store.n, True)
    cdef matrix logits
    cdef int64_t tokens = hidden.rows, top_k
    cdef int activation = ACTIVATIONS[layer.activation].number
    cdef layer_job job
    cdef const float[::1] gate_weight
    cdef const int32_t *ids = NULL
    cdef const float *weights = NULL
    memset(&job, 0, sizeof(job))
    refuse_overlap(result, hidden, "out")
    if result.rows != tokens:
        raise ValueError(f"out: got {result.rows} rows, expected {tokens} as in hidden_states")
    if router_logits is None:
        if topk_ids.shape[0] != tokens:
            raise ValueError(f"topk_ids: got {topk_ids.shape[0]} rows, expected {tokens} as in hidden_states")
        check_ids(topk_ids, gate_up_store.num_experts)
        top_k = topk_ids.shape[1]
    else:
        logits = float_matrix(router_logits, "router_logits", gate_up_store.num_experts, False)
        if logits.rows != tokens:
            raise ValueError(f"router_logits: got {logits.rows} rows, expected {tokens} as in hidden_states")
        refuse_overlap(result, logits, "out")
        set_routing(&job.router, workspace, &logits, layer.routing)
        top_k = job.router.top_k
        job.routed_pairs = tokens * top_k
    if tokens == 0:
        return

    job.weigh_input = layer.apply_router_weight_on_input
    job.combine.table, job.combine.num_threads = workspace.table, workspace.num_threads
    job.combine.top_k, job.combine.width = top_k, result.width
    job.combine.input, job.combine.input_dtype, job.combine.k = hidden.data, hidden.dtype, hidden.width
    job.combine.output, job.combine.dtype = result.data, result.dtype
    set_pass(&job.routed, workspace, gate_up, down, top_k, activation, hidden.dtype)
    if shared is not None:
        job.has_shared = True
        set_pass(&job.shared, workspace, shared.gate_up, shared.down, 1, activation, hidden.dtype)
        gate_weight = shared.gate_weight
        if gate_weight is not None:
            job.combine.gate_weight = &gate_weight[0]
    job.slice_tokens = job.routed.max_tokens = job.shared.max_tokens = min(tokens_a_slice(&job), tokens)

    if not job.routed_pairs:
        ids, weights = &topk_ids[0, 0], &topk_weights[0, 0]
    workspace.enter()
    try:
        carve(workspace, &workspace.scratch, carve_layer, &job)
        with nogil:
            forward(&job, ids, weights, tokens, hidden.nbytes // tokens, result.nbytes // tokens)
    finally:
        workspace.leave()


cdef int check_ids(const int32_t[:, ::1] ids, int64_t num_experts) except -1:
    cdef int64_t t, j
    for t in range(ids.shape[0]):
        for j in range(ids.shape[1]):
            if not -1 <= ids[t, j] < num_experts:
                raise IndexError(f"topk_ids[{t}, {j}]: got {ids[t, j]}, expected -1 to {num_experts - 1}")
    return 0


# ---------------------------------------------------------------------------------------------
# Memory

cdef int64_t tokens_a_slice(const layer_job *job) noexcept:
    cdef int64_t top_k = job.combine.top_k, products = top_k, inner = top_k * job.routed.gate_up.inner, tokens
    if job.has_shared:
        products += 1
        inner = max(inner, job.shared.gate_up.inner)
    tokens = max(SLICE_BYTES // (4 * (inner + products * job.combine.width)),
                 job.combine.table.mc * job.routed.num_experts // top_k)
    return max(<int64_t>1, min(tokens, MAX_INT32 // top_k))     # pairs of a slice are counted in int32


cdef void carve_layer(arena *memory, void *layer) noexcept nogil:
    """The layout of a layer's memory. Routing, both passes and combination run in turn and share memory."""
    cdef layer_job *job = <layer_job *>layer
    cdef int64_t row_bytes = job.combine.width * <int64_t>sizeof(float), begin, end
    if job.routed_pairs:
        job.router.ids = <int32_t *>take(memory, job.routed_pairs * <int64_t>sizeof(int32_t))
        job.router.weights = <float *>take(memory, job.routed_pairs * <int64_t>sizeof(float))
    job.routed.down.output = <char *>take(memory, job.slice_tokens * job.combine.top_k * row_bytes)
    job.combine.products = <const float *>job.routed.down.output
    if job.has_shared:
        job.shared_ids = <int32_t *>take(memory, job.slice_tokens * <int64_t>sizeof(int32_t))
        job.shared.down.output = <char *>take(memory, job.slice_tokens * row_bytes)
        job.combine.shared = <const float *>job.shared.down.output
    begin = memory.used
    if job.routed_pairs:
        carve_routing(memory, &job.router)
    end, memory.used = memory.used, begin
    carve_pass(memory, &job.routed)
    end, memory.used = max(end, memory.used), begin
    if job.has_shared:
        carve_pass(memory, &job.shared)
    end, memory.used = max(end, memory.used), begin
    carve_combination(memory, &job.combine)
    memory.used = max(end, memory.used)


cdef void carve_pass(arena *memory, expert_pass *p) noexcept nogil:
    cdef int64_t tokens = p.max_tokens, pairs = tokens * p.top_k, begin, end
    carve_blocks(memory, &p.gate_up_plan, p.gate_up.table, p.num_experts, pairs)
    carve_places(memory, &p.gate_up_plan, pairs, tokens)
    p.offsets = <int64_t *>take(memory, (p.num_experts + 1) * <int64_t>sizeof(int64_t))
    p.down_plan.in_rows = <int32_t *>take(memory, pairs * <int64_t>sizeof(int32_t))
    p.down_plan.out_rows = <int64_t *>take(memory, pairs * <int64_t>sizeof(int64_t))
    p.down_plan.row_orders = <int32_t *>take(memory, pairs * <int64_t>sizeof(int32_t))
    p.gate_up.output = <char *>take(memory, pairs * p.gate_up.inner * <int64_t>sizeof(float))
    p.quantize_inner.input = p.gate_up.output
    carve_quantized(memory, &p.quantize_input,
                    tokens if p.gate_up_orders.all_equal and not p.gate_up.table.min_matrix_rows else pairs)
    carve_quantized(memory, &p.quantize_inner, pairs)
    # The products run one after the other.
    begin = memory.used
    carve_gemm(memory, &p.gate_up)
    end, memory.used = memory.used, begin
    carve_gemm(memory, &p.down)
    memory.used = max(end, memory.used)


# ---------------------------------------------------------------------------------------------
# All tokens, slice by slice

cdef void forward(layer_job *job, const int32_t *ids, const float *weights, int64_t tokens, int64_t input_row_bytes,
                  int64_t output_row_bytes) noexcept nogil:
    cdef int64_t begin = 0, count
    if job.routed_pairs:
        route_tokens(&job.router, tokens)
        ids, weights = job.router.ids, job.router.weights
    if job.has_shared:
        memset(job.shared_ids, 0, job.slice_tokens * sizeof(int32_t))
    while begin < tokens:
        count = min(job.slice_tokens, tokens - begin)
        forward_slice(job, ids + begin * job.combine.top_k, weights + begin * job.combine.top_k, count)
        job.combine.input += count * input_row_bytes
        job.combine.output += count * output_row_bytes
        begin += count


cdef void forward_slice(layer_job *job, const int32_t *ids, const float *weights, int64_t tokens) noexcept nogil:
    """Compute rows ``[0, tokens)`` of the output from the same rows of ``combine.input``."""
    cdef const float *input_weights = NULL
    job.routed.quantize_input.input = job.shared.quantize_input.input = job.combine.input
    job.combine.ids, job.combine.weights = ids, weights
    if job.weigh_input:
        input_weights = weights
        job.combine.weights = NULL
    if job.has_shared:
        run_pass(&job.shared, job.shared_ids, NULL, tokens)
    run_pass(&job.routed, ids, input_weights, tokens)
    combine_tokens(&job.combine, tokens)


# ---------------------------------------------------------------------------------------------
# A pass: both products

cdef int set_pass(expert_pass *p, Workspace workspace, gate_up, down, int64_t top_k, int activation,
                  int dtype) except -1:
    """Set the members that the workspace and the stacks determine, for input of ``dtype``."""
    cdef CpuGptqStore gate_up_store = gate_up.store, down_store = down.store
    p.num_experts, p.top_k = gate_up_store.num_experts, top_k
    p.gate_up_orders.order_of = gate_up_store.view.order_of
    p.gate_up_orders.all_equal = len(gate_up_store.group_orders) == 1
    p.down_orders.order_of = down_store.view.order_of
    set_quantize_job(&p.quantize_input, workspace, gate_up_store)
    p.quantize_input.dtype = dtype
    set_quantize_job(&p.quantize_inner, workspace, down_store)
    p.quantize_inner.dtype = DTYPE_F32
    set_gemm_job(&p.gate_up, workspace, gate_up_store, gate_up.bias)
    set_activation(&p.gate_up, down_store.k, activation)
    set_gemm_job(&p.down, workspace, down_store, down.bias)
    p.down.out_dtype = DTYPE_F32
    return 0


cdef void run_pass(expert_pass *p, const int32_t *ids, const float *input_weights, int64_t tokens) noexcept nogil:
    """Compute the products ``[tokens, top_k]`` of rows ``[0, tokens)`` of the input.

    ``input_weights`` is NULL, or has a factor for each input row.
    """
    group_by_expert(p, ids, tokens)
    place_rows(&p.gate_up_plan, NULL, tokens, &p.gate_up_orders, p.gate_up.table.min_matrix_rows)
    p.quantize_input.weights = input_weights
    multiply(&p.gate_up, &p.quantize_input, &p.gate_up_plan)
    multiply(&p.down, &p.quantize_inner, &p.down_plan)


cdef void group_by_expert(expert_pass *p, const int32_t *ids, int64_t tokens) noexcept nogil:
    """Sort the pairs (token, choice) stably by expert, leave out pairs of id -1, and fill both plans."""
    cdef row_plan *first = &p.gate_up_plan
    cdef row_plan *second = &p.down_plan
    cdef int64_t pair, e, place
    memset(p.offsets, 0, (p.num_experts + 1) * sizeof(int64_t))
    for pair in range(tokens * p.top_k):
        if ids[pair] >= 0:
            p.offsets[ids[pair] + 1] += 1
    first.num_blocks = 0
    for e in range(p.num_experts):
        first.num_blocks += cut_into_blocks(
            first.blocks + first.num_blocks, e, p.offsets[e], p.offsets[e + 1], 0, p.gate_up.table)
        p.offsets[e + 1] += p.offsets[e]
    first.num_pairs = p.offsets[p.num_experts]
    second.blocks, second.num_blocks = first.blocks, first.num_blocks
    second.num_pairs = second.num_rows = second.num_distinct = first.num_pairs
    for pair in range(tokens * p.top_k):
        e = ids[pair]
        if e < 0:
            continue
        place = p.offsets[e]
        p.offsets[e] += 1
        first.pair_rows[place] = <int32_t>(pair // p.top_k)
        first.out_rows[place] = place
        second.in_rows[place] = <int32_t>place
        second.out_rows[place] = pair
        second.row_orders[place] = p.down_orders.order_of[e]
