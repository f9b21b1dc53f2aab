"""Checks of dispatches, for the extensions of ``marlin_cy.cpu``."""

from libc.stdint cimport int64_t

cpdef int check_dispatches(const int64_t[:, ::1] dispatches, int64_t num_experts, int64_t input_rows,
                           int64_t output_rows) except -1
cpdef int check_disjoint(const int64_t[:, ::1] dispatches) except -1
