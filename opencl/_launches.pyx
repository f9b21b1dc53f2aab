"""Launches of kernels whose arguments are set, from a table: one loop in C, without Python and without events.

A launch through PyOpenCL takes the host about a microsecond more, of some eight that the driver takes: a tuple for each
size, and an event that is made and released.
"""

from libc.stdint cimport uintptr_t

# clEnqueueNDRangeKernel. OpenCL's header is not needed, and a build of the library does not look for one.
ctypedef int (*enqueue_type)(void *queue, void *kernel, unsigned int dimensions, const size_t *global_offset,
                             const size_t *global_size, const size_t *local_size, unsigned int num_events,
                             const void *wait_list, void *event) noexcept nogil

# A row of the table.
cdef enum:
    KERNEL, DIMENSIONS, GLOBAL_SIZE, LOCAL_SIZE = 5


cpdef Py_ssize_t enqueue_launches(uintptr_t function, uintptr_t queue, const size_t[:, ::1] table,
                                  Py_ssize_t begin) noexcept:
    """Enqueue the launches of a table from row ``begin`` on.

    Parameters
    ----------
    function : int
        The address of clEnqueueNDRangeKernel.
    queue : int
        A cl_command_queue.
    table : uintp ``[launches, 8]``
        The cl_kernel; dimensions, 0 if the launch is left out; the global size ``[3]``; the local size ``[3]``, zeros if
        the driver chooses it.
    begin : int

    Returns
    -------
    int
        The first launch that failed; the number of launches if none did.
    """
    cdef Py_ssize_t i = begin, rows = table.shape[0]
    cdef enqueue_type enqueue = <enqueue_type>function
    cdef const size_t *row
    with nogil:
        while i < rows:
            row = &table[i, 0]
            if row[DIMENSIONS] and enqueue(<void *>queue, <void *>row[KERNEL], <unsigned int>row[DIMENSIONS], NULL,
                                           row + GLOBAL_SIZE, row + LOCAL_SIZE if row[LOCAL_SIZE] else NULL, 0, NULL,
                                           NULL):
                break
            i += 1
    return i
