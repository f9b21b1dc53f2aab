"""Row plans: the experts that each row is multiplied by, and the places of quantised rows.

``_rows.pyx`` has a drawing.
"""

from libc.stdint cimport int32_t, int64_t

from marlin_cy.cpu._arena cimport arena
from marlin_cy.cpu._dispatch cimport ukernel_table

cdef struct row_block:
    int64_t expert
    int64_t begin       # first pair
    int64_t count       # pairs, 1 to ukernel_table's mc
    int64_t columns     # which of the gemm_job's column ranges

cdef struct row_plan:
    # Pairs, in runs of one expert, and the blocks that the runs are cut into.
    int64_t num_pairs
    int64_t num_blocks
    row_block *blocks           # [num_blocks]
    int32_t *pair_rows          # [num_pairs] named row
    int64_t *out_rows           # [num_pairs] output row
    int32_t *in_rows            # [num_pairs] place of the quantised row
    # Places. Pointers may be NULL, as quantize_job says.
    int64_t num_rows            # quantised rows
    int64_t num_distinct        # rows to quantise; the others are copies
    int64_t *input_rows         # [num_rows] input row
    int32_t *row_orders         # [num_rows] order of K
    int32_t *copy_of            # [num_rows] place of the row that this one is a copy of, or -1
    int32_t *distinct           # [num_distinct] place
    int32_t *row_place          # [named rows] the first place of each, or -1

# The orders of K of a stack's experts.
cdef struct expert_orders:
    const int32_t *order_of     # [num_experts]
    bint all_equal

# Numbers the rows that a call names: 0, 1, 2, ... in the order of their first appearance.
cdef struct row_index:
    int64_t num_rows            # distinct rows so far
    int64_t *rows               # [max_rows] the row with each number
    int32_t *slots              # [num_slots] a hash table of numbers, -1 for a free slot
    int64_t num_slots           # a power of two, at least twice max_rows

# Builds a plan from pairs that are added one by one.
cdef struct row_planner:
    const ukernel_table *table
    int64_t max_pairs
    int64_t max_runs
    row_plan plan
    row_index index
    int64_t run_expert
    int64_t run_begin           # first pair of the run that is being added

cdef void carve_planner(arena *memory, void *planner) noexcept nogil
cdef void begin_plan(row_planner *planner) noexcept nogil
cdef void begin_run(row_planner *planner, int64_t expert) noexcept nogil
cdef void add_pair(row_planner *planner, int64_t input_row, int64_t output_row) noexcept nogil
cdef void finish_plan(row_planner *planner, const expert_orders *orders) noexcept nogil

cdef void carve_index(arena *memory, row_index *index, int64_t max_rows) noexcept nogil
cdef void clear_index(row_index *index) noexcept nogil
cdef int32_t number_of(row_index *index, int64_t row) noexcept nogil

cdef void carve_blocks(arena *memory, row_plan *plan, const ukernel_table *table, int64_t runs,
                       int64_t pairs) noexcept nogil
cdef void carve_places(arena *memory, row_plan *plan, int64_t pairs, int64_t named_rows) noexcept nogil
cdef int64_t cut_into_blocks(row_block *blocks, int64_t expert, int64_t begin, int64_t count, int64_t columns,
                             const ukernel_table *table) noexcept nogil
cdef void place_rows(row_plan *plan, const int64_t *rows, int64_t named_rows, const expert_orders *orders,
                     int min_matrix_rows) noexcept nogil
