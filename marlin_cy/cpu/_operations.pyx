"""The operations of a decoder, one by one: :class:`~marlin_cy.decoder.operations.DecoderOperations` has the contracts.

Each call checks its arrays, and shares rows, columns or heads out among the threads. A whole model runs them in one
parallel region instead.
"""

import numpy as np

from cython.parallel cimport prange
from libc.stdint cimport int32_t, int64_t
from libc.string cimport memset

from marlin_cy.cpu._arena cimport arena, carve, take_floats
from marlin_cy.cpu._buffers cimport element_bytes, float_matrix, int32_copy, matrix, refuse_overlap
from marlin_cy.cpu._dense cimport begin_dense, dense_job, do_dense
from marlin_cy.cpu._dispatch cimport (
    DTYPE_F32,
    LANES,
    delta_task,
    dense_task,
    ukernel_table,
)
from marlin_cy.cpu._team cimport barrier, member, run_team
from marlin_cy.cpu._workspace cimport Workspace

from marlin_cy.arguments import number
from marlin_cy.errors import UnsupportedError

# ---------------------------------------------------------------------------------------------
# Checks

cdef int check_shape(object array, str name, tuple shape) except -1:
    """The shape of an array; None stands for any length."""
    got = getattr(array, "shape", None)
    cdef Py_ssize_t i, n = len(shape)
    cdef bint fits = got is not None and len(got) == n
    if fits:
        for i in range(n):
            fits = fits and got[i] != 0 and (shape[i] is None or shape[i] == got[i])
    if fits:
        return 0
    if got is None or len(got) != n or any(want is not None and want != length for want, length in zip(shape, got)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: got {type(array).__name__ if got is None else f'shape {got}'}, expected [{wanted}]")
    raise ValueError(f"{name}: got shape {got}, expected no length of 0")


cdef matrix checked(object array, str name, tuple shape, bint writeable, bint any_dtype=False) except *:
    """An array of a shape as rows of its last dimension; float32 unless ``any_dtype``."""
    check_shape(array, name, shape)
    if not any_dtype and array.dtype != np.float32:
        raise TypeError(f"{name}: got dtype {array.dtype}, expected float32")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name}: got strides {array.strides} for shape {array.shape}, expected a C-contiguous array")
    return float_matrix(array.reshape(-1), name, array.shape[len(shape) - 1], writeable)


cdef const int32_t[::1] checked_indices(object array, str name, int64_t count, int64_t end) except *:
    """A copy of a vector of ``count`` indices, each at least 0 and less than ``end``."""
    check_shape(array, name, (count,))
    cdef const int32_t[::1] indices = int32_copy(array, name, count)
    cdef int64_t i
    for i in range(count):
        if not 0 <= indices[i] < end:
            raise IndexError(f"{name}: got {indices[i]} at [{i}], expected 0 to {end - 1}")
    return indices


# ---------------------------------------------------------------------------------------------
# Rows

cdef struct row_job:
    const ukernel_table *table
    int num_threads
    int64_t rows
    int64_t width
    int64_t heads
    const char *x
    int dtype               # of x
    const float *weight
    const float *gate
    float *residual
    float *out
    float scalar            # epsilon, or a factor
    const int32_t *indices
    const float *cos
    const float *sin
    int64_t pairs
    int interleaved

ctypedef void row_fn(const row_job *job, int64_t row) noexcept nogil


cdef int run_rows(Workspace workspace, row_job *job, row_fn *operation) except -1:
    """Call an operation for each row."""
    cdef int64_t row
    job.table, job.num_threads = workspace.table, workspace.num_threads
    workspace.enter()
    try:
        with nogil:
            for row in prange(job.rows, num_threads=job.num_threads, schedule="static"):
                operation(job, row)
    finally:
        workspace.leave()
    return 0


cdef void embedding_row(const row_job *job, int64_t row) noexcept nogil:
    job.table.widen(job.out + row * job.width,
                    job.x + job.indices[row] * job.width * element_bytes(job.dtype), job.dtype, job.width)


cdef void rms_norm_row(const row_job *job, int64_t row) noexcept nogil:
    cdef const float *x = <const float *>job.x + row * job.width
    if job.residual is not NULL:
        job.table.add(job.residual + row * job.width, x, job.width)
        x = job.residual + row * job.width
    job.table.rms_norm(job.out + row * job.width, x, job.weight, job.scalar, job.width)


