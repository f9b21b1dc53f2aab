"""Attention over a paged cache, as phases of a decoder's step.

The positions of a sequence are cut into chunks of ``ATTENTION_CHUNK``, counted from 0. The micro-kernel gives the
maximum, the sum and the weighted values of a chunk; a row's chunks are merged in ascending order. So neither the other
rows of a batch nor the number of threads changes a row's bits. The work is cut in one of two ways::

    many rows    a unit is a tile of rows, by some heads that share a head of the cache; it goes through the chunks
                 and merges them
    few rows     a unit is one row, by some heads, by one chunk ("split"); its result is kept, and finish_row merges
                 a row's results

A tile's queries are its rows by its heads: query ``r * heads + h``.
"""

from libc.stdint cimport int32_t, int64_t
from libc.string cimport memcpy

from marlin_cy.cpu._arena cimport arena, take, take_floats
from marlin_cy.cpu._buffers cimport element_bytes
from marlin_cy.cpu._dispatch cimport ATTENTION_CHUNK, CHUNK_PAGES, KV_BLOCK, MAX_QUERIES, attention_task, ukernel_table
from marlin_cy.cpu._team cimport member, take_item
from marlin_cy.cpu.decoder._batch cimport batch, segment

cdef enum:
    # With more rows, the results of all chunks would need too much memory.
    MAX_SPLIT_ROWS = 16
    # Units of a thread, so that a slow thread does not delay the others.
    UNITS_PER_THREAD = 4


