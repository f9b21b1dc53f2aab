"""Linear layers that read the same rows, as a phase of a decoder's step.

A *group* is up to four linear layers, quantised or dense, that read the same input: a query, a key and a value
projection, or gate and up. :func:`run_group` is one phase, which all threads of a team run:

1. *rows*: threads take input rows. A row is put together if several hosts have its columns, prepared (the caller's
   hook: a norm, an activation), and quantised once for all quantised layers that order K alike;
2. a barrier;
3. *items*: threads take items of each layer in turn, without a barrier between the layers.

Outputs are complete after the caller's next barrier.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.string cimport memcmp, memset

import numpy as np

from marlin_cy.cpu._arena cimport arena, take
from marlin_cy.cpu._buffers cimport float_matrix, matrix
from marlin_cy.cpu._dense cimport begin_dense, do_dense
from marlin_cy.cpu._dispatch cimport DTYPE_F32, DTYPE_F8, DTYPE_I8
from marlin_cy.cpu._exchange cimport load_row
from marlin_cy.cpu._gemm cimport (
    begin_items, carve_gemm, do_items, set_columns, set_gemm_job, set_quantize_job,
)
from marlin_cy.cpu._quantize cimport begin_quantizing, carve_quantized, quantize_one
from marlin_cy.cpu._rows cimport carve_blocks, cut_into_blocks
from marlin_cy.cpu._store cimport CpuGptqStore
from marlin_cy.cpu._team cimport barrier, items_a_turn, member, queue, take_items
from marlin_cy.cpu._workspace cimport Workspace

from marlin_cy.cpu.stack import CpuLinear
from marlin_cy.decoder.plan import DenseLinear
from marlin_cy.errors import UnsupportedError

# ---------------------------------------------------------------------------------------------
# Setting up

cdef int set_group(projection_group *group, Workspace workspace, list projections, list owners) except -1:
    """Set the members that the layers determine; ``owners`` keeps the layers' arrays alive."""
    cdef projection *p
    cdef int index
    memset(group, 0, sizeof(projection_group))
    group.table = workspace.table
    group.num_projections, group.k = len(projections), projections[0].in_features
    for index in range(group.num_projections):
        p = &group.projections[index]
        layer = projections[index]
        p.n = layer.out_features
        owners.append(layer)
        if isinstance(layer, CpuLinear):
            set_quantised(group, p, workspace, layer, owners)
        elif isinstance(layer, DenseLinear):
            set_dense(&p.dense, workspace, layer, owners)
        else:
            raise TypeError(f"plan: got a projection of type {type(layer).__name__}, expected a CpuLinear or DenseLinear")
    return 0


cdef int set_quantised(projection_group *group, projection *p, Workspace workspace, layer, list owners) except -1:
    cdef CpuGptqStore store = layer.stack.store
    cdef int64_t offset = layer.offset, first = offset // store.n
    cdef quantize_job job
    cdef const float[::1] bias = layer.bias
    if (offset + p.n - 1) // store.n != first:
        raise UnsupportedError(f"plan: got a projection over several experts of a stack: {layer!r}")
    p.quantised = True
    set_gemm_job(&p.gemm, workspace, store, None)
    p.gemm.store.data += first * store.view.expert_stride
    p.gemm.all_columns.begin, p.gemm.all_columns.end = offset - first * store.n, offset - first * store.n + p.n
    set_columns(&p.gemm, &p.gemm.all_columns, 1)
    p.gemm.out_dtype, p.gemm.out_width = DTYPE_F32, p.n
    if bias is not None:
        p.gemm.bias = &bias[0]
    set_quantize_job(&job, workspace, store)
    job.dtype = DTYPE_F32
    if job.orders is not NULL:
        job.orders += store.view.order_of[first] * store.view.packed_k
    p.quantised_by = find_quantised(group, &job)
    return 0


cdef int find_quantised(projection_group *group, const quantize_job *job) noexcept:
    """The index of a job that quantises rows in the same way, which is added if there is none."""
    cdef const quantize_job *other
    cdef int index
    for index in range(group.num_quantised):
        other = &group.quantised[index]
        if other.packed_k != job.packed_k or other.group_size != job.group_size:
            continue
        if other.orders is NULL and job.orders is NULL:
            return index
        if other.orders is not NULL and job.orders is not NULL and memcmp(
                other.orders, job.orders, job.packed_k * sizeof(int32_t)) == 0:
            return index
    group.quantised[group.num_quantised] = job[0]
    group.num_quantised += 1
    return group.num_quantised - 1