cdef void gated_rms_norm_row(const row_job *job, int64_t row) noexcept nogil:
    job.table.gated_rms_norm(job.out + row * job.width, <const float *>job.x + row * job.width, job.weight,
                             job.gate + row * job.width, job.scalar, job.width)


cdef void l2_normalize_row(const row_job *job, int64_t row) noexcept nogil:
    job.table.l2_normalize(job.out + row * job.width, job.scalar, job.width)


cdef void rope_row(const row_job *job, int64_t row) noexcept nogil:
    cdef int64_t head, at = job.indices[row] * job.pairs
    for head in range(job.heads):
        job.table.rope(job.out + (row * job.heads + head) * job.width, job.cos + at, job.sin + at, job.pairs,
                       job.interleaved)


def embedding_rows(Workspace workspace, table, tokens, out):
    cdef row_job job
    cdef matrix source = checked(table, "table", (None, None), False, any_dtype=True)
    cdef matrix to = checked(out, "out", (None, source.width), True)
    cdef const int32_t[::1] indices = checked_indices(tokens, "tokens", to.rows, source.rows)
    refuse_overlap(to, source, "out")
    job.x, job.dtype, job.rows, job.width, job.indices = source.data, source.dtype, to.rows, to.width, &indices[0]
    job.out = <float *>to.data
    run_rows(workspace, &job, embedding_row)


def rms_norm(Workspace workspace, x, weight, eps, out, residual):
    cdef row_job job
    cdef matrix rows = checked(x, "x", (None, None), False), to, factors, sums
    to = checked(out, "out", (rows.rows, rows.width), True)
    job.weight = job.residual = NULL
    if weight is not None:
        factors = checked(weight, "weight", (rows.width,), False)
        refuse_overlap(to, factors, "out")
        job.weight = <const float *>factors.data
    if residual is not None:
        sums = checked(residual, "residual", (rows.rows, rows.width), True)
        refuse_overlap(sums, rows, "residual")
        refuse_overlap(to, sums, "out")
        job.residual = <float *>sums.data
    if to.data != rows.data:
        refuse_overlap(to, rows, "out")
    job.x, job.rows, job.width, job.out, job.scalar = rows.data, rows.rows, rows.width, <float *>to.data, number("eps", eps)
    run_rows(workspace, &job, rms_norm_row)


def gated_rms_norm(Workspace workspace, x, weight, gate, eps, out):
    cdef row_job job
    cdef matrix rows = checked(x, "x", (None, None), False), to, factors, gates
    to = checked(out, "out", (rows.rows, rows.width), True)
    gates = checked(gate, "gate", (rows.rows, rows.width), False)
    refuse_overlap(to, gates, "out")
    job.weight = NULL
    if weight is not None:
        factors = checked(weight, "weight", (rows.width,), False)
        refuse_overlap(to, factors, "out")
        job.weight = <const float *>factors.data
    if to.data != rows.data:
        refuse_overlap(to, rows, "out")
    job.x, job.rows, job.width, job.out, job.scalar = rows.data, rows.rows, rows.width, <float *>to.data, number("eps", eps)
    job.gate = <const float *>gates.data
    run_rows(workspace, &job, gated_rms_norm_row)


def l2_normalize(Workspace workspace, x, factor):
    cdef row_job job
    cdef matrix rows = checked(x, "x", (None, None), True)
    job.rows, job.width, job.out, job.scalar = rows.rows, rows.width, <float *>rows.data, number("factor", factor)
    run_rows(workspace, &job, l2_normalize_row)


def rope(Workspace workspace, x, cos, sin, positions, bint interleaved):
    cdef row_job job
    cdef matrix heads = checked(x, "x", (None, None, None), True)
    cdef matrix cosines = checked(cos, "cos", (None, None), False)
    cdef matrix sines = checked(sin, "sin", (cosines.rows, cosines.width), False)
    cdef const int32_t[::1] indices = checked_indices(positions, "positions", x.shape[0], cosines.rows)
    if 2 * cosines.width > heads.width:
        raise ValueError(f"cos: got {cosines.width} pairs, expected at most {heads.width // 2}, half a head of x")
    refuse_overlap(heads, cosines, "x")
    refuse_overlap(heads, sines, "x")
    job.rows, job.heads, job.width, job.out = x.shape[0], x.shape[1], heads.width, <float *>heads.data
    job.cos, job.sin, job.pairs = <const float *>cosines.data, <const float *>sines.data, cosines.width
    job.indices, job.interleaved = &indices[0], interleaved
    run_rows(workspace, &job, rope_row)


