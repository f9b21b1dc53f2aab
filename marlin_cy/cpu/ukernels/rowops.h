/* Row operations in plain C. The file of each ISA includes them, and so compiles them for its own instructions. The
 * compiler vectorises them. Every step is one IEEE operation, fused only where the code says fmaf, so the bits do not
 * depend on the width of the vectors. The including file defines ROWOPS: storage class and target attribute.
 */
#ifndef MARLIN_CY_ROWOPS_H
#define MARLIN_CY_ROWOPS_H

#include <math.h>
#include <string.h>

#include "ukernel.h"

static inline uint32_t float_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float bits_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* exp(x) within 2 units in the last place. As expf of Cephes: x = n ln 2 + r, and a polynomial in r. Then n is added to
 * the exponent in two halves, so that the results are right down to the smallest subnormal and up to infinity. */
ROWOPS float exp_f32(float x)
{
    x = x > -104.0f ? x : -104.0f; /* also if x is a NaN, which callers handle: silu gives NaN / 1 */
    x = x < 89.0f ? x : 89.0f;
    float n = rintf(x * 1.44269504f);
    float r = fmaf(n, -0.693359375f, x);
    r = fmaf(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = fmaf(p, r, 1.3981999507e-3f);
    p = fmaf(p, r, 8.3334519073e-3f);
    p = fmaf(p, r, 4.1665795894e-2f);
    p = fmaf(p, r, 1.6666665459e-1f);
    p = fmaf(p, r, 5.0000001201e-1f);
    p = fmaf(p, r * r, r) + 1.0f;
    int32_t whole = (int32_t)n, half = whole >> 1;
    return p * bits_float((uint32_t)(half + 127) << 23) * bits_float((uint32_t)(whole - half + 127) << 23);
}

/* Every activation is gate * sigmoid(z) * up, with its own z:
 *
 *   silu       z = gate
 *   gelu_tanh  z = 2 u, an odd polynomial in gate, because (1 + tanh(u)) / 2 = sigmoid(2 u)
 *   gelu       z = log(Phi(gate) / Phi(-gate)) with Phi(x) = (1 + erf(x / sqrt(2))) / 2. This function is odd and
 *              smooth. A polynomial approximates it, whose coefficients minimise the largest error of sigmoid(z),
 *              0.49 * 2^-24. Beyond the fitted range (|gate| > 7) z keeps rising with gate, so the result is gate or 0.
 *   swigluoai  z = 1.702 gate, of clamped values
 *
 * The error, in units of 2^-24 * |gate * up|, is the sum of
 *
 *   1 each     for the division, the sum in the denominator, the product with up, and up + 1
 *   at most 1  for exp: its error of 4, times sigmoid * (1 - sigmoid), which is at most 1/4
 *   0.68       for z: its relative error of 2 or 3, times |z| * sigmoid * (1 - sigmoid), which is at most 0.224
 *   0.49       for the fit of gelu */
ROWOPS float activate(float gate, float up, int activation)
{
    float z = gate;
    if (activation == ACTIVATION_GELU) {
        const float square = gate * gate;
        float p = 3.512341529e-9f;
        p = fmaf(p, square, -2.645266761e-7f);
        p = fmaf(p, square, 7.929488675e-6f);
        p = fmaf(p, square, -1.106123891e-4f);
        p = fmaf(p, square, -6.518995360e-5f);
        p = fmaf(p, square, 7.266616821e-2f);
        z = gate * fmaf(p, square, 1.595769882f);
    } else if (activation == ACTIVATION_GELU_TANH) {
        z = gate * fmaf(7.13548163e-2f, gate * gate, 1.59576912f); /* 2 sqrt(2 / pi) * (0.044715 gate^2 + 1) */
    } else if (activation == ACTIVATION_SWIGLUOAI) {
        z = 1.702f * gate;
        up += 1.0f;
    }
    return gate / (1.0f + exp_f32(-z)) * up;
}

/* The clamps of swigluoai. A NaN fails each comparison, so it stays a NaN. The clamps are in a separate loop: within
 * the loop of the activation, the compiler derives branches from the constant 7 and does not vectorise them. */
ROWOPS void clamp_sums(float *restrict clamped, const float *restrict sums)
{
    for (int i = 0; i < TILE_N; i++) {
        const float gate = sums[i], up = sums[TILE_N + i];
        clamped[i] = gate > 7.0f ? 7.0f : gate;
        clamped[TILE_N + i] = fabsf(up) > 7.0f ? copysignf(7.0f, up) : up;
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
        if (activation == ACTIVATION_SWIGLUOAI) {
            clamp_sums(clamped, values);
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
