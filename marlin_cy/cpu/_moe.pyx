"""The Mixture-of-Experts layer: routing, both products, combination, in one stretch without the GIL."""

import numpy as np

from cython.parallel cimport prange, threadid
from libc.math cimport INFINITY, NAN, isfinite, isnan
from libc.stdint cimport int32_t, int64_t
from libc.string cimport memset

from marlin_cy.cpu._buffers cimport float_matrix, matrix, refuse_overlap
from marlin_cy.cpu._dispatch cimport DTYPE_F32, ukernel_table
from marlin_cy.cpu._gemm cimport (
    cut_into_blocks, gemm_job, max_blocks, place_rows, row_block, row_places, row_places_bytes, run_gemm, set_gemm_job,
    set_quantize_job, set_row_places, split_bytes, thread_area, use_row_places,
)
from marlin_cy.cpu._quantize cimport (
    place_quantized, quantize_job, quantized_bytes, row_buffer_floats,
)
from marlin_cy.cpu._store cimport CpuGptqStore
from marlin_cy.cpu._workspace cimport Workspace

from marlin_cy.cpu._dispatch import ACTIVATIONS

cdef enum:
    # Tokens are taken in slices, so that what lies between the two products stays small next to the
    # weights; but a slice has enough tokens to fill the row blocks of all experts.
    SLICE_BYTES = 64 << 20


# ---------------------------------------------------------------------------------------------
# Routing. The formula is that of marlin_cy/moe/routing.py.

cdef enum scoring_kind:
    SOFTMAX
    SOFTMAX_TOPK
    SIGMOID

SCORING_KINDS = {"softmax": SOFTMAX, "softmax_topk": SOFTMAX_TOPK, "sigmoid": SIGMOID}

cdef struct routing:
    const ukernel_table *table
    const char *logits      # [*, num_experts]
    int dtype
    int64_t num_experts
    int64_t top_k
    scoring_kind scoring
    bint normalise
    const float *bias       # [num_experts], or NULL
    int64_t num_groups
    int64_t topk_groups
    bint top2_group_score             # a group's score is the sum of its two largest, not its largest
    float factor
    int32_t *ids            # [tokens, top_k]
    float *weights          # [tokens, top_k]


cdef inline int64_t routing_floats(int64_t num_experts) noexcept nogil:
    """Floats that a thread needs: scores, what experts are chosen by, and what groups are."""
    return 3 * num_experts


cdef bint has_finite_max(const float *logits, int64_t num_experts) noexcept nogil:
    """Whether there is no NaN and no infinity of positive sign, and not only infinities of negative sign."""
    cdef int64_t e
    cdef float largest = -INFINITY
    for e in range(num_experts):
        if isnan(logits[e]):
            return False
        largest = max(largest, logits[e])
    return isfinite(largest)


cdef int64_t pop_argmax(float *values, int64_t count) noexcept nogil:
    """The index of the largest value, of equal ones the smaller; a NaN in its place marks it as taken."""
    cdef int64_t best = 0, i
    while best < count - 1 and isnan(values[best]):
        best += 1
    for i in range(best + 1, count):
        if values[i] > values[best]:
            best = i
    values[best] = NAN
    return best


cdef void mask_groups(const routing *r, float *choice, float *group_scores) noexcept nogil:
    """Mark the experts of all groups but the chosen ones as taken."""
    cdef int64_t size = r.num_experts // r.num_groups, g, e
    cdef float first, second
    for g in range(r.num_groups):
        first = second = -INFINITY
        for e in range(g * size, (g + 1) * size):
            if choice[e] > first:
                second = first
                first = choice[e]
            elif choice[e] > second:
                second = choice[e]
        group_scores[g] = first + second if r.top2_group_score else first
    for g in range(r.topk_groups):
        pop_argmax(group_scores, r.num_groups)
    for g in range(r.num_groups):
        if not isnan(group_scores[g]):
            for e in range(g * size, (g + 1) * size):
                choice[e] = NAN


