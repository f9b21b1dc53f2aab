"""A paged cache and attention over it: :class:`~marlin_cy.decoder.operations.DecoderOperations` has the contracts.

Both are those of a decoder's step (``decoder/_attention.pyx``), for one sequence.
"""

import numpy as np

from cython.parallel cimport prange
from libc.stdint cimport int32_t, int64_t
from libc.string cimport memset

from marlin_cy.cpu._arena cimport arena, carve
from marlin_cy.cpu._buffers cimport int32_copy, matrix, refuse_overlap
from marlin_cy.cpu._dispatch cimport KV_BLOCK, LANES, MAX_HEAD_DIM, ukernel_table
from marlin_cy.cpu._operations cimport check_shape, checked
from marlin_cy.cpu._team cimport barrier, member, run_team
from marlin_cy.cpu._workspace cimport Workspace
from marlin_cy.cpu.decoder._attention cimport (
    attention_job, begin_attention, carve_attention, chunks_of, finish_row, first_visible, kv_pool, run_attention,
    store_position,
)
from marlin_cy.cpu.decoder._batch cimport batch, segment

from marlin_cy.arguments import integer, number
from marlin_cy.errors import UnsupportedError

cdef struct cache_view:
    kv_pool pool
    int64_t num_pages
    int64_t kv_heads
    int64_t head_dim
    int64_t value_dim

# Attention of a batch of one sequence.
cdef struct operation:
    attention_job attend
    batch rows
    segment sequence


cdef cache_view checked_cache(object keys, object values, bint writeable) except *:
    cdef cache_view cache
    cdef matrix k = checked(keys, "keys", (None, None, None, KV_BLOCK), writeable, any_dtype=True), v
    cache.num_pages, cache.kv_heads, cache.head_dim = keys.shape[0], keys.shape[1], keys.shape[2]
    v = checked(values, "values", (cache.num_pages, cache.kv_heads, KV_BLOCK, None), writeable, any_dtype=True)
    if v.dtype != k.dtype:
        raise TypeError(f"values: got dtype {values.dtype}, expected that of keys, {keys.dtype}")
    cache.pool.keys, cache.pool.values, cache.pool.dtype, cache.value_dim = k.data, v.data, k.dtype, v.width
    if cache.head_dim > MAX_HEAD_DIM:
        raise UnsupportedError(f"keys: got heads of {cache.head_dim} values; the CPU's kernels do at most {MAX_HEAD_DIM}")
    if cache.value_dim > MAX_HEAD_DIM or cache.value_dim % LANES:
        raise UnsupportedError(f"values: got heads of {cache.value_dim} values; the CPU's kernels do multiples of "
                               f"{LANES}, at most {MAX_HEAD_DIM}")
    cache.pool.key_head, cache.pool.key_page = keys.strides[1], keys.strides[0]
    cache.pool.value_head, cache.pool.value_page = values.strides[1], values.strides[0]
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
                append_token(table, &cache, page_of, first + token,
                             <const float *>new_keys.data + token * cache.kv_heads * cache.head_dim,
                             <const float *>new_values.data + token * cache.kv_heads * cache.value_dim)
    finally:
        workspace.leave()


cdef void append_token(const ukernel_table *table, const cache_view *cache, const int32_t *pages, int64_t position,
                       const float *k, const float *v) noexcept nogil:
    cdef int64_t head
    for head in range(cache.kv_heads):
        store_position(&cache.pool, table, pages, position, head, k + head * cache.head_dim, cache.head_dim,
                       v + head * cache.value_dim, cache.value_dim)


def attention(Workspace workspace, q, keys, values, page_table, start, out, scale, window, sinks, soft_cap):
    cdef operation op
    cdef attention_job *job = &op.attend
    cdef cache_view cache = checked_cache(keys, values, False)
    cdef int64_t first, tokens
    cdef matrix queries = checked(q, "q", (None, None, None), False), to, logits
    check_shape(q, "q", (None, None, cache.head_dim))
    memset(&op, 0, sizeof(operation))
    tokens, job.num_heads = q.shape[0], q.shape[1]
    if job.num_heads % cache.kv_heads:
        raise ValueError(f"q: got {job.num_heads} heads, expected a multiple of {cache.kv_heads}, the heads of keys")
    to = checked(out, "out", (tokens, job.num_heads, cache.value_dim), True)
    refuse_overlap(to, queries, "out")
    first = checked_start(start)
    if window is not None:
        job.window = integer("window", window)
        if job.window < 1:
            raise ValueError(f"window: got {job.window}, expected at least 1")
    if sinks is not None:
        logits = checked(sinks, "sinks", (job.num_heads,), False)
        refuse_overlap(to, logits, "out")
        job.sinks = <const float *>logits.data
    job.scale = number("scale", scale)
    if soft_cap is not None:
        job.soft_cap = number("soft_cap", soft_cap)
        if not job.soft_cap > 0:
            raise ValueError(f"soft_cap: got {soft_cap!r}, expected a positive float32")
    cdef const int32_t[::1] pages = checked_page_table(page_table, &cache, first_visible(job, first), first + tokens)
    cdef const int32_t[::1] segment_of = np.zeros(tokens, np.int32)
    job.table, job.num_threads, job.pool = workspace.table, workspace.num_threads, cache.pool
    job.num_kv_heads, job.head_dim, job.value_dim = cache.kv_heads, cache.head_dim, cache.value_dim
    job.q, job.q_row, job.q_head = <const float *>queries.data, job.num_heads * job.head_dim, job.head_dim
    job.output = <float *>to.data
    op.sequence.count, op.sequence.position, op.sequence.pages = tokens, first, &pages[0]
    op.rows.rows, op.rows.num_segments, op.rows.segments = tokens, 1, &op.sequence
    op.rows.segment_of = &segment_of[0]
    workspace.enter()
    try:
        carve(workspace, &workspace.scratch, carve_operation, &op)
        with nogil:
            begin_attention(job, &op.rows, NULL, tokens)
            run_team(workspace.num_threads, attend, &op)
    finally:
        workspace.leave()


cdef void carve_operation(arena *memory, void *address) noexcept nogil:
    cdef operation *op = <operation *>address
    carve_attention(memory, &op.attend, op.rows.rows, chunks_of(op.sequence.position + op.rows.rows))


cdef void attend(void *address, member *m) noexcept nogil:
    cdef operation *op = <operation *>address
    cdef int64_t row
    run_attention(&op.attend, m)
    barrier(m)
    for row in range(op.rows.rows * m.thread // m.num_threads, op.rows.rows * (m.thread + 1) // m.num_threads):
        finish_row(&op.attend, row)
