"""The Mixture-of-Experts layer, which runs without the GIL from routing to output.

Phases of a call:

1. *check* every argument, and *reserve* the memory of all phases;
2. *route* all tokens, unless the caller has chosen their experts (``_routing.pyx``);
3. for each *slice* of the tokens:

   a. one thread *begins*: it groups the tokens by expert and plans their rows (``_rows.pyx``), once for the pass of
      the routed experts and once for the pass of the shared expert, if there is one;
   b. the *first products* of both passes (``_gemm.pyx``), whose epilogue is the activation;
   c. the *second products* of both passes, which quantise these results;
   d. *combine* the products of each token (``_combine.pyx``).

On several hosts, each of which has some columns of every expert, the results of b are exchanged before c, and those of
d at the end (``_exchange.pyx``).

Phases 2 and 3 run in one parallel region; a barrier separates each phase from the next.
"""

from libc.stdint cimport int32_t, int64_t
from libc.string cimport memset

from marlin_cy.cpu._arena cimport arena, carve, take, take_floats
from marlin_cy.cpu._buffers cimport element_bytes, float_matrix, matrix, refuse_overlap
from marlin_cy.cpu._combine cimport carve_combination, combine_tokens
from marlin_cy.cpu._dispatch cimport ACTIVATION_RELU2, DTYPE_F32, MAX_MC
from marlin_cy.cpu._exchange cimport (
    Hosts, begin_exchange, carve_exchange, load_row, run_exchange,
)
from marlin_cy.cpu._gemm cimport (
    begin_product, carve_gemm, run_product, set_activation, set_gemm_job, set_quantize_job, set_rectified,
)
from marlin_cy.cpu._quantize cimport carve_quantized
from marlin_cy.cpu._routing cimport carve_routing, route_tokens, set_routing
from marlin_cy.cpu._rows cimport carve_blocks, carve_places, cut_into_blocks, place_rows, row_plan
from marlin_cy.cpu._store cimport CpuGptqStore
from marlin_cy.cpu._team cimport barrier, member, run_team
from marlin_cy.cpu._workspace cimport Workspace

from marlin_cy.activations import ACTIVATIONS

cdef enum:
    # Tokens are taken in slices, so that the rows between the two products stay small compared with the weights. A
    # slice still has enough tokens to fill the row blocks of all experts.
    SLICE_BYTES = 64 << 20
    MAX_INT32 = 0x7fffffff


def moe_forward(Workspace workspace, layer, hidden_states, out, router_logits, const int32_t[:, ::1] topk_ids,
                const float[:, ::1] topk_weights):
    """Fill ``out`` with the output of a ``MoeLayer``, given ``router_logits``, or ``topk_ids`` and ``topk_weights``.

    No other thread may write to ``topk_ids``: pass a private copy.
    """
    cdef CpuGptqStore gate_up_store = layer.gate_up.store
    cdef matrix hidden = float_matrix(hidden_states, "hidden_states", gate_up_store.k, False)
    cdef Hosts hosts = None if layer.shard is None else Hosts(layer.shard.shard.group)
    cdef matrix result = float_matrix(out, "out", layer.output_size, True)
    cdef matrix logits
    cdef int64_t tokens = hidden.rows, top_k
    cdef layer_job job
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
        job.routes = True
    if tokens == 0:
        return

    if router_logits is None:
        job.ids, job.weights = &topk_ids[0, 0], &topk_weights[0, 0]
    job.input, job.input_dtype, job.output, job.combine.dtype = hidden.data, hidden.dtype, result.data, result.dtype
    set_layer(&job, workspace, layer, top_k, tokens, hosts)
    workspace.enter()
    try:
        if hosts is not None:
            job.gathers_outputs = True
            hosts.set_exchange(&job.outputs)
            hosts.add_section(&job.outputs, layer.shard.outputs, element_bytes(result.dtype)).max_rows = job.slice_tokens
        carve(workspace, &workspace.scratch, carve_layer, &job)
        job.tokens = tokens
        with nogil:
            run_team(workspace.num_threads, forward, &job)
        if hosts is not None:
            hosts.finish()
    finally:
        workspace.leave()


