/* Norms of rows, over the vectors of a vec_*.h. The including file defines KERNEL and TARGET. */
#ifndef MARLIN_CY_NORMS_H
#define MARLIN_CY_NORMS_H

#include "activate.h"

/* Whether weights of a dtype have 8 bits, and scales. */
KERNEL int is_scaled(int dtype) { return dtype == DTYPE_I8 || dtype == DTYPE_F8; }

/* Bytes of an element. */
KERNEL int element_size(int dtype) { return dtype == DTYPE_F32 ? 4 : is_scaled(dtype) ? 1 : 2; }

/* Load the lanes of a row's last values: `count` of them, continued with zeros. */
KERNEL void load_tail(vec parts[PARTS], const void *from, int64_t count, int dtype)
{
    float values[LANES] = {0};
    memcpy(values, from, (size_t)(count * element_size(dtype)));
    for (int part = 0; part < PARTS; part++)
        parts[part] = vec_load_as(values, part * VEC_N, dtype);
}

/* The sum of x[i]^2, by lanes. */
KERNEL float sum_of_squares(const float *x, int64_t n)
{
    vec sum[PARTS], tail[PARTS];
    int64_t i = 0;
    for (int part = 0; part < PARTS; part++)
        sum[part] = vec_set(0.0f);
    for (; i + LANES <= n; i += LANES)
        for (int part = 0; part < PARTS; part++) {
            const vec value = vec_load(x + i + part * VEC_N);
            sum[part] = vec_fma(value, value, sum[part]);
        }
    if (i < n) {
        load_tail(tail, x + i, n - i, DTYPE_F32);
        for (int part = 0; part < PARTS; part++)
            sum[part] = vec_fma(tail[part], tail[part], sum[part]);
    }
    return lanes_sum(sum);
}

TARGET static void rms_norm(float *dst, const float *src, const float *weight, float eps, int64_t n)
{
    const float r = 1.0f / sqrtf(sum_of_squares(src, n) / (float)n + eps);
    if (weight)
        for (int64_t i = 0; i < n; i++)
            dst[i] = src[i] * r * weight[i];
    else
        for (int64_t i = 0; i < n; i++)
            dst[i] = src[i] * r;
}

TARGET static void gated_rms_norm(float *dst, const float *src, const float *weight, const float *gate, float eps,
                                  int64_t n)
{
    const float r = 1.0f / sqrtf(sum_of_squares(src, n) / (float)n + eps);
    if (weight)
        for (int64_t i = 0; i < n; i++)
            dst[i] = src[i] * r * weight[i] * silu_f32(gate[i]);
    else
        for (int64_t i = 0; i < n; i++)
            dst[i] = src[i] * r * silu_f32(gate[i]);
}

TARGET static void l2_normalize(float *x, float factor, int64_t n)
{
    const float r = factor / sqrtf(sum_of_squares(x, n) + 1e-6f);
    for (int64_t i = 0; i < n; i++)
        x[i] = x[i] * r;
}

#define NORM_KERNELS .rms_norm = rms_norm, .gated_rms_norm = gated_rms_norm, .l2_normalize = l2_normalize

#endif
