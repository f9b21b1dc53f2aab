"""Growable scratch memory, owned by a context and reused by its calls."""

from libc.stddef cimport size_t

from marlin_cy.cpu._dispatch cimport KernelTable, ukernel_table

cdef struct buffer:
    void *data      # aligned to 64 bytes; NULL when empty
    size_t size     # bytes
    void *base      # the allocation

cdef class Workspace:
    cdef readonly KernelTable kernels
    cdef const ukernel_table *table     # of kernels
    cdef readonly int num_threads
    cdef readonly int planes
    cdef bint busy
    cdef buffer threads     # one thread_area for each thread
    cdef buffer rows        # row lists and blocks of the call
    cdef buffer quantized   # activations of the call: planes and scales
    cdef buffer hidden      # quantised inner activations of a MoE layer
    cdef buffer floats      # float32 rows between the phases of a MoE layer
    cdef buffer slots       # split-K: partial sums, one slot for each item and chunk; then the arrivals of each item

    cdef void *reserve(self, buffer *which, size_t size) except NULL
    cdef int enter(self) except -1
    cdef void leave(self) noexcept
