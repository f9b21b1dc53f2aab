"""Grouped-query attention, from normalised rows to the output projection.

Phases, each of which ends at a barrier:

1. *project*: queries, keys and values, one group of products (``_projections.pyx``);
2. *place*: the heads of each row are normalised and rotated, and keys and values are written to the cache;
3. *attend*: ``_attention.pyx``;
4. *output*: the chunks of a row are merged and gated as its values are quantised; then the output projection.

The caller's barrier ends the last phase.

On several hosts, each has some heads. A row's values are merged and gated before an exchange, and quantised after it.
"""

from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from marlin_cy.cpu._arena cimport arena, take_floats
from marlin_cy.cpu._dispatch cimport KV_BLOCK
from marlin_cy.cpu._exchange cimport Hosts, begin_rows, carve_rows, run_exchange
from marlin_cy.cpu._team cimport barrier, member
from marlin_cy.cpu._workspace cimport Workspace
from marlin_cy.cpu.decoder._attention cimport begin_attention, carve_attention, finish_row, run_attention, store_position
from marlin_cy.cpu.decoder._batch cimport batch, segment
from marlin_cy.cpu.decoder._cache cimport KvPool
from marlin_cy.cpu.decoder._projections cimport begin_group, carve_group, run_group, run_rows, set_group


# ---------------------------------------------------------------------------------------------
# Setting up

cdef int set_grouped(grouped_job *job, Workspace workspace, plan, pool, float norm_eps, list owners,
                     Hosts hosts) except -1:
    """Set the members that the workspace and an ``AttentionPlan`` determine."""
    cdef const float[::1] q_norm = plan.q_norm
    cdef const float[::1] k_norm = plan.k_norm
    cdef const float[::1] sinks = plan.sinks
    cdef KvPool layer = pool
    cdef int64_t per_head = plan.head_dim * (2 if plan.gated else 1)
    owners.append(plan)
    memset(job, 0, sizeof(grouped_job))
    set_group(&job.qkv, workspace, [plan.q, plan.k, plan.v], owners)
    set_group(&job.out, workspace, [plan.o], owners)
    set_rope(&job.rope, plan.rope, owners)
    job.norm_eps, job.gated = norm_eps, plan.gated
    if q_norm is not None:
        job.q_norm = &q_norm[0]
    if k_norm is not None:
        job.k_norm = &k_norm[0]
    job.attend.table, job.attend.num_threads, job.attend.pool = workspace.table, workspace.num_threads, layer.pool
    job.attend.num_heads, job.attend.num_kv_heads = plan.num_heads, plan.num_kv_heads
    job.attend.head_dim = job.attend.value_dim = plan.head_dim
    job.attend.window, job.attend.scale, job.attend.soft_cap = plan.window or 0, plan.scale, plan.soft_cap or 0
    if sinks is not None:
        job.attend.sinks = &sinks[0]
    job.attend.q_row, job.attend.q_head = plan.num_heads * per_head, per_head
    if plan.values is None:
        job.out.prepare, job.out.prepared = finish_grouped, job
    else:
        job.divided, job.out.gathered = True, hosts.set_rows(&job.values, plan.values)
    return 0


cdef int set_rope(rope_table *table, rope, list owners) except -1:
    cdef const float[:, ::1] cos, sin
    if rope is None:
        table.cos = NULL
        return 0
    cos, sin = rope.cos, rope.sin
    owners.append(rope)
    table.cos, table.sin, table.pairs, table.interleaved = &cos[0, 0], &sin[0, 0], rope.pairs, rope.interleaved
    return 0


# ---------------------------------------------------------------------------------------------
# Memory

cdef void carve_grouped(arena *memory, grouped_job *job, int64_t max_rows, int64_t max_out_rows,
                        int64_t max_chunks) noexcept nogil:
    """The layout of a layer's memory; the caller owns the input of ``qkv`` and the output of ``out``."""
    cdef int64_t values = job.attend.num_heads * job.attend.value_dim
    job.q = job.qkv.projections[0].output = take_floats(memory, max_rows * job.qkv.projections[0].n)
    job.k = job.qkv.projections[1].output = take_floats(memory, max_rows * job.qkv.projections[1].n)
    job.v = job.qkv.projections[2].output = take_floats(memory, max_rows * job.qkv.projections[2].n)
    job.attend.q = job.q
    job.attend.output = take_floats(memory, max_rows * values)
    job.out.input = take_floats(memory, max_out_rows * job.out.k)
    if job.divided:
        carve_rows(memory, &job.values, max_out_rows)
    carve_group(memory, &job.qkv, max_rows)
    carve_attention(memory, &job.attend, max_rows, max_chunks)
    carve_group(memory, &job.out, max_out_rows)


