"""Products of quantised rows with packed experts: one flat list of work, one prange.

An *item* is a block of rows of one expert, as many as suit the ISA, by two tiles of columns, over all of
K. The micro-kernel sums it in float32 in the thread's own scratch; the epilogue adds the bias or
applies the activation, converts, and writes the rows to where they belong.

K is summed in chunks of ``CHUNK_K`` values: each chunk from zero, then the chunks in ascending order.
That is so whether one thread computes them all or, where there are fewer items than would keep the
threads busy, each chunk is an item of its own (split-K), which leaves its sums in a workspace slot;
whoever finishes the last chunk adds them up. So the bits do not depend on the number of threads.
"""

from cython.parallel cimport prange
from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.stdlib cimport qsort
from libc.string cimport memset

from marlin_cy.cpu._atomic cimport fetch_add
from marlin_cy.cpu._buffers cimport float_matrix, int32_vector, matrix, refuse_overlap
from marlin_cy.cpu._dispatch cimport (
    BLOCK_BYTES, CHUNK_K, DTYPE_F32, GROUP_HEADER_BYTES, LANE_K, TILE_N, gemm_fn, gemm_task,
)
from marlin_cy.cpu._quantize cimport (
    begin_quantizing, group_rows, place_quantized, quantize_job, quantize_rows, quantized_bytes, row_buffer_floats,
)

cdef enum:
    # Fewer items than this per thread leave threads idle at the end: then K is split.
    MIN_ITEMS_PER_THREAD = 4
    # Items taken at a time, and how many such turns a thread should have at least, so that one that is
    # slow, or has other work to do, does not hold up the rest.
    MAX_ITEMS_PER_TURN = 8
    TURNS_PER_THREAD = 32


ctypedef void item_fn(const gemm_job *job, int64_t item, int thread) noexcept nogil


# ---------------------------------------------------------------------------------------------
# Items

cdef inline int64_t first_tile(const gemm_job *job) noexcept nogil:
    return job.column_begin // TILE_N


