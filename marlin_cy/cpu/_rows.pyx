"""Row plans: the experts that each row is multiplied by, and the places of quantised rows.

A call multiplies *pairs*. A pair is an input row and an expert; its product goes to one output row. The pairs of one
expert that follow each other are a *run*. A run is cut into *blocks*, as many rows as a micro-kernel takes at once.

The input rows that a call names are numbered 0, 1, 2, ... So the cost and the memory of a plan depend on the number of
named rows, not on their indices.

A quantised row lies at a *place*. Micro-kernels read the rows of a pair at any place, with one exception: the rows of a
*large* block, one of ``min_matrix_rows`` or more, must lie at consecutive places. A row that two large blocks name
therefore has two places; it is quantised for the first and copied to the second. Small blocks use any existing
place. If the experts order K differently, each pair has a place of its own.

With ``min_matrix_rows`` 3, experts 0 and 1 with three rows each, and expert 2 with one::

    pair             0   1   2 |  3   4   5 |  6
    block            0   0   0 |  1   1   1 |  2       0 and 1 are large
    input row       70  71  72 | 71  72  73 | 72
    pair_rows        0   1   2 |  1   2   3 |  2       numbers of the named rows
    in_rows          0   1   2 |  3   4   5 |  2       places

    place            0   1   2    3   4   5
    input_rows      70  71  72   71  72  73            num_rows = 6
    copy_of          -   -   -    1   2   -
    distinct         0   1   2            5            num_distinct = 4: only these places are quantised

    named row        0   1   2   3
    row_place        0   1   2   5                     the first place of each
"""

from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.string cimport memset

from marlin_cy.cpu._arena cimport arena, take

cdef extern from *:
    # 2**64 divided by the golden ratio: multiples of it spread evenly over 64 bits.
    """
    #define HASH_FACTOR 0x9E3779B97F4A7C15u
    """
    const uint64_t HASH_FACTOR


# ---------------------------------------------------------------------------------------------
# A plan from pairs that are added one by one

cdef void carve_planner(arena *memory, void *job) noexcept nogil:
    """The layout of a :class:`row_planner`'s memory."""
    cdef row_planner *planner = <row_planner *>job
    carve_blocks(memory, &planner.plan, planner.table, planner.max_runs, planner.max_pairs)
    carve_places(memory, &planner.plan, planner.max_pairs, planner.max_pairs)
    carve_index(memory, &planner.index, planner.max_pairs)


cdef void begin_plan(row_planner *planner) noexcept nogil:
    planner.plan.num_pairs = planner.plan.num_blocks = planner.run_begin = 0
    clear_index(&planner.index)


cdef void begin_run(row_planner *planner, int64_t expert) noexcept nogil:
    """Begin a run: the pairs that are added next are for this expert."""
    if planner.plan.num_pairs > planner.run_begin and expert == planner.run_expert:
        return
    end_run(planner)
    planner.run_expert = expert


cdef void end_run(row_planner *planner) noexcept nogil:
    cdef row_plan *plan = &planner.plan
    plan.num_blocks += cut_into_blocks(plan.blocks + plan.num_blocks, planner.run_expert, planner.run_begin,
                                       plan.num_pairs - planner.run_begin, 0, planner.table)
    planner.run_begin = plan.num_pairs


cdef void add_pair(row_planner *planner, int64_t input_row, int64_t output_row) noexcept nogil:
    cdef row_plan *plan = &planner.plan
    plan.pair_rows[plan.num_pairs] = number_of(&planner.index, input_row)
    plan.out_rows[plan.num_pairs] = output_row
    plan.num_pairs += 1


cdef void finish_plan(row_planner *planner, const expert_orders *orders) noexcept nogil:
    """End the plan after all pairs were added."""
    end_run(planner)
    place_rows(&planner.plan, planner.index.rows, planner.index.num_rows, orders, planner.table.min_matrix_rows)


# ---------------------------------------------------------------------------------------------
# Numbers of the named rows

cdef void carve_index(arena *memory, row_index *index, int64_t max_rows) noexcept nogil:
    index.num_slots = 1
    while index.num_slots < 2 * max_rows:
        index.num_slots *= 2
    index.rows = <int64_t *>take(memory, max_rows * <int64_t>sizeof(int64_t))
    index.slots = <int32_t *>take(memory, index.num_slots * <int64_t>sizeof(int32_t))


cdef void clear_index(row_index *index) noexcept nogil:
    index.num_rows = 0
    memset(index.slots, 0xff, index.num_slots * sizeof(int32_t))


