#include "decoder.cl"

// norm_router: for few rows, the residual, the RMS norm and the router's product in one launch.
//
//   y = x + added;  output = rms_norm(y, weight);  logits = output @ router.T + bias
//
// Every work-group computes the norm of its row, which takes less time than a launch. The first of a row writes y and
// the output; y is not x, as others read x meanwhile. Groups: columns, rows.
//
// Build options
//   WIDTH         of a row: a multiple of 8
//   WEIGHT_TYPE   of the router, as INPUT_TYPE of common.cl
//   TEAM, TEAMS   work-items that share a column (a power of two), and columns of a work-group
//
// Arguments
//   x, added, y       float [rows][WIDTH]
//   weight            float [WIDTH]
//   output            OUTPUT [rows][WIDTH]
//   router            WEIGHT [n][WIDTH]
//   bias              float [n] or NULL
//   logits            float [rows][n]
//   arrived           uint [1]: set to 0, for the launch that routes

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

__attribute__((reqd_work_group_size(ITEMS, 1, 1))) __kernel void norm_router(
    __global const float *restrict x, __global const float *restrict added, __global float *restrict y,
    __global const float *restrict weight, __global OUTPUT *restrict output, const float eps,
    __global const WEIGHT *restrict router, __global const float *restrict bias, __global float *restrict logits,
    const uint n, __global uint *restrict arrived)
{
    __local float normed[WIDTH];
    __local float sums[ITEMS];
    const uint item = get_local_id(0), lane = item % TEAM, column = get_group_id(0) * TEAMS + item / TEAM;
    const ulong row = get_group_id(1);
    const bool writes = get_group_id(0) == 0;
    if (get_group_id(0) == 0 && get_group_id(1) == 0 && item == 0)
        *arrived = 0;
    float sum = 0;
    for (uint i = item; i < WIDTH; i += ITEMS) {
        const float value = x[row * WIDTH + i] + added[row * WIDTH + i];
        if (writes)
            y[row * WIDTH + i] = value;
        sum = fma(value, value, sum);
        normed[i] = value * weight[i];
    }
    const float factor = 1 / sqrt(group_sum(sum, sums) / WIDTH + eps);
    if (writes)
        for (uint i = item; i < WIDTH; i += ITEMS)
            store_output(normed[i] * factor, output, row * WIDTH + i);
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
        logits[row * n + column] = fma(sums[item], factor, bias ? bias[column] : 0);
}
