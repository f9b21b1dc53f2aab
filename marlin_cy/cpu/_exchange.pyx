"""Exchanges between hosts, as phases of a parallel region.

Each host computes some columns of a matrix, and then needs whole rows. A host's columns are one block of memory, and so
is what it gets from each other host::

    local      [rows, width]                                  written by this host's threads
    received   | host 0: [rows, width 0] | host 1: [rows, width 1] | ...

:func:`run_exchange` is a phase: all threads call it, and thread 0 takes the GIL to call ``Group.gather``. Readers take a
row from all blocks (:func:`load_row`) as they use it, so that no pass over the matrix is added. A message may have two
sections: rows of two matrices that are needed at the same time.

An exchange that fails leaves an exception in the :class:`Hosts`, and later exchanges of the call do nothing: the region
ends as it would have, on meaningless values, and :meth:`Hosts.finish` raises.
"""

import numpy as np

from cpython.buffer cimport PyBUF_READ, PyBUF_WRITE
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from marlin_cy.cpu._arena cimport arena, take
from marlin_cy.cpu._team cimport barrier, member


cdef class Hosts:
    """The hosts of a call.

    Parameters
    ----------
    group : Group
    """

    def __init__(self, group):
        self.group, self.size, self.rank, self.owners = group, group.size, group.rank, []

    cdef int set_exchange(self, exchange *x) except -1:
        """Set the members that the hosts determine. The object must outlive the exchange."""
        memset(x, 0, sizeof(exchange))
        x.hosts, x.failed, x.size, x.rank = <void *>self, &self.failed, self.size, self.rank
        return 0

    cdef section *add_section(self, exchange *x, cut, int64_t element) except NULL:
        """Add rows with ``cut``, int64 ``[hosts + 1]``, to a message. The caller sets ``max_rows`` and ``rows``."""
        cdef const int64_t[::1] columns = np.ascontiguousarray(cut, np.int64)
        cdef section *s = &x.sections[x.num_sections]
        if columns.shape[0] != self.size + 1 or x.num_sections == MAX_SECTIONS:
            raise ValueError(f"cut: got {columns.shape[0]} entries, expected {self.size + 1}")
        self.owners.append(columns)
        x.num_sections += 1
        s.cut, s.element, s.num_parts = &columns[0], element, self.size
        s.width = columns[self.rank + 1] - columns[self.rank]
        return s

    cdef section *set_rows(self, exchange *x, cut) except NULL:
        """Set an exchange of one section of float32."""
        self.set_exchange(x)
        return self.add_section(x, cut, sizeof(float))

    cdef int begin(self) except -1:
        """Forget the failure of an earlier call."""
        self.failed, self.error = False, None
        return 0

    cdef int finish(self) except -1:
        """Raise what an exchange has raised."""
        cdef object error = self.error
        self.error = None
        if error is not None:
            raise error
        return 0


# ---------------------------------------------------------------------------------------------
# Memory

cdef void carve_exchange(arena *memory, exchange *x) noexcept nogil:
    """The layout for messages of at most ``max_rows`` rows of each section."""
    cdef int64_t sent = 0, received = 0
    cdef int index
    cdef section *s
    x.counts = <int64_t *>take(memory, x.size * <int64_t>sizeof(int64_t))
    for index in range(x.num_sections):
        s = &x.sections[index]
        s.parts = <column_part *>take(memory, x.size * <int64_t>sizeof(column_part))
        sent += s.max_rows * s.width * s.element
        received += s.max_rows * s.cut[x.size] * s.element
    x.send = <char *>take(memory, sent)
    x.received = <char *>take(memory, received)


cdef void carve_rows(arena *memory, exchange *x, int64_t max_rows) noexcept nogil:
    """The layout for messages of one section."""
    x.sections[0].max_rows = max_rows
    carve_exchange(memory, x)


# ---------------------------------------------------------------------------------------------
# Work

cdef void begin_exchange(exchange *x) noexcept nogil:
    """Place this host's columns, now that the rows of each section are known. One thread calls this."""
    cdef int64_t at = 0
    cdef int index
    cdef section *s
    for index in range(x.num_sections):
        s = &x.sections[index]
        s.local = x.send + at
        at += s.rows * s.width * s.element


cdef void begin_rows(exchange *x, int64_t rows) noexcept nogil:
    """As :func:`begin_exchange`, for a message of one section."""
    x.sections[0].rows = rows
    begin_exchange(x)


cdef void run_exchange(exchange *x, member *m) noexcept nogil:
    """Exchange what all threads have written before. It can be read when the call returns. On one host: a barrier."""
    barrier(m)
    if x.hosts is NULL:
        return
    if m.thread == 0:
        place_parts(x)
        if not has_failed(x):
            gather(x)
    barrier(m)


cdef void place_parts(exchange *x) noexcept nogil:
    """Place what all hosts send. Exchanges of other layers may have used the same memory before."""
    cdef int64_t at = 0, width
    cdef int host, index
    cdef section *s
    for host in range(x.size):
        x.counts[host] = at
        for index in range(x.num_sections):
            s = &x.sections[index]
            width = s.cut[host + 1] - s.cut[host]
            s.parts[host].data, s.parts[host].begin, s.parts[host].width = x.received + at, s.cut[host], width
            at += s.rows * width * s.element
        x.counts[host] = at - x.counts[host]


cdef bint has_failed(const exchange *x) noexcept nogil:
    """Whether an exchange of this call has failed. All threads get the same answer between two exchanges."""
    return x.failed[0]


cdef void gather(exchange *x) noexcept with gil:
    cdef Hosts hosts = <Hosts>x.hosts
    cdef int64_t total = 0
    cdef int host
    counts = []
    try:
        for host in range(x.size):
            counts.append(x.counts[host])
            total += x.counts[host]
        if total == 0:  # on all hosts
            return
        hosts.group.gather(PyMemoryView_FromMemory(x.send, x.counts[x.rank], PyBUF_READ),
                           PyMemoryView_FromMemory(x.received, total, PyBUF_WRITE), counts)
    except BaseException as error:
        hosts.failed, hosts.error = True, error


cdef void load_row(const section *s, int64_t row, void *target) noexcept nogil:
    """Write a whole row to ``target``, after the exchange."""
    cdef int host
    cdef const column_part *part
    for host in range(s.num_parts):
        part = s.parts + host
        memcpy(<char *>target + part.begin * s.element, part.data + row * part.width * s.element,
               part.width * s.element)
