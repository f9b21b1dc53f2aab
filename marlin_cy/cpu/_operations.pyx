"""The operations of a decoder, one by one: :class:`~marlin_cy.decoder.operations.DecoderOperations` has the contracts.

Each call checks its arrays, and shares rows, columns or heads out among the threads. A whole model runs them in one
parallel region instead.
"""

import numpy as np

from cython.parallel cimport prange, threadid
from libc.math cimport INFINITY
from libc.stdint cimport int32_t, int64_t
from libc.string cimport memcpy

from marlin_cy.cpu._arena cimport arena, carve, take
from marlin_cy.cpu._buffers cimport float_matrix, int32_copy, matrix, refuse_overlap
from marlin_cy.cpu._dispatch cimport (
    ATTENTION_CHUNK,
    CHUNK_PAGES,
    DTYPE_F32,
    KV_BLOCK,
    LANES,
    MAX_HEAD_DIM,
    MAX_QUERIES,
    attention_scratch,
    attention_task,
    delta_task,
    dense_task,
    ukernel_table,
)
from marlin_cy.cpu._workspace cimport Workspace

from marlin_cy.arguments import integer, number
from marlin_cy.errors import UnsupportedError

cdef enum:
    DENSE_COLUMNS = 64      # outputs of a task of dense products


# ---------------------------------------------------------------------------------------------
# Checks

cdef int element_bytes(int dtype) noexcept nogil:
    return 4 if dtype == DTYPE_F32 else 2


