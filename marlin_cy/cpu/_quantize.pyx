"""Quantisation of activations, a row at a time, in parallel.

Each row is brought to float32, its K put into the packed order where the weights have one, and
quantised group by group by the ISA's ``quantize_row``. Formula: ``ukernels/ukernel.h``. Where a row must
lie in several places, it is copied to the others.
"""

from libc.stdint cimport int8_t, int32_t, int64_t
from libc.string cimport memcpy

from marlin_cy.cpu._atomic cimport fetch_add, wait_until
from marlin_cy.cpu._dispatch cimport DTYPE_F32, act_meta

cdef enum:
    CACHE_LINE = 64
    TURNS_PER_THREAD = 8


cdef inline int64_t round_up(int64_t value, int64_t multiple) noexcept nogil:
    return (value + multiple - 1) // multiple * multiple


cdef int64_t row_buffer_floats(int64_t k, int64_t packed_k) noexcept nogil:
    """Floats that a thread needs: one row as it comes, one in packed order."""
    return round_up(k, CACHE_LINE // 4) + round_up(packed_k, CACHE_LINE // 4)


cdef int64_t quantized_bytes(int64_t num_rows, int64_t packed_k, int group_size, int planes) noexcept nogil:
    """Bytes of ``num_rows`` quantised rows and their scales."""
    cdef int64_t cells = (packed_k + group_size - 1) // group_size * group_rows(num_rows)
    return round_up(cells * group_size * planes, CACHE_LINE) + round_up(cells * <int64_t>sizeof(act_meta), CACHE_LINE)


cdef void place_quantized(quantize_job *job, void *memory) noexcept nogil:
    """Point ``a`` and ``meta`` into memory of :func:`quantized_bytes` bytes."""
    cdef int64_t cells = (job.packed_k + job.group_size - 1) // job.group_size * group_rows(job.num_rows)
    job.a = <int8_t *>memory
    job.meta = <act_meta *>(<char *>memory + round_up(cells * job.group_size * job.planes, CACHE_LINE))


cdef void quantize_one(const quantize_job *job, int64_t row, int thread) noexcept nogil:
    cdef int64_t source = row if job.input_rows is NULL else job.input_rows[row]
    cdef int64_t element = 4 if job.dtype == DTYPE_F32 else 2, i
    cdef const char *values = job.input + source * job.k * element
    cdef const float *x = <const float *>values
    cdef float *widened = job.row_buffers + thread * row_buffer_floats(job.k, job.packed_k)
    cdef float *ordered = widened + round_up(job.k, CACHE_LINE // 4)
    cdef const int32_t *order
    cdef int64_t cell = <int64_t>job.group_size * job.planes, stride = group_rows(job.num_rows), group
    if job.dtype != DTYPE_F32:
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
        for group in range((job.packed_k + job.group_size - 1) // job.group_size):
            job.meta[group * stride + row].scale *= job.weights[source]


cdef void copy_quantized(const quantize_job *job, int64_t source, int64_t target) noexcept nogil:
    cdef int64_t cell = <int64_t>job.group_size * job.planes, stride = group_rows(job.num_rows)
    cdef int64_t group, groups = (job.packed_k + job.group_size - 1) // job.group_size
    for group in range(groups):
        memcpy(job.a + (group * stride + target) * cell, job.a + (group * stride + source) * cell, cell)
        job.meta[group * stride + target] = job.meta[group * stride + source]


cdef void quantize_with_copies(const quantize_job *job, int64_t index, int thread) noexcept nogil:
    cdef int64_t row = index if job.distinct is NULL else job.distinct[index], copy
    quantize_one(job, row, thread)
    if job.next_copy is NULL:
        return
    copy = job.next_copy[row]
    while copy >= 0:
        copy_quantized(job, row, copy)
        copy = job.next_copy[copy]


cdef void begin_quantizing(quantize_job *job) noexcept nogil:
    """Before threads call :func:`quantize_rows`."""
    job.next_distinct = job.num_done = 0


cdef void quantize_rows(quantize_job *job, int thread, int num_threads) noexcept nogil:
    """Quantise rows that no other thread has begun, a few at a time, until all of the job's are done.

    Not a fixed share each: where cores are shared with others, or are of two kinds, one thread may take twice as long.
    """
    cdef int64_t turn = max(<int64_t>1, job.num_distinct // (TURNS_PER_THREAD * num_threads)), index, end
    cdef int64_t begin = fetch_add(&job.next_distinct, turn)
    while begin < job.num_distinct:
        end = min(begin + turn, job.num_distinct)
        for index in range(begin, end):
            quantize_with_copies(job, index, thread)
        fetch_add(&job.num_done, end - begin)
        begin = fetch_add(&job.next_distinct, turn)
    wait_until(&job.num_done, job.num_distinct)
