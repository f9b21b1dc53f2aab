"""Products of a stack and of its views. Each entry point checks, plans, and multiplies.

1. *check*: every argument, before the workspace is claimed or grows. Arrays of indices (dispatches,
   ids of rows and experts) are copied first, so that no other thread can change a checked index;
2. *plan*: which rows meet which expert, and where quantised rows lie (``_rows.pyx``);
3. *multiply*: one parallel region (``_gemm.pyx``).
"""

import numpy as np

from libc.stdint cimport int32_t, int64_t
from libc.string cimport memset

from marlin_cy.cpu._arena cimport arena, carve, take
from marlin_cy.cpu._buffers cimport float_matrix, int32_copy, matrix, refuse_overlap
from marlin_cy.cpu._dispatch cimport ukernel_table
from marlin_cy.cpu._gemm cimport (
    carve_gemm, column_range, gemm_job, multiply, set_columns, set_gemm_job, set_output, set_quantize_job,
)
from marlin_cy.cpu._quantize cimport carve_quantized, quantize_job
from marlin_cy.cpu._rows cimport (
    add_pair, begin_plan, begin_run, carve_blocks, carve_planner, clear_index, cut_into_blocks, expert_orders,
    finish_plan, number_of, row_index, row_plan, row_planner,
)
from marlin_cy.cpu._store cimport CpuGptqStore
from marlin_cy.cpu._workspace cimport Workspace
from marlin_cy.stacks._dispatches cimport check_disjoint, check_dispatches

cdef enum:
    MAX_INT32 = 0x7fffffff
    STACK_IDS = 1 << 9          # tables for up to this many ids take 8 KiB of the stack; larger ones are allocated


cdef struct product:
    quantize_job quantize
    gemm_job gemm
    int64_t num_rows            # quantised rows


# The plan of a view: all rows meet each of its experts. Row r is input row, quantised row, and output row r.
cdef struct view_plan:
    const ukernel_table *table
    int64_t num_experts
    int64_t rows
    row_plan plan
    column_range *ranges        # [num_experts]


def gemm_batched(Workspace workspace, CpuGptqStore store, const float[:, ::1] bias, input,
                 const int64_t[:, ::1] dispatches, output):
    """``MarlinExpertStack.gemm_phase_batched`` on packed weights.

    Parameters
    ----------
    bias : float32 ``[experts, n]`` or None
    dispatches : int64 ``[D, 4]``
        No other thread may write to it.
    """
    cdef matrix inp = float_matrix(input, "input", store.k, False)
    cdef matrix out = float_matrix(output, "output", store.n, True)
    cdef int64_t pairs = 0, i, row
    cdef row_planner planner
    refuse_overlap(out, inp, "output")
    check_dispatches(dispatches, store.num_experts, inp.rows, out.rows)
    check_disjoint(dispatches)
    for i in range(dispatches.shape[0]):
        pairs += dispatches[i, 3]
    check_pairs("dispatches", pairs)
    if pairs == 0:
        return
    workspace.enter()
    try:
        reserve_planner(&planner, workspace, pairs, dispatches.shape[0])
        for i in range(dispatches.shape[0]):
            if dispatches[i, 3] == 0:
                continue
            begin_run(&planner, dispatches[i, 0])
            for row in range(dispatches[i, 3]):
                add_pair(&planner, dispatches[i, 1] + row, dispatches[i, 2] + row)
        run_planned(&planner, workspace, store, bias, &inp, &out)
    finally:
        workspace.leave()