cdef inline int64_t panels(const gemm_job *job) noexcept nogil:
    """Items that the columns are cut into."""
    if job.inner:
        return (job.inner + TILE_N - 1) // TILE_N
    return ((job.column_end + TILE_N - 1) // TILE_N - first_tile(job) + 1) // 2


cdef inline int64_t num_chunks(const gemm_job *job) noexcept nogil:
    return (job.store.packed_k + CHUNK_K - 1) // CHUNK_K


cdef inline bint is_split(const gemm_job *job, int num_threads) noexcept nogil:
    return num_chunks(job) > 1 and job.num_blocks * panels(job) < MIN_ITEMS_PER_THREAD * num_threads


cdef inline int64_t slot_floats(const gemm_job *job) noexcept nogil:
    return job.table.mc * PAIR_N


cdef inline int64_t *arrivals(const gemm_job *job) noexcept nogil:
    """How many of its chunks each item has: behind the slots."""
    return <int64_t *>(job.slots + job.num_blocks * panels(job) * num_chunks(job) * slot_floats(job))


cdef int64_t split_bytes(const gemm_job *job, int num_threads) noexcept nogil:
    """Bytes for split-K that ``run_gemm`` needs at most, whatever the number of blocks."""
    cdef int64_t most_items = MIN_ITEMS_PER_THREAD * num_threads
    if num_chunks(job) == 1 or panels(job) >= most_items:
        return 0
    return most_items * (num_chunks(job) * slot_floats(job) * <int64_t>sizeof(float) + <int64_t>sizeof(int64_t))


cdef struct tile_pair:
    const uint8_t *tile[2]      # packed tiles; the second is NULL where an item has one


cdef tile_pair tiles_of(const gemm_job *job, int64_t item) noexcept nogil:
    """The packed tiles of an item."""
    cdef int64_t num_panels = panels(job), panel = item % num_panels, tile
    cdef const uint8_t *expert = job.store.data + job.blocks[item // num_panels].expert * job.store.expert_stride
    cdef tile_pair pair
    if job.inner:
        # inner is the K of the second product, so a multiple of 32: the ups of a tile of gates are a tile too.
        pair.tile[0] = expert + panel * job.store.tile_stride
        pair.tile[1] = pair.tile[0] + job.inner // TILE_N * job.store.tile_stride
    else:
        tile = first_tile(job) + 2 * panel
        pair.tile[0] = expert + tile * job.store.tile_stride
        pair.tile[1] = pair.tile[0] + job.store.tile_stride if tile < (job.column_end - 1) // TILE_N else NULL
    return pair


cdef void sum_item(const gemm_job *job, int64_t item, int64_t chunk_begin, int64_t chunk_end, float *out,
                   gemm_scratch *scratch) noexcept nogil:
    """The sums of an item over some chunks."""
    cdef const packed_view *store = &job.store
    cdef const row_block *block = job.blocks + item // panels(job)
    cdef gemm_fn *gemm = job.table.gemm[store.codes][job.planes - 1]
    cdef tile_pair pair = tiles_of(job, item)
    cdef tile_pair following = tiles_of(job, min(item + 1, job.num_blocks * panels(job) - 1))
    cdef int64_t chunk_groups = CHUNK_K // store.group_size, chunk_bytes = CHUNK_K // LANE_K * BLOCK_BYTES
    cdef int64_t chunk, group, groups
    cdef gemm_task task
    cdef int t
    task.scale_dtype = store.scale_dtype
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
            task.header[t] = pair.tile[t] + group * GROUP_HEADER_BYTES
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
    """Write an item's sums to the rows of the output that they belong to."""
    cdef int64_t num_panels = panels(job), panel = item % num_panels
    cdef const row_block *block = job.blocks + item // num_panels
    cdef const int64_t *rows = job.out_rows + block.begin
    cdef const float *bias = NULL
    cdef const float *up_bias = NULL
    cdef int64_t tile_column, begin, end, element = 4 if job.out_dtype == DTYPE_F32 else 2
    if job.bias is not NULL:
        bias = job.bias + block.expert * job.bias_stride
    if job.inner:
        if bias is not NULL:
            bias += panel * TILE_N
            up_bias = bias + job.inner
        job.table.glu_epilogue(<float *>job.output + panel * TILE_N, job.out_width, rows, <int>block.count, sums, bias,
                            up_bias, job.activation)
        return
    tile_column = (first_tile(job) + 2 * panel) * TILE_N
    begin, end = max(tile_column, job.column_begin), min(tile_column + PAIR_N, job.column_end)
    if bias is not NULL:
        bias += begin - job.column_begin
    job.table.store_rows(
        job.output + (begin - job.column_begin) * element, job.out_width * element, rows, <int>block.count,
        sums + begin - tile_column, bias, <int>(end - begin), job.out_dtype)


# ---------------------------------------------------------------------------------------------
# The flat list of work

cdef void whole_item(const gemm_job *job, int64_t item, int thread) noexcept nogil:
    cdef thread_area *area = job.areas + thread
    sum_item(job, item, 0, num_chunks(job), area.out, &area.scratch)
    finish_item(job, item, area.out)


cdef void join_item(const gemm_job *job, int64_t item) noexcept nogil:
    cdef int64_t chunks = num_chunks(job), written = job.blocks[item // panels(job)].count * PAIR_N, chunk, i
    cdef float *out = job.slots + item * chunks * slot_floats(job)
    cdef const float *slot
    for chunk in range(1, chunks):
        slot = out + chunk * slot_floats(job)
        for i in range(written):
            out[i] += slot[i]
    finish_item(job, item, out)


cdef void split_item(const gemm_job *job, int64_t index, int thread) noexcept nogil:
    cdef int64_t item = index // num_chunks(job), chunk = index % num_chunks(job)
    sum_item(job, item, chunk, chunk + 1, job.slots + index * slot_floats(job), &job.areas[thread].scratch)
    if fetch_add(arrivals(job) + item, 1) == num_chunks(job) - 1:
        join_item(job, item)


cdef void work(const gemm_job *job, int thread, int num_threads, int64_t turn, item_fn *do_item) noexcept nogil:
    """Do a thread's own share of the list, then what others have not yet taken of theirs."""
    cdef int64_t begin, item
    cdef int other
    cdef thread_area *area
    for other in range(num_threads):
        area = job.areas + (thread + other) % num_threads
        begin = fetch_add(&area.next_item, turn)
        while begin < area.end_item:
            for item in range(begin, min(begin + turn, area.end_item)):
                do_item(job, item, thread)
            begin = fetch_add(&area.next_item, turn)


cdef void share_out(const gemm_job *job, quantize_job *rows, int64_t items, int64_t max_turn, int num_threads,
                    item_fn *do_item) noexcept nogil:
    """One prange over the list, after the rows have been quantised. Each thread begins at its own share of it: there
    it streams neighbouring tiles."""
    cdef int64_t turn = min(max_turn, max(<int64_t>1, items // (TURNS_PER_THREAD * num_threads)))
    cdef int thread
    for thread in range(num_threads):
        job.areas[thread].next_item = items * thread // num_threads
        job.areas[thread].end_item = items * (thread + 1) // num_threads
    begin_quantizing(rows)
    for thread in prange(num_threads, num_threads=num_threads, schedule="static", chunksize=1):
        quantize_rows(rows, thread, num_threads)
        work(job, thread, num_threads, turn, do_item)


cdef void run_gemm(const gemm_job *job, quantize_job *rows, int num_threads) noexcept nogil:
    """Quantise rows and do a job that multiplies them, on ``num_threads`` threads."""
    cdef int64_t items = job.num_blocks * panels(job)
    if is_split(job, num_threads):
        memset(arrivals(job), 0, items * sizeof(int64_t))
        share_out(job, rows, items * num_chunks(job), 1, num_threads, split_item)
    else:
        share_out(job, rows, items, MAX_ITEMS_PER_TURN, num_threads, whole_item)


# ---------------------------------------------------------------------------------------------
# Row plans: which rows go through which expert

cdef int64_t max_blocks(const ukernel_table *table, int64_t runs, int64_t pairs) noexcept nogil:
    """Blocks that so many runs of so many pairs in all are cut into, at most."""
    return runs + pairs // table.mc


cdef int64_t cut_into_blocks(row_block *blocks, int64_t expert, int64_t begin, int64_t count,
                             const ukernel_table *table) noexcept nogil:
    """Cut a run of one expert's pairs into blocks; returns how many.

    Blocks are as even as they can be in whole steps of ``mr`` rows, which micro-kernels take at
    full speed; what is left over is in the last.
    """
    cdef int64_t mc = table.mc, mr = table.mr
    cdef int64_t parts = (count + mc - 1) // mc, steps = (count + mr - 1) // mr, part
    cdef int64_t first, end
    for part in range(parts):
        first, end = steps * part // parts * mr, min(steps * (part + 1) // parts * mr, count)
        blocks[part] = row_block(expert=expert, begin=begin + first, count=end - first)
    return parts


cdef int64_t row_places_bytes(int64_t pairs, int64_t input_rows) noexcept nogil:
    return pairs * <int64_t>(sizeof(int64_t) + 4 * sizeof(int32_t)) + input_rows * <int64_t>sizeof(int32_t)


cdef void set_row_places(row_places *places, void *memory, int64_t pairs, int64_t input_rows) noexcept nogil:
    """Point into memory of :func:`row_places_bytes` bytes, aligned to 8."""
    places.input_rows = <int64_t *>memory
    places.in_rows = <int32_t *>(places.input_rows + pairs)
    places.row_orders = places.in_rows + pairs
    places.next_copy = places.row_orders + pairs
    places.distinct = places.next_copy + pairs
    places.row_place = places.distinct + pairs


cdef void place_block(row_places *places, const row_block *block, const int32_t *pair_rows, int32_t order,
                      bint one_order, bint consecutive) noexcept nogil:
    cdef int64_t pair, row
    cdef int32_t before, place
    for pair in range(block.begin, block.begin + block.count):
        row = pair_rows[pair]
        before = places.row_place[row] if one_order else -1
        if before >= 0 and not consecutive:
            places.in_rows[pair] = before
            continue
        place = <int32_t>places.num_rows
        places.num_rows += 1
        if before >= 0:
            places.next_copy[before] = place
        else:
            places.distinct[places.num_distinct] = place
            places.num_distinct += 1
        places.input_rows[place], places.row_orders[place], places.next_copy[place] = row, order, -1
        places.row_place[row] = places.in_rows[pair] = place


cdef void place_rows(row_places *places, const row_block *blocks, int64_t num_blocks, const int32_t *pair_rows,
                     const int32_t *order_of, bint one_order, int64_t input_rows,
                     int min_matrix_rows) noexcept nogil:
    """Decide where quantised rows lie. ``order_of`` has the order of K of each expert, ``one_order`` says that they
    are the same.

    An input row has one place, but for blocks of ``min_matrix_rows`` rows or more (0: no blocks), which have places of
    their own; and with several orders every pair has.
    """
    cdef int64_t b
    cdef bint large, is_large
    places.num_rows = places.num_distinct = 0
    memset(places.row_place, 0xff, input_rows * sizeof(int32_t))
    # Large blocks first: then small ones need no places but for rows that are in no large one.
    for large in range(1, -1, -1):
        for b in range(num_blocks):
            is_large = min_matrix_rows > 0 and blocks[b].count >= min_matrix_rows
            if is_large == large:
                place_block(places, blocks + b, pair_rows, order_of[blocks[b].expert], one_order, large)


cdef void use_row_places(quantize_job *job, const row_places *places) noexcept nogil:
    job.num_rows, job.num_distinct = places.num_rows, places.num_distinct
    job.input_rows, job.row_orders = places.input_rows, places.row_orders
    job.distinct, job.next_copy = places.distinct, places.next_copy


cdef int64_t plan_bytes(const ukernel_table *table, int64_t pairs, int64_t runs, int64_t input_rows) noexcept nogil:
    return (row_places_bytes(pairs, input_rows) + max_blocks(table, runs, pairs) * <int64_t>sizeof(row_block)
            + pairs * <int64_t>(sizeof(int64_t) + sizeof(int32_t)) + <int64_t>sizeof(int64_t))


cdef class RowPlanner:
    """Collects (expert, input row, output row)."""

    cdef row_plan plan
    cdef bint one_order
    cdef const ukernel_table *table
    cdef const int32_t *order_of
    cdef int64_t run_expert, run_begin, input_rows

    cdef int begin(self, Workspace workspace, CpuGptqStore store, int64_t pairs, int64_t runs,
                   int64_t input_rows) except -1:
        cdef char *memory = <char *>workspace.reserve(
            &workspace.rows, plan_bytes(workspace.table, pairs, runs, input_rows))
        memset(&self.plan, 0, sizeof(row_plan))
        self.plan.out_rows = <int64_t *>memory
        self.plan.blocks = <row_block *>(self.plan.out_rows + pairs)
        self.table = workspace.table
        set_row_places(
            &self.plan.places, self.plan.blocks + max_blocks(self.table, runs, pairs), pairs, input_rows)
        self.plan.pair_rows = self.plan.places.row_place + input_rows
        self.one_order = len(store.group_orders) == 1
        self.order_of = store.view.order_of
        self.run_begin, self.input_rows = 0, input_rows
        return 0

    cdef void start_run(self, int64_t expert) noexcept nogil:
        """The pairs that follow are this expert's."""
        if self.plan.num_pairs > self.run_begin and expert == self.run_expert:
            return
        self.end_run()
        self.run_expert = expert

    cdef void end_run(self) noexcept nogil:
        self.plan.num_blocks += cut_into_blocks(
            self.plan.blocks + self.plan.num_blocks, self.run_expert, self.run_begin,
            self.plan.num_pairs - self.run_begin, self.table)
        self.run_begin = self.plan.num_pairs

    cdef void add(self, int64_t input_row, int64_t output_row) noexcept nogil:
        self.plan.pair_rows[self.plan.num_pairs] = <int32_t>input_row
        self.plan.out_rows[self.plan.num_pairs] = output_row
        self.plan.num_pairs += 1

    cdef void finish(self) noexcept nogil:
        """All pairs are there."""
        self.end_run()
        place_rows(&self.plan.places, self.plan.blocks, self.plan.num_blocks, self.plan.pair_rows, self.order_of,
                   self.one_order, self.input_rows, self.table.min_matrix_rows)


cdef void set_quantize_job(quantize_job *job, Workspace workspace, CpuGptqStore store) noexcept:
    """What follows from the settings and the weights; the rest is zero."""
    memset(job, 0, sizeof(quantize_job))
    job.table, job.planes = workspace.table, workspace.planes
    job.k, job.packed_k, job.group_size = store.k, store.view.packed_k, store.view.group_size
    job.orders = store.view.orders


cdef void set_gemm_job(gemm_job *job, Workspace workspace, CpuGptqStore store, const float[:, ::1] bias) noexcept:
    """What follows from the settings, the weights and a stack's bias, for all columns; the rest is zero."""
    memset(job, 0, sizeof(gemm_job))
    job.table, job.planes = workspace.table, workspace.planes
    job.store = store.view
    job.column_end = job.out_width = store.n
    if bias is not None:
        job.bias, job.bias_stride = &bias[0, 0], store.n


cdef void set_output(gemm_job *job, const matrix *output, int64_t column) noexcept:
    """Write to ``output``, the first column computed to its column ``column``."""
    job.output = output.data + column * (4 if output.dtype == DTYPE_F32 else 2)
    job.out_dtype = output.dtype
    job.out_width = output.width


cdef int run_plan(Workspace workspace, CpuGptqStore store, const row_plan *plan, const matrix *input,
                  gemm_job *job) except -1:
    """Quantise the rows of a plan and multiply them by their experts."""
    cdef quantize_job quantize
    cdef int64_t row_floats = row_buffer_floats(store.k, store.view.packed_k), slots_bytes
    set_quantize_job(&quantize, workspace, store)
    quantize.input, quantize.dtype = input.data, input.dtype
    use_row_places(&quantize, &plan.places)
    quantize.row_buffers = <float *>workspace.reserve(&workspace.floats, 4 * row_floats * workspace.num_threads)
    place_quantized(&quantize, workspace.reserve(&workspace.quantized, quantized_bytes(
        quantize.num_rows, store.view.packed_k, store.view.group_size, workspace.planes)))
    job.a, job.meta, job.num_quantized = quantize.a, quantize.meta, quantize.num_rows
    job.in_rows, job.out_rows = plan.places.in_rows, plan.out_rows
    job.blocks, job.num_blocks = plan.blocks, plan.num_blocks
    job.areas = <thread_area *>workspace.reserve(&workspace.threads, sizeof(thread_area) * workspace.num_threads)
    slots_bytes = split_bytes(job, workspace.num_threads)
    if slots_bytes:
        job.slots = <float *>workspace.reserve(&workspace.slots, slots_bytes)
    with nogil:
        run_gemm(job, &quantize, workspace.num_threads)
    return 0


# ---------------------------------------------------------------------------------------------
# Entry points: check everything, then work

cdef struct dispatch:
    int64_t expert
    int64_t in_row
    int64_t out_row
    int64_t m


cdef int by_out_row(const void *a, const void *b) noexcept nogil:
    cdef int64_t left = (<const dispatch *>a).out_row, right = (<const dispatch *>b).out_row
    return (left > right) - (left < right)


cdef int check_dispatches(const int64_t[:, ::1] dispatches, CpuGptqStore store, const matrix *input,
                          const matrix *output) except -1:
    cdef int64_t i, m
    for i in range(dispatches.shape[0]):
        if not 0 <= dispatches[i, 0] < store.num_experts:
            raise IndexError(
                f"dispatches[{i}]: got expert_idx {dispatches[i, 0]}, expected 0 to {store.num_experts - 1}")
        m = dispatches[i, 3]
        if m < 0:
            raise ValueError(f"dispatches[{i}]: got m {m}, expected 0 or more")
        if dispatches[i, 1] < 0 or dispatches[i, 1] > input.rows - m:
            raise IndexError(f"dispatches[{i}]: got {m} input rows from {dispatches[i, 1]} on, "
                             f"expected them within the input's {input.rows}")
        if dispatches[i, 2] < 0 or dispatches[i, 2] > output.rows - m:
            raise IndexError(f"dispatches[{i}]: got {m} output rows from {dispatches[i, 2]} on, "
                             f"expected them within the output's {output.rows}")
    return 0


cdef int check_disjoint(dispatch *sorted_copy, const int64_t[:, ::1] dispatches) except -1:
    """Refuse output rows that two dispatches write; ``sorted_copy`` has room for all of them."""
    cdef int64_t i, count = 0
    cdef dispatch *before
    for i in range(dispatches.shape[0]):
        if dispatches[i, 3]:
            sorted_copy[count] = dispatch(dispatches[i, 0], dispatches[i, 1], dispatches[i, 2], dispatches[i, 3])
            count += 1
    qsort(sorted_copy, count, sizeof(dispatch), by_out_row)
    for i in range(1, count):
        before = sorted_copy + i - 1
        if before.out_row + before.m > sorted_copy[i].out_row:
            raise ValueError(
                f"dispatches: got overlapping output rows {before.out_row} to {before.out_row + before.m} and "
                f"{sorted_copy[i].out_row} to {sorted_copy[i].out_row + sorted_copy[i].m}, expected separate ones")
    return 0


def gemm_batched(Workspace workspace, CpuGptqStore store, const float[:, ::1] bias, input,
                 const int64_t[:, ::1] dispatches, output):
    """``MarlinExpertStack.gemm_phase_batched`` on packed weights; ``bias`` is ``[experts, n]`` or None."""
    cdef matrix inp = float_matrix(input, "input", store.k, False)
    cdef matrix out = float_matrix(output, "output", store.n, True)
    cdef int64_t pairs = 0, input_rows = 0, count = dispatches.shape[0], i, r
    cdef RowPlanner planner = RowPlanner()
    cdef gemm_job job
    refuse_overlap(out, inp, "output")
    set_gemm_job(&job, workspace, store, bias)
    set_output(&job, &out, 0)
    check_dispatches(dispatches, store, &inp, &out)
    for i in range(count):
        pairs += dispatches[i, 3]
        if dispatches[i, 3]:
            input_rows = max(input_rows, dispatches[i, 1] + dispatches[i, 3])
    workspace.enter()
    try:
        if count > 1:
            check_disjoint(<dispatch *>workspace.reserve(&workspace.rows, count * sizeof(dispatch)), dispatches)
        if pairs == 0:
            return
        planner.begin(workspace, store, pairs, count, input_rows)
        for i in range(count):
            if dispatches[i, 3] == 0:
                continue
            planner.start_run(dispatches[i, 0])
            for r in range(dispatches[i, 3]):
                planner.add(dispatches[i, 1] + r, dispatches[i, 2] + r)
        planner.finish()
        run_plan(workspace, store, &planner.plan, &inp, &job)
    finally:
        workspace.leave()


cdef int check_routing(const int *sorted_ids, int64_t length, const int *experts, int64_t num_experts, int64_t past,
                       int64_t block_size, int64_t pairs, CpuGptqStore store, char *seen) except -1:
    cdef int64_t i
    if past < 0 or past > length or past % block_size or past // block_size > num_experts:
        raise ValueError(
            f"num_tokens_past_padded: got {past}, expected a multiple of moe_block_size {block_size}, within the "
            f"{length} sorted_token_ids and the {num_experts} blocks of expert_ids")
    for i in range(past // block_size):
        if not -1 <= experts[i] < store.num_experts:
            raise IndexError(f"expert_ids[{i}]: got {experts[i]}, expected -1 to {store.num_experts - 1}")
    memset(seen, 0, pairs)
    for i in range(past):
        if sorted_ids[i] < 0:
            raise IndexError(f"sorted_token_ids[{i}]: got {sorted_ids[i]}, expected 0 or more")
        if sorted_ids[i] < pairs and experts[i // block_size] >= 0:
            if seen[sorted_ids[i]]:
                raise ValueError(f"sorted_token_ids[{i}]: got {sorted_ids[i]} a second time, expected each id once")
            seen[sorted_ids[i]] = 1
    return 0


def gemm_vllm(Workspace workspace, CpuGptqStore store, const float[:, ::1] bias, input, sorted_token_ids, expert_ids,
              int64_t num_tokens_past_padded, output, int64_t prob_m, int64_t moe_block_size, int64_t top_k):
    """``MarlinExpertStack.gemm_phase_vllm`` on packed weights; ``bias`` is ``[experts, n]`` or None."""
    cdef matrix inp = float_matrix(input, "input", store.k, False)
    cdef matrix out = float_matrix(output, "output", store.n, True)
    cdef int64_t length, num_experts, pairs, i, s
    cdef const int *sorted_ids = int32_vector(sorted_token_ids, "sorted_token_ids", &length)
    cdef const int *experts = int32_vector(expert_ids, "expert_ids", &num_experts)
    cdef RowPlanner planner = RowPlanner()
    cdef gemm_job job
    refuse_overlap(out, inp, "output")
    set_gemm_job(&job, workspace, store, bias)
    set_output(&job, &out, 0)
    if moe_block_size < 1:
        raise ValueError(f"moe_block_size: got {moe_block_size}, expected at least 1")
    if top_k < 1:
        raise ValueError(f"top_k: got {top_k}, expected at least 1")
    if prob_m < 0 or prob_m > inp.rows:
        raise ValueError(f"prob_m: got {prob_m}, expected 0 to {inp.rows}, the rows of input")
    if prob_m > out.rows // top_k:
        raise ValueError(f"prob_m * top_k: got {prob_m} * {top_k}, expected at most {out.rows}, the rows of output")
    pairs = prob_m * top_k
    workspace.enter()
    try:
        check_routing(sorted_ids, length, experts, num_experts, num_tokens_past_padded, moe_block_size, pairs, store,
                      <char *>workspace.reserve(&workspace.rows, pairs + 1))
        planner.begin(workspace, store, pairs, num_tokens_past_padded // moe_block_size + 1, prob_m)
        for i in range(num_tokens_past_padded // moe_block_size):
            if experts[i] < 0:
                continue
            planner.start_run(experts[i])
            for s in range(i * moe_block_size, (i + 1) * moe_block_size):
                if sorted_ids[s] < pairs:
                    planner.add(sorted_ids[s] // top_k, sorted_ids[s])
        planner.finish()
        if planner.plan.num_pairs:
            run_plan(workspace, store, &planner.plan, &inp, &job)
    finally:
        workspace.leave()


def linear(Workspace workspace, CpuGptqStore store, input, output, int64_t m, int64_t column_offset, int64_t width,
           const float[::1] bias):
    """Rows ``[0, m)`` by columns ``[column_offset, column_offset + width)`` of the stacked N."""
    cdef matrix inp = float_matrix(input, "input", store.k, False)
    cdef matrix out = float_matrix(output, "out", width, True)
    cdef int64_t done = 0, expert, begin, end, row
    cdef RowPlanner planner
    cdef gemm_job job
    refuse_overlap(out, inp, "out")
    if m < 0 or m > inp.rows or m > out.rows:
        raise ValueError(f"m: got {m}, expected 0 to {min(inp.rows, out.rows)}, the rows of input and out")
    if m == 0:
        return
    workspace.enter()
    try:
        while done < width:
            expert = (column_offset + done) // store.n
            begin = (column_offset + done) % store.n
            end = min(store.n, begin + width - done)
            planner = RowPlanner()
            planner.begin(workspace, store, m, 1, m)
            planner.start_run(expert)
            for row in range(m):
                planner.add(row, row)
            planner.finish()
            set_gemm_job(&job, workspace, store, None)
            job.column_begin, job.column_end = begin, end
            set_output(&job, &out, done)
            if bias is not None:
                job.bias = &bias[done]
            run_plan(workspace, store, &planner.plan, &inp, &job)
            done += end - begin
    finally:
        workspace.leave()
