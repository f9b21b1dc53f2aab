"""Combination: the weighted sum of the experts' products for each token."""

from libc.stdint cimport int64_t
from libc.string cimport memset

from marlin_cy.cpu._arena cimport arena, take_floats
from marlin_cy.cpu._buffers cimport element_bytes
from marlin_cy.cpu._team cimport member

cdef enum:
    GATE_STEP = 32      # divides K
    GATE_SUMS = 8       # independent sums, so that an addition need not wait for the previous one


cdef void carve_combination(arena *memory, combination *c) noexcept nogil:
    """The layout of the threads' scratch memory."""
    c.sums = take_floats(memory, c.width * c.num_threads)


cdef void combine_tokens(const combination *c, int64_t tokens, const member *m) noexcept nogil:
    """Combine a thread's share of the tokens."""
    cdef int64_t token
    for token in range(tokens * m.thread // m.num_threads, tokens * (m.thread + 1) // m.num_threads):
        combine_token(c, token, m.thread)


cdef void combine_token(const combination *c, int64_t token, int thread) noexcept nogil:
    """``output[token] = gate * shared + sum_j weight * product``, by fused multiply-adds from zero, j ascending."""
    cdef int64_t element = element_bytes(c.dtype), j, pair
    cdef float *sums = c.sums + thread * c.width
    memset(sums, 0, c.width * sizeof(float))
    if c.shared is not NULL:
        c.table.axpy(sums, c.shared + token * c.width, 1 if c.gate_weight is NULL else shared_gate(c, token), c.width)
    for j in range(c.top_k):
        pair = token * c.top_k + j
        if c.ids[pair] >= 0:
            c.table.axpy(sums, c.products + pair * c.width, 1 if c.weights is NULL else c.weights[pair], c.width)
    c.table.narrow(c.output + token * c.width * element, sums, c.dtype, c.width)


cdef float shared_gate(const combination *c, int64_t token) noexcept nogil:
    """``sigmoid(x . gate_weight)``. Products of two float32 are exact in double; their order of summation is fixed."""
    cdef int64_t element = element_bytes(c.input_dtype), step, i, lane
    cdef const float *weight
    cdef float[GATE_STEP] x
    cdef double[GATE_SUMS] sums
    cdef double total = 0
    cdef float gate
    memset(sums, 0, sizeof(sums))
    for step in range(c.k // GATE_STEP):
        c.table.widen(x, c.input + (token * c.k + step * GATE_STEP) * element, c.input_dtype, GATE_STEP)
        weight = c.gate_weight + step * GATE_STEP
        for i in range(GATE_STEP // GATE_SUMS):
            for lane in range(GATE_SUMS):
                sums[lane] += <double>x[i * GATE_SUMS + lane] * weight[i * GATE_SUMS + lane]
    for lane in range(GATE_SUMS):
        total += sums[lane]
    gate = <float>total
    c.table.sigmoid(&gate, 1)
    return gate
