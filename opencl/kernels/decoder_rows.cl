#include "decoder.cl"
#include "activation.cl"

// Whole rows of a decoder: embedding, RMS norm with the residual added, and the product of a gate.
//
// Build options
//   ROW_ITEMS        work-items of a work-group: a power of two
//   ADDED            one of ADDED_*, below
//   PICKED           of `norm_rows`, below
//   ACTIVATION       of activation.cl, for `glu_rows`

#ifndef ROW_ITEMS
#define ROW_ITEMS 256
#endif
// What `norm_rows` adds to its rows: nothing, other rows, or the weighted rows of experts.
#define ADDED_NONE 0
#define ADDED_ROWS 1
#define ADDED_EXPERTS 2
#ifndef ADDED
#define ADDED ADDED_NONE
#endif
#ifndef PICKED
#define PICKED 0
#endif

// x[row] = table[token of row]. A work-group for each row.
//   table   INPUT [vocabulary][width]
__kernel void embed_rows(__global const int *restrict batch, __global const INPUT *restrict table,
                         __global float *restrict x, const uint width)
{
    const ulong row = get_group_id(0), token = (uint)STEP_ROW(batch, row).x;
    for (uint i = get_local_id(0); i < width; i += get_local_size(0))
        x[row * width + i] = load_input(table, token * width + i);
}

// What is added to value i of a row of x: row `row` of `added`, or the weighted sum of its experts' rows.
#if ADDED == ADDED_EXPERTS
#define ADDED_ARGS                                                                                                  \
    __global const float *restrict added, __global const int *restrict ids, __global const float *restrict weights, \
        const uint num_experts, const uint top_k, __global const float *restrict shared,                            \
        __global const float *restrict factors
#define ADDED_NAMES added, ids, weights, num_experts, top_k, shared, factors
// Four rows at a time, so that four loads are in flight; rows that are left out are loaded, too.
static inline float addend(ulong row, uint i, uint width, ADDED_ARGS)
{
    float sum = 0;
    if (shared)
        sum = shared[row * width + i] * (factors ? factors[row] : 1.0f);
    for (uint begin = 0; begin < top_k; begin += 4) {
        float product[4], weight[4];
        bool chosen[4];
        for (uint j = 0; j < 4; j++) {
            const ulong place = row * top_k + min(begin + j, top_k - 1);
            chosen[j] = begin + j < top_k && (uint)ids[place] < num_experts;
            weight[j] = weights ? weights[place] : 1.0f;
            product[j] = added[place * width + i];
        }
        for (uint j = 0; j < 4; j++)
            sum = chosen[j] ? fma(weight[j], product[j], sum) : sum;
    }
    return sum;
}
#else
#define ADDED_ARGS __global const float *restrict added
#define ADDED_NAMES added
static inline float addend(ulong row, uint i, uint width, ADDED_ARGS)
{
    return ADDED == ADDED_ROWS ? added[row * width + i] : 0;
}
#endif

// x += added;  output = x / sqrt(mean(x * x) + eps) * weight. A work-group for each row of the output.
//   x              float [rows][x_stride], from element x_offset on. The sum is written to it, unless rows are picked:
//                  then several work-groups may have one row
//   output         OUTPUT [rows][width]
//   picked         row i of the output is that of row picked[picked_offset + i] (PICKED), else of row i
//   arrived        uint [1] or NULL: set to 0, for the launch that routes
//   added          float [rows][width] (ADDED_ROWS), or [rows * top_k][width] (ADDED_EXPERTS). Then also, as for
//                  `combine` of moe.cl:
//   ids, weights   int and float [rows][top_k]; weights NULL: all are 1
//   shared         float [rows][width], the rows of a shared expert, or NULL; factors float [rows], or NULL: all are 1
__attribute__((reqd_work_group_size(ROW_ITEMS, 1, 1))) __kernel void norm_rows(
    __global float *restrict x, const uint x_offset, const uint x_stride, __global const float *restrict weight,
    __global OUTPUT *restrict output, const float eps, const uint width, __global const int *restrict picked,
    const uint picked_offset, __global uint *restrict arrived, ADDED_ARGS)
{
    __local float sums[ROW_ITEMS];
    const uint item = get_local_id(0);
#if PICKED
    const ulong row = (uint)picked[picked_offset + get_group_id(0)];
#else
    const ulong row = get_group_id(0);
#endif
    if (arrived && get_global_id(0) == 0)
        *arrived = 0;
    x += x_offset + row * x_stride;
    float sum = 0;
    for (uint i = item; i < width; i += ROW_ITEMS) {
        const float value = x[i] + addend(row, i, width, ADDED_NAMES);
#if ADDED && !PICKED
        x[i] = value;
#endif
        sum = fma(value, value, sum);
    }
    const float factor = 1 / sqrt(group_sum(sum, sums) / width + eps);
    for (uint i = item; i < width; i += ROW_ITEMS) {
#if PICKED
        const float value = x[i] + addend(row, i, width, ADDED_NAMES);
#else
        const float value = x[i];
#endif
        store_output(value * factor * weight[i], output, get_group_id(0) * (ulong)width + i);
    }
}

// output = act(gate) * up, of rows [gate (width), up (width)], or of up alone. A work-item for each value.
#if ACTIVATION
__kernel void glu_rows(__global const float *restrict input, __global OUTPUT *restrict output, const uint width)
{
    const ulong row = get_global_id(1);
    const uint i = get_global_id(0);
    if (i < width) {
        __global const float *from = input + row * ROW_PARTS * width;
        store_output(activated(from[i], from[(ROW_PARTS - 1) * width + i]), output, row * width + i);
    }
}
#endif