# ---------------------------------------------------------------------------------------------
# Work

cdef void begin_grouped(grouped_job *job, const batch *rows, int64_t out_rows) noexcept nogil:
    """Set the rows of a call. One thread calls this, before any thread calls :func:`run_grouped`."""
    job.rows, job.head_items.next, job.finished.next = rows, 0, 0
    if job.divided:
        begin_rows(&job.values, out_rows)
    begin_group(&job.qkv, rows.rows)
    begin_group(&job.out, out_rows)


cdef void run_grouped(grouped_job *job, member *m) noexcept nogil:
    run_group(&job.qkv, m)
    if m.thread == 0:
        begin_attention(&job.attend, job.rows, job.out_rows, job.out.num_rows)
    barrier(m)
    run_rows(&job.head_items, row_blocks(job) * job.attend.num_kv_heads, place_heads, job, m)
    barrier(m)
    if job.out.num_rows == 0:  # nobody reads the output: only the cache was wanted
        return
    run_attention(&job.attend, m)
    barrier(m)
    if job.divided:
        run_rows(&job.finished, job.out.num_rows, finish_grouped, job, m)
        run_exchange(&job.values, m)
    run_group(&job.out, m)


cdef inline int64_t block_rows(const grouped_job *job) noexcept nogil:
    """Rows of an item of the phase *place*: those of a page, so that threads write to different cache lines.

    With few rows, an item has one row, so that there is an item for each thread.
    """
    return KV_BLOCK if job.rows.rows * job.attend.num_kv_heads >= 4 * KV_BLOCK * job.attend.num_threads else 1


cdef inline int64_t row_blocks(const grouped_job *job) noexcept nogil:
    return (job.rows.rows + block_rows(job) - 1) // block_rows(job)


cdef void place_heads(void *grouped, int64_t item, int thread) noexcept nogil:
    """Place one head of the cache, for a block of rows."""
    cdef grouped_job *job = <grouped_job *>grouped
    cdef int64_t first = item // job.attend.num_kv_heads * block_rows(job), row
    for row in range(first, min(first + block_rows(job), job.rows.rows)):
        place_row(job, row, item % job.attend.num_kv_heads)


cdef void place_row(const grouped_job *job, int64_t row, int64_t kv_head) noexcept nogil:
    """Write a key and a value of one row to the cache; normalise and rotate the queries that read this head."""
    cdef int64_t kv_heads = job.attend.num_kv_heads, heads = job.attend.num_heads // kv_heads
    cdef int64_t d = job.attend.head_dim, h
    cdef const segment *part = job.rows.segments + job.rows.segment_of[row]
    cdef int64_t position = part.position + row - part.row
    cdef float *k = job.k + (row * kv_heads + kv_head) * d
    place_head(job, k, job.k_norm, position)
    store_position(&job.attend.pool, job.attend.table, part.pages, position, kv_head, k, d,
                   job.v + (row * kv_heads + kv_head) * d, d)
    for h in range(kv_head * heads, (kv_head + 1) * heads):
        place_head(job, job.q + row * job.attend.q_row + h * job.attend.q_head, job.q_norm, position)


cdef inline void place_head(const grouped_job *job, float *head, const float *norm, int64_t position) noexcept nogil:
    if norm is not NULL:
        job.attend.table.rms_norm(head, head, norm, job.norm_eps, job.attend.head_dim)
    if job.rope.cos is not NULL:
        job.attend.table.rope(head, job.rope.cos + position * job.rope.pairs, job.rope.sin + position * job.rope.pairs,
                              job.rope.pairs, job.rope.interleaved)


cdef void finish_grouped(void *grouped, int64_t out_row, int thread) noexcept nogil:
    """Fill a row of the output projection's input, or of this host's part of it."""
    cdef grouped_job *job = <grouped_job *>grouped
    cdef int64_t row = out_row if job.out_rows is NULL else job.out_rows[out_row], h
    cdef int64_t d = job.attend.head_dim, width = job.attend.num_heads * d
    cdef float *values = (<float *>job.values.sections[0].local if job.divided else job.out.input) + out_row * width
    finish_row(&job.attend, out_row)
    memcpy(values, job.attend.output + row * width, width * sizeof(float))
    if job.gated:
        for h in range(job.attend.num_heads):
            job.attend.table.sigmoid_gate(
                values + h * d, job.q + row * job.attend.q_row + h * job.attend.q_head + d, d)