# ---------------------------------------------------------------------------------------------
# Dense products

# A product whose rows or results need not be float32: those of another dtype are converted in the scratch memory.
cdef struct converted_product:
    dense_job dense
    const char *x
    char *out
    int x_dtype
    int out_dtype
    int64_t x_size              # elements
    int64_t out_size
    float *wide_x               # NULL if x is float32
    float *wide_out             # NULL if out is float32


def dense(Workspace workspace, x, weight, bias, out):
    cdef matrix weights = checked(weight, "weight", (None, None), False, any_dtype=True), rows, to, biases
    cdef converted_product job
    cdef dense_task *task = &job.dense.task
    memset(&job, 0, sizeof(job))
    check_shape(x, "x", (None, weights.width))
    rows = float_matrix(x, "x", weights.width, False)
    check_shape(out, "out", (rows.rows, weights.rows))
    to = float_matrix(out, "out", weights.rows, True)
    refuse_overlap(to, rows, "out")
    refuse_overlap(to, weights, "out")
    if bias is not None:
        biases = checked(bias, "bias", (weights.rows,), False)
        refuse_overlap(to, biases, "out")
        task.bias = <const float *>biases.data
    job.x, job.x_dtype, job.x_size = rows.data, rows.dtype, rows.rows * rows.width
    job.out, job.out_dtype, job.out_size = to.data, to.dtype, to.rows * to.width
    task.x_stride = task.k = weights.width
    task.w, task.dtype, task.w_stride, task.n = weights.data, weights.dtype, weights.width, weights.rows
    task.out_stride = weights.rows
    job.dense.table, job.dense.num_threads = workspace.table, workspace.num_threads
    workspace.enter()
    try:
        carve(workspace, &workspace.scratch, carve_product, &job)
        task.x = <const float *>job.x if job.wide_x is NULL else job.wide_x
        task.out = <float *>job.out if job.wide_out is NULL else job.wide_out
        with nogil:
            begin_dense(&job.dense, rows.rows)
            run_team(workspace.num_threads, multiply_converted, &job)
    finally:
        workspace.leave()


cdef void carve_product(arena *memory, void *address) noexcept nogil:
    cdef converted_product *job = <converted_product *>address
    if job.x_dtype != DTYPE_F32:
        job.wide_x = take_floats(memory, job.x_size)
    if job.out_dtype != DTYPE_F32:
        job.wide_out = take_floats(memory, job.out_size)


cdef void multiply_converted(void *address, member *m) noexcept nogil:
    cdef converted_product *job = <converted_product *>address
    cdef int64_t begin, end
    if job.wide_x is not NULL:
        begin, end = job.x_size * m.thread // m.num_threads, job.x_size * (m.thread + 1) // m.num_threads
        job.dense.table.widen(job.wide_x + begin, job.x + begin * element_bytes(job.x_dtype), job.x_dtype, end - begin)
        barrier(m)
    do_dense(&job.dense, m)
    if job.wide_out is not NULL:
        barrier(m)
        begin, end = job.out_size * m.thread // m.num_threads, job.out_size * (m.thread + 1) // m.num_threads
        job.dense.table.narrow(job.out + begin * element_bytes(job.out_dtype), job.wide_out + begin, job.out_dtype,
                               end - begin)


# ---------------------------------------------------------------------------------------------
# Gated DeltaNet

def short_conv(Workspace workspace, x, weight, state, out):
    cdef matrix rows = checked(x, "x", (None, None), False), before, to, taps
    cdef int64_t token, channels = rows.width, width
    checked(weight, "weight", (channels, None), False)
    transposed = np.ascontiguousarray(weight.T)
    taps = checked(transposed, "weight", (None, channels), False)
    width = taps.rows
    to = checked(out, "out", (rows.rows, channels), True)
    refuse_overlap(to, rows, "out")
    check_state(state, "state", (width - 1, channels))
    before = float_matrix(state.reshape(-1), "state", channels, True)
    refuse_overlap(before, rows, "state")
    refuse_overlap(before, to, "state")
    workspace.enter()
    try:
        with nogil:
            for token in range(rows.rows):
                workspace.table.short_conv(<float *>to.data + token * channels, <float *>before.data,
                                           <const float *>rows.data + token * channels, <const float *>taps.data,
                                           channels, channels, <int>width)
    finally:
        workspace.leave()


