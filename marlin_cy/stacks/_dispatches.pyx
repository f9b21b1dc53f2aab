"""Checks of dispatches, int64 ``[D, 4]`` of ``(expert, first input row, first output row, m)``; for all backends.

They are compiled because they run in every call: for eight dispatches, a dozen NumPy operations would take about as
many instructions as a small product.
"""

from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stdint cimport int64_t
from libc.stdlib cimport qsort

cdef struct row_range:
    int64_t begin
    int64_t end


cpdef int check_dispatches(const int64_t[:, ::1] dispatches, int64_t num_experts, int64_t input_rows,
                           int64_t output_rows) except -1:
    """Refuse dispatches that name an expert or a row that does not exist.

    Raises
    ------
    IndexError
        An expert or a range of rows is out of bounds.
    ValueError
        ``m`` is negative.
    """
    cdef int64_t i, m
    for i in range(dispatches.shape[0]):
        if not 0 <= dispatches[i, 0] < num_experts:
            raise IndexError(f"dispatches[{i}]: got expert_idx {dispatches[i, 0]}, expected 0 to {num_experts - 1}")
        m = dispatches[i, 3]
        if m < 0:
            raise ValueError(f"dispatches[{i}]: got m {m}, expected 0 or more")
        if dispatches[i, 1] < 0 or dispatches[i, 1] > input_rows - m:
            raise IndexError(f"dispatches[{i}]: got {m} input rows from {dispatches[i, 1]} on, "
                             f"expected them within the input's {input_rows}")
        if dispatches[i, 2] < 0 or dispatches[i, 2] > output_rows - m:
            raise IndexError(f"dispatches[{i}]: got {m} output rows from {dispatches[i, 2]} on, "
                             f"expected them within the output's {output_rows}")
    return 0


cpdef int check_disjoint(const int64_t[:, ::1] dispatches) except -1:
    """Raise a ``ValueError`` if two dispatches write the same output row.

    The caller has called :func:`check_dispatches` before.
    """
    cdef int64_t i, count = 0
    cdef row_range *ranges
    cdef row_range *before
    if dispatches.shape[0] < 2:
        return 0
    ranges = <row_range *>PyMem_Malloc(dispatches.shape[0] * sizeof(row_range))
    if ranges is NULL:
        raise MemoryError(f"dispatches: could not allocate memory to sort {dispatches.shape[0]} dispatches")
    try:
        for i in range(dispatches.shape[0]):
            if dispatches[i, 3]:
                ranges[count] = row_range(dispatches[i, 2], dispatches[i, 2] + dispatches[i, 3])
                count += 1
        qsort(ranges, count, sizeof(row_range), by_begin)
        for i in range(1, count):
            before = ranges + i - 1
            if before.end > ranges[i].begin:
                raise ValueError(
                    f"dispatches: got overlapping output rows {before.begin} to {before.end} and "
                    f"{ranges[i].begin} to {ranges[i].end}, expected separate ones")
    finally:
        PyMem_Free(ranges)
    return 0


cdef int by_begin(const void *a, const void *b) noexcept nogil:
    cdef int64_t left = (<const row_range *>a).begin, right = (<const row_range *>b).begin
    return (left > right) - (left < right)
