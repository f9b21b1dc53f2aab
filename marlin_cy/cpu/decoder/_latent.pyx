"""Multi-head latent attention, from normalised rows to the output projection.

The attention is absorbed: each head's part of ``kv_b_proj`` multiplies its query and its result, and not the keys and
values, of which there is one latent row for all heads (``LatentAttentionPlan`` has the formulas). Phases, each of which
ends at a barrier:

1. *project*: queries and latent rows; queries in two steps if they have a low rank;
2. *place*: latent rows are normalised, rotated and written to the cache; queries are rotated and absorbed;
3. *attend*: ``_attention.pyx``, with one head of the cache for all query heads;
4. *merge* the chunks of each row;
5. *expand*: each head's result by its part of ``kv_b_proj``;
6. *output*: the output projection, which the caller's barrier ends.

On several hosts, each has some query heads, and all have the cache. Latent rows and low-rank queries are exchanged after
phase 1, the results of phase 5 before phase 6.
"""

from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from marlin_cy.cpu._arena cimport arena, take_floats
from marlin_cy.cpu._buffers cimport element_bytes, float_matrix, matrix
from marlin_cy.cpu._dispatch cimport dense_task
from marlin_cy.cpu._exchange cimport (
    Hosts, begin_exchange, begin_rows, carve_exchange, carve_rows, load_row, run_exchange,
)
from marlin_cy.cpu._team cimport barrier, member
from marlin_cy.cpu._workspace cimport Workspace
from marlin_cy.cpu.decoder._attention cimport begin_attention, carve_attention, finish_row, run_attention, store_position
from marlin_cy.cpu.decoder._batch cimport batch, segment
from marlin_cy.cpu.decoder._cache cimport KvPool
from marlin_cy.cpu.decoder._grouped cimport set_rope
from marlin_cy.cpu.decoder._projections cimport begin_group, carve_group, plain_rows, run_group, run_rows, set_group

cdef enum:
    ROWS = 16       # of an item that multiplies by one head's matrix


# ---------------------------------------------------------------------------------------------
# Setting up

cdef int set_latent(latent_job *job, Workspace workspace, plan, pool, list owners, Hosts hosts) except -1:
    """Set the members that the workspace and a ``LatentAttentionPlan`` determine."""
    cdef const float[::1] q_norm = plan.q_a_norm
    cdef const float[::1] kv_norm = plan.kv_a_norm
    cdef KvPool layer = pool
    owners.append(plan)
    memset(job, 0, sizeof(latent_job))
    job.has_second = plan.q_a is not None
    set_group(&job.first, workspace, [plan.q_a if job.has_second else plan.q_b, plan.kv_a], owners)
    if job.has_second:
        set_group(&job.second, workspace, [plan.q_b], owners)
        job.second.prepare, job.second.prepared = norm_query, job
        job.q_norm = &q_norm[0]
    set_group(&job.out, workspace, [plan.o], owners)
    set_heads(&job.k_up, plan.k_up, owners)
    set_heads(&job.v_up, plan.v_up, owners)
    set_rope(&job.rope, plan.rope, owners)
    job.kv_norm, job.norm_eps = &kv_norm[0], plan.norm_eps
    job.nope_dim, job.rope_dim, job.latent_dim = plan.nope_dim, plan.rope_dim, plan.latent_dim
    job.attend.table, job.attend.num_threads, job.attend.pool = workspace.table, workspace.num_threads, layer.pool
    job.attend.num_heads, job.attend.num_kv_heads = plan.num_heads, 1
    job.attend.head_dim, job.attend.value_dim = plan.latent_dim + plan.rope_dim, plan.latent_dim
    job.attend.scale = plan.scale
    job.attend.q_head = job.attend.head_dim
    job.attend.q_row = job.attend.num_heads * job.attend.head_dim
    if plan.values is not None:
        job.divided, job.out.gathered = True, hosts.set_rows(&job.values, plan.values)
        hosts.set_exchange(&job.low)
        if job.has_second:
            job.second.gathered = hosts.add_section(&job.low, plan.low_rank, sizeof(float))
        job.latent = hosts.add_section(&job.low, plan.latent, sizeof(float))
    return 0