cdef int set_layer(layer_job *job, Workspace workspace, layer, int64_t top_k, int64_t max_tokens, Hosts hosts) except -1:
    """Set the members that the workspace and the layer, a ``MoePlan``, determine.

    The caller has set ``input_dtype`` and ``combine.dtype``, and, where the layer routes, ``router`` and
    ``routes``. ``hosts`` is not None if the layer is shared out over several.
    """
    cdef int activation = ACTIVATIONS[layer.activation].number
    cdef CpuGptqStore gate_up_store = layer.gate_up.store, down_store = layer.down.store
    cdef const float[::1] gate_weight
    shared = layer.shared_expert
    job.weigh_input = layer.apply_router_weight_on_input
    job.combine.table, job.combine.num_threads = workspace.table, workspace.num_threads
    job.combine.top_k, job.combine.width = top_k, down_store.n
    job.combine.input_dtype, job.combine.k = job.input_dtype, gate_up_store.k
    set_pass(&job.routed, workspace, layer.gate_up, layer.down, top_k, activation, job.input_dtype)
    if shared is not None:
        job.has_shared = True
        set_pass(&job.shared, workspace, shared.gate_up, shared.down, 1, activation, job.input_dtype)
        gate_weight = shared.gate_weight
        if gate_weight is not None:
            job.combine.gate_weight = &gate_weight[0]
    job.full_inner, job.full_width = top_k * down_store.k, job.combine.width
    if shared is not None:
        job.full_inner = max(job.full_inner, shared.down.k)
    if hosts is not None:
        job.divided, job.full_width = True, layer.output_size
        hosts.set_exchange(&job.inner)
        job.routed.quantize_inner.gathered = hosts.add_section(&job.inner, layer.shard.inner, sizeof(float))
        if shared is not None:
            job.shared.quantize_inner.gathered = hosts.add_section(&job.inner, layer.shard.shared, sizeof(float))
    set_max_tokens(job, max_tokens)
    return 0


cdef void set_max_tokens(layer_job *job, int64_t max_tokens) noexcept nogil:
    """Set the most tokens of a call, before its memory is carved."""
    job.slice_tokens = job.routed.max_tokens = job.shared.max_tokens = min(tokens_a_slice(job), max_tokens)
    if job.routes:
        job.routed_pairs = max_tokens * job.combine.top_k
    job.inner.sections[0].max_rows = job.slice_tokens * job.combine.top_k
    job.inner.sections[1].max_rows = job.outputs.sections[0].max_rows = job.slice_tokens


cdef int check_ids(const int32_t[:, ::1] ids, int64_t num_experts) except -1:
    cdef int64_t t, j
    for t in range(ids.shape[0]):
        for j in range(ids.shape[1]):
            if not -1 <= ids[t, j] < num_experts:
                raise IndexError(f"topk_ids[{t}, {j}]: got {ids[t, j]}, expected -1 to {num_experts - 1}")
    return 0


# ---------------------------------------------------------------------------------------------
# Memory

