/* The exponential function and what consists of it, in plain C, for loops that the compiler vectorises. Every step is
 * one IEEE operation, fused only where the code says fmaf. The including file defines ROWOPS: storage class and target
 * attribute.
 */
#ifndef MARLIN_CY_ACTIVATE_H
#define MARLIN_CY_ACTIVATE_H

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

/* max(x, 0) squared. A NaN stays a NaN. */
ROWOPS float rectified_square(float x) { return x < 0.0f ? 0.0f : x * x; }

/* Every activation is gate * sigmoid(z) * up, with its own z:
 *
 *   silu       z = gate
 *   gelu_tanh  z = 2 u, an odd polynomial in gate, because (1 + tanh(u)) / 2 = sigmoid(2 u)
 *   gelu       z = log(Phi(gate) / Phi(-gate)) with Phi(x) = (1 + erf(x / sqrt(2))) / 2. This function is odd and
 *              smooth. A polynomial approximates it, whose coefficients minimise the largest error of sigmoid(z),
 *              0.49 * 2^-24. Beyond the fitted range (|gate| > 7) z keeps rising with gate, so the result is gate or 0.
 *   swigluoai  z = 1.702 gate, of clamped values
 *   silu_clamp10  as silu, of clamped values
 *
 * relu2 is the exception: the square of max(up, 0).
 *
 * The error of the others, in units of 2^-24 * |gate * up|, is the sum of
 *
 *   1 each     for the division, the sum in the denominator, the product with up, and up + 1
 *   at most 1  for exp: its error of 4, times sigmoid * (1 - sigmoid), which is at most 1/4
 *   0.68       for z: its relative error of 2 or 3, times |z| * sigmoid * (1 - sigmoid), which is at most 0.224
 *   0.49       for the fit of gelu */
ROWOPS float activate(float gate, float up, int activation)
{
    if (activation == ACTIVATION_RELU2)
        return rectified_square(up);
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

/* exp(x), where a NaN stays a NaN. */
ROWOPS float exp_or_nan(float x) { return x == x ? exp_f32(x) : x; }

ROWOPS float silu_f32(float x) { return x / (1.0f + exp_f32(-x)); }

ROWOPS float sigmoid_f32(float x) { return x == x ? 1.0f / (1.0f + exp_f32(-x)) : x; }

/* tanh(x) within 4 units of 2^-24, also where it is small. A NaN stays a NaN. */
ROWOPS float tanh_f32(float x) { return x == x ? 1.0f - 2.0f / (1.0f + exp_f32(2.0f * x)) : x; }

#endif
