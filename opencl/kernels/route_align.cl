#include "routing.cl"
#include "align.cl"
#include "prepare.cl"

// route_align: `route`, then `align` of few pairs, in one launch; before them `prepare_rows`, where rows depend on
// neither. A work-group takes a token, and the last of them aligns what all have chosen.
//
// Build options
//   PTX        1: for NVIDIA, compute capability 7.0 or later, whose OpenCL may have no atomics of a device's scope
//              0: OpenCL C 3.0 with __opencl_c_atomic_order_acq_rel and __opencl_c_atomic_scope_device
//   PREPARES   1: rows are prepared
//   those of routing.cl and prepare.cl

#ifndef PTX
#define PTX 0
#endif
#ifndef PREPARES
#define PREPARES 0
#endif
#if PREPARES && GATHER > 1
#error "route_align.cl needs GATHER 0 or 1"
#endif

#if PREPARES
#define ROW_ARGS , PREPARE_ARGS
#else
#define ROW_ARGS
#endif

// How many work-groups came here before. What they wrote before that can be read from here on.
static inline uint arrive(__global uint *arrived)
{
#if PTX
    uint before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrived) : "memory");
    return before;
#else
    return atomic_fetch_add_explicit((volatile __global atomic_uint *)arrived, 1u, memory_order_acq_rel,
                                     memory_scope_device);
#endif
}

// Arguments of all three, without align's ids and counts, and
//   marks     local uint, as align_few says
//   arrived       uint [1]: counts work-groups, from launch_base on
//   launch_base   above all that launches before this one can have left in arrived, even those that failed midway
__attribute__((reqd_work_group_size(ROUTE_ITEMS, 1, 1)))
__kernel void route_align(ROUTE_ARGS, const uint block_size, __global int *restrict sorted_ids,
                          __global int *restrict expert_ids, __global int *restrict past, __local uint *restrict marks,
                          __global uint *arrived, const uint launch_base ROW_ARGS)
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
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE); // the whole work-group's choices come before its arrival
    if (get_local_id(0) == 0)
        is_last = arrive(arrived) == launch_base + tokens - 1;
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
    // The others align nothing, for no experts: PoCL 3.0 crashes if barriers depend on what lies in local memory.
    align_few(ids + ids_offset, is_last ? tokens * top_k : 0, is_last ? num_experts : 0, block_size, sorted_ids,
              expert_ids, past, fours, marks);
}