cdef int set_heads(head_matrices *heads, weights, list owners) except -1:
    """``weights`` is ``[num_heads, n, k]``."""
    cdef matrix rows = float_matrix(weights.reshape(-1, weights.shape[2]), "plan: kv_b_proj", weights.shape[2], False)
    owners.append(weights)
    heads.weights, heads.dtype, heads.n, heads.k = rows.data, rows.dtype, weights.shape[1], weights.shape[2]
    return 0


cdef void set_latent_rows(latent_job *job, plain_rows *rows, plain_rows *out_rows) noexcept nogil:
    job.first.rows = job.second.rows = rows
    job.out.rows = out_rows


# ---------------------------------------------------------------------------------------------
# Memory

cdef void carve_latent(arena *memory, latent_job *job, int64_t max_rows, int64_t max_out_rows,
                       int64_t max_chunks) noexcept nogil:
    """The layout of a layer's memory; the caller owns the input of ``first`` and the output of ``out``."""
    cdef int64_t num_heads = job.attend.num_heads
    job.first.projections[0].output = take_floats(memory, max_rows * job.first.projections[0].n)
    job.kv = job.first.projections[1].output = take_floats(memory, max_rows * job.first.projections[1].n)
    job.q = job.first.projections[0].output
    if job.has_second:
        job.second.input = job.first.projections[0].output
        job.q = job.second.projections[0].output = take_floats(memory, max_rows * job.second.projections[0].n)
        carve_group(memory, &job.second, max_rows)
    job.query = take_floats(memory, max_rows * job.attend.q_row)
    job.attend.q = job.query
    job.attend.output = take_floats(memory, max_rows * num_heads * job.latent_dim)
    job.merged = take_floats(memory, max_out_rows * num_heads * job.latent_dim)
    job.out.input = take_floats(memory, max_out_rows * job.out.k)
    if job.divided:
        job.kv = take_floats(memory, max_rows * (job.latent_dim + job.rope_dim))
        job.low.sections[0].max_rows = job.low.sections[1].max_rows = max_rows
        carve_exchange(memory, &job.low)
        carve_rows(memory, &job.values, max_out_rows)
        if job.has_second:
            job.second.input = take_floats(memory, max_rows * job.second.k)
    carve_group(memory, &job.first, max_rows)
    carve_attention(memory, &job.attend, max_rows, max_chunks)
    carve_group(memory, &job.out, max_out_rows)


# ---------------------------------------------------------------------------------------------
# Work

cdef void begin_latent(latent_job *job, const batch *rows, int64_t out_rows) noexcept nogil:
    """Set the rows of a call. One thread calls this, before any thread calls :func:`run_latent`."""
    job.rows = rows
    job.latent_rows.next = job.absorbed.next = job.merged_rows.next = job.expanded.next = 0
    if job.divided:
        job.low.sections[0].rows = job.low.sections[1].rows = rows.rows
        begin_exchange(&job.low)
        begin_rows(&job.values, out_rows)
        job.first.projections[1].output = <float *>job.latent.local
        if job.has_second:
            job.first.projections[0].output = <float *>job.low.sections[0].local
    begin_group(&job.first, rows.rows)
    if job.has_second:
        begin_group(&job.second, rows.rows)
    begin_group(&job.out, out_rows)


cdef void run_latent(latent_job *job, member *m) noexcept nogil:
    cdef int64_t rows = job.rows.rows, out_rows = job.out.num_rows
    run_group(&job.first, m)
    if m.thread == 0:
        begin_attention(&job.attend, job.rows, job.out_rows, job.out.num_rows)
    run_exchange(&job.low, m)
    run_rows(&job.latent_rows, rows, place_latent, job, m)
    if job.has_second:
        run_group(&job.second, m)
        barrier(m)
    run_rows(&job.absorbed, head_items(job, rows), absorb, job, m)
    barrier(m)
    if out_rows == 0:  # only the cache was wanted
        return
    run_attention(&job.attend, m)
    barrier(m)
    run_rows(&job.merged_rows, out_rows, merge, job, m)
    barrier(m)
    run_rows(&job.expanded, head_items(job, out_rows), expand, job, m)
    run_exchange(&job.values, m)
    run_group(&job.out, m)


cdef void norm_query(void *latent, int64_t row, int thread) noexcept nogil:
    """Normalise a row of the low-rank query."""
    cdef latent_job *job = <latent_job *>latent
    cdef float *q = job.second.input + row * job.second.k
    job.attend.table.rms_norm(q, q, job.q_norm, job.norm_eps, job.second.k)