def gemm_vllm(Workspace workspace, CpuGptqStore store, const float[:, ::1] bias, input, sorted_token_ids, expert_ids,
              int64_t num_tokens_past_padded, output, int64_t prob_m, int64_t moe_block_size, int64_t top_k):
    """``MarlinExpertStack.gemm_phase_vllm`` on packed weights; ``bias`` is float32 ``[experts, n]`` or None."""
    cdef matrix inp = float_matrix(input, "input", store.k, False)
    cdef matrix out = float_matrix(output, "output", store.n, True)
    cdef int64_t past = num_tokens_past_padded, padding, pairs, block, slot
    cdef const int32_t[::1] ids
    cdef const int32_t[::1] experts
    cdef row_planner planner
    refuse_overlap(out, inp, "output")
    if moe_block_size < 1:
        raise ValueError(f"moe_block_size: got {moe_block_size}, expected at least 1")
    if top_k < 1:
        raise ValueError(f"top_k: got {top_k}, expected at least 1")
    if prob_m < 0 or prob_m > inp.rows:
        raise ValueError(f"prob_m: got {prob_m}, expected 0 to {inp.rows}, the rows of input")
    if prob_m > out.rows // top_k:
        raise ValueError(f"prob_m * top_k: got {prob_m} * {top_k}, expected at most {out.rows}, the rows of output")
    ids = int32_copy(sorted_token_ids, "sorted_token_ids", past)
    experts = int32_copy(expert_ids, "expert_ids", past // moe_block_size)
    if past < 0 or past > len(sorted_token_ids) or past % moe_block_size or past // moe_block_size > len(expert_ids):
        raise ValueError(
            f"num_tokens_past_padded: got {past}, expected a multiple of moe_block_size {moe_block_size}, within the "
            f"{len(sorted_token_ids)} sorted_token_ids and the {len(expert_ids)} blocks of expert_ids")
    padding = prob_m * top_k
    pairs = check_blocks(ids, experts, moe_block_size, padding, store.num_experts)
    if pairs == 0:
        return
    workspace.enter()
    try:
        reserve_planner(&planner, workspace, pairs, experts.shape[0])
        for block in range(experts.shape[0]):
            if experts[block] < 0:
                continue
            begin_run(&planner, experts[block])
            for slot in range(block * moe_block_size, (block + 1) * moe_block_size):
                if ids[slot] < padding:
                    add_pair(&planner, ids[slot] // top_k, ids[slot])
        run_planned(&planner, workspace, store, bias, &inp, &out)
    finally:
        workspace.leave()


def linear(Workspace workspace, CpuGptqStore store, input, output, int64_t m, int64_t column_offset, int64_t width,
           const float[::1] bias):
    """Multiply rows ``[0, m)`` by columns ``[column_offset, column_offset + width)`` of the stacked N.

    The experts of these columns must have the same order of K.
    """
    cdef matrix inp = float_matrix(input, "input", store.k, False)
    cdef matrix out = float_matrix(output, "out", width, True)
    cdef int64_t first = column_offset // store.n, last = (column_offset + width - 1) // store.n
    cdef view_plan view
    cdef product job
    refuse_overlap(out, inp, "out")
    if m < 0 or m > inp.rows or m > out.rows:
        raise ValueError(f"m: got {m}, expected 0 to {min(inp.rows, out.rows)}, the rows of input and out")
    check_pairs("m", m)
    if m == 0:
        return
    workspace.enter()
    try:
        memset(&view, 0, sizeof(view))
        view.table, view.num_experts, view.rows = workspace.table, last - first + 1, m
        carve(workspace, &workspace.lists, carve_view, &view)
        plan_view(&view, first, column_offset - first * store.n, width, store.n)
        set_product(&job, workspace, store, None, &inp, &out)
        set_columns(&job.gemm, view.ranges, view.num_experts)
        if bias is not None:
            job.gemm.bias = &bias[0]
        if job.quantize.orders is not NULL:
            job.quantize.orders += store.view.order_of[first] * store.view.packed_k
        run(&job, workspace, &view.plan)
    finally:
        workspace.leave()


# ---------------------------------------------------------------------------------------------
# Checks

cdef int check_pairs(str name, int64_t pairs) except -1:
    """Places of quantised rows are int32."""
    if pairs > MAX_INT32:
        raise ValueError(f"{name}: got {pairs} rows to compute, expected fewer than 2**31")
    return 0


cdef int64_t check_blocks(const int32_t[::1] ids, const int32_t[::1] experts, int64_t block_size, int64_t padding,
                          int64_t num_experts) except -1:
    """The number of ids that name a row; ids from ``padding`` on are padding, and blocks of expert -1 are skipped."""
    cdef int64_t i, named = 0
    cdef int32_t repeated
    for i in range(experts.shape[0]):
        if not -1 <= experts[i] < num_experts:
            raise IndexError(f"expert_ids[{i}]: got {experts[i]}, expected -1 to {num_experts - 1}")
    for i in range(ids.shape[0]):
        if ids[i] < 0:
            raise IndexError(f"sorted_token_ids[{i}]: got {ids[i]}, expected 0 or more")
        named += ids[i] < padding and experts[i // block_size] >= 0
    repeated = first_repeated(ids, experts, block_size, padding, named)
    if repeated >= 0:
        raise_repeated(ids, experts, block_size, repeated)
    return named


cdef int32_t first_repeated(const int32_t[::1] ids, const int32_t[::1] experts, int64_t block_size, int64_t padding,
                            int64_t named) except -2:
    """The first id that was named before, or -1. The cost depends on the number of ids, not on their values."""
    cdef int64_t[STACK_IDS] few_rows
    cdef int32_t[2 * STACK_IDS] few_slots
    cdef int64_t[::1] rows
    cdef int32_t[::1] slots
    cdef row_index index
    cdef int64_t i, distinct
    if named == 0:
        return -1
    index.num_slots = 2
    while index.num_slots < 2 * named:
        index.num_slots *= 2
    if named <= STACK_IDS:
        index.rows, index.slots = few_rows, few_slots
    else:
        rows, slots = np.empty(named, np.int64), np.empty(index.num_slots, np.int32)
        index.rows, index.slots = &rows[0], &slots[0]
    clear_index(&index)
    for i in range(ids.shape[0]):
        if ids[i] < padding and experts[i // block_size] >= 0:
            distinct = index.num_rows
            number_of(&index, ids[i])
            if index.num_rows == distinct:
                return ids[i]
    return -1


cdef int raise_repeated(const int32_t[::1] ids, const int32_t[::1] experts, int64_t block_size,
                        int32_t repeated) except -1:
    cdef int64_t i, seen = 0
    for i in range(ids.shape[0]):
        if ids[i] == repeated and experts[i // block_size] >= 0:
            seen += 1
            if seen == 2:
                raise ValueError(f"sorted_token_ids[{i}]: got {repeated} a second time, expected each id once")
    return 0


# ---------------------------------------------------------------------------------------------
# Plans

cdef int reserve_planner(row_planner *planner, Workspace workspace, int64_t pairs, int64_t runs) except -1:
    memset(planner, 0, sizeof(row_planner))
    planner.table, planner.max_pairs, planner.max_runs = workspace.table, pairs, runs
    carve(workspace, &workspace.lists, carve_planner, planner)
    begin_plan(planner)
    return 0


cdef void carve_view(arena *memory, void *job) noexcept nogil:
    cdef view_plan *view = <view_plan *>job
    carve_blocks(memory, &view.plan, view.table, view.num_experts, view.num_experts * view.rows)
    view.plan.in_rows = <int32_t *>take(memory, view.rows * <int64_t>sizeof(int32_t))
    view.plan.out_rows = <int64_t *>take(memory, view.rows * <int64_t>sizeof(int64_t))
    view.ranges = <column_range *>take(memory, view.num_experts * <int64_t>sizeof(column_range))


cdef void plan_view(view_plan *view, int64_t first_expert, int64_t first_column, int64_t width, int64_t n) noexcept:
    """``width`` columns of an expert of ``n`` columns, from ``first_column`` on."""
    cdef int64_t i, row, begin = first_column, done = 0
    for row in range(view.rows):
        view.plan.in_rows[row] = <int32_t>row
        view.plan.out_rows[row] = row
    view.plan.num_pairs = view.plan.num_rows = view.plan.num_distinct = view.rows
    for i in range(view.num_experts):
        view.ranges[i] = column_range(begin=begin, end=min(n, begin + width - done), out_begin=done)
        view.plan.num_blocks += cut_into_blocks(
            view.plan.blocks + view.plan.num_blocks, first_expert + i, 0, view.rows, i, view.table)
        done += view.ranges[i].end - begin
        begin = 0


# ---------------------------------------------------------------------------------------------
# Products

cdef int run_planned(row_planner *planner, Workspace workspace, CpuGptqStore store, const float[:, ::1] bias,
                     const matrix *input, const matrix *output) except -1:
    """Finish a plan and run it."""
    cdef product job
    cdef expert_orders orders
    orders.order_of, orders.all_equal = store.view.order_of, len(store.group_orders) == 1
    finish_plan(planner, &orders)
    set_product(&job, workspace, store, bias, input, output)
    return run(&job, workspace, &planner.plan)


cdef int set_product(product *job, Workspace workspace, CpuGptqStore store, const float[:, ::1] bias,
                     const matrix *input, const matrix *output) except -1:
    set_quantize_job(&job.quantize, workspace, store)
    job.quantize.input, job.quantize.dtype = input.data, input.dtype
    set_gemm_job(&job.gemm, workspace, store, bias)
    set_output(&job.gemm, output)
    return 0


cdef int run(product *job, Workspace workspace, const row_plan *plan) except -1:
    job.num_rows = plan.num_rows
    carve(workspace, &workspace.scratch, carve_product, job)
    workspace.quantized_rows += plan.num_distinct
    with nogil:
        multiply(&job.gemm, &job.quantize, plan)
    return 0


cdef void carve_product(arena *memory, void *product_job) noexcept nogil:
    cdef product *job = <product *>product_job
    carve_quantized(memory, &job.quantize, job.num_rows)
    carve_gemm(memory, &job.gemm)
