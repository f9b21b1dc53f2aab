"""The Mixture-of-Experts layer: routing, both products, combination, in one stretch without the GIL."""

import numpy as np

from cython.parallel cimport prange, threadid
from libc.math cimport isnan
from libc.stdint cimport int32_t, int64_t
from libc.string cimport memset

from marlin_cy.cpu._buffers cimport float_matrix, matrix, refuse_overlap
from marlin_cy.cpu._dispatch cimport DTYPE_F32, MAX_ROWS, ukernel_table
from marlin_cy.cpu._gemm cimport (
    OUT_FLOATS, cut_into_blocks, gemm_job, row_block, run_gemm, set_gemm_job, set_quantize_job, split_slots, thread_area,
)
from marlin_cy.cpu._quantize cimport (
    place_quantized, quantize_job, quantize_rows, quantized_bytes, row_buffer_floats,
)
from marlin_cy.cpu._store cimport CpuGptqStore
from marlin_cy.cpu._workspace cimport Workspace

cdef enum:
    # Tokens are taken in slices, so that what lies between the two products stays small next to the
    # weights; but a slice has enough tokens to fill the row blocks of all experts.
    SLICE_BYTES = 64 << 20


# ---------------------------------------------------------------------------------------------
# Routing

cdef struct routing:
    const ukernel_table *table
    const char *logits      # [*, num_experts]
    int dtype
    int64_t num_experts
    int64_t top_k
    bint normalise
    int32_t *ids            # [tokens, top_k]
    float *weights          # [tokens, top_k]


cdef void route_token(const routing *r, int64_t token, float *probabilities) noexcept nogil:
    cdef int64_t element = 4 if r.dtype == DTYPE_F32 else 2, j, e, best
    cdef int32_t *ids = r.ids + token * r.top_k
    cdef float *weights = r.weights + token * r.top_k
    cdef float total = 0
    r.table.widen(probabilities, r.logits + token * r.num_experts * element, r.dtype, r.num_experts)
    r.table.softmax(probabilities, r.num_experts)
    if isnan(probabilities[0]):     # a NaN or an infinity among the logits: the token's output is NaN
        for j in range(r.top_k):
            ids[j] = <int32_t>j
            weights[j] = probabilities[0]
        return
    for j in range(r.top_k):
        best = 0
        for e in range(1, r.num_experts):
            if probabilities[e] > probabilities[best]:
                best = e
        ids[j] = <int32_t>best
        weights[j] = probabilities[best]
        total += probabilities[best]
        probabilities[best] = -1
    if r.normalise:
        for j in range(r.top_k):
            weights[j] /= total


cdef void route_tokens(const routing *r, int64_t tokens, float *buffers, int num_threads) noexcept nogil:
    cdef int64_t token
    for token in prange(tokens, num_threads=num_threads, schedule="static"):
        route_token(r, token, buffers + threadid() * r.num_experts)


cdef void set_routing(routing *r, Workspace workspace, const matrix *logits, int64_t top_k, bint normalise) noexcept:
    r.table, r.logits, r.dtype = workspace.table, logits.data, logits.dtype
    r.num_experts, r.top_k, r.normalise = logits.width, top_k, normalise


def route(Workspace workspace, router_logits, int64_t num_experts, int64_t top_k, bint normalise):
    """``(ids, weights)``, int32 and float32 ``[tokens, top_k]``: the top-k of the softmax of each row."""
    cdef matrix logits = float_matrix(router_logits, "router_logits", num_experts, False)
    ids, weights = np.empty((logits.rows, top_k), np.int32), np.empty((logits.rows, top_k), np.float32)
    cdef int32_t[:, ::1] ids_view = ids
    cdef float[:, ::1] weights_view = weights
    cdef routing r
    cdef float *buffers
    if logits.rows == 0:
        return ids, weights
    set_routing(&r, workspace, &logits, top_k, normalise)
    r.ids, r.weights = &ids_view[0, 0], &weights_view[0, 0]
    workspace.enter()
    try:
        buffers = <float *>workspace.reserve(&workspace.floats, 4 * num_experts * workspace.num_threads)
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
    int64_t *input_rows     # [pairs] the same, where each pair is quantised in its expert's order
    int64_t *places         # [pairs] 0, 1, 2, ...: the sorted pair's own row
    int32_t *place_rows     # [pairs] the same
    int64_t *pairs          # [pairs] token * top_k + j of each sorted pair
    int32_t *gate_orders    # [pairs] order of K in the first product
    int32_t *down_orders    # [pairs] and in the second
    row_block *blocks


