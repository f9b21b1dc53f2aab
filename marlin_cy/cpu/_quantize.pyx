"""Quantisation of activations, one row at a time, in parallel.

Each row is widened to float32, permuted if the weights have a packed order of K, and quantised group by
group by the ISA's ``quantize_row``. ``ukernels/ukernel.h`` has the formula. A row that must lie in several places is
quantised once. When all rows are quantised, they are copied to the other places; ``_rows.pyx`` draws the places.
Threads share copies by the places that they write, so that no two threads write to the same cache lines.
"""

from libc.stdint cimport int8_t, int32_t, int64_t
from libc.string cimport memcpy

from marlin_cy.cpu._arena cimport CACHE_LINE, arena, round_up, take, take_floats
from marlin_cy.cpu._atomic cimport fetch_add, wait_until
from marlin_cy.cpu._buffers cimport element_bytes
from marlin_cy.cpu._dispatch cimport DTYPE_F32, act_meta
from marlin_cy.cpu._exchange cimport load_row
from marlin_cy.cpu._team cimport items_a_turn, member, take_items

# ---------------------------------------------------------------------------------------------
# Memory

cdef void carve_quantized(arena *memory, quantize_job *job, int64_t max_rows) noexcept nogil:
    """The layout of the memory to quantise any number of rows up to ``max_rows``."""
    cdef quantize_job largest = job[0]
    cdef arena sizes
    job.row_buffers = take_floats(memory, row_buffer_floats(job.k, job.packed_k) * job.num_threads)
    largest.num_rows = max_rows
    sizes.base, sizes.used = NULL, 0
    carve_result(&sizes, &largest)
    job.memory = take(memory, sizes.used)


cdef void place_quantized(quantize_job *job) noexcept nogil:
    """Point ``a`` and ``meta`` into the job's memory, now that ``num_rows`` is known."""
    cdef arena memory
    memory.base, memory.used = <char *>job.memory, 0
    carve_result(&memory, job)


cdef void carve_result(arena *memory, quantize_job *job) noexcept nogil:
    cdef int64_t cells = num_groups(job) * group_rows(job.num_rows)
    job.a = <int8_t *>take(memory, cells * job.group_size * job.planes)
    job.meta = <act_meta *>take(memory, cells * <int64_t>sizeof(act_meta))


cdef inline int64_t num_groups(const quantize_job *job) noexcept nogil:
    return (job.packed_k + job.group_size - 1) // job.group_size


cdef inline int64_t row_buffer_floats(int64_t k, int64_t packed_k) noexcept nogil:
    """Floats that a thread needs: one row widened, and one row in packed order."""
    return round_up(k, CACHE_LINE // 4) + round_up(packed_k, CACHE_LINE // 4)


# ---------------------------------------------------------------------------------------------
# Work

cdef void begin_quantizing(quantize_job *job, const row_plan *plan) noexcept nogil:
    """Set the rows to those of a plan. One thread calls this, before any thread calls :func:`quantize_rows`."""
    job.num_rows, job.num_distinct = plan.num_rows, plan.num_distinct
    job.input_rows, job.row_orders = plan.input_rows, plan.row_orders
    job.distinct, job.copy_of = plan.distinct, plan.copy_of
    place_quantized(job)
    job.distinct_rows.next = job.places.next = job.num_quantised = job.num_copied = 0


cdef void quantize_rows(quantize_job *job, const member *m) noexcept nogil:
    """Quantise rows that no other thread has taken, a few at a time; return when all rows of the job are done.

    Threads have no fixed shares: on shared or unequal cores, one thread may need twice the time of another.
    """
    cdef int64_t turn = items_a_turn(job.num_distinct, m), index, end
    cdef int64_t begin = take_items(&job.distinct_rows, job.num_distinct, turn, m)
    while begin < job.num_distinct:
        end = min(begin + turn, job.num_distinct)
        for index in range(begin, end):
            quantize_one(job, index if job.distinct is NULL else job.distinct[index], m.thread)
        fetch_add(&job.num_quantised, end - begin)
        begin = take_items(&job.distinct_rows, job.num_distinct, turn, m)
    wait_until(&job.num_quantised, job.num_distinct)
    if job.num_distinct < job.num_rows:
        copy_rows(job, m)


cdef void copy_rows(quantize_job *job, const member *m) noexcept nogil:
    """Fill places that no other thread has taken; return when all places are filled."""
    cdef int64_t turn = items_a_turn(job.num_rows, m), end
    cdef int64_t begin = take_items(&job.places, job.num_rows, turn, m)
    while begin < job.num_rows:
        end = min(begin + turn, job.num_rows)
        copy_to_places(job, begin, end)
        fetch_add(&job.num_copied, end - begin)
        begin = take_items(&job.places, job.num_rows, turn, m)
    wait_until(&job.num_copied, job.num_rows)


cdef void quantize_one(const quantize_job *job, int64_t row, int thread) noexcept nogil:
    cdef int64_t source = row if job.input_rows is NULL else job.input_rows[row]
    cdef int64_t element = element_bytes(job.dtype), i
    cdef const char *values = job.input + source * job.k * element
    cdef const float *x = <const float *>values
    cdef float *widened = job.row_buffers + thread * row_buffer_floats(job.k, job.packed_k)
    cdef float *ordered = widened + round_up(job.k, CACHE_LINE // 4)
    cdef const int32_t *order
    cdef int64_t cell = <int64_t>job.group_size * job.planes, stride = group_rows(job.num_rows), group
    if job.gathered is not NULL:
        load_row(job.gathered, source, widened)
        x = widened
    elif job.dtype != DTYPE_F32:
        job.table.widen(widened, values, job.dtype, job.k)
        x = widened
    if job.orders is not NULL:
        order = job.orders + (0 if job.row_orders is NULL else job.row_orders[row] * job.packed_k)
        for i in range(job.packed_k):
            ordered[i] = x[order[i]] if order[i] >= 0 else 0
        x = ordered
    job.table.quantize_row(x, job.packed_k, job.group_size, job.planes, job.a + row * cell, stride * cell,
                           job.meta + row, stride)
    if job.weights is not NULL:
        for group in range(num_groups(job)):
            job.meta[group * stride + row].scale *= job.weights[source]


cdef void copy_to_places(const quantize_job *job, int64_t begin, int64_t end) noexcept nogil:
    """Copy the rows that belong at places ``begin`` to ``end - 1``, group by group: these are adjacent in memory."""
    cdef int64_t cell = <int64_t>job.group_size * job.planes, stride = group_rows(job.num_rows), group, place
    cdef int8_t *a
    cdef act_meta *meta
    for group in range(num_groups(job)):
        a, meta = job.a + group * stride * cell, job.meta + group * stride
        for place in range(begin, end):
            if job.copy_of[place] >= 0:
                memcpy(a + place * cell, a + job.copy_of[place] * cell, cell)
                meta[place] = meta[job.copy_of[place]]