cdef void route_token(const routing *r, int64_t token, float *scores) noexcept nogil:
    cdef int64_t element = 4 if r.dtype == DTYPE_F32 else 2, num_experts = r.num_experts, j, e
    cdef int32_t *ids = r.ids + token * r.top_k
    cdef float *weights = r.weights + token * r.top_k
    cdef float *choice = scores + num_experts
    cdef float total = 0
    r.table.widen(scores, r.logits + token * num_experts * element, r.dtype, num_experts)
    if not has_finite_max(scores, num_experts):
        for j in range(r.top_k):
            ids[j] = <int32_t>j
            weights[j] = NAN
        return
    if r.scoring == SOFTMAX:
        r.table.softmax(scores, num_experts)
    elif r.scoring == SIGMOID:
        r.table.sigmoid(scores, num_experts)
    for e in range(num_experts):
        choice[e] = scores[e] if r.bias is NULL else scores[e] + r.bias[e]
    if r.num_groups > 1:
        mask_groups(r, choice, choice + num_experts)
    for j in range(r.top_k):
        e = pop_argmax(choice, num_experts)
        ids[j] = <int32_t>e
        weights[j] = scores[e]
        total += scores[e]
    if r.scoring == SOFTMAX_TOPK:
        r.table.softmax(weights, r.top_k)
    elif r.normalise:
        total += <float>1e-20
        for j in range(r.top_k):
            weights[j] /= total
    for j in range(r.top_k):
        weights[j] *= r.factor


cdef void route_tokens(const routing *r, int64_t tokens, float *buffers, int num_threads) noexcept nogil:
    cdef int64_t token
    if tokens == 1:  # others would take longer to come than it does
        route_token(r, 0, buffers)
        return
    for token in prange(tokens, num_threads=num_threads, schedule="static"):
        route_token(r, token, buffers + threadid() * routing_floats(r.num_experts))


cdef int set_routing(routing *r, Workspace workspace, const matrix *logits, kind) except -1:
    """What follows from the settings, the logits and a ``Routing``; it owns the bias."""
    cdef const float[::1] bias = kind.correction_bias
    r.table, r.logits, r.dtype = workspace.table, logits.data, logits.dtype
    r.num_experts, r.top_k = logits.width, kind.top_k
    r.scoring, r.normalise, r.factor = SCORING_KINDS[kind.scoring], kind.norm_topk_prob, kind.routed_scaling_factor
    r.bias = NULL
    if bias is not None:
        r.bias = &bias[0]
    r.num_groups, r.topk_groups, r.top2_group_score = kind.num_groups, kind.topk_groups, kind.group_score == "top2_sum"
    return 0


def route(Workspace workspace, router_logits, kind):
    """``(ids, weights)``, int32 and float32 ``[tokens, top_k]``, of each row by a ``Routing``."""
    cdef matrix logits = float_matrix(router_logits, "router_logits", kind.num_experts, False)
    cdef routing r
    cdef float *buffers
    set_routing(&r, workspace, &logits, kind)
    ids, weights = np.empty((logits.rows, r.top_k), np.int32), np.empty((logits.rows, r.top_k), np.float32)
    cdef int32_t[:, ::1] ids_view = ids
    cdef float[:, ::1] weights_view = weights
    if logits.rows == 0:
        return ids, weights
    r.ids, r.weights = &ids_view[0, 0], &weights_view[0, 0]
    workspace.enter()
    try:
        buffers = <float *>workspace.reserve(
            &workspace.floats, sizeof(float) * routing_floats(r.num_experts) * workspace.num_threads)
        with nogil:
            route_tokens(&r, logits.rows, buffers, workspace.num_threads)
    finally:
        workspace.leave()
    return ids, weights


# ---------------------------------------------------------------------------------------------
# Grouping tokens by expert

