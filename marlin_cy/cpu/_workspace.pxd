"""Growable scratch memory, owned by a context and reused by its calls."""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t

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
    cdef buffer lists       # row plans
    cdef buffer scratch     # all other memory of a call
    cdef readonly int64_t quantized_rows    # input rows quantised by the products of stacks and views so far, for tests

    cdef void *reserve(self, buffer *which, size_t size) except NULL
    cdef int enter(self) except -1
    cdef void leave(self) noexcept