cdef int check_state(object state, str name, tuple shape) except -1:
    """A float32 array of exactly this shape, which may have a length of 0."""
    if getattr(state, "shape", None) != shape:
        raise ValueError(f"{name}: got shape {getattr(state, 'shape', None)}, expected {shape}")
    if state.dtype != np.float32:
        raise TypeError(f"{name}: got dtype {state.dtype}, expected float32")
    if not state.flags.c_contiguous:
        raise ValueError(f"{name}: got strides {state.strides} for shape {state.shape}, expected a C-contiguous array")
    return 0


def delta_gates(Workspace workspace, a, b, a_log, dt_bias, decay, beta):
    cdef matrix rows = checked(a, "a", (None, None), False)
    cdef matrix second = checked(b, "b", (rows.rows, rows.width), False)
    cdef matrix rates = checked(a_log, "a_log", (rows.width,), False)
    cdef matrix biases = checked(dt_bias, "dt_bias", (rows.width,), False)
    cdef matrix decays = checked(decay, "decay", (rows.rows, rows.width), True)
    cdef matrix betas = checked(beta, "beta", (rows.rows, rows.width), True)
    cdef int64_t token, at
    refuse_overlap(betas, decays, "beta")
    cdef matrix source
    cdef matrix *sources = [rows, second, rates, biases]
    for source in sources[:4]:
        refuse_overlap(decays, source, "decay")
        refuse_overlap(betas, source, "beta")
    workspace.enter()
    try:
        with nogil:
            for token in range(rows.rows):
                at = token * rows.width
                workspace.table.delta_gates(<float *>decays.data + at, <float *>betas.data + at,
                                            <const float *>rows.data + at, <const float *>second.data + at,
                                            <const float *>rates.data, <const float *>biases.data, rows.width)
    finally:
        workspace.leave()


def delta_rule(Workspace workspace, q, k, v, decay, beta, state, out):
    cdef delta_task task
    cdef matrix queries = checked(q, "q", (None, None, None), False)
    cdef int64_t tokens = q.shape[0], k_heads = q.shape[1], key_dim = q.shape[2], v_heads, value_dim, head
    cdef matrix keys = checked(k, "k", (tokens, k_heads, key_dim), False)
    cdef matrix values = checked(v, "v", (tokens, None, None), False), decays, betas, states, to
    v_heads, value_dim = v.shape[1], v.shape[2]
    if v_heads % k_heads:
        raise ValueError(f"v: got {v_heads} heads, expected a multiple of {k_heads}, the heads of k")
    if value_dim % LANES:
        raise UnsupportedError(f"v: got heads of {value_dim} values; the CPU's kernels do multiples of {LANES}")
    decays = checked(decay, "decay", (tokens, v_heads), False)
    betas = checked(beta, "beta", (tokens, v_heads), False)
    states = checked(state, "state", (v_heads, key_dim, value_dim), True)
    to = checked(out, "out", (tokens, v_heads, value_dim), True)
    refuse_overlap(to, states, "out")
    cdef matrix source
    cdef matrix *sources = [queries, keys, values, decays, betas]
    for source in sources[:5]:
        refuse_overlap(to, source, "out")
        refuse_overlap(states, source, "state")
    task.tokens, task.key_dim, task.columns = tokens, key_dim, value_dim
    task.q, task.k, task.v = <const float *>queries.data, <const float *>keys.data, <const float *>values.data
    task.q_stride = task.k_stride = k_heads * key_dim
    task.v_stride = task.y_stride = v_heads * value_dim
    task.decay, task.beta, task.gate_stride = <const float *>decays.data, <const float *>betas.data, v_heads
    task.state, task.state_stride, task.y = <float *>states.data, value_dim, <float *>to.data
    cdef const ukernel_table *table = workspace.table
    cdef int num_threads = workspace.num_threads
    workspace.enter()
    try:
        with nogil:
            for head in prange(v_heads, num_threads=num_threads, schedule="static"):
                delta_head(table, &task, head, head // (v_heads // k_heads))
    finally:
        workspace.leave()


cdef void delta_head(const ukernel_table *table, const delta_task *heads, int64_t head, int64_t k_head) noexcept nogil:
    """One value head of a task whose pointers are those of head 0."""
    cdef delta_task task = heads[0]
    task.q, task.k = heads.q + k_head * heads.key_dim, heads.k + k_head * heads.key_dim
    task.v, task.y = heads.v + head * heads.columns, heads.y + head * heads.columns
    task.decay, task.beta = heads.decay + head, heads.beta + head
    task.state = heads.state + head * heads.key_dim * heads.state_stride
    table.delta_rule(&task)
