"""Scratch memory of a call: a bump pointer over one buffer of the workspace."""

from libc.stdint cimport int64_t

from marlin_cy.cpu._workspace cimport Workspace, buffer

cdef enum:
    CACHE_LINE = 64

cdef struct arena:
    char *base              # NULL while sizes are measured
    int64_t used            # bytes

# Takes all arrays of a job from the arena and stores their addresses in the job. Sizes may depend on the job's sizes
# but not on its addresses.
ctypedef void carve_fn(arena *memory, void *job) noexcept nogil

cdef inline int64_t round_up(int64_t value, int64_t multiple) noexcept nogil:
    return (value + multiple - 1) // multiple * multiple

cdef inline void *take(arena *memory, int64_t nbytes) noexcept nogil:
    """The arena's next ``nbytes`` bytes, from the start of a cache line on; NULL while sizes are measured."""
    cdef void *begin = NULL if memory.base is NULL else memory.base + memory.used
    memory.used += round_up(nbytes, CACHE_LINE)
    return begin

cdef inline float *take_floats(arena *memory, int64_t count) noexcept nogil:
    return <float *>take(memory, count * <int64_t>sizeof(float))

cdef int64_t measure(carve_fn *layout, void *job) noexcept nogil
cdef int carve(Workspace workspace, buffer *which, carve_fn *layout, void *job) except -1