def align_block_size(const int32_t[::1] topk_ids, int64_t block_size, int64_t num_experts,
                     int32_t[::1] sorted_ids, int32_t[::1] expert_ids):
    """Fill the arrays of ``moe_align_block_size``; returns the number of slots up to the last block's end."""
    cdef int64_t count = topk_ids.shape[0], i, e, past = 0
    cdef int64_t[::1] next_slot = np.zeros(num_experts, np.int64)
    for i in range(count):
        if topk_ids[i] >= 0:
            next_slot[topk_ids[i]] += 1
    for i in range(sorted_ids.shape[0]):
        sorted_ids[i] = <int32_t>count
    for e in range(num_experts):
        i = past
        past += (next_slot[e] + block_size - 1) // block_size * block_size
        next_slot[e] = i
        while i < past:
            expert_ids[i // block_size] = <int32_t>e
            i += block_size
    for i in range(past // block_size, expert_ids.shape[0]):
        expert_ids[i] = -1
    for i in range(count):
        if topk_ids[i] >= 0:
            sorted_ids[next_slot[topk_ids[i]]] = <int32_t>i
            next_slot[topk_ids[i]] += 1
    return past


cdef struct grouping:
    int64_t num_pairs
    int64_t num_blocks
    int64_t *offsets        # [num_experts + 1]
    int32_t *tokens         # [pairs] token of each sorted pair: the row of hidden_states
    int64_t *places         # [pairs] 0, 1, 2, ...: the sorted pair's own row
    int32_t *place_rows     # [pairs] the same
    int64_t *pairs          # [pairs] token * top_k + j of each sorted pair
    int32_t *down_orders    # [pairs] order of K in the second product
    row_block *blocks
    row_places quantized    # in the first product


cdef int64_t grouping_bytes(const ukernel_table *table, int64_t num_experts, int64_t tokens,
                            int64_t pairs) noexcept nogil:
    return (row_places_bytes(pairs, tokens) + 8 * (num_experts + 1) + pairs * (2 * 8 + 3 * 4)
            + max_blocks(table, num_experts, pairs) * <int64_t>sizeof(row_block))


cdef void place_grouping(grouping *g, const ukernel_table *table, char *memory, int64_t num_experts, int64_t tokens,
                         int64_t pairs) noexcept nogil:
    g.offsets = <int64_t *>memory
    g.places = g.offsets + num_experts + 1
    g.pairs = g.places + pairs
    g.blocks = <row_block *>(g.pairs + pairs)
    set_row_places(&g.quantized, g.blocks + max_blocks(table, num_experts, pairs), pairs, tokens)
    g.tokens = g.quantized.row_place + tokens
    g.place_rows = g.tokens + pairs
    g.down_orders = g.place_rows + pairs


cdef void group_by_expert(grouping *g, const int32_t *ids, int64_t tokens, int64_t top_k, int64_t num_experts,
                          const int32_t *down_order_of, const ukernel_table *table) noexcept nogil:
    """Sort (token, j) by expert, keeping their order; an id of -1 takes no part."""
    cdef int64_t pair, e, place
    memset(g.offsets, 0, (num_experts + 1) * sizeof(int64_t))
    for pair in range(tokens * top_k):
        if ids[pair] >= 0:
            g.offsets[ids[pair] + 1] += 1
    g.num_blocks = 0
    for e in range(num_experts):
        g.num_blocks += cut_into_blocks(g.blocks + g.num_blocks, e, g.offsets[e], g.offsets[e + 1], table)
        g.offsets[e + 1] += g.offsets[e]
    g.num_pairs = g.offsets[num_experts]
    for pair in range(tokens * top_k):
        e = ids[pair]
        if e < 0:
            continue
        place = g.offsets[e]
        g.offsets[e] += 1
        g.pairs[place] = pair
        g.tokens[place] = <int32_t>(pair // top_k)
        g.places[place] = place
        g.place_rows[place] = <int32_t>place
        g.down_orders[place] = down_order_of[e]


# ---------------------------------------------------------------------------------------------
# Both products

# What experts give for the tokens that have chosen them. A shared expert is one that all have chosen.
cdef struct expert_pass:
    quantize_job quantize_input
    gemm_job gate_up
    quantize_job quantize_inner
    gemm_job down
    grouping group
    int64_t num_experts
    int64_t top_k
    const int32_t *gate_order_of
    const int32_t *down_order_of
    bint one_order              # of K in the first product, for all experts
    int min_matrix_rows             # as in ukernel_table
    void *quantized             # memory of either quantisation
    void *quantized_inner


cdef int set_pass(expert_pass *p, Workspace workspace, gate_up, down, int64_t top_k, int activation,
                  int dtype) except -1:
    """What follows from the settings and the stacks, for input of ``dtype``; :func:`place_pass` adds the memory."""
    cdef CpuGptqStore gate_store = gate_up.store, down_store = down.store
    p.num_experts, p.top_k = gate_store.num_experts, top_k
    p.gate_order_of, p.down_order_of = gate_store.view.order_of, down_store.view.order_of
    p.one_order = len(gate_store.group_orders) == 1
    p.min_matrix_rows = workspace.table.min_matrix_rows
    set_quantize_job(&p.quantize_input, workspace, gate_store)
    p.quantize_input.dtype = dtype
    set_quantize_job(&p.quantize_inner, workspace, down_store)
    p.quantize_inner.dtype = DTYPE_F32
    set_gemm_job(&p.gate_up, workspace, gate_store, gate_up.bias)
    p.gate_up.activation = activation
    p.gate_up.inner = p.gate_up.out_width = down_store.k
    set_gemm_job(&p.down, workspace, down_store, down.bias)
    p.down.out_dtype = DTYPE_F32
    return 0


cdef struct pass_memory:
    int64_t grouping            # bytes
    int64_t quantized           # bytes
    int64_t quantized_inner     # bytes
    int64_t inner               # floats
    int64_t slots               # bytes
    int64_t thread_floats       # of each thread


cdef void add_pass_memory(pass_memory *most, const expert_pass *p, int64_t tokens, int num_threads) noexcept:
    """Let ``most`` be enough for a pass over ``tokens`` tokens, too."""
    cdef int64_t pairs = tokens * p.top_k
    most.grouping = max(most.grouping, grouping_bytes(p.gate_up.table, p.num_experts, tokens, pairs))
    most.quantized = max(most.quantized, quantized_bytes(
        tokens if p.one_order and not p.min_matrix_rows else pairs, p.quantize_input.packed_k, p.quantize_input.group_size,
        p.gate_up.planes))
    most.quantized_inner = max(most.quantized_inner, quantized_bytes(
        pairs, p.quantize_inner.packed_k, p.quantize_inner.group_size, p.down.planes))
    most.inner = max(most.inner, pairs * p.gate_up.inner)
    most.slots = max(most.slots, split_bytes(&p.gate_up, num_threads), split_bytes(&p.down, num_threads))
    most.thread_floats = max(most.thread_floats, row_buffer_floats(p.quantize_input.k, p.quantize_input.packed_k),
                             row_buffer_floats(p.quantize_inner.k, p.quantize_inner.packed_k))


cdef void place_pass(expert_pass *p, Workspace workspace, int64_t tokens, float *row_buffers, float *inner,
                     float *products) noexcept:
    """Point into what the workspace holds. Passes that run one after the other share all but the products."""
    place_grouping(&p.group, workspace.table, <char *>workspace.rows.data, p.num_experts, tokens, tokens * p.top_k)
    p.quantized, p.quantized_inner = workspace.quantized.data, workspace.hidden.data
    p.quantize_input.row_buffers = p.quantize_inner.row_buffers = row_buffers
    p.gate_up.output = <char *>inner
    p.quantize_inner.input = <char *>inner
    p.down.output = <char *>products
    p.gate_up.areas = p.down.areas = <thread_area *>workspace.threads.data
    p.gate_up.slots = p.down.slots = <float *>workspace.slots.data


cdef void run_pass(expert_pass *p, const int32_t *ids, const float *input_weights, int64_t tokens,
                   int num_threads) noexcept nogil:
    """Rows ``[0, tokens)`` of the input to their products ``[tokens, top_k]``.

    ``input_weights`` is NULL, or what rows of the input are multiplied by.
    """
    cdef grouping *g = &p.group
    group_by_expert(g, ids, tokens, p.top_k, p.num_experts, p.down_order_of, p.gate_up.table)

    place_rows(&g.quantized, g.blocks, g.num_blocks, g.tokens, p.gate_order_of, p.one_order, tokens,
               p.min_matrix_rows)
    use_row_places(&p.quantize_input, &g.quantized)
    place_quantized(&p.quantize_input, p.quantized)
    p.quantize_input.weights = input_weights

    p.gate_up.a, p.gate_up.meta = p.quantize_input.a, p.quantize_input.meta
    p.gate_up.num_quantized = p.quantize_input.num_rows
    p.gate_up.in_rows = g.quantized.in_rows
    p.gate_up.out_rows = g.places
    p.gate_up.blocks, p.gate_up.num_blocks = g.blocks, g.num_blocks
    run_gemm(&p.gate_up, &p.quantize_input, num_threads)

    p.quantize_inner.num_rows = p.quantize_inner.num_distinct = g.num_pairs
    p.quantize_inner.row_orders = g.down_orders
    place_quantized(&p.quantize_inner, p.quantized_inner)

    p.down.a, p.down.meta = p.quantize_inner.a, p.quantize_inner.meta
    p.down.num_quantized = g.num_pairs
    p.down.in_rows, p.down.out_rows = g.place_rows, g.pairs
    p.down.blocks, p.down.num_blocks = g.blocks, g.num_blocks
    run_gemm(&p.down, &p.quantize_inner, num_threads)


# ---------------------------------------------------------------------------------------------
# Combination

cdef enum:
    GATE_STEP = 32      # divides K
    GATE_SUMS = 8       # sums side by side, so that an addition need not wait for the one before

cdef struct combination:
    const ukernel_table *table
    const float *products   # [tokens, top_k, width]
    const int32_t *ids      # [tokens, top_k]
    const float *weights    # [tokens, top_k], or NULL for 1
    int64_t top_k
    int64_t width
    const float *shared     # [tokens, width] of the shared expert, or NULL
    const float *gate_weight    # [k] of its gate, or NULL for 1
    const char *input       # [tokens, k]
    int input_dtype
    int64_t k
    char *output            # [tokens, width]
    int dtype
    float *sums             # [num_threads, width]


cdef float shared_gate(const combination *c, int64_t token) noexcept nogil:
    """``sigmoid(x . gate_weight)``. Products of two float32 are exact in double; they are summed in one order."""
    cdef int64_t element = 4 if c.input_dtype == DTYPE_F32 else 2, step, i, lane
    cdef const float *weight
    cdef float[GATE_STEP] x
    cdef double[GATE_SUMS] sums
    cdef double total = 0
    cdef float gate
    memset(sums, 0, sizeof(sums))
    for step in range(c.k // GATE_STEP):
        c.table.widen(x, c.input + (token * c.k + step * GATE_STEP) * element, c.input_dtype, GATE_STEP)
        weight = c.gate_weight + step * GATE_STEP
        for i in range(GATE_STEP // GATE_SUMS):
            for lane in range(GATE_SUMS):
                sums[lane] += <double>x[i * GATE_SUMS + lane] * weight[i * GATE_SUMS + lane]
    for lane in range(GATE_SUMS):
        total += sums[lane]
    gate = <float>total
    c.table.sigmoid(&gate, 1)
    return gate


cdef void combine_token(const combination *c, int64_t token, int thread) noexcept nogil:
    """``output[token] = gate * shared + sum_j weight * product``: fused multiply-adds from zero on, j ascending."""
    cdef int64_t element = 4 if c.dtype == DTYPE_F32 else 2, j, pair
    cdef float *sums = c.sums + thread * c.width
    memset(sums, 0, c.width * sizeof(float))
    if c.shared is not NULL:
        c.table.axpy(sums, c.shared + token * c.width, 1 if c.gate_weight is NULL else shared_gate(c, token), c.width)
    for j in range(c.top_k):
        pair = token * c.top_k + j
        if c.ids[pair] >= 0:
            c.table.axpy(sums, c.products + pair * c.width, 1 if c.weights is NULL else c.weights[pair], c.width)
    c.table.narrow(c.output + token * c.width * element, sums, c.dtype, c.width)


cdef void combine_tokens(const combination *c, int64_t tokens, int num_threads) noexcept nogil:
    cdef int64_t token
    if tokens == 1:
        combine_token(c, 0, 0)
        return
    for token in prange(tokens, num_threads=num_threads, schedule="static"):
        combine_token(c, token, threadid())


# ---------------------------------------------------------------------------------------------
# The layer

cdef struct layer_job:
    expert_pass routed
    expert_pass shared          # where combine.shared is not NULL
    combination combine
    int32_t *shared_ids         # [slice_tokens] zeros
    bint weigh_input            # weights are for the input, not for the products


cdef int64_t tokens_a_slice(const layer_job *job, bint has_shared) noexcept:
    cdef int64_t top_k = job.routed.top_k, products = top_k, inner = top_k * job.routed.gate_up.inner
    if has_shared:
        products += 1
        inner = max(inner, job.shared.gate_up.inner)
    return max(SLICE_BYTES // (4 * (inner + products * job.combine.width)),
               job.routed.gate_up.table.mc * job.routed.num_experts // top_k, <int64_t>1)


cdef int reserve_layer(layer_job *job, Workspace workspace, int64_t slice_tokens, bint has_shared, routing *router,
                       int64_t routed_pairs) except -1:
    """Reserve what slices need, and ids and weights for the router's pairs; point to all of it."""
    cdef int num_threads = workspace.num_threads
    cdef int64_t pairs = slice_tokens * job.routed.top_k, shared_tokens = slice_tokens if has_shared else 0
    cdef pass_memory memory
    cdef char *rows
    cdef float *inner
    cdef float *products
    cdef float *shared_products
    cdef float *row_buffers
    memset(&memory, 0, sizeof(memory))
    memory.thread_floats = max(job.combine.width, routing_floats(job.routed.num_experts))
    add_pass_memory(&memory, &job.routed, slice_tokens, num_threads)
    if has_shared:
        add_pass_memory(&memory, &job.shared, slice_tokens, num_threads)
    rows = <char *>workspace.reserve(
        &workspace.rows, memory.grouping + shared_tokens * <int64_t>sizeof(int32_t)
        + routed_pairs * <int64_t>(sizeof(int32_t) + sizeof(float)))
    workspace.reserve(&workspace.quantized, memory.quantized)
    workspace.reserve(&workspace.hidden, memory.quantized_inner)
    inner = <float *>workspace.reserve(
        &workspace.floats, 4 * (memory.inner + (pairs + shared_tokens) * job.combine.width
                                + memory.thread_floats * num_threads))
    workspace.reserve(&workspace.threads, sizeof(thread_area) * num_threads)
    if memory.slots:
        workspace.reserve(&workspace.slots, memory.slots)

    products = inner + memory.inner
    shared_products = products + pairs * job.combine.width
    row_buffers = shared_products + shared_tokens * job.combine.width
    job.shared_ids = <int32_t *>(rows + memory.grouping)
    router.ids = job.shared_ids + shared_tokens
    router.weights = <float *>(router.ids + routed_pairs)
    place_pass(&job.routed, workspace, slice_tokens, row_buffers, inner, products)
    job.combine.products, job.combine.sums = products, row_buffers
    if has_shared:
        memset(job.shared_ids, 0, shared_tokens * sizeof(int32_t))
        place_pass(&job.shared, workspace, slice_tokens, row_buffers, inner, shared_products)
        job.combine.shared = shared_products
    return 0


cdef void forward_slice(layer_job *job, const int32_t *ids, const float *weights, int64_t tokens,
                        int num_threads) noexcept nogil:
    """Rows ``[0, tokens)`` of ``combine.input`` to those of its output."""
    cdef const float *input_weights = NULL
    job.routed.quantize_input.input = job.shared.quantize_input.input = job.combine.input
    job.combine.ids, job.combine.weights = ids, weights
    if job.weigh_input:
        input_weights = weights
        job.combine.weights = NULL
    if job.combine.shared is not NULL:
        run_pass(&job.shared, job.shared_ids, NULL, tokens, num_threads)
    run_pass(&job.routed, ids, input_weights, tokens, num_threads)
    combine_tokens(&job.combine, tokens, num_threads)


cdef int check_ids(const int32_t[:, ::1] ids, int64_t num_experts) except -1:
    cdef int64_t t, j
    for t in range(ids.shape[0]):
        for j in range(ids.shape[1]):
            if not -1 <= ids[t, j] < num_experts:
                raise IndexError(f"topk_ids[{t}, {j}]: got {ids[t, j]}, expected -1 to {num_experts - 1}")
    return 0


def moe_forward(Workspace workspace, layer, hidden_states, out, router_logits, const int32_t[:, ::1] topk_ids,
                const float[:, ::1] topk_weights):
    """Fill ``out`` with the output of a ``MoeLayer`` on the CPU.

    Either ``router_logits`` is given, or ``topk_ids`` and ``topk_weights`` are.
    """
    gate_up, down, shared = layer.gate_up, layer.down, layer.shared_expert
    cdef CpuGptqStore gate_store = gate_up.store, down_store = down.store
    cdef matrix hidden = float_matrix(hidden_states, "hidden_states", gate_store.k, False)
    cdef matrix result = float_matrix(out, "out", down_store.n, True)
    cdef matrix logits
    cdef int64_t tokens = hidden.rows, top_k, slice_tokens, begin, count, routed_pairs = 0
    cdef int num_threads = workspace.num_threads, activation = ACTIVATIONS[layer.activation]
    cdef layer_job job
    cdef routing router
    cdef const float[::1] gate_weight
    cdef const int32_t *ids
    cdef const float *weights
    refuse_overlap(result, hidden, "out")
    if result.rows != tokens:
        raise ValueError(f"out: got {result.rows} rows, expected {tokens}, those of hidden_states")
    if router_logits is None:
        if topk_ids.shape[0] != tokens:
            raise ValueError(f"topk_ids: got {topk_ids.shape[0]} rows, expected {tokens}, those of hidden_states")
        check_ids(topk_ids, gate_store.num_experts)
        top_k = topk_ids.shape[1]
    else:
        logits = float_matrix(router_logits, "router_logits", gate_store.num_experts, False)
        if logits.rows != tokens:
            raise ValueError(f"router_logits: got {logits.rows} rows, expected {tokens}, those of hidden_states")
        refuse_overlap(result, logits, "out")
        set_routing(&router, workspace, &logits, layer.routing)
        top_k = router.top_k
        routed_pairs = tokens * top_k
    if tokens == 0:
        return

    memset(&job, 0, sizeof(job))
    job.weigh_input = layer.apply_router_weight_on_input
    job.combine.table, job.combine.top_k, job.combine.width = workspace.table, top_k, result.width
    job.combine.input, job.combine.input_dtype, job.combine.k = hidden.data, hidden.dtype, hidden.width
    job.combine.output, job.combine.dtype = result.data, result.dtype
    set_pass(&job.routed, workspace, gate_up, down, top_k, activation, hidden.dtype)
    if shared is not None:
        set_pass(&job.shared, workspace, shared.gate_up, shared.down, 1, activation, hidden.dtype)
        gate_weight = shared.gate_weight
        if gate_weight is not None:
            job.combine.gate_weight = &gate_weight[0]
    slice_tokens = min(tokens_a_slice(&job, shared is not None), tokens)

    workspace.enter()
    try:
        reserve_layer(&job, workspace, slice_tokens, shared is not None, &router, routed_pairs)
        if routed_pairs:
            ids, weights = router.ids, router.weights
        else:
            ids, weights = &topk_ids[0, 0], &topk_weights[0, 0]
        with nogil:
            if routed_pairs:
                route_tokens(&router, tokens, job.combine.sums, num_threads)
            begin = 0
            while begin < tokens:
                count = min(slice_tokens, tokens - begin)
                forward_slice(&job, ids + begin * top_k, weights + begin * top_k, count, num_threads)
                job.combine.input += count * (hidden.nbytes // tokens)
                job.combine.output += count * (result.nbytes // tokens)
                begin = begin + count
    finally:
        workspace.leave()
