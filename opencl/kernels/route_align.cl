#include "routing.cl"
#include "align.cl"
#include "prepare.cl"
#include "arrive.cl"

// route_align: `route`, then `align` for few pairs, in one launch, and `prepare_rows` for rows that depend on neither.
// Each work-group prepares a row and routes a token. The last of them aligns the pairs of all tokens.
//
// Build options, besides those of routing.cl, prepare.cl and arrive.cl
//   PREPARES   1: rows are prepared

#ifndef PREPARES
#define PREPARES 0
#endif
#if PREPARES && (GATHER == GATHER_BY_SLOT || GATHER == GATHER_MAPPED)
#error "route_align.cl needs GATHER_NO_ORDER or GATHER_ONE_ORDER"
#endif

#if PREPARES
#define ROW_ARGS , PREPARE_ARGS
#else
#define ROW_ARGS
#endif

// The arguments of `route`, the arguments of `align` except ids and counts, with PREPARES the arguments of
// `prepare_rows`, and
//   marks         local uint: as for align_few
//   arrived       uint [1]: counts work-groups from launch_base on
//   launch_base   larger than every count of an earlier launch. The first work-group raises the counter to it. So a
//                 wrong count, which an earlier launch that failed midway may have left, does not matter
__attribute__((reqd_work_group_size(ROUTE_ITEMS, 1, 1))) __kernel void route_align(
    ROUTE_ARGS, const uint block_size, __global int *restrict sorted_ids, __global int *restrict expert_ids,
    __global int *restrict past, __local uint *restrict marks, __global uint *arrived, const uint launch_base ROW_ARGS)
{
    __local uint2 pairs[ROUTE_ITEMS];
    __local uint is_last;
    const uint token = get_group_id(0), tokens = get_num_groups(0);
    if (get_local_id(0) == 0)
        atomic_max((volatile __global uint *)arrived, launch_base);
#if PREPARES
    prepare_row(token, token, input + input_offset, output, row_factor, k_in, k_out, order, (__local uint *)pairs,
                (__local int *)pairs + ROUTE_ITEMS);
#endif
    route_token(token, ROUTE_NAMES, pairs);
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE); // the work-group's choices are written before it is counted
    if (get_local_id(0) == 0)
        is_last = arrive(arrived) == launch_base + tokens - 1;
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
    // Every work-group calls align_few, with no pairs and no experts unless it is the last: PoCL 3.0 crashes if a
    // barrier depends on a value in local memory.
    align_few(ids + ids_offset, is_last ? tokens * top_k : 0, is_last ? num_experts : 0, block_size, sorted_ids,
              expert_ids, past, fours, marks);
}
