/* Operations on each value of a row by itself, in plain C that the compiler vectorises. The including file defines
 * TARGET and ROWOPS, and narrow_values.
 */
#ifndef MARLIN_CY_ELEMENTWISE_H
#define MARLIN_CY_ELEMENTWISE_H

#include "rowops.h"

TARGET static void add(float *restrict dst, const float *restrict src, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        dst[i] = dst[i] + src[i];
}

ROWOPS void rotate(float *a, float *b, float cos, float sin)
{
    const float first = *a, second = *b;
    *a = fmaf(first, cos, -(second * sin));
    *b = fmaf(second, cos, first * sin);
}

TARGET static void rope(float *x, const float *cos, const float *sin, int64_t pairs, int interleaved)
{
    float *restrict a = x, *restrict b = x + pairs;
    if (interleaved)
        for (int64_t i = 0; i < pairs; i++)
            rotate(x + 2 * i, x + 2 * i + 1, cos[i], sin[i]);
    else
        for (int64_t i = 0; i < pairs; i++)
            rotate(a + i, b + i, cos[i], sin[i]);
}

TARGET static void sigmoid_gate(float *restrict x, const float *restrict gate, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = x[i] * sigmoid_f32(gate[i]);
}

/* Whole vectors of gates and ups go through the epilogue of a task, as one row of its sums. */
TARGET static void glu_rows(float *dst, const float *gate, const float *up, int64_t n, int activation)
{
    const int64_t first_row = 0;
    for (int64_t i = 0; i < n; i += TILE_N) {
        const size_t count = n - i < TILE_N ? (size_t)(n - i) : TILE_N;
        float sums[PAIR_N] = {0}, values[TILE_N];
        memcpy(sums, gate + i, count * sizeof *sums);
        memcpy(sums + TILE_N, up + i, count * sizeof *sums);
        glu_epilogue_sums(values, TILE_N, &first_row, 1, sums, NULL, NULL, activation);
        memcpy(dst + i, values, count * sizeof *values);
    }
}

ROWOPS void scatter(char *page, const char *values, int position, int element, int d)
{
    for (int i = 0; i < d; i++)
        memcpy(page + (i * KV_BLOCK + position) * element, values + i * element, (size_t)element);
}

TARGET static void store_keys(void *page, const float *k, int position, int dtype, int d)
{
    float narrowed[MAX_HEAD_DIM];
    narrow_values(narrowed, k, dtype, d);
    if (dtype == DTYPE_F32)
        scatter(page, (const char *)narrowed, position, sizeof(float), d);
    else
        scatter(page, (const char *)narrowed, position, sizeof(uint16_t), d);
}

TARGET static void short_conv(float *dst, float *state, const float *x, const float *weight, ptrdiff_t stride,
                              int64_t channels, int width)
{
    enum { STEP = 64 }; /* channels whose sums are kept on the stack */
    for (int64_t begin = 0; begin < channels; begin += STEP) {
        const int count = channels - begin < STEP ? (int)(channels - begin) : STEP;
        float sums[STEP] = {0};
        for (int t = 0; t < width; t++) {
            const float *const taps = weight + t * stride + begin;
            const float *const input = t < width - 1 ? state + t * stride + begin : x + begin;
            for (int c = 0; c < count; c++)
                sums[c] = fmaf(taps[c], input[c], sums[c]);
        }
        for (int t = 0; t < width - 1; t++) {
            const float *const next = t < width - 2 ? state + (t + 1) * stride + begin : x + begin;
            memcpy(state + t * stride + begin, next, (size_t)count * sizeof *state);
        }
        for (int c = 0; c < count; c++)
            dst[begin + c] = silu_f32(sums[c]);
    }
}

/* log1p(u) for 0 <= u <= 1, as 2 atanh(z) with z = u / (2 + u) <= 1/3. The first term of the series that is left out,
 * z^16 / 17 of the whole, is below 2^-29. */
ROWOPS float log1p_f32(float u)
{
    const float z = u / (2.0f + u), square = z * z;
    float p = 1.0f / 15.0f;
    p = fmaf(p, square, 1.0f / 13.0f);
    p = fmaf(p, square, 1.0f / 11.0f);
    p = fmaf(p, square, 1.0f / 9.0f);
    p = fmaf(p, square, 1.0f / 7.0f);
    p = fmaf(p, square, 1.0f / 5.0f);
    p = fmaf(p, square, 1.0f / 3.0f);
    return 2.0f * fmaf(p * square, z, z);
}

TARGET static void delta_gates(float *decay, float *beta, const float *a, const float *b, const float *a_log,
                               const float *dt_bias, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        const float x = a[i] + dt_bias[i];
        const float softplus = (x > 0.0f ? x : 0.0f) + log1p_f32(exp_or_nan(-fabsf(x)));
        decay[i] = exp_or_nan(-(exp_or_nan(a_log[i]) * softplus));
        beta[i] = sigmoid_f32(b[i]);
    }
}

#define ELEMENTWISE_KERNELS                                                                                 \
    .add = add, .rope = rope, .sigmoid_gate = sigmoid_gate, .glu_rows = glu_rows, .store_keys = store_keys, \
    .short_conv = short_conv, .delta_gates = delta_gates

#endif
