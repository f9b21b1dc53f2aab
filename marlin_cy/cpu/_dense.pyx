"""Products by weights of 8, 16 or 32 bits, whose rows and outputs threads share.

One thread calls :func:`begin_dense`. After a barrier, or in a parallel region that starts after this call, all threads
call :func:`do_dense`.
"""

from libc.stdint cimport int64_t

from marlin_cy.cpu._buffers cimport element_bytes
from marlin_cy.cpu._dispatch cimport dense_task
from marlin_cy.cpu._team cimport member, take_item

cdef enum:
    DENSE_ROWS = 32             # rows of a dense item, at most
    DENSE_COLUMNS = 256         # outputs of a dense item, at most: 1 MB of bfloat16 weights with K of 2048
    DENSE_STEP = 8              # outputs of a dense item are a multiple of this
    ITEMS_PER_THREAD = 4


cdef void begin_dense(dense_job *job, int64_t rows) noexcept nogil:
    """Cut ``rows`` rows into items: enough to keep the threads busy, each as large as possible."""
    cdef int64_t wanted = ITEMS_PER_THREAD * job.num_threads, row_blocks, columns
    job.task.m = rows
    job.row_block = min(<int64_t>DENSE_ROWS, max(<int64_t>1, rows))
    row_blocks = (rows + job.row_block - 1) // job.row_block
    columns = max(<int64_t>DENSE_STEP, job.task.n * max(<int64_t>1, row_blocks) // wanted)
    job.column_block = min(<int64_t>DENSE_COLUMNS, (columns + DENSE_STEP - 1) // DENSE_STEP * DENSE_STEP)
    job.items.next = 0


cdef void do_dense(dense_job *job, const member *m) noexcept nogil:
    """Do a thread's part of a dense product."""
    cdef int64_t row_blocks = (job.task.m + job.row_block - 1) // job.row_block
    cdef int64_t column_blocks = (job.task.n + job.column_block - 1) // job.column_block
    cdef int64_t count = row_blocks * column_blocks, item = take_item(&job.items, count, m)
    while item < count:
        dense_item(job, item % row_blocks * job.row_block, item // row_blocks * job.column_block)
        item = take_item(&job.items, count, m)


cdef void dense_item(const dense_job *job, int64_t row, int64_t column) noexcept nogil:
    cdef dense_task task = job.task
    task.m, task.n = min(job.row_block, task.m - row), min(job.column_block, task.n - column)
    task.x += row * task.x_stride
    task.w = <const char *>task.w + column * task.w_stride * element_bytes(task.dtype)
    task.out += row * task.out_stride + column
    if task.scales is not NULL:
        task.scales += column * task.scale_stride
    if task.bias is not NULL:
        task.bias += column
    job.table.dense(&task)
