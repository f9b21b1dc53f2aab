"""The batch of a step, as the phases of a layer see it."""

from libc.stdint cimport int32_t, int64_t

# Rows of the batch that follow each other in one sequence.
cdef struct segment:
    int64_t row                 # the first
    int64_t count
    int64_t position            # of the first row in the sequence
    const int32_t *pages        # the sequence's pages, in order
    int64_t state               # the sequence's slot of recurrent state, or -1

cdef struct batch:
    int64_t rows
    int64_t num_segments
    const segment *segments     # [num_segments]
    const int32_t *segment_of   # [rows]
    const int32_t *tokens       # [rows]