cdef void place_latent(void *latent, int64_t row, int thread) noexcept nogil:
    """Write a row's key and value to the cache."""
    cdef latent_job *job = <latent_job *>latent
    cdef const segment *part = job.rows.segments + job.rows.segment_of[row]
    cdef int64_t position = part.position + row - part.row
    cdef float *c = job.kv + row * (job.latent_dim + job.rope_dim)
    if job.divided:
        load_row(job.latent, row, c)
    job.attend.table.rms_norm(c, c, job.kv_norm, job.norm_eps, job.latent_dim)
    rotate(job, c + job.latent_dim, position)
    store_position(&job.attend.pool, job.attend.table, part.pages, position, 0, c, job.latent_dim + job.rope_dim, c,
                   job.latent_dim)


cdef inline void rotate(const latent_job *job, float *x, int64_t position) noexcept nogil:
    job.attend.table.rope(x, job.rope.cos + position * job.rope.pairs, job.rope.sin + position * job.rope.pairs,
                          job.rope.pairs, job.rope.interleaved)


cdef inline int64_t head_items(const latent_job *job, int64_t rows) noexcept nogil:
    """Items of ``ROWS`` rows by one head."""
    return (rows + ROWS - 1) // ROWS * job.attend.num_heads


cdef void absorb(void *latent, int64_t item, int thread) noexcept nogil:
    """Queries of one head: the rotated part is copied, the other part multiplied by ``k_up``."""
    cdef latent_job *job = <latent_job *>latent
    cdef int64_t head = item % job.attend.num_heads, begin = item // job.attend.num_heads * ROWS, row, position
    cdef int64_t count = min(<int64_t>ROWS, job.rows.rows - begin), width = job.nope_dim + job.rope_dim
    cdef int64_t q_row = job.attend.num_heads * width
    cdef float *q = job.q + head * width
    cdef float *query = job.query + head * job.attend.q_head
    cdef const segment *part
    multiply_head(job, &job.k_up, head, q + begin * q_row, q_row, count, query + begin * job.attend.q_row,
                  job.attend.q_row)
    for row in range(begin, begin + count):
        part = job.rows.segments + job.rows.segment_of[row]
        position = part.position + row - part.row
        rotate(job, q + row * q_row + job.nope_dim, position)
        memcpy(query + row * job.attend.q_row + job.latent_dim, q + row * q_row + job.nope_dim,
               job.rope_dim * sizeof(float))


cdef void merge(void *latent, int64_t out_row, int thread) noexcept nogil:
    cdef latent_job *job = <latent_job *>latent
    cdef int64_t row = out_row if job.out_rows is NULL else job.out_rows[out_row]
    cdef int64_t width = job.attend.num_heads * job.latent_dim
    finish_row(&job.attend, out_row)
    memcpy(job.merged + out_row * width, job.attend.output + row * width, width * sizeof(float))


cdef void expand(void *latent, int64_t item, int thread) noexcept nogil:
    """Results of one head, multiplied by ``v_up``."""
    cdef latent_job *job = <latent_job *>latent
    cdef int64_t head = item % job.attend.num_heads, begin = item // job.attend.num_heads * ROWS
    cdef int64_t count = min(<int64_t>ROWS, job.out.num_rows - begin), width = job.attend.num_heads * job.latent_dim
    cdef int64_t values = job.attend.num_heads * job.v_up.n
    cdef float *out = <float *>job.values.sections[0].local if job.divided else job.out.input
    multiply_head(job, &job.v_up, head, job.merged + begin * width + head * job.latent_dim, width, count,
                  out + begin * values + head * job.v_up.n, values)


cdef void multiply_head(const latent_job *job, const head_matrices *heads, int64_t head, const float *x, int64_t x_stride,
                        int64_t rows, float *out, int64_t out_stride) noexcept nogil:
    cdef dense_task task
    memset(&task, 0, sizeof(task))
    task.x, task.x_stride, task.m, task.out, task.out_stride = x, x_stride, rows, out, out_stride
    task.w = heads.weights + head * heads.n * heads.k * element_bytes(heads.dtype)
    task.dtype, task.w_stride, task.n, task.k = heads.dtype, heads.k, heads.n, heads.k
    job.attend.table.dense(&task)