cdef int check_shape(object array, str name, tuple shape) except -1:
    """The shape of an array; None stands for any length."""
    got = getattr(array, "shape", None)
    if got is None or len(got) != len(shape) or any(want is not None and want != n for want, n in zip(shape, got)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: got {type(array).__name__ if got is None else f'shape {got}'}, expected [{wanted}]")
    if 0 in got:
        raise ValueError(f"{name}: got shape {got}, expected no length of 0")
    return 0


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

def dense(Workspace workspace, x, weight, bias, out):
    cdef matrix rows = checked(x, "x", (None, None), False), to, biases
    cdef matrix weights = checked(weight, "weight", (None, rows.width), False, any_dtype=True)
    cdef dense_task task
    to = checked(out, "out", (rows.rows, weights.rows), True)
    refuse_overlap(to, rows, "out")
    refuse_overlap(to, weights, "out")
    task.bias = NULL
    if bias is not None:
        biases = checked(bias, "bias", (weights.rows,), False)
        refuse_overlap(to, biases, "out")
        task.bias = <const float *>biases.data
    task.x, task.x_stride, task.m, task.k = <const float *>rows.data, rows.width, rows.rows, rows.width
    task.w, task.dtype, task.w_stride, task.n = weights.data, weights.dtype, weights.width, weights.rows
    task.out, task.out_stride = <float *>to.data, to.width
    cdef int64_t part, parts = (task.n + DENSE_COLUMNS - 1) // DENSE_COLUMNS
    cdef const ukernel_table *table = workspace.table
    cdef int num_threads = workspace.num_threads
    workspace.enter()
    try:
        with nogil:
            for part in prange(parts, num_threads=num_threads, schedule="static"):
                dense_columns(table, &task, part * DENSE_COLUMNS)
    finally:
        workspace.leave()


cdef void dense_columns(const ukernel_table *table, const dense_task *whole, int64_t column) noexcept nogil:
    """The outputs of a task from ``column`` on, DENSE_COLUMNS of them at most."""
    cdef dense_task task = whole[0]
    task.w = <const char *>whole.w + column * whole.w_stride * element_bytes(whole.dtype)
    task.n = min(whole.n - column, <int64_t>DENSE_COLUMNS)
    task.out = whole.out + column
    if task.bias is not NULL:
        task.bias = whole.bias + column
    table.dense(&task)


# ---------------------------------------------------------------------------------------------
# Attention

cdef struct cache_view:
    char *keys
    char *values
    int dtype
    int64_t num_pages
    int64_t kv_heads
    int64_t head_dim
    int64_t value_dim
    int64_t key_bytes       # of one head's page
    int64_t value_bytes


cdef cache_view checked_cache(object keys, object values, bint writeable) except *:
    cdef cache_view cache
    cdef matrix k = checked(keys, "keys", (None, None, None, KV_BLOCK), writeable, any_dtype=True), v
    cache.num_pages, cache.kv_heads, cache.head_dim = keys.shape[0], keys.shape[1], keys.shape[2]
    v = checked(values, "values", (cache.num_pages, cache.kv_heads, KV_BLOCK, None), writeable, any_dtype=True)
    if v.dtype != k.dtype:
        raise TypeError(f"values: got dtype {values.dtype}, expected that of keys, {keys.dtype}")
    cache.keys, cache.values, cache.dtype, cache.value_dim = k.data, v.data, k.dtype, v.width
    if cache.head_dim > MAX_HEAD_DIM:
        raise UnsupportedError(f"keys: got heads of {cache.head_dim} values; the CPU's kernels do at most {MAX_HEAD_DIM}")
    if cache.value_dim > MAX_HEAD_DIM or cache.value_dim % LANES:
        raise UnsupportedError(f"values: got heads of {cache.value_dim} values; the CPU's kernels do multiples of "
                               f"{LANES}, at most {MAX_HEAD_DIM}")
    cache.key_bytes = cache.head_dim * KV_BLOCK * element_bytes(cache.dtype)
    cache.value_bytes = cache.value_dim * KV_BLOCK * element_bytes(cache.dtype)
    return cache


cdef const int32_t[::1] checked_page_table(object page_table, const cache_view *cache, int64_t begin, int64_t end) except *:
    """A copy of a page table, whose entries for the positions begin to end - 1 are valid."""
    cdef const int32_t[::1] pages = int32_copy(page_table, "page_table", (end + KV_BLOCK - 1) // KV_BLOCK)
    cdef int64_t i
    if pages.shape[0] * KV_BLOCK < end:
        raise ValueError(f"page_table: got {pages.shape[0]} pages, expected at least {(end + KV_BLOCK - 1) // KV_BLOCK}")
    for i in range(begin // KV_BLOCK, pages.shape[0]):
        if not 0 <= pages[i] < cache.num_pages:
            raise IndexError(f"page_table: got {pages[i]} at [{i}], expected 0 to {cache.num_pages - 1}")
    return pages


cdef int64_t checked_start(object start) except -1:
    cdef int64_t value = integer("start", start)
    if not 0 <= value < 2**31:
        raise ValueError(f"start: got {value}, expected 0 to {2**31 - 1}")
    return value


def append_to_cache(Workspace workspace, keys, values, k, v, page_table, start):
    cdef cache_view cache = checked_cache(keys, values, True)
    cdef matrix new_keys = checked(k, "k", (None, cache.kv_heads, cache.head_dim), False)
    cdef matrix new_values = checked(v, "v", (k.shape[0], cache.kv_heads, cache.value_dim), False)
    cdef int64_t first = checked_start(start), tokens = k.shape[0], token
    cdef const int32_t[::1] pages = checked_page_table(page_table, &cache, first, first + tokens)
    cdef const int32_t *page_of = &pages[0]
    cdef const ukernel_table *table = workspace.table
    cdef int num_threads = workspace.num_threads
    workspace.enter()
    try:
        with nogil:
            for token in prange(tokens, num_threads=num_threads, schedule="static"):
                append_token(table, &cache, <const float *>new_keys.data + token * cache.kv_heads * cache.head_dim,
                             <const float *>new_values.data + token * cache.kv_heads * cache.value_dim,
                             page_of[(first + token) // KV_BLOCK], (first + token) % KV_BLOCK)
    finally:
        workspace.leave()


cdef void append_token(const ukernel_table *table, const cache_view *cache, const float *k, const float *v, int64_t page,
                       int position) noexcept nogil:
    cdef int64_t head, at, value_row = cache.value_bytes // KV_BLOCK
    for head in range(cache.kv_heads):
        at = page * cache.kv_heads + head
        table.store_keys(cache.keys + at * cache.key_bytes, k + head * cache.head_dim, position, cache.dtype,
                         <int>cache.head_dim)
        table.narrow(cache.values + at * cache.value_bytes + position * value_row, v + head * cache.value_dim,
                     cache.dtype, cache.value_dim)


# A thread's memory: the queries of a task, side by side, and their results.
cdef struct attention_rows:
    attention_scratch *scratch
    float *q                    # [MAX_QUERIES, head_dim]
    float *out                  # [MAX_QUERIES, value_dim] of the chunks so far
    float *chunk_out            # [MAX_QUERIES, value_dim] of one chunk
    float[MAX_QUERIES] max
    float[MAX_QUERIES] sum
    float[MAX_QUERIES] chunk_max
    float[MAX_QUERIES] chunk_sum
    int32_t[MAX_QUERIES] begin
    int32_t[MAX_QUERIES] end

cdef struct attention_job:
    const ukernel_table *table
    int num_threads
    cache_view cache
    const float *q
    float *out
    const int32_t *pages
    const float *sinks
    int64_t tokens
    int64_t heads
    int64_t start
    int64_t window              # 0: none
    float scale
    float soft_cap
    attention_rows *rows        # of each thread


cdef void carve_attention(arena *memory, void *address) noexcept nogil:
    cdef attention_job *job = <attention_job *>address
    cdef int64_t f = sizeof(float)
    cdef attention_rows *rows
    cdef attention_rows unused      # while sizes are measured
    cdef int thread
    job.rows = <attention_rows *>take(memory, job.num_threads * <int64_t>sizeof(attention_rows))
    for thread in range(job.num_threads):
        rows = &unused if job.rows is NULL else job.rows + thread
        rows.scratch = <attention_scratch *>take(memory, sizeof(attention_scratch))
        rows.q = <float *>take(memory, MAX_QUERIES * job.cache.head_dim * f)
        rows.out = <float *>take(memory, MAX_QUERIES * job.cache.value_dim * f)
        rows.chunk_out = <float *>take(memory, MAX_QUERIES * job.cache.value_dim * f)


def attention(Workspace workspace, q, keys, values, page_table, start, out, scale, window, sinks, soft_cap):
    cdef attention_job job
    cdef matrix queries = checked(q, "q", (None, None, None), False), to, logits
    job.cache = checked_cache(keys, values, False)
    check_shape(q, "q", (None, None, job.cache.head_dim))
    job.tokens, job.heads = q.shape[0], q.shape[1]
    if job.heads % job.cache.kv_heads:
        raise ValueError(f"q: got {job.heads} heads, expected a multiple of {job.cache.kv_heads}, the heads of keys")
    to = checked(out, "out", (job.tokens, job.heads, job.cache.value_dim), True)
    refuse_overlap(to, queries, "out")
    job.start, job.window = checked_start(start), 0
    if window is not None:
        job.window = integer("window", window)
        if job.window < 1:
            raise ValueError(f"window: got {job.window}, expected at least 1")
    job.sinks = NULL
    if sinks is not None:
        logits = checked(sinks, "sinks", (job.heads,), False)
        refuse_overlap(to, logits, "out")
        job.sinks = <const float *>logits.data
    job.scale, job.soft_cap = number("scale", scale), 0
    if soft_cap is not None:
        job.soft_cap = number("soft_cap", soft_cap)
        if not job.soft_cap > 0:
            raise ValueError(f"soft_cap: got {soft_cap!r}, expected a positive float32")
    cdef const int32_t[::1] pages = checked_page_table(page_table, &job.cache, first_visible(&job, 0),
                                                       job.start + job.tokens)
    job.table, job.num_threads, job.pages = workspace.table, workspace.num_threads, &pages[0]
    job.q, job.out = <const float *>queries.data, <float *>to.data
    cdef int64_t group = job.heads // job.cache.kv_heads
    cdef int64_t blocks = (job.tokens * group + MAX_QUERIES - 1) // MAX_QUERIES, i
    workspace.enter()
    try:
        carve(workspace, &workspace.scratch, carve_attention, &job)
        with nogil:
            for i in prange(blocks * job.cache.kv_heads, num_threads=job.num_threads, schedule="dynamic"):
                attend(&job, job.rows + threadid(), i % job.cache.kv_heads, i // job.cache.kv_heads * MAX_QUERIES)
    finally:
        workspace.leave()


cdef int64_t first_visible(const attention_job *job, int64_t token) noexcept nogil:
    """The first position that a token sees."""
    cdef int64_t position = job.start + token
    return position - job.window + 1 if 0 < job.window <= position else 0


cdef void attend(const attention_job *job, attention_rows *rows, int64_t kv_head, int64_t first) noexcept nogil:
    """MAX_QUERIES queries at most of one head of keys, from ``first`` on; query i is of token i // group."""
    cdef int64_t group = job.heads // job.cache.kv_heads
    cdef int64_t m = min(job.tokens * group - first, <int64_t>MAX_QUERIES), r, row, chunk, begin
    cdef int64_t d = job.cache.head_dim, dv = job.cache.value_dim, end = job.start + (first + m - 1) // group + 1
    cdef const float *sink
    for r in range(m):
        row = (first + r) // group * job.heads + kv_head * group + (first + r) % group
        memcpy(rows.q + r * d, job.q + row * d, d * sizeof(float))
        rows.max[r], rows.sum[r] = -INFINITY, 0
    for chunk in range(first_visible(job, first // group) // ATTENTION_CHUNK,
                       (end + ATTENTION_CHUNK - 1) // ATTENTION_CHUNK):
        begin = chunk * ATTENTION_CHUNK
        for r in range(m):
            rows.begin[r] = clip(first_visible(job, (first + r) // group) - begin)
            rows.end[r] = clip(job.start + (first + r) // group + 1 - begin)
        attend_chunk(job, rows, kv_head, <int>m, chunk)
    for r in range(m):
        row = (first + r) // group * job.heads + kv_head * group + (first + r) % group
        sink = NULL if job.sinks is NULL else job.sinks + kv_head * group + (first + r) % group
        job.table.attention_finish(rows.out + r * dv, rows.max[r], rows.sum[r], sink, dv)
        memcpy(job.out + row * dv, rows.out + r * dv, dv * sizeof(float))


cdef int32_t clip(int64_t position) noexcept nogil:
    """A position relative to a chunk, as a limit of what is visible in the chunk."""
    return <int32_t>min(max(position, <int64_t>0), <int64_t>ATTENTION_CHUNK)


cdef void attend_chunk(const attention_job *job, attention_rows *rows, int64_t kv_head, int m,
                       int64_t chunk) noexcept nogil:
    """Add one chunk of the cache to the results of m queries."""
    cdef int64_t d = job.cache.head_dim, dv = job.cache.value_dim, r
    cdef attention_task task
    task.m, task.d, task.dv = m, <int>d, <int>dv
    task.q, task.q_stride = rows.q, d
    task.keys = job.cache.keys + kv_head * job.cache.key_bytes
    task.values = job.cache.values + kv_head * job.cache.value_bytes
    task.key_stride = job.cache.kv_heads * job.cache.key_bytes
    task.value_stride = job.cache.kv_heads * job.cache.value_bytes
    task.pages, task.dtype = job.pages + chunk * CHUNK_PAGES, job.cache.dtype
    task.scale, task.soft_cap = job.scale, job.soft_cap
    task.begin, task.end = rows.begin, rows.end
    task.max, task.sum = rows.chunk_max, rows.chunk_sum
    task.out, task.out_stride, task.scratch = rows.chunk_out, dv, rows.scratch
    job.table.attention(&task)
    for r in range(m):
        job.table.attention_merge(rows.max + r, rows.sum + r, rows.out + r * dv, rows.chunk_max[r], rows.chunk_sum[r],
                                  rows.chunk_out + r * dv, dv)


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
