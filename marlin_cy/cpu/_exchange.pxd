"""Exchanges between hosts, as phases of a parallel region."""

from libc.stdint cimport int64_t

from marlin_cy.cpu._arena cimport arena
from marlin_cy.cpu._team cimport member

cdef enum:
    MAX_SECTIONS = 2

# The columns of one host. Row r is at data + r * width * element.
cdef struct column_part:
    const char *data
    int64_t begin
    int64_t width

# Rows of which each host has some columns.
cdef struct section:
    const int64_t *cut          # [hosts + 1] the first column of each host, and the number of columns
    int64_t element             # bytes
    int64_t width               # columns of this host
    int64_t rows
    int64_t max_rows
    int num_parts               # hosts
    char *local                 # [rows, width] this host's columns, which it writes before the exchange
    column_part *parts          # [hosts] all columns, after the exchange

# One message of every host: its columns of each section.
cdef struct exchange:
    void *hosts                 # a Hosts; NULL: all columns are on one host, and nothing is exchanged
    const bint *failed          # whether an exchange of this call has failed
    int size
    int rank
    int num_sections
    section[MAX_SECTIONS] sections
    # Memory that carve_exchange takes.
    int64_t *counts             # [hosts] bytes of each host's message
    char *send
    char *received

cdef class Hosts:
    cdef object group
    cdef object error
    cdef bint failed
    cdef int size
    cdef int rank
    cdef list owners

    cdef int set_exchange(self, exchange *x) except -1
    cdef section *add_section(self, exchange *x, cut, int64_t element) except NULL
    cdef section *set_rows(self, exchange *x, cut) except NULL
    cdef int begin(self) except -1
    cdef int finish(self) except -1

cdef void carve_exchange(arena *memory, exchange *x) noexcept nogil
cdef void carve_rows(arena *memory, exchange *x, int64_t max_rows) noexcept nogil
cdef void begin_exchange(exchange *x) noexcept nogil
cdef void begin_rows(exchange *x, int64_t rows) noexcept nogil
cdef void run_exchange(exchange *x, member *m) noexcept nogil
cdef bint has_failed(const exchange *x) noexcept nogil
cdef void load_row(const section *s, int64_t row, void *target) noexcept nogil
