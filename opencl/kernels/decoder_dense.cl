// Products by weights of 8, 16 or 32 bits: out[r][c] = bias[c] + sum over k of x[r][k] * weight[c][k], in float32.
//
// A launch may hold several products of equal shape, the heads of latent attention: product h has its own weights, reads
// x from h * x_batch on, and writes to out from h * out_batch on.
//
// Build options
//   INPUT_TYPE      of x
//   WEIGHT_TYPE     of the weights, as INPUT_TYPE, or of scaled.cl
//   SCALE_K         of scaled.cl
//   ALIGNED         of common.cl, for x and the weights: k, all strides and all offsets are multiples of 8
//   DENSE_ROWS      rows of a work-group of `dense_few`
//   TEAM            work-items of `dense_few` that share a column: a power of two
//   TEAMS           teams in a work-group
//
// Arguments. Strides and offsets are in elements
//   x, x_offset, x_stride, x_batch       rows of k values
//   weight                               WEIGHT [batch][n][k]
//   scales                               of scaled.cl; NULL for weights of 16 or 32 bits
//   bias                                 float [n] or NULL
//   out, out_offset, out_stride, out_batch

#ifndef WEIGHT_TYPE
#define WEIGHT_TYPE 0
#endif
#include "scaled.cl"

#define WEIGHT JOIN(TYPE_, WEIGHT_TYPE)
#define load_weight JOIN(load_, WEIGHT_TYPE)
#define load8_weight JOIN(load8_, WEIGHT_TYPE)
#ifndef DENSE_ROWS
#define DENSE_ROWS 1
#endif
#ifndef TEAM
#define TEAM 32
#endif
#ifndef TEAMS
#define TEAMS 4
#endif
#define COLUMNS 2 // of a team, so that the loads of one hide the latency of the other's

#define DENSE_ARGS                                                                                  \
    __global const INPUT *restrict x, const uint x_offset, const uint x_stride, const uint x_batch, \
        __global const WEIGHT *restrict weight, __global const float *restrict scales,              \
        __global const float *restrict bias, __global float *restrict out, const uint out_offset,   \
        const uint out_stride, const uint out_batch, const uint rows, const uint n, const uint k

// A weight as it is multiplied.
#if HAS_SCALES
#define SCALED(w, column, at) ((w) * scale_at(scales, column, at, k))
#else
#define SCALED(w, column, at) (w)
#endif

static inline float sum8(float8 value)
{
    const float4 sum = value.lo + value.hi;
    return sum.x + sum.y + (sum.z + sum.w);
}

// For few rows: weights are read once, at the speed of memory. Groups: columns, rows, batch.
__attribute__((reqd_work_group_size(TEAM * TEAMS, 1, 1))) __kernel void dense_few(DENSE_ARGS)
{
    __local float sums[TEAM * TEAMS];
    const uint item = get_local_id(0), lane = item % TEAM, team = item / TEAM;
    const uint first = (get_group_id(0) * TEAMS + team) * COLUMNS, first_row = get_group_id(1) * DENSE_ROWS;
    x += x_offset + get_group_id(2) * (ulong)x_batch;
    weight += get_group_id(2) * (ulong)n * k;
    float8 products[COLUMNS][DENSE_ROWS];
    float tails[COLUMNS][DENSE_ROWS];
    ulong columns[COLUMNS], starts[DENSE_ROWS];
#pragma unroll
    for (uint c = 0; c < COLUMNS; c++)
        columns[c] = min(first + c, n - 1) * (ulong)k;
#pragma unroll
    for (uint r = 0; r < DENSE_ROWS; r++)
        starts[r] = min(first_row + r, rows - 1) * (ulong)x_stride;
#pragma unroll
    for (uint c = 0; c < COLUMNS; c++)
#pragma unroll
        for (uint r = 0; r < DENSE_ROWS; r++) {
            products[c][r] = (float8)(0.0f);
            tails[c][r] = 0;
        }
    for (uint octet = lane; octet < k / 8; octet += TEAM) {
        float8 w[COLUMNS];
#pragma unroll
        for (uint c = 0; c < COLUMNS; c++)
            w[c] = SCALED(load8_weight(weight, columns[c] + 8 * octet), min(first + c, n - 1), 8 * octet);
#pragma unroll
        for (uint r = 0; r < DENSE_ROWS; r++) {
            const float8 a = load8_input(x, starts[r] + 8 * octet);
#pragma unroll
            for (uint c = 0; c < COLUMNS; c++)
                products[c][r] = fma(a, w[c], products[c][r]);
        }
    }
    for (uint i = k / 8 * 8 + lane; i < k; i += TEAM)
        for (uint r = 0; r < DENSE_ROWS; r++)
            for (uint c = 0; c < COLUMNS; c++)
                tails[c][r] = fma(load_input(x, starts[r] + i),
                                  SCALED(load_weight(weight, columns[c] + i), min(first + c, n - 1), i), tails[c][r]);
    for (uint c = 0; c < COLUMNS; c++)
        for (uint r = 0; r < DENSE_ROWS; r++) {
            barrier(CLK_LOCAL_MEM_FENCE);
            sums[item] = sum8(products[c][r]) + tails[c][r];
            barrier(CLK_LOCAL_MEM_FENCE);
            for (uint half_size = TEAM / 2; half_size > 0; half_size /= 2) {
                if (lane < half_size)
                    sums[item] += sums[item + half_size];
                barrier(CLK_LOCAL_MEM_FENCE);
            }
            if (lane == 0 && first + c < n && first_row + r < rows)
                out[out_offset + get_group_id(2) * (ulong)out_batch + (first_row + r) * (ulong)out_stride + first + c] =
                    sums[item] + (bias ? bias[first + c] : 0);
        }
}

