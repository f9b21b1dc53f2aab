"""Checked access to the arrays that callers pass in."""

from libc.stdint cimport int32_t, int64_t

from marlin_cy.cpu._dispatch cimport DTYPE_F32, DTYPE_F8, DTYPE_I8

cdef struct matrix:
    char *data
    int64_t rows
    int64_t width   # elements in a row
    int64_t nbytes
    int dtype       # DTYPE_F32, DTYPE_F16, DTYPE_BF16

cdef inline int64_t element_bytes(int dtype) noexcept nogil:
    return 4 if dtype == DTYPE_F32 else 1 if dtype == DTYPE_I8 or dtype == DTYPE_F8 else 2

cdef matrix float_matrix(object array, str name, int64_t width, bint writeable) except *
cdef int tensor_dtype(object tensor, str name) except -1
cdef int refuse_overlap(matrix output, matrix input, str name) except -1
cdef const int32_t[::1] int32_copy(object array, str name, int64_t count)
