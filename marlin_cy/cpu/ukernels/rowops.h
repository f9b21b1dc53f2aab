/* Row operations in plain C. The file of each ISA includes them, and so compiles them for its own instructions. The
 * compiler vectorises them. Every step is one IEEE operation, fused only where the code says fmaf, so the bits do not
 * depend on the width of the vectors. The including file defines ROWOPS: storage class and target attribute.
 */
#ifndef MARLIN_CY_ROWOPS_H
#define MARLIN_CY_ROWOPS_H

#include "activate.h"

/* Gates at most `limit`, ups between -limit and limit. A NaN fails each comparison, so it stays a NaN. The clamps are in a separate loop: within
 * the loop of the activation, the compiler derives branches from the constant and does not vectorise them. */
ROWOPS void clamp_sums(float *restrict clamped, const float *restrict sums, float limit)
{
    for (int i = 0; i < TILE_N; i++) {
        const float gate = sums[i], up = sums[TILE_N + i];
        clamped[i] = gate > limit ? limit : gate;
        clamped[TILE_N + i] = fabsf(up) > limit ? copysignf(limit, up) : up;
    }
}

/* `activation` is a constant where this is inlined. */
ROWOPS void glu_epilogue_by(float *dst, ptrdiff_t row_floats, const int64_t *rows, int m, const float *sums,
                            const float *gate_bias, const float *up_bias, int activation)
{
    for (int r = 0; r < m; r++, sums += PAIR_N) {
        float *restrict row = dst + rows[r] * row_floats;
        float biased[PAIR_N], clamped[PAIR_N];
        const float *restrict values = sums;
        if (gate_bias) {
            for (int i = 0; i < TILE_N; i++) {
                biased[i] = sums[i] + gate_bias[i];
                biased[TILE_N + i] = sums[TILE_N + i] + up_bias[i];
            }
            values = biased;
        }
        if (activation == ACTIVATION_SWIGLUOAI || activation == ACTIVATION_SILU_CLAMP10) {
            clamp_sums(clamped, values, activation == ACTIVATION_SWIGLUOAI ? 7.0f : 10.0f);
            values = clamped;
        }
        for (int i = 0; i < TILE_N; i++)
            row[i] = activate(values[i], values[TILE_N + i], activation);
    }
}

ROWOPS void glu_epilogue_sums(float *dst, ptrdiff_t row_floats, const int64_t *rows, int m, const float *sums,
                              const float *gate_bias, const float *up_bias, int activation)
{
    switch (activation) {
    case ACTIVATION_SILU: glu_epilogue_by(dst, row_floats, rows, m, sums, gate_bias, up_bias, ACTIVATION_SILU); break;
    case ACTIVATION_GELU: glu_epilogue_by(dst, row_floats, rows, m, sums, gate_bias, up_bias, ACTIVATION_GELU); break;
    case ACTIVATION_GELU_TANH:
        glu_epilogue_by(dst, row_floats, rows, m, sums, gate_bias, up_bias, ACTIVATION_GELU_TANH);
        break;
    case ACTIVATION_SWIGLUOAI:
        glu_epilogue_by(dst, row_floats, rows, m, sums, gate_bias, up_bias, ACTIVATION_SWIGLUOAI);
        break;
    case ACTIVATION_SILU_CLAMP10:
        glu_epilogue_by(dst, row_floats, rows, m, sums, gate_bias, up_bias, ACTIVATION_SILU_CLAMP10);
        break;
    case ACTIVATION_RELU2: glu_epilogue_by(dst, row_floats, rows, m, sums, gate_bias, up_bias, ACTIVATION_RELU2); break;
    }
}

ROWOPS void axpy_rows(float *restrict dst, const float *restrict src, float weight, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        dst[i] = fmaf(weight, src[i], dst[i]);
}

ROWOPS void widen_bf16(float *restrict dst, const uint16_t *restrict src, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        dst[i] = bits_float((uint32_t)src[i] << 16);
}

ROWOPS void narrow_bf16(uint16_t *restrict dst, const float *restrict src, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = float_bits(src[i]);
        uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        uint32_t quiet_nan = bits >> 16 | 0x40;
        dst[i] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded);
    }
}

ROWOPS void narrow_values(void *dst, const float *src, int dtype, int64_t n);

/* The including file defines `narrow_values`, the conversion to float16, bfloat16 or float32. */
ROWOPS void store_sums(char *dst, ptrdiff_t row_bytes, const int64_t *rows, int m, const float *sums, const float *bias,
                       int n, int dtype)
{
    for (int r = 0; r < m; r++, sums += PAIR_N) {
        float biased[PAIR_N];
        const float *values = sums;
        if (bias) {
            for (int i = 0; i < n; i++)
                biased[i] = sums[i] + bias[i];
            values = biased;
        }
        narrow_values(dst + rows[r] * row_bytes, values, dtype, n);
    }
}

ROWOPS void softmax_row(float *x, int64_t n)
{
    float largest = x[0], sum = 0.0f;
    for (int64_t i = 1; i < n; i++)
        largest = x[i] > largest ? x[i] : largest;
    for (int64_t i = 0; i < n; i++) {
        const float difference = x[i] - largest;
        x[i] = difference == difference ? exp_f32(difference) : difference;
    }
    for (int64_t i = 0; i < n; i++)
        sum += x[i];
    for (int64_t i = 0; i < n; i++)
        x[i] = x[i] / sum;
}

ROWOPS void sigmoid_row(float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = x[i] == x[i] ? 1.0f / (1.0f + exp_f32(-x[i])) : x[i];
}

#endif
