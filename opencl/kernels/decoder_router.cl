#include "decoder.cl"

// norm_router: for few rows, the residual, the RMS norm and the router's product in one launch, and with ROUTES the
// choice of experts, too.
//
//   y = x + added;  output = rms_norm(y, weight);  logits = output @ router.T + bias
//
// Every work-group computes the norm of its row, which takes less time than a launch. The first of a row writes y and
// the output; y is not x, as others read x meanwhile. The last work-group of a row to arrive routes the row, and the last
// of those aligns the pairs of all rows. Groups: columns, rows.
//
// Build options
//   WIDTH         of a row: a multiple of 8
//   WEIGHT_TYPE   of the router, as INPUT_TYPE of common.cl
//   TEAM, TEAMS   work-items that share a column (a power of two), and columns of a work-group
//   ROUTES        1: rows are routed, and their pairs aligned; then also those of route_token.cl and arrive.cl
//
// Arguments
//   x, added, y       float [rows][WIDTH]
//   weight            float [WIDTH]
//   output            OUTPUT [rows][WIDTH]
//   router            WEIGHT [n][WIDTH]
//   bias              float [n] or NULL
//   logits            float [rows][n]
//   arrived           without ROUTES uint [1]: set to 0, for the launch that routes. With ROUTES uint [rows + 1], zeros
//                     before and after a launch: work-groups of each row, then rows, that have arrived
// With ROUTES also top_k to picked of route_token, where `bias` is called correction, and block_size to marks of
// align_few

#ifndef WEIGHT_TYPE
#define WEIGHT_TYPE 0
#endif
#define WEIGHT JOIN(TYPE_, WEIGHT_TYPE)
#define load8_weight JOIN(load8_, WEIGHT_TYPE)
#ifndef WIDTH
#define WIDTH 2048
#endif
#ifndef TEAM
#define TEAM 32
#define TEAMS 8
#endif
#define ITEMS (TEAM * TEAMS)
#ifndef ROUTES
#define ROUTES 0
#endif
#if ROUTES
#define ROUTE_ITEMS ITEMS
#include "route_token.cl"
#include "align_few.cl"
#include "arrive.cl"
// ids and logits are not restrict, as a work-group reads what others wrote.
#define CHOICE_ARGS                                                                                                   \
    , const uint top_k, const int normalise, const float factor, __global const float *restrict scale,                \
        const float jitter, __global const float *restrict correction, const uint num_groups, const uint topk_groups, \
        __global int *ids, __global float *restrict weights, __local uint4 *restrict fours,                           \
        __local uint *restrict groups, __local float *restrict picked, const uint block_size,                         \
        __global int *restrict sorted_ids, __global int *restrict expert_ids, __global int *restrict past,            \
        __local uint *restrict marks
#else
#define CHOICE_ARGS
#endif

__attribute__((reqd_work_group_size(ITEMS, 1, 1))) __kernel void norm_router(
    __global const float *restrict x, __global const float *restrict added, __global float *restrict y,
    __global const float *restrict weight, __global OUTPUT *restrict output, const float eps,
    __global const WEIGHT *restrict router, __global const float *restrict bias, __global float *logits, const uint n,
    __global uint *arrived CHOICE_ARGS)
{
    __local float normed[WIDTH];
    __local float sums[ITEMS];
#if ROUTES
    __local uint2 pairs[GROUPING ? ITEMS : 1];
    __local uint routes, aligns;
#endif
    const uint item = get_local_id(0), lane = item % TEAM, column = get_group_id(0) * TEAMS + item / TEAM;
    const ulong row = get_group_id(1);
    const bool writes = get_group_id(0) == 0;
#if !ROUTES
    if (writes && row == 0 && item == 0)
        *arrived = 0;
#endif
    float sum = 0;
    for (uint i = item; i < WIDTH; i += ITEMS) {
        const float value = x[row * WIDTH + i] + added[row * WIDTH + i];
        if (writes)
            y[row * WIDTH + i] = value;
        sum = fma(value, value, sum);
        normed[i] = value * weight[i];
    }
    const float norm_factor = 1 / sqrt(group_sum(sum, sums) / WIDTH + eps);
    if (writes)
        for (uint i = item; i < WIDTH; i += ITEMS)
            store_output(normed[i] * norm_factor, output, row * WIDTH + i);
    const ulong start = min(column, n - 1) * (ulong)WIDTH;
    float8 products = (float8)(0.0f);
    for (uint octet = lane; octet < WIDTH / 8; octet += TEAM)
        products = fma(vload8(octet, normed), load8_weight(router, start + 8 * octet), products);
    const float4 four = products.lo + products.hi;
    barrier(CLK_LOCAL_MEM_FENCE); // group_sum's result has been read
    sums[item] = four.x + four.y + (four.z + four.w);
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint half_size = TEAM / 2; half_size > 0; half_size /= 2) {
        if (lane < half_size)
            sums[item] += sums[item + half_size];
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    if (lane == 0 && column < n)
        logits[row * n + column] = fma(sums[item], norm_factor, bias ? bias[column] : 0);
#if ROUTES
    const uint rows = get_num_groups(1);
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE); // logits are written before the work-group is counted
    if (item == 0) {
        routes = arrive(arrived + row) == get_num_groups(0) - 1;
        if (routes)
            arrived[row] = 0;
    }
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
    // All work-groups reach all barriers, with no experts unless they are the last ones: see route_align.cl.
    route_token(row, logits, routes ? n : 0, routes ? top_k : 0, normalise, factor, scale, jitter, correction,
                num_groups, topk_groups, ids, weights, fours, groups, picked, pairs);
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE); // the row's choices are written before the row is counted
    if (item == 0) {
        aligns = routes && arrive(arrived + rows) == rows - 1;
        if (aligns)
            arrived[rows] = 0;
    }
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
    align_few(ids, aligns ? rows * top_k : 0, aligns ? n : 0, block_size, sorted_ids, expert_ids, past, fours, marks);
#endif
}
