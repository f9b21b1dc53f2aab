"""Checked access to the arrays that callers pass in."""

from libc.stdint cimport int64_t

cdef struct matrix:
    char *data
    int64_t rows
    int64_t width   # elements in a row
    int64_t nbytes
    int dtype       # DTYPE_F32, DTYPE_F16, DTYPE_BF16

cdef object as_array(object array, str name)
cdef matrix float_matrix(object array, str name, int64_t width, bint writeable) except *
cdef int refuse_overlap(matrix output, matrix input, str name) except -1
cdef const int *int32_vector(object array, str name, int64_t *length) except? NULL