cdef int64_t tokens_a_slice(const layer_job *job) noexcept nogil:
    cdef int64_t top_k = job.combine.top_k, products = top_k, tokens
    # Hosts must cut their tokens alike, whatever the instruction set and the columns of each.
    cdef int64_t rows = MAX_MC if job.divided else job.combine.table.mc
    if job.has_shared:
        products += 1
    tokens = max(SLICE_BYTES // (4 * (job.full_inner + products * job.full_width)), rows * job.routed.num_experts // top_k)
    return max(<int64_t>1, min(tokens, MAX_INT32 // top_k))     # pairs of a slice are counted in int32


cdef void carve_layer(arena *memory, void *layer) noexcept nogil:
    """The layout of a layer's memory. Routing, the passes and combination run in turn and share memory."""
    cdef layer_job *job = <layer_job *>layer
    cdef int64_t row_bytes = job.combine.width * <int64_t>sizeof(float), begin, end
    if job.routes:
        job.router.ids = <int32_t *>take(memory, job.routed_pairs * <int64_t>sizeof(int32_t))
        job.router.weights = take_floats(memory, job.routed_pairs)
        job.ids, job.weights = job.router.ids, job.router.weights
    take_outputs(memory, &job.routed, row_bytes)
    job.combine.products = <const float *>job.routed.down.output
    if job.has_shared:
        job.shared_ids = <int32_t *>take(memory, job.slice_tokens * <int64_t>sizeof(int32_t))
        take_outputs(memory, &job.shared, row_bytes)
        job.combine.shared = <const float *>job.shared.down.output
    if job.divided:
        carve_exchange(memory, &job.inner)
    if job.gathers_outputs:
        carve_exchange(memory, &job.outputs)
    begin = memory.used
    if job.routes:
        carve_routing(memory, &job.router)
    end, memory.used = memory.used, begin
    carve_pass(memory, &job.routed)
    if job.has_shared:
        carve_pass(memory, &job.shared)
    end, memory.used = max(end, memory.used), begin
    carve_combination(memory, &job.combine)
    memory.used = max(end, memory.used)


cdef void take_outputs(arena *memory, expert_pass *p, int64_t row_bytes) noexcept nogil:
    """Take the results of both products. They share memory: the first ones are quantised before the second are written.

    On several hosts, the results of the first product belong to an exchange.
    """
    cdef int64_t inner_bytes = p.gate_up.out_width * <int64_t>sizeof(float)
    cdef bint gathered = p.quantize_inner.gathered is not NULL
    p.down.output = <char *>take(memory, p.max_tokens * p.top_k * (row_bytes if gathered else max(row_bytes, inner_bytes)))
    if not gathered:
        p.gate_up.output = p.quantize_inner.input = p.down.output


cdef void carve_pass(arena *memory, expert_pass *p) noexcept nogil:
    cdef int64_t tokens = p.max_tokens, pairs = tokens * p.top_k
    carve_blocks(memory, &p.gate_up_plan, p.gate_up.table, p.num_experts, pairs)
    carve_places(memory, &p.gate_up_plan, pairs, tokens)
    p.offsets = <int64_t *>take(memory, (p.num_experts + 1) * <int64_t>sizeof(int64_t))
    p.down_plan.in_rows = <int32_t *>take(memory, pairs * <int64_t>sizeof(int32_t))
    p.down_plan.out_rows = <int64_t *>take(memory, pairs * <int64_t>sizeof(int64_t))
    p.down_plan.row_orders = <int32_t *>take(memory, pairs * <int64_t>sizeof(int32_t))
    carve_quantized(memory, &p.quantize_input,
                    tokens if p.gate_up_orders.all_equal and not p.gate_up.table.min_matrix_rows else pairs)
    carve_quantized(memory, &p.quantize_inner, pairs)
    # A thread may begin the second product of one pass while others finish the first product of the other pass.
    carve_gemm(memory, &p.gate_up)
    carve_gemm(memory, &p.down)


# ---------------------------------------------------------------------------------------------
# All tokens, slice by slice

cdef void forward(void *layer, member *m) noexcept nogil:
    """A thread's part of a layer: ``job.tokens`` rows. The output is complete when all threads have returned."""
    cdef layer_job *job = <layer_job *>layer
    cdef int64_t begin = 0, count
    if job.routes:
        route_tokens(&job.router, job.tokens, m)
        if job.tokens > 1:  # thread 0 routes a single token, and goes on with it
            barrier(m)
    while begin < job.tokens:
        count = min(job.slice_tokens, job.tokens - begin)
        if m.thread == 0:
            begin_slice(job, begin, count)
        barrier(m)
        run_product(&job.routed.gate_up, &job.routed.quantize_input, m)
        if job.has_shared:
            run_product(&job.shared.gate_up, &job.shared.quantize_input, m)
        run_exchange(&job.inner, m)
        run_product(&job.routed.down, &job.routed.quantize_inner, m)
        if job.has_shared:
            run_product(&job.shared.down, &job.shared.quantize_inner, m)
        barrier(m)
        combine_tokens(&job.combine, count, m)
        if job.gathers_outputs:
            run_exchange(&job.outputs, m)
            store_outputs(job, begin, count, m)
        begin += count
        if begin < job.tokens:
            barrier(m)


cdef void store_outputs(const layer_job *job, int64_t begin, int64_t count, const member *m) noexcept nogil:
    """Write a thread's share of the rows of a slice, whose columns come from all hosts."""
    cdef int64_t row_bytes = job.full_width * element_bytes(job.combine.dtype), token
    for token in range(count * m.thread // m.num_threads, count * (m.thread + 1) // m.num_threads):
        load_row(&job.outputs.sections[0], token, job.output + (begin + token) * row_bytes)


cdef void begin_slice(layer_job *job, int64_t begin, int64_t tokens) noexcept nogil:
    """Plan both passes for ``tokens`` tokens from ``begin`` on."""
    cdef const int32_t *ids = job.ids + begin * job.combine.top_k
    cdef const float *weights = job.weights + begin * job.combine.top_k
    cdef const char *input = job.input + begin * job.combine.k * element_bytes(job.input_dtype)
    job.combine.input = input
    job.combine.output = job.output + begin * job.combine.width * element_bytes(job.combine.dtype)
    job.combine.ids, job.combine.weights = ids, weights
    if job.weigh_input:
        job.combine.weights = NULL
    else:
        weights = NULL
    begin_pass(&job.routed, ids, input, weights, tokens)
    if job.has_shared:
        memset(job.shared_ids, 0, tokens * sizeof(int32_t))
        begin_pass(&job.shared, job.shared_ids, input, NULL, tokens)
    if job.divided:
        job.inner.sections[0].rows, job.inner.sections[1].rows = job.routed.gate_up_plan.num_pairs, tokens
        begin_exchange(&job.inner)
        job.routed.gate_up.output, job.shared.gate_up.output = job.inner.sections[0].local, job.inner.sections[1].local
    if job.gathers_outputs:
        job.outputs.sections[0].rows = tokens
        begin_exchange(&job.outputs)
        job.combine.output = job.outputs.sections[0].local


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
    if activation == ACTIVATION_RELU2:
        set_rectified(&p.gate_up)
    else:
        set_activation(&p.gate_up, gate_up_store.n // 2, activation)
    set_gemm_job(&p.down, workspace, down_store, down.bias)
    p.down.out_dtype = DTYPE_F32
    return 0


cdef void begin_pass(expert_pass *p, const int32_t *ids, const char *input, const float *input_weights,
                     int64_t tokens) noexcept nogil:
    """Prepare both products ``[tokens, top_k]`` of the rows of ``input``.

    ``input_weights`` is NULL, or has a factor for each input row.
    """
    group_by_expert(p, ids, tokens)
    place_rows(&p.gate_up_plan, NULL, tokens, &p.gate_up_orders, p.gate_up.table.min_matrix_rows)
    p.quantize_input.input, p.quantize_input.weights = input, input_weights
    begin_product(&p.gate_up, &p.quantize_input, &p.gate_up_plan)
    begin_product(&p.down, &p.quantize_inner, &p.down_plan)


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
