"""Checks of the arrays of a decoder's operations."""

from libc.stdint cimport int32_t, int64_t

from marlin_cy.cpu._buffers cimport matrix

cdef int check_shape(object array, str name, tuple shape) except -1
cdef matrix checked(object array, str name, tuple shape, bint writeable, bint any_dtype=*) except *
cdef const int32_t[::1] checked_indices(object array, str name, int64_t count, int64_t end) except *
