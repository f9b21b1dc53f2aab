"""Growable scratch memory, owned by a context and reused by its calls."""

from libc.stddef cimport size_t

from marlin_cy.cpu._dispatch cimport ukernel_table

cdef struct buffer:
    void *data      # aligned to 64 bytes; NULL when empty
    size_t size     # bytes
    void *base      # what to free

cdef class Workspace:
    cdef const ukernel_table *table
    cdef readonly str isa
    cdef readonly int num_threads
    cdef readonly int planes
    cdef bint busy
    cdef buffer threads     # one thread_area a thread
    cdef buffer rows        # row lists and blocks of the call
    cdef buffer quantized   # activations of the call: planes and scales
    cdef buffer hidden      # quantised inner activations of a MoE layer
    cdef buffer floats      # float32 rows between the phases of a MoE layer
    cdef buffer slots       # partial sums of split-K, an item and chunk a slot, and how many of them each item has

    cdef void *reserve(self, buffer *which, size_t size) except NULL
    cdef int enter(self) except -1
    cdef void leave(self) noexcept
