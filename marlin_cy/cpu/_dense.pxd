"""Products by weights of 8, 16 or 32 bits, whose rows and outputs threads share."""

from libc.stdint cimport int64_t

from marlin_cy.cpu._dispatch cimport dense_task, ukernel_table
from marlin_cy.cpu._team cimport member, queue

# Threads take blocks of rows and outputs.
cdef struct dense_job:
    const ukernel_table *table
    int num_threads
    dense_task task             # of all rows and outputs
    int64_t row_block
    int64_t column_block
    queue items

cdef void begin_dense(dense_job *job, int64_t rows) noexcept nogil
cdef void do_dense(dense_job *job, const member *m) noexcept nogil
