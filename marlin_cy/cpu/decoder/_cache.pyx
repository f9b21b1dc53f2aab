"""The memory of one layer's keys and values.

::

    keys    [heads][num_pages][head_dim][KV_BLOCK]       position p of a page in column p
    values  [heads][num_pages][KV_BLOCK][value_dim]

The pages of a head follow each other, so that a sequence with consecutive pages is read as one stream. The system
provides the memory of a page when the page is first written.
"""

import numpy as np

from libc.stdint cimport uint8_t

from marlin_cy.cpu._dispatch cimport DTYPE_BF16, DTYPE_F16, DTYPE_F32, KV_BLOCK

DTYPES = {"float32": DTYPE_F32, "float16": DTYPE_F16, "bfloat16": DTYPE_BF16}


def page_bytes(heads, head_dim, value_dim, dtype):
    """Bytes of a page of all heads: keys and values."""
    return heads * (head_dim + value_dim) * KV_BLOCK * (4 if dtype == "float32" else 2)


cdef class KvPool:
    """Pages for one layer.

    Parameters
    ----------
    num_pages, heads, head_dim, value_dim : int
    dtype : {"float16", "bfloat16", "float32"}

    Raises
    ------
    MemoryError
    """

    def __cinit__(self, num_pages, heads, head_dim, value_dim, dtype):
        cdef uint8_t[:, :, ::1] keys, values
        element = 4 if dtype == "float32" else 2
        self.keys = np.empty((heads, num_pages, head_dim * KV_BLOCK * element), np.uint8)
        self.values = np.empty((heads, num_pages, value_dim * KV_BLOCK * element), np.uint8)
        keys, values = self.keys, self.values
        self.pool.keys, self.pool.values = <char *>&keys[0, 0, 0], <char *>&values[0, 0, 0]
        self.pool.dtype = DTYPES[dtype]
        self.pool.key_head, self.pool.key_page = keys.strides[0], keys.strides[1]
        self.pool.value_head, self.pool.value_page = values.strides[0], values.strides[1]

    def copy_page(self, source, target):
        """Copy the keys and values of one page to another."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]

    @property
    def nbytes(self):
        """Bytes of all pages."""
        return self.keys.nbytes + self.values.nbytes


cdef class StatePool:
    """Slots of recurrent state for one layer of gated DeltaNet.

    ::

        conv   [num_states][conv_width - 1][channels]                      inputs of the last tokens
        state  [num_states][num_v_heads][key_dim][value_dim]

    Parameters
    ----------
    num_states, conv_width, channels, num_v_heads, key_dim, value_dim : int

    Raises
    ------
    MemoryError
    """

    def __cinit__(self, num_states, conv_width, channels, num_v_heads, key_dim, value_dim):
        cdef float[:, :, ::1] conv
        cdef float[:, :, :, ::1] state
        # One row more than is used, so that a width of 1 has an address too.
        self.conv = np.zeros((num_states, max(conv_width - 1, 1), channels), np.float32)
        self.state = np.zeros((num_states, num_v_heads, key_dim, value_dim), np.float32)
        conv, state = self.conv, self.state
        self.conv_data, self.state_data = &conv[0, 0, 0], &state[0, 0, 0, 0]

    def clear(self, slot):
        """Set a slot to the state of an empty sequence."""
        self.conv[slot] = 0
        self.state[slot] = 0

    def copy(self, source, target):
        """Copy one slot to another."""
        self.conv[target] = self.conv[source]
        self.state[target] = self.state[source]

    def save(self, slot):
        """A copy of a slot, for :meth:`restore`."""
        return self.conv[slot].copy(), self.state[slot].copy()

    def restore(self, slot, saved):
        """Set a slot to what :meth:`save` returned."""
        self.conv[slot], self.state[slot] = saved

    @property
    def nbytes(self):
        """Bytes of all slots."""
        return self.conv.nbytes + self.state.nbytes
