"""Products of quantised rows with packed experts: one flat list of items, one prange.

:func:`multiply` is one product in a parallel region of its own. A call with several products runs them in one region:
one thread calls :func:`begin_product`, and after a barrier all threads call :func:`run_product`. Its phases:

1. *quantise*: threads take rows until all are quantised (``_quantize.pyx``);
2. *sum*: threads take items. An item is a block of rows of one expert, by two tiles of columns, over all of K. The
   micro-kernel sums it in float32 in the thread's own scratch;
3. *finish*: the epilogue adds the bias or applies the activation, converts, and writes the rows to the output.

K is summed in chunks of ``CHUNK_K`` values: each chunk from zero, then the chunks in ascending order. With too few
items to keep the threads busy, each chunk is an item of its own (split-K) and leaves its sums in a slot of the
workspace; the thread that finishes an item's last chunk adds the chunks up. The order of additions is the same, so the
bits do not depend on the number of threads.
"""

from libc.stdint cimport int64_t, uint8_t
from libc.string cimport memset

from marlin_cy.cpu._arena cimport arena, take, take_floats
from marlin_cy.cpu._atomic cimport fetch_add, load
from marlin_cy.cpu._buffers cimport element_bytes
from marlin_cy.cpu._dispatch cimport CHUNK_K, DTYPE_F32, LANE_K, TILE_N, gemm_fn, gemm_task
from marlin_cy.cpu._quantize cimport begin_quantizing, group_rows, quantize_rows
from marlin_cy.cpu._store cimport tile_offset
from marlin_cy.cpu._team cimport member, run_team

import numpy as np

cdef enum:
    # With fewer items than this per thread, K is split. Otherwise some threads would be idle at the end.
    MIN_ITEMS_PER_THREAD = 4
    # A thread takes several items at a time, but in at least so many turns, so that a slow or busy thread does not
    # delay the others.
    MAX_ITEMS_PER_TURN = 8
    TURNS_PER_THREAD = 32


ctypedef void item_fn(const gemm_job *job, int64_t item, int thread) noexcept nogil


# ---------------------------------------------------------------------------------------------
# Setting up a job

cdef void set_quantize_job(quantize_job *job, Workspace workspace, CpuGptqStore store) noexcept:
    """Set the members that the workspace and the weights determine; zero the rest."""
    memset(job, 0, sizeof(quantize_job))
    job.table, job.planes, job.num_threads = workspace.table, workspace.planes, workspace.num_threads
    job.k, job.packed_k, job.group_size = store.k, store.view.packed_k, store.view.group_size
    job.orders = store.view.orders


cdef void set_gemm_job(gemm_job *job, Workspace workspace, CpuGptqStore store, const float[:, ::1] bias) noexcept:
    """Set the members that the workspace, the weights and a stack's bias determine, for all columns; zero the rest.

    The job then points into itself: do not copy it.
    """
    memset(job, 0, sizeof(gemm_job))
    job.table, job.planes, job.num_threads = workspace.table, workspace.planes, workspace.num_threads
    job.store = store.view
    job.out_width = job.all_columns.end = store.n
    set_columns(job, &job.all_columns, 1)
    if bias is not None:
        job.bias, job.bias_stride = &bias[0, 0], store.n


