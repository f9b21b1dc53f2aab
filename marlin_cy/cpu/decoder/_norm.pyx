"""RMS norms of the residual stream, as a part of the phase that quantises rows."""

from libc.stdint cimport int64_t
from libc.string cimport memcpy

from marlin_cy.cpu._buffers cimport element_bytes
from marlin_cy.cpu._exchange cimport column_part


cdef void norm_row(void *norm, int64_t row, int thread) noexcept nogil:
    """Complete a row of the residual stream, and normalise it."""
    cdef norm_job *job = <norm_job *>norm
    cdef float *x = job.x + row * job.width
    cdef int64_t element
    if job.embedded is not NULL:
        element = element_bytes(job.embedding_dtype)
        job.table.widen(x, job.embedding + job.embedded.tokens[row] * job.width * element, job.embedding_dtype,
                        job.width)
    elif job.gathered is not NULL:
        memcpy(x, job.source + job.gathered[row] * job.width, job.width * sizeof(float))
    add_delta(job, row, x)
    job.table.rms_norm(job.normed + row * job.width, x, job.weight, job.eps, job.width)


cdef void add_delta(const norm_job *job, int64_t row, float *x) noexcept nogil:
    cdef const column_part *part
    cdef int host
    if job.gathered_delta is not NULL:
        for host in range(job.gathered_delta.num_parts):
            part = job.gathered_delta.parts + host
            job.table.add(x + part.begin, <const float *>part.data + row * part.width, part.width)
    elif job.delta is not NULL:
        job.table.add(x, job.delta + row * job.width, job.width)