cdef void store_position(const kv_pool *pool, const ukernel_table *table, const int32_t *pages, int64_t position,
                         int64_t head, const float *k, int64_t head_dim, const float *v, int64_t value_dim) noexcept nogil:
    """Write the key and the value of one position to a head of the cache; ``pages`` are the sequence's."""
    cdef int64_t page = pages[position // KV_BLOCK], place = position % KV_BLOCK
    cdef int64_t value_row = value_dim * element_bytes(pool.dtype)
    table.store_keys(pool.keys + head * pool.key_head + page * pool.key_page, k, <int>place, pool.dtype, <int>head_dim)
    table.narrow(pool.values + head * pool.value_head + page * pool.value_page + place * value_row, v, pool.dtype,
                 value_dim)


cdef int64_t chunks_of(int64_t tokens) noexcept nogil:
    """Chunks of the cache that ``tokens`` positions take."""
    return (tokens + ATTENTION_CHUNK - 1) // ATTENTION_CHUNK


# ---------------------------------------------------------------------------------------------
# Memory

cdef void carve_attention(arena *memory, attention_job *job, int64_t max_rows, int64_t max_chunks) noexcept nogil:
    """The layout for batches of at most ``max_rows`` rows in sequences of at most ``max_chunks`` chunks."""
    job.max_partials = min(max_rows, <int64_t>MAX_SPLIT_ROWS) * max_chunks
    job.tiles = <attention_tile *>take(memory, max_rows * <int64_t>sizeof(attention_tile))
    job.areas = <attention_area *>take(memory, job.num_threads * <int64_t>sizeof(attention_area))
    job.buffers = take_floats(memory, job.num_threads * buffer_floats(job))
    job.partial_max = take_floats(memory, job.max_partials * job.num_heads)
    job.partial_sum = take_floats(memory, job.max_partials * job.num_heads)
    job.partial_out = take_floats(memory, job.max_partials * job.num_heads * job.value_dim)


cdef inline int64_t buffer_floats(const attention_job *job) noexcept nogil:
    """Floats that a thread needs: a tile's queries, its merged values, and a chunk's values."""
    return MAX_QUERIES * (job.head_dim + 2 * job.value_dim)


# ---------------------------------------------------------------------------------------------
# The cut into units

cdef void begin_attention(attention_job *job, const batch *rows, const int32_t *needed,
                          int64_t num_needed) noexcept nogil:
    """Cut a batch into units. One thread calls this, before any thread calls :func:`run_attention`.

    ``needed`` has the ``num_needed`` rows whose output is needed, ascending; NULL for all rows.
    """
    cdef int64_t wanted = UNITS_PER_THREAD * job.num_threads, heads = heads_a_pool_head(job)
    job.rows, job.units.next = rows, 0
    job.needed, job.num_needed = needed, num_needed
    job.heads_a_unit = min(heads, <int64_t>MAX_QUERIES)
    cut_into_tiles(job, MAX_QUERIES // job.heads_a_unit, False)
    if job.num_units < wanted and num_needed <= MAX_SPLIT_ROWS:
        cut_into_tiles(job, 1, True)
    while job.num_units < wanted and job.heads_a_unit > 1:
        job.heads_a_unit = (job.heads_a_unit + 1) // 2
        cut_into_tiles(job, 1 if job.split else MAX_QUERIES // min(heads, <int64_t>MAX_QUERIES), job.split)


cdef void cut_into_tiles(attention_job *job, int64_t max_rows, bint split) noexcept nogil:
    """Cut the needed rows into tiles of consecutive rows of one segment."""
    cdef int64_t index = 0, row, position, count, partials = 0
    cdef const segment *part
    cdef attention_tile *tile
    job.split, job.num_tiles = split, 0
    while index < job.num_needed:
        row = needed_row(job, index)
        part = job.rows.segments + job.rows.segment_of[row]
        position, count = part.position + row - part.row, 1
        while (count < max_rows and index + count < job.num_needed and row + count < part.row + part.count
                and needed_row(job, index + count) == row + count):
            count += 1
        tile = job.tiles + job.num_tiles
        job.num_tiles += 1
        tile.segment, tile.row, tile.count = job.rows.segment_of[row], row, count
        tile.first_chunk, tile.end_chunk = first_visible(job, position) // ATTENTION_CHUNK, chunks_of(position + count)
        tile.first_partial = partials
        partials += tile.end_chunk - tile.first_chunk
        index += count
    job.num_units = (partials if split else job.num_tiles) * units_a_tile(job)


cdef inline int64_t needed_row(const attention_job *job, int64_t index) noexcept nogil:
    """The needed row with this number."""
    return index if job.needed is NULL else job.needed[index]


cdef inline int64_t heads_a_pool_head(const attention_job *job) noexcept nogil:
    return job.num_heads // job.num_kv_heads


cdef inline int64_t units_a_tile(const attention_job *job) noexcept nogil:
    return job.num_kv_heads * ((heads_a_pool_head(job) + job.heads_a_unit - 1) // job.heads_a_unit)


cdef int64_t first_visible(const attention_job *job, int64_t position) noexcept nogil:
    """The first position that a row sees."""
    return max(<int64_t>0, position - job.window + 1) if job.window else 0


# ---------------------------------------------------------------------------------------------
# Units

cdef void run_attention(attention_job *job, member *m) noexcept nogil:
    """Do a thread's part. If the work is split, :func:`finish_row` must then be called for each row."""
    cdef int64_t unit = take_item(&job.units, job.num_units, m), per_tile = units_a_tile(job), index, t
    while unit < job.num_units:
        index = unit // per_tile
        if job.split:
            t = 0
            while t + 1 < job.num_tiles and job.tiles[t + 1].first_partial <= index:
                t += 1
            attend_chunk(job, job.tiles + t, index - job.tiles[t].first_partial, unit % per_tile, m.thread)
        else:
            # The last tiles see the most chunks: they come first, so that threads end together.
            attend_tile(job, job.tiles + job.num_tiles - 1 - index, unit % per_tile, m.thread)
        unit = take_item(&job.units, job.num_units, m)


cdef struct unit_heads:
    int64_t pool_head
    int64_t first               # query head
    int64_t count


cdef unit_heads heads_of(const attention_job *job, int64_t number) noexcept nogil:
    """The heads of unit ``number`` of a tile."""
    cdef int64_t parts = units_a_tile(job) // job.num_kv_heads, part = number % parts
    cdef unit_heads h
    h.pool_head = number // parts
    h.count = min(job.heads_a_unit, heads_a_pool_head(job) - part * job.heads_a_unit)
    h.first = h.pool_head * heads_a_pool_head(job) + part * job.heads_a_unit
    return h


cdef void attend_chunk(const attention_job *job, const attention_tile *tile, int64_t number, int64_t unit,
                       int thread) noexcept nogil:
    """Keep the result of a tile of one row for its chunk ``number``."""
    cdef unit_heads h = heads_of(job, unit)
    cdef int64_t partial = (tile.first_partial + number) * job.num_heads + h.first
    cdef attention_area *area = job.areas + thread
    cdef attention_task task
    set_task(job, &task, tile, &h, area)
    task.q, task.q_stride = job.q + tile.row * job.q_row + h.first * job.q_head, job.q_head
    task.max, task.sum = job.partial_max + partial, job.partial_sum + partial
    task.out, task.out_stride = job.partial_out + partial * job.value_dim, job.value_dim
    set_chunk(job, &task, tile, &h, tile.first_chunk + number, area)
    job.table.attention(&task)


cdef void attend_tile(const attention_job *job, const attention_tile *tile, int64_t unit, int thread) noexcept nogil:
    """Merge a tile's chunks in ascending order, and write its output."""
    cdef unit_heads h = heads_of(job, unit)
    cdef attention_area *area = job.areas + thread
    cdef float *q = job.buffers + thread * buffer_floats(job)
    cdef float *merged = q + MAX_QUERIES * job.head_dim
    cdef float *values = merged + MAX_QUERIES * job.value_dim
    cdef float *out
    cdef int64_t chunk, i, queries = tile.count * h.count
    cdef attention_task task
    set_task(job, &task, tile, &h, area)
    for i in range(queries):
        memcpy(q + i * job.head_dim, job.q + (tile.row + i // h.count) * job.q_row + (h.first + i % h.count) * job.q_head,
               job.head_dim * sizeof(float))
        area.sum[i] = 0
    task.q, task.q_stride = q, job.head_dim
    task.max, task.sum, task.out, task.out_stride = area.chunk_max, area.chunk_sum, values, job.value_dim
    for chunk in range(tile.first_chunk, tile.end_chunk):
        set_chunk(job, &task, tile, &h, chunk, area)
        job.table.attention(&task)
        for i in range(queries):
            job.table.attention_merge(area.max + i, area.sum + i, merged + i * job.value_dim, area.chunk_max[i],
                                      area.chunk_sum[i], values + i * job.value_dim, job.value_dim)
    for i in range(queries):
        out = job.output + ((tile.row + i // h.count) * job.num_heads + h.first + i % h.count) * job.value_dim
        memcpy(out, merged + i * job.value_dim, job.value_dim * sizeof(float))
        job.table.attention_finish(out, area.max[i], area.sum[i], sink_of(job, h.first + i % h.count), job.value_dim)


cdef void set_task(const attention_job *job, attention_task *task, const attention_tile *tile, const unit_heads *h,
                   attention_area *area) noexcept nogil:
    """Set the members that all chunks share."""
    task.m, task.d, task.dv = <int>(tile.count * h.count), <int>job.head_dim, <int>job.value_dim
    task.keys = job.pool.keys + h.pool_head * job.pool.key_head
    task.values = job.pool.values + h.pool_head * job.pool.value_head
    task.key_stride, task.value_stride, task.dtype = job.pool.key_page, job.pool.value_page, job.pool.dtype
    task.scale, task.soft_cap = job.scale, job.soft_cap
    task.begin, task.end, task.scratch = area.begin, area.end, &area.scratch


cdef void set_chunk(const attention_job *job, attention_task *task, const attention_tile *tile, const unit_heads *h,
                    int64_t chunk, attention_area *area) noexcept nogil:
    cdef const segment *part = job.rows.segments + tile.segment
    cdef int64_t row, position, begin, end, head
    task.pages = part.pages + chunk * CHUNK_PAGES
    for row in range(tile.count):
        position = part.position + tile.row - part.row + row
        begin = first_visible(job, position) - chunk * ATTENTION_CHUNK
        end = position + 1 - chunk * ATTENTION_CHUNK
        begin, end = max(begin, <int64_t>0), max(<int64_t>0, min(end, <int64_t>ATTENTION_CHUNK))
        for head in range(h.count):
            area.begin[row * h.count + head] = <int32_t>min(begin, <int64_t>ATTENTION_CHUNK)
            area.end[row * h.count + head] = <int32_t>end


cdef inline const float *sink_of(const attention_job *job, int64_t head) noexcept nogil:
    if job.sinks is NULL:
        return NULL
    return job.sinks + head


cdef void finish_row(const attention_job *job, int64_t index) noexcept nogil:
    """Merge the chunks of needed row ``index``, if the work was split. The row's output is complete afterwards."""
    cdef const attention_tile *tile = job.tiles + index
    cdef int64_t head, number, partial
    cdef float largest = 0, total
    cdef float *out
    if not job.split:
        return
    for head in range(job.num_heads):
        out = job.output + (tile.row * job.num_heads + head) * job.value_dim
        total = 0
        for number in range(tile.end_chunk - tile.first_chunk):
            partial = (tile.first_partial + number) * job.num_heads + head
            job.table.attention_merge(&largest, &total, out, job.partial_max[partial], job.partial_sum[partial],
                                      job.partial_out + partial * job.value_dim, job.value_dim)
        job.table.attention_finish(out, largest, total, sink_of(job, head), job.value_dim)