cdef void set_columns(gemm_job *job, const column_range *ranges, int64_t count) noexcept:
    """Compute these columns. Two tiles are a panel; a range may have fewer panels than ``panels``."""
    cdef int64_t i, tiles
    job.ranges, job.panels = ranges, 0
    for i in range(count):
        tiles = (ranges[i].end + TILE_N - 1) // TILE_N - ranges[i].begin // TILE_N
        job.panels = max(job.panels, (tiles + 1) // 2)


cdef void set_activation(gemm_job *job, int64_t inner, int activation) noexcept:
    """Apply an activation to ``inner`` gates and ups. A panel is a tile of gates and the tile of their ups."""
    job.inner = job.out_width = inner
    job.panels = (inner + TILE_N - 1) // TILE_N
    job.activation = activation


cdef void set_rectified(gemm_job *job) noexcept:
    """Square and rectify the product: the activation of a layer whose experts have no gates."""
    job.rectified, job.out_dtype = True, DTYPE_F32


cdef void set_output(gemm_job *job, const matrix *output) noexcept:
    job.output, job.out_dtype, job.out_width = output.data, output.dtype, output.width


cdef void carve_gemm(arena *memory, gemm_job *job) noexcept nogil:
    """The layout of the threads' scratch, and of slots for split-K with as many blocks as :func:`is_split` allows."""
    cdef int64_t max_items = MIN_ITEMS_PER_THREAD * job.num_threads
    job.areas = <thread_area *>take(memory, job.num_threads * <int64_t>sizeof(thread_area))
    if num_chunks(job) > 1 and job.panels < max_items:
        job.slots = take_floats(memory, max_items * num_chunks(job) * slot_floats(job))
        job.arrivals = <int64_t *>take(memory, max_items * <int64_t>sizeof(int64_t))


# ---------------------------------------------------------------------------------------------
# The flat list of items

cdef struct product_run:
    gemm_job *job
    quantize_job *rows


cdef void multiply(gemm_job *job, quantize_job *rows, const row_plan *plan) noexcept nogil:
    """Quantise the rows of a plan and multiply them by their experts."""
    cdef product_run run
    run.job, run.rows = job, rows
    begin_product(job, rows, plan)
    run_team(job.num_threads, run_alone, &run)


cdef void run_alone(void *product, member *m) noexcept nogil:
    cdef product_run *run = <product_run *>product
    run_product(run.job, run.rows, m)


cdef void begin_product(gemm_job *job, quantize_job *rows, const row_plan *plan) noexcept nogil:
    """Prepare a product. One thread calls this, before any thread calls :func:`run_product`."""
    begin_quantizing(rows, plan)
    begin_items(job, rows, plan)


cdef void run_product(gemm_job *job, quantize_job *rows, const member *m) noexcept nogil:
    """Do a thread's part of a product. Outputs are complete when all threads have returned."""
    quantize_rows(rows, m)
    do_items(job, m)


cdef void begin_items(gemm_job *job, const quantize_job *rows, const row_plan *plan) noexcept nogil:
    """Prepare the items of a product of ``rows``, which may be quantised later, and may serve other products too."""
    cdef int64_t items
    job.a, job.meta, job.num_quantized = rows.a, rows.meta, rows.num_rows
    job.in_rows, job.out_rows = plan.in_rows, plan.out_rows
    job.blocks, job.num_blocks = plan.blocks, plan.num_blocks
    items = job.num_blocks * job.panels
    if is_split(job):
        memset(job.arrivals, 0, items * sizeof(int64_t))
        items *= num_chunks(job)
    set_shares(job, items)


cdef void do_items(const gemm_job *job, const member *m) noexcept nogil:
    """Do a thread's part of a product whose rows are quantised."""
    cdef int64_t items = job.num_blocks * job.panels
    if is_split(job):
        work(job, m.thread, 1, split_item)
    else:
        work(job, m.thread, min(<int64_t>MAX_ITEMS_PER_TURN, max(<int64_t>1, items // (TURNS_PER_THREAD * job.num_threads))),
             whole_item)


cdef inline bint is_split(const gemm_job *job) noexcept nogil:
    return job.slots is not NULL and job.num_blocks * job.panels < MIN_ITEMS_PER_THREAD * job.num_threads


cdef void set_shares(const gemm_job *job, int64_t items) noexcept nogil:
    cdef int thread
    for thread in range(job.num_threads):
        job.areas[thread].next_item = items * thread // job.num_threads
        job.areas[thread].end_item = items * (thread + 1) // job.num_threads


cdef void work(const gemm_job *job, int thread, int64_t turn, item_fn *do_item) noexcept nogil:
    """Do a thread's own share of the items, where it streams adjacent tiles, then items that no thread has taken.

    The counter of a finished share is only read. An addition would take its cache line away from all other
    threads, once for every pair of threads.
    """
    cdef int64_t begin, item
    cdef int other
    cdef thread_area *area
    for other in range(job.num_threads):
        area = job.areas + (thread + other) % job.num_threads
        while load(&area.next_item) < area.end_item:
            begin = fetch_add(&area.next_item, turn)
            for item in range(begin, min(begin + turn, area.end_item)):
                do_item(job, item, thread)


cdef void whole_item(const gemm_job *job, int64_t item, int thread) noexcept nogil:
    cdef thread_area *area = job.areas + thread
    if is_empty(job, item):
        return
    sum_item(job, item, 0, num_chunks(job), area.out, &area.scratch)
    finish_item(job, item, area.out)


cdef void split_item(const gemm_job *job, int64_t index, int thread) noexcept nogil:
    cdef int64_t item = index // num_chunks(job), chunk = index % num_chunks(job)
    if is_empty(job, item):
        return
    sum_item(job, item, chunk, chunk + 1, job.slots + index * slot_floats(job), &job.areas[thread].scratch)
    if fetch_add(job.arrivals + item, 1) == num_chunks(job) - 1:
        join_item(job, item)


cdef void join_item(const gemm_job *job, int64_t item) noexcept nogil:
    cdef int64_t chunks = num_chunks(job), written = job.blocks[item // job.panels].count * PAIR_N, chunk, i
    cdef float *out = job.slots + item * chunks * slot_floats(job)
    cdef const float *slot
    for chunk in range(1, chunks):
        slot = out + chunk * slot_floats(job)
        for i in range(written):
            out[i] += slot[i]
    finish_item(job, item, out)


cdef inline int64_t num_chunks(const gemm_job *job) noexcept nogil:
    return (job.store.packed_k + CHUNK_K - 1) // CHUNK_K


cdef inline int64_t slot_floats(const gemm_job *job) noexcept nogil:
    return job.table.mc * PAIR_N


# ---------------------------------------------------------------------------------------------
# Sums

cdef struct tile_pair:
    const uint8_t *tile[2]      # packed tiles; the second is NULL in an item of one tile


cdef inline bint is_empty(const gemm_job *job, int64_t item) noexcept nogil:
    """Whether the item's block has fewer panels than others."""
    cdef const column_range *columns = job.ranges + job.blocks[item // job.panels].columns
    return columns.begin // TILE_N + 2 * (item % job.panels) > (columns.end - 1) // TILE_N


cdef tile_pair tiles_of(const gemm_job *job, int64_t item) noexcept nogil:
    """The packed tiles of an item that is not empty."""
    cdef int64_t panel = item % job.panels, tile
    cdef const row_block *block = job.blocks + item // job.panels
    cdef const column_range *columns = job.ranges + block.columns
    cdef const uint8_t *expert = job.store.data + block.expert * job.store.expert_stride
    cdef tile_pair pair
    if job.inner:
        # inner is the K of the second product, so a multiple of 32: the ups of a tile of gates are a tile too.
        pair.tile[0] = expert + tile_offset(&job.store, panel)
        pair.tile[1] = expert + tile_offset(&job.store, panel + job.inner // TILE_N)
    else:
        tile = columns.begin // TILE_N + 2 * panel
        pair.tile[0] = expert + tile_offset(&job.store, tile)
        pair.tile[1] = expert + tile_offset(&job.store, tile + 1) if tile < (columns.end - 1) // TILE_N else NULL
    return pair


cdef void sum_item(const gemm_job *job, int64_t item, int64_t chunk_begin, int64_t chunk_end, float *out,
                   gemm_scratch *scratch) noexcept nogil:
    """The sums of an item over some chunks."""
    cdef const packed_view *store = &job.store
    cdef const row_block *block = job.blocks + item // job.panels
    cdef gemm_fn *gemm = job.table.gemm[store.codes][job.planes - 1]
    cdef tile_pair pair = tiles_of(job, item)
    cdef tile_pair following = pair
    cdef int64_t chunk_groups = CHUNK_K // store.group_size, chunk_bytes = CHUNK_K // LANE_K * store.block_bytes
    cdef int64_t chunk, group, groups
    cdef gemm_task task
    cdef int t
    if item + 1 < job.num_blocks * job.panels and not is_empty(job, item + 1):
        following = tiles_of(job, item + 1)
    task.scales = store.scales
    task.group_blocks = store.group_size // LANE_K
    task.a_row_stride = <int64_t>store.group_size * job.planes
    task.a_group_stride = task.a_row_stride * group_rows(job.num_quantized)
    task.meta_group_stride = group_rows(job.num_quantized)
    task.rows = job.in_rows + block.begin
    task.m = <int>block.count
    task.out = out
    task.scratch = scratch
    for chunk in range(chunk_begin, chunk_end):
        group = chunk * chunk_groups
        groups = min(chunk_groups, store.num_groups - group)
        for t in range(2):
            if pair.tile[t] is NULL:
                task.header[t] = task.body[t] = NULL
                continue
            task.header[t] = pair.tile[t] + chunk * store.chunk_header_bytes
            task.body[t] = pair.tile[t] + store.header_bytes + chunk * chunk_bytes
            if chunk + 1 < chunk_end:
                task.next[t] = task.body[t] + chunk_bytes
            else:
                task.next[t] = following.tile[0] if following.tile[t] is NULL else following.tile[t]
        task.num_groups = <int>groups
        task.last_group_blocks = <int>(
            min(<int64_t>store.group_size, store.packed_k - (group + groups - 1) * store.group_size) // LANE_K)
        task.a = job.a + group * task.a_group_stride
        task.meta = job.meta + group * task.meta_group_stride
        task.accumulate = chunk > chunk_begin
        gemm(&task)


# ---------------------------------------------------------------------------------------------
# Epilogues

cdef void finish_item(const gemm_job *job, int64_t item, const float *sums) noexcept nogil:
    """Write an item's sums to its rows and columns of the output."""
    cdef int64_t panel = item % job.panels
    cdef const row_block *block = job.blocks + item // job.panels
    cdef const column_range *columns = job.ranges + block.columns
    cdef const int64_t *rows = job.out_rows + block.begin
    cdef const float *bias = NULL
    cdef const float *up_bias = NULL
    cdef int64_t tile_column, begin, end, out_column, element = element_bytes(job.out_dtype)
    if job.bias is not NULL:
        bias = job.bias + block.expert * job.bias_stride
    if job.inner:
        if bias is not NULL:
            bias += panel * TILE_N
            up_bias = bias + job.inner
        job.table.glu_epilogue(<float *>job.output + panel * TILE_N, job.out_width, rows, <int>block.count, sums, bias,
                               up_bias, job.activation)
        return
    tile_column = (columns.begin // TILE_N + 2 * panel) * TILE_N
    begin, end = max(tile_column, columns.begin), min(tile_column + PAIR_N, columns.end)
    out_column = columns.out_begin + begin - columns.begin
    if bias is not NULL:
        bias += out_column
    job.table.store_rows(
        job.output + out_column * element, job.out_width * element, rows, <int>block.count,
        sums + begin - tile_column, bias, <int>(end - begin), job.out_dtype)
    if job.rectified:
        rectify(<float *>job.output + out_column, job.out_width, rows, block.count, end - begin)


cdef void rectify(float *output, int64_t width, const int64_t *rows, int64_t count, int64_t columns) noexcept nogil:
    """``max(x, 0)`` squared, in place. A NaN stays a NaN."""
    cdef float *row
    cdef int64_t i, j
    for i in range(count):
        row = output + rows[i] * width
        for j in range(columns):
            row[j] = 0 if row[j] < 0 else row[j] * row[j]


# ---------------------------------------------------------------------------------------------
# For tests

cdef void no_work(const gemm_job *job, int64_t item, int thread) noexcept nogil:
    pass


def counters_after(int num_threads, int64_t items):
    """int64 ``[num_threads, 2]``: each share's counter and end, after the threads took all items one after another.

    Items are taken one at a time and nothing is computed. A counter past its end shows needless additions. For
    tests.
    """
    cdef gemm_job job
    areas = np.zeros(num_threads * sizeof(thread_area), np.uint8)
    counters = np.empty((num_threads, 2), np.int64)
    cdef unsigned char[::1] memory = areas
    cdef int64_t[:, ::1] result = counters
    cdef int thread
    memset(&job, 0, sizeof(job))
    job.num_threads, job.areas = num_threads, <thread_area *>&memory[0]
    set_shares(&job, items)
    for thread in range(num_threads):
        work(&job, thread, 1, no_work)
    for thread in range(num_threads):
        result[thread, 0], result[thread, 1] = job.areas[thread].next_item, job.areas[thread].end_item
    return counters