cdef int set_dense(dense_job *job, Workspace workspace, layer, list owners) except -1:
    """Set the members that a ``DenseLinear`` determines."""
    cdef const float[::1] bias = layer.bias
    cdef const float[:, ::1] scales = layer.scales
    cdef const uint8_t[:, ::1] elements
    cdef matrix w
    owners.append(layer)
    memset(job, 0, sizeof(dense_job))
    job.table, job.num_threads = workspace.table, workspace.num_threads
    if scales is None:
        w = float_matrix(layer.weight, "plan: weight", layer.in_features, False)
        job.task.w, job.task.dtype = w.data, w.dtype
    else:
        elements = layer.weight.view(np.uint8)
        job.task.w, job.task.dtype = &elements[0, 0], DTYPE_I8 if layer.weight.dtype == np.int8 else DTYPE_F8
        job.task.scales, job.task.scale_stride, job.task.scale_k = &scales[0, 0], scales.shape[1], layer.scale_k
    job.task.n, job.task.k = layer.out_features, layer.in_features
    job.task.w_stride = job.task.x_stride = job.task.k
    job.task.out_stride = job.task.n
    if bias is not None:
        job.task.bias = &bias[0]
    return 0


# ---------------------------------------------------------------------------------------------
# Memory

cdef void carve_plain(arena *memory, plain_rows *rows, const ukernel_table *table) noexcept nogil:
    """The layout of a plan of at most ``max_rows`` rows."""
    carve_blocks(memory, &rows.plan, table, 1, rows.max_rows)
    rows.plan.in_rows = <int32_t *>take(memory, rows.max_rows * <int64_t>sizeof(int32_t))
    rows.plan.out_rows = <int64_t *>take(memory, rows.max_rows * <int64_t>sizeof(int64_t))


cdef void plan_plain(plain_rows *rows, const ukernel_table *table, int64_t count) noexcept nogil:
    cdef int64_t row
    cdef row_plan *plan = &rows.plan
    for row in range(count):
        plan.in_rows[row], plan.out_rows[row] = <int32_t>row, row
    plan.num_pairs = plan.num_rows = plan.num_distinct = count
    plan.num_blocks = cut_into_blocks(plan.blocks, 0, 0, count, 0, table)


cdef void carve_group(arena *memory, projection_group *group, int64_t max_rows) noexcept nogil:
    """The layout of quantised rows and the products' scratch; ``input`` and outputs are the caller's."""
    cdef int index
    for index in range(group.num_quantised):
        carve_quantized(memory, &group.quantised[index], max_rows)
    for index in range(group.num_projections):
        if group.projections[index].quantised:
            carve_gemm(memory, &group.projections[index].gemm)


# ---------------------------------------------------------------------------------------------
# Work

cdef void begin_group(projection_group *group, int64_t num_rows) noexcept nogil:
    """Set the rows of a call. One thread calls this, before any thread calls :func:`run_group`."""
    cdef projection *p
    cdef int index
    group.num_rows, group.row_items.next = num_rows, 0
    for index in range(group.num_quantised):
        group.quantised[index].input = <const char *>group.input
        begin_quantizing(&group.quantised[index], &group.rows.plan)
    for index in range(group.num_projections):
        p = &group.projections[index]
        if p.quantised:
            p.gemm.output = <char *>p.output
        else:
            p.dense.task.x, p.dense.task.out = group.input, p.output


cdef void run_group(projection_group *group, member *m) noexcept nogil:
    cdef projection *p
    cdef int index
    if m.thread == 0:
        begin_products(group)
    run_rows(&group.row_items, group.num_rows, prepare_row, group, m)
    barrier(m)
    for index in range(group.num_projections):
        p = &group.projections[index]
        if p.quantised:
            do_items(&p.gemm, m)
        else:
            do_dense(&p.dense, m)


cdef void begin_products(projection_group *group) noexcept nogil:
    """Prepare the items. The products of other groups, which use the same memory, have ended at an earlier barrier."""
    cdef projection *p
    cdef int index
    for index in range(group.num_projections):
        p = &group.projections[index]
        if p.quantised:
            begin_items(&p.gemm, &group.quantised[p.quantised_by], &group.rows.plan)
        else:
            begin_dense(&p.dense, group.num_rows)


cdef void prepare_row(void *job, int64_t row, int thread) noexcept nogil:
    cdef projection_group *group = <projection_group *>job
    cdef int index
    if group.gathered is not NULL:
        load_row(group.gathered, row, group.input + row * group.k)
    if group.prepare is not NULL:
        group.prepare(group.prepared, row, thread)
    for index in range(group.num_quantised):
        quantize_one(&group.quantised[index], row, thread)


cdef void run_rows(queue *items, int64_t rows, row_fn *prepare, void *job, member *m) noexcept nogil:
    """Call ``prepare`` for all rows. ``items.next`` is 0 before.

    Threads take adjacent rows, whose results may share cache lines.
    """
    cdef int64_t turn = items_a_turn(rows, m), row
    cdef int64_t begin = take_items(items, rows, turn, m)
    while begin < rows:
        for row in range(begin, min(begin + turn, rows)):
            prepare(job, row, m.thread)
        begin = take_items(items, rows, turn, m)