cdef int32_t number_of(row_index *index, int64_t row) noexcept nogil:
    """The number of a row, which is added if it is new."""
    cdef int64_t slot = <int64_t>((<uint64_t>row * HASH_FACTOR) >> 32) & (index.num_slots - 1)
    cdef int32_t number = index.slots[slot]
    while number >= 0:
        if index.rows[number] == row:
            return number
        slot = (slot + 1) & (index.num_slots - 1)
        number = index.slots[slot]
    number = <int32_t>index.num_rows
    index.slots[slot] = number
    index.rows[number] = row
    index.num_rows += 1
    return number


# ---------------------------------------------------------------------------------------------
# Blocks

cdef void carve_blocks(arena *memory, row_plan *plan, const ukernel_table *table, int64_t runs,
                       int64_t pairs) noexcept nogil:
    """The layout of the memory for the blocks of at most ``runs`` runs with ``pairs`` pairs in total."""
    plan.blocks = <row_block *>take(memory, (runs + pairs // table.mc) * <int64_t>sizeof(row_block))


cdef int64_t cut_into_blocks(row_block *blocks, int64_t expert, int64_t begin, int64_t count, int64_t columns,
                             const ukernel_table *table) noexcept nogil:
    """Cut a run into blocks; returns the number of blocks.

    Blocks have sizes as equal as possible in whole steps of ``mr`` rows, with which micro-kernels run at full speed.
    The last block has the remainder.
    """
    cdef int64_t mc = table.mc, mr = table.mr
    cdef int64_t parts = (count + mc - 1) // mc, steps = (count + mr - 1) // mr, part
    cdef int64_t first, end
    for part in range(parts):
        first, end = steps * part // parts * mr, min(steps * (part + 1) // parts * mr, count)
        blocks[part] = row_block(expert=expert, begin=begin + first, count=end - first, columns=columns)
    return parts


# ---------------------------------------------------------------------------------------------
# Places

cdef void carve_places(arena *memory, row_plan *plan, int64_t pairs, int64_t named_rows) noexcept nogil:
    """The layout of the memory for at most ``pairs`` pairs of ``named_rows`` rows."""
    plan.pair_rows = <int32_t *>take(memory, pairs * <int64_t>sizeof(int32_t))
    plan.out_rows = <int64_t *>take(memory, pairs * <int64_t>sizeof(int64_t))
    plan.in_rows = <int32_t *>take(memory, pairs * <int64_t>sizeof(int32_t))
    plan.input_rows = <int64_t *>take(memory, pairs * <int64_t>sizeof(int64_t))
    plan.row_orders = <int32_t *>take(memory, pairs * <int64_t>sizeof(int32_t))
    plan.copy_of = <int32_t *>take(memory, pairs * <int64_t>sizeof(int32_t))
    plan.distinct = <int32_t *>take(memory, pairs * <int64_t>sizeof(int32_t))
    plan.row_place = <int32_t *>take(memory, named_rows * <int64_t>sizeof(int32_t))


cdef void place_rows(row_plan *plan, const int64_t *rows, int64_t named_rows, const expert_orders *orders,
                     int min_matrix_rows) noexcept nogil:
    """Assign a place to every pair of a plan's blocks.

    ``rows`` has the input row of each of the ``named_rows`` numbers, or is NULL if row and number are equal. With
    ``min_matrix_rows`` 0, no block is large.
    """
    cdef int64_t b
    cdef bint large, is_large
    plan.num_rows = plan.num_distinct = 0
    memset(plan.row_place, 0xff, named_rows * sizeof(int32_t))
    # Large blocks first: a small block then needs places only for rows that are in no large block.
    for large in range(1, -1, -1):
        for b in range(plan.num_blocks):
            is_large = min_matrix_rows > 0 and plan.blocks[b].count >= min_matrix_rows
            if is_large == large:
                place_block(plan, plan.blocks + b, rows, orders, large)


cdef void place_block(row_plan *plan, const row_block *block, const int64_t *rows, const expert_orders *orders,
                      bint consecutive) noexcept nogil:
    cdef int64_t pair
    cdef int32_t row, before, place, order = orders.order_of[block.expert]
    for pair in range(block.begin, block.begin + block.count):
        row = plan.pair_rows[pair]
        before = plan.row_place[row] if orders.all_equal else -1
        if before >= 0 and not consecutive:
            plan.in_rows[pair] = before
            continue
        place = <int32_t>plan.num_rows
        plan.num_rows += 1
        if before < 0:
            plan.row_place[row] = place
            plan.distinct[plan.num_distinct] = place
            plan.num_distinct += 1
        plan.input_rows[place] = row if rows is NULL else rows[row]
        plan.row_orders[place], plan.copy_of[place], plan.in_rows[pair] = order, before, place
