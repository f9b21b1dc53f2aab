#include "align.cl"
#include "prepare.cl"

// align_prepare: `align`, and `prepare_rows` of rows that do not depend on it, in one launch. The first num_experts
// work-groups do the one, a work-group each of the others a row.

#if GATHER > 1
#error "align_prepare.cl needs GATHER 0 or 1"
#endif

__attribute__((reqd_work_group_size(ALIGN_ITEMS, 1, 1)))
__kernel void align_prepare(ALIGN_ARGS, PREPARE_ARGS)
{
    __local uint marks[TILE_WORDS], sums[ALIGN_ITEMS], first_block;
    const uint group = get_group_id(0);
    if (group < num_experts) {
        align_expert(group, ALIGN_NAMES, marks, sums, &first_block);
    } else {
        const uint row = group - num_experts;
        prepare_row(row, row, input + input_offset, output, row_factor, k_in, k_out, order, sums,
                    (__local int *)marks);
    }
}