cdef int64_t grouping_bytes(int64_t num_experts, int64_t pairs) noexcept nogil:
    return (8 * (num_experts + 1) + pairs * (3 * 8 + 4 * 4)
            + (num_experts + pairs // MAX_ROWS) * <int64_t>sizeof(row_block))


cdef void place_grouping(grouping *g, char *memory, int64_t num_experts, int64_t pairs) noexcept nogil:
    g.offsets = <int64_t *>memory
    g.input_rows = g.offsets + num_experts + 1
    g.places = g.input_rows + pairs
    g.pairs = g.places + pairs
    g.blocks = <row_block *>(g.pairs + pairs)
    g.tokens = <int32_t *>(g.blocks + num_experts + pairs // MAX_ROWS)
    g.place_rows = g.tokens + pairs
    g.gate_orders = g.place_rows + pairs
    g.down_orders = g.gate_orders + pairs


cdef void group_by_expert(grouping *g, const int32_t *ids, int64_t tokens, int64_t top_k, int64_t num_experts,
                          const int32_t *gate_order_of, const int32_t *down_order_of) noexcept nogil:
    """Sort (token, j) by expert, keeping their order; an id of -1 takes no part."""
    cdef int64_t pair, e, place
    memset(g.offsets, 0, (num_experts + 1) * sizeof(int64_t))
    for pair in range(tokens * top_k):
        if ids[pair] >= 0:
            g.offsets[ids[pair] + 1] += 1
    g.num_blocks = 0
    for e in range(num_experts):
        g.num_blocks += cut_into_blocks(g.blocks + g.num_blocks, e, g.offsets[e], g.offsets[e + 1])
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
        g.input_rows[place] = pair // top_k
        g.places[place] = place
        g.place_rows[place] = <int32_t>place
        g.gate_orders[place] = gate_order_of[e]
        g.down_orders[place] = down_order_of[e]


# ---------------------------------------------------------------------------------------------
# The layer

cdef struct combination:
    const ukernel_table *table
    const float *products   # [tokens, top_k, width]
    const int32_t *ids      # [tokens, top_k]
    const float *weights    # [tokens, top_k]
    int64_t top_k
    int64_t width
    char *output            # [tokens, width]
    int dtype
    float *sums             # [num_threads, width]


cdef void combine_token(const combination *c, int64_t token, int thread) noexcept nogil:
    """``output[token] = sum_j weight * product``, a chain of fused multiply-adds from zero, j ascending."""
    cdef int64_t element = 4 if c.dtype == DTYPE_F32 else 2, j, pair
    cdef float *sums = c.sums + thread * c.width
    memset(sums, 0, c.width * sizeof(float))
    for j in range(c.top_k):
        pair = token * c.top_k + j
        if c.ids[pair] >= 0:
            c.table.axpy(sums, c.products + pair * c.width, c.weights[pair], c.width)
    c.table.narrow(c.output + token * c.width * element, sums, c.dtype, c.width)


cdef void combine_tokens(const combination *c, int64_t tokens, int num_threads) noexcept nogil:
    cdef int64_t token
    for token in prange(tokens, num_threads=num_threads, schedule="static"):
        combine_token(c, token, threadid())


cdef struct layer_job:
    quantize_job quantize_input
    gemm_job gate_up
    quantize_job quantize_inner
    gemm_job down
    combination combine
    grouping group
    int64_t num_experts
    bint ordered                # experts quantise their rows in their own orders of K
    void *quantized             # memory of either quantisation
    void *quantized_inner


cdef void forward_slice(layer_job *job, const int32_t *ids, int64_t tokens, const int32_t *gate_order_of,
                        const int32_t *down_order_of, int num_threads) noexcept nogil:
    """Rows ``[0, tokens)`` of the job's input to those of its output."""
    cdef grouping *g = &job.group
    group_by_expert(g, ids, tokens, job.combine.top_k, job.num_experts, gate_order_of, down_order_of)

    job.quantize_input.num_rows = g.num_pairs if job.ordered else tokens
    job.quantize_input.input_rows = g.input_rows if job.ordered else NULL
    job.quantize_input.row_orders = g.gate_orders if job.ordered else NULL
    place_quantized(&job.quantize_input, job.quantized)
    quantize_rows(&job.quantize_input, num_threads)

    job.gate_up.a, job.gate_up.meta = job.quantize_input.a, job.quantize_input.meta
    job.gate_up.num_quantized = job.quantize_input.num_rows
    job.gate_up.in_rows = g.place_rows if job.ordered else g.tokens
    job.gate_up.out_rows = g.places
    job.gate_up.blocks, job.gate_up.num_blocks = g.blocks, g.num_blocks
    run_gemm(&job.gate_up, num_threads)

    job.quantize_inner.num_rows = g.num_pairs
    job.quantize_inner.row_orders = g.down_orders
    place_quantized(&job.quantize_inner, job.quantized_inner)
    quantize_rows(&job.quantize_inner, num_threads)

    job.down.a, job.down.meta = job.quantize_inner.a, job.quantize_inner.meta
    job.down.num_quantized = g.num_pairs
    job.down.in_rows, job.down.out_rows = g.place_rows, g.pairs
    job.down.blocks, job.down.num_blocks = g.blocks, g.num_blocks
    run_gemm(&job.down, num_threads)

    combine_tokens(&job.combine, tokens, num_threads)


cdef int check_ids(const int32_t[:, ::1] ids, int64_t num_experts) except -1:
    cdef int64_t t, j
    for t in range(ids.shape[0]):
        for j in range(ids.shape[1]):
            if not -1 <= ids[t, j] < num_experts:
                raise IndexError(f"topk_ids[{t}, {j}]: got {ids[t, j]}, expected -1 to {num_experts - 1}")
    return 0


def moe_forward(Workspace workspace, CpuGptqStore gate_up, CpuGptqStore down, hidden_states, out, router_logits,
                const int32_t[:, ::1] topk_ids, const float[:, ::1] topk_weights, int64_t top_k, bint normalise):
    """Fill ``out`` with the layer's output.

    Either ``router_logits`` is given, or ``topk_ids`` and ``topk_weights`` are; ``top_k`` fits them.
    """
    cdef matrix hidden = float_matrix(hidden_states, "hidden_states", gate_up.k, False)
    cdef matrix result = float_matrix(out, "out", down.n, True)
    cdef matrix logits
    cdef int64_t tokens = hidden.rows, inner = down.k, width = down.n, experts = gate_up.num_experts
    cdef int64_t slice_tokens, pairs, begin, count, slots
    cdef int num_threads = workspace.num_threads
    cdef layer_job job
    cdef routing router
    cdef const int32_t *ids = NULL
    cdef const float *weights = NULL
    cdef char *memory
    cdef float *buffers
    cdef float *row_buffers
    cdef int64_t routed = 0
    refuse_overlap(result, hidden, "out")
    if result.rows != tokens:
        raise ValueError(f"out: got {result.rows} rows, expected {tokens}, those of hidden_states")
    if router_logits is None:
        if topk_ids.shape[0] != tokens:
            raise ValueError(f"topk_ids: got {topk_ids.shape[0]} rows, expected {tokens}, those of hidden_states")
        check_ids(topk_ids, experts)
    else:
        logits = float_matrix(router_logits, "router_logits", experts, False)
        if logits.rows != tokens:
            raise ValueError(f"router_logits: got {logits.rows} rows, expected {tokens}, those of hidden_states")
        refuse_overlap(result, logits, "out")
        routed = tokens * top_k
    if tokens == 0:
        return

    slice_tokens = max(SLICE_BYTES // (4 * top_k * (inner + width)), MAX_ROWS * experts // top_k, <int64_t>1)
    slice_tokens = min(slice_tokens, tokens)
    pairs = slice_tokens * top_k
    job.num_experts = experts
    job.ordered = len(gate_up.group_orders) > 1
    set_quantize_job(&job.quantize_input, workspace, gate_up)
    job.quantize_input.dtype = hidden.dtype
    set_quantize_job(&job.quantize_inner, workspace, down)
    job.quantize_inner.dtype = DTYPE_F32
    set_gemm_job(&job.gate_up, workspace, gate_up, None)
    job.gate_up.inner = job.gate_up.out_width = inner
    set_gemm_job(&job.down, workspace, down, None)
    job.down.out_dtype = DTYPE_F32
    job.combine.table, job.combine.dtype = workspace.table, result.dtype
    job.combine.top_k, job.combine.width = top_k, width

    workspace.enter()
    try:
        memory = <char *>workspace.reserve(
            &workspace.rows, grouping_bytes(experts, pairs) + routed * <int64_t>(sizeof(int32_t) + sizeof(float)))
        place_grouping(&job.group, memory, experts, pairs)
        job.quantized = workspace.reserve(&workspace.quantized, quantized_bytes(
            pairs if job.ordered else slice_tokens, job.quantize_input.packed_k, job.quantize_input.group_size,
            workspace.planes))
        job.quantized_inner = workspace.reserve(&workspace.hidden, quantized_bytes(
            pairs, job.quantize_inner.packed_k, job.quantize_inner.group_size, workspace.planes))
        count = max(row_buffer_floats(gate_up.k, gate_up.view.packed_k),
                    row_buffer_floats(inner, down.view.packed_k), width, experts)
        buffers = <float *>workspace.reserve(
            &workspace.floats, 4 * (count * num_threads + pairs * (inner + width)))
        row_buffers = buffers + pairs * (inner + width)
        job.quantize_input.row_buffers = job.quantize_inner.row_buffers = job.combine.sums = row_buffers
        job.gate_up.output = <char *>buffers
        job.quantize_inner.input = <char *>buffers
        job.down.output = <char *>(buffers + pairs * inner)
        job.combine.products = buffers + pairs * inner
        job.gate_up.areas = job.down.areas = <thread_area *>workspace.reserve(
            &workspace.threads, sizeof(thread_area) * num_threads)
        slots = max(split_slots(&job.gate_up, num_threads), split_slots(&job.down, num_threads))
        if slots:
            job.gate_up.slots = job.down.slots = <float *>workspace.reserve(
                &workspace.slots, slots * OUT_FLOATS * sizeof(float))
        if router_logits is None:
            ids, weights = &topk_ids[0, 0], &topk_weights[0, 0]
        else:
            set_routing(&router, workspace, &logits, top_k, normalise)
            router.ids = <int32_t *>(memory + grouping_bytes(experts, pairs))
            router.weights = <float *>(router.ids + routed)
            ids, weights = router.ids, router.weights
        with nogil:
            if routed:
                route_tokens(&router, tokens, row_buffers, num_threads)
            begin = 0
            while begin < tokens:
                count = min(slice_tokens, tokens - begin)
                job.quantize_input.input = hidden.data + begin * (hidden.nbytes // tokens)
                job.combine.output = result.data + begin * (result.nbytes // tokens)
                job.combine.ids, job.combine.weights = ids + begin * top_k, weights + begin * top_k
                forward_slice(&job, job.combine.ids, count, gate_up.view.order_of, down.view.order_of, num_threads)
                begin = begin + count
    finally:
        workspace.leave()
