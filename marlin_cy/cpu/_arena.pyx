"""Scratch memory of a call: a bump pointer over one buffer of the workspace.

A *layout* is a function that takes every array of a job from an arena. :func:`carve` calls the layout twice. The first
call has no memory and adds up the bytes; the second call hands out addresses in memory of that many bytes. One
function does both, so the size and the addresses cannot disagree::

    base                 used
    |                    |
    [array 0 ..][array 1 ]                   each array begins at a multiple of 64 bytes

Arrays that are not in use at the same time may share memory. The layout sets ``used`` back to the beginning of the
first of these arrays before it takes the next one, and finally to the largest end.
"""

from libc.stdint cimport int64_t


cdef int carve(Workspace workspace, buffer *which, carve_fn *layout, void *job) except -1:
    """Set a job's arrays to memory of a workspace buffer, which grows as needed. Its old contents may be lost."""
    cdef arena memory
    cdef int64_t size = measure(layout, job)
    memory.base, memory.used = <char *>workspace.reserve(which, size), 0
    layout(&memory, job)
    if memory.used != size:
        raise SystemError(f"workspace: a layout took {memory.used} bytes after measuring {size}")
    return 0


cdef int64_t measure(carve_fn *layout, void *job) noexcept nogil:
    """Bytes that a layout takes. The job's addresses are NULL afterwards."""
    cdef arena memory
    memory.base, memory.used = NULL, 0
    layout(&memory, job)
    return memory.used


# ---------------------------------------------------------------------------------------------
# For tests

cdef struct sample:
    int64_t count
    const int64_t *sizes
    int64_t *addresses


cdef void carve_sample(arena *memory, void *job) noexcept nogil:
    cdef sample *s = <sample *>job
    cdef int64_t i
    for i in range(s.count):
        s.addresses[i] = <int64_t>take(memory, s.sizes[i])


def carved(Workspace workspace, const int64_t[::1] sizes, int64_t[::1] addresses):
    """Carve arrays of these sizes, store their addresses, and return the bytes measured. For tests."""
    cdef sample job
    job.count, job.sizes, job.addresses = sizes.shape[0], &sizes[0], &addresses[0]
    cdef int64_t size = measure(carve_sample, &job)
    workspace.enter()
    try:
        carve(workspace, &workspace.scratch, carve_sample, &job)
    finally:
        workspace.leave()
    return size