// For many rows: a work-group of 16 x 16 work-items computes a tile of 64 rows and 64 columns, 16 values of K at a time
// from local memory; a work-item has 4 x 4 of the sums, 16 apart. Groups: columns, rows, batch.
#define TILE 64
#define TILE_K 16
#define EACH (TILE / 16)
__attribute__((reqd_work_group_size(256, 1, 1))) __kernel void dense_many(DENSE_ARGS)
{
    // One column more than TILE, so that neighbours of a column lie in different banks.
    __local float a[TILE_K][TILE + 1], b[TILE_K][TILE + 1];
    const uint item = get_local_id(0), tx = item % 16, ty = item / 16;
    const uint first = get_group_id(0) * TILE, first_row = get_group_id(1) * TILE;
    x += x_offset + get_group_id(2) * (ulong)x_batch;
    weight += get_group_id(2) * (ulong)n * k;
    float sums[EACH][EACH];
#pragma unroll
    for (uint i = 0; i < EACH; i++)
#pragma unroll
        for (uint j = 0; j < EACH; j++)
            sums[i][j] = 0;
    for (uint base = 0; base < k; base += TILE_K) {
        const bool inside = base + tx < k;
#pragma unroll
        for (uint i = 0; i < EACH; i++) {
            const uint place = ty + 16 * i;
            a[tx][place] = inside && first_row + place < rows
                               ? load_input(x, (ulong)(first_row + place) * x_stride + base + tx)
                               : 0;
            b[tx][place] =
                inside && first + place < n
                    ? SCALED(load_weight(weight, (ulong)(first + place) * k + base + tx), first + place, base + tx)
                    : 0;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
#pragma unroll
        for (uint step = 0; step < TILE_K; step++) {
            float left[EACH], right[EACH];
#pragma unroll
            for (uint i = 0; i < EACH; i++) {
                left[i] = a[step][ty + 16 * i];
                right[i] = b[step][tx + 16 * i];
            }
#pragma unroll
            for (uint i = 0; i < EACH; i++)
#pragma unroll
                for (uint j = 0; j < EACH; j++)
                    sums[i][j] = fma(left[i], right[j], sums[i][j]);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    for (uint i = 0; i < EACH; i++)
        for (uint j = 0; j < EACH; j++) {
            const uint row = first_row + ty + 16 * i, column = first + tx + 16 * j;
            if (row < rows && column < n)
                out[out_offset + get_group_id(2) * (ulong)out_batch + row * (ulong)out_stride + column] =
                    sums[i][j] + (bias ? bias[column] : 0);
        }
}
