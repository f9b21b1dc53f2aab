"""A paged cache and attention over it: :class:`~marlin_cy.decoder.operations.DecoderOperations` has the contracts.

A task is a head of keys and MAX_QUERIES queries at most: those of all heads that share the head of keys, token by
token. The task goes through the chunks of the cache in ascending order, and merges each chunk's result into those of
the chunks before.
"""

from cython.parallel cimport prange, threadid
from libc.math cimport INFINITY
from libc.stdint cimport int32_t, int64_t
from libc.string cimport memcpy

from marlin_cy.cpu._arena cimport arena, carve, take
from marlin_cy.cpu._buffers cimport int32_copy, matrix, refuse_overlap
from marlin_cy.cpu._dispatch cimport (
    ATTENTION_CHUNK,
    CHUNK_PAGES,
    KV_BLOCK,
    LANES,
    MAX_HEAD_DIM,
    MAX_QUERIES,
    attention_scratch,
    attention_task,
    ukernel_table,
)
from marlin_cy.cpu._operations cimport check_shape, checked, element_bytes
from marlin_cy.cpu._workspace cimport Workspace

from marlin_cy.arguments import integer, number
from marlin_cy.errors import UnsupportedError

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
        sink = NULL
        if job.sinks is not NULL:
            sink = job.sinks + kv_head * group + (first + r) % group
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
