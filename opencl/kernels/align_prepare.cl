#include "align.cl"
#include "prepare.cl"

// align_prepare: `align`, and `prepare_rows` for rows that do not depend on its result, in one launch. Each of the
// first num_experts work-groups aligns the pairs of an expert; each of the others prepares a row.

#if GATHER == GATHER_BY_SLOT || GATHER == GATHER_MAPPED
#error "align_prepare.cl needs GATHER_NO_ORDER or GATHER_ONE_ORDER"
#endif

__attribute__((reqd_work_group_size(ALIGN_ITEMS, 1, 1))) __kernel void align_prepare(ALIGN_ARGS, PREPARE_ARGS)
{
    __local uint marks[TILE_WORDS], sums[ALIGN_ITEMS], first_block;
    const uint group = get_group_id(0);
    if (group < num_experts) {
        align_expert(group, ALIGN_NAMES, marks, sums, &first_block);
    } else {
        const uint row = group - num_experts;
        prepare_row(row, row, input + input_offset, output, row_factor, k_in, k_out, order, sums, (__local int *)marks);
    }
}
