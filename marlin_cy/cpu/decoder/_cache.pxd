"""The memory of one layer's keys and values."""

from marlin_cy.cpu.decoder._attention cimport kv_pool

cdef class KvPool:
    cdef kv_pool pool
    cdef readonly object keys
    cdef readonly object values

cdef class StatePool:
    cdef float *conv_data
    cdef float *state_data
    cdef readonly object conv
    cdef readonly object state
