/* Vectors of portable C: all lanes of a row. The including file defines half_to_float. The compiler decides what to
 * inline: where the CPU has no fused multiply-add, each fmaf is a call. */
#ifndef MARLIN_CY_VEC_C_H
#define MARLIN_CY_VEC_C_H

#include <math.h>
#include <string.h>

#include "activate.h"

enum { VEC_N = LANES, PARTS = LANES / VEC_N };

typedef struct {
    float lane[VEC_N];
} vec;

static inline vec vec_set(float x)
{
    vec v;
    for (int l = 0; l < VEC_N; l++)
        v.lane[l] = x;
    return v;
}

static inline vec vec_load(const float *from)
{
    vec v;
    memcpy(&v, from, sizeof v);
    return v;
}

/* Elements index to index + VEC_N - 1 of an array of `dtype`; those of DTYPE_F8 times 2^-8. */
static inline vec vec_load_as(const void *from, int64_t index, int dtype)
{
    vec v;
    if (dtype == DTYPE_F32)
        return vec_load((const float *)from + index);
    if (dtype == DTYPE_I8) {
        for (int l = 0; l < VEC_N; l++)
            v.lane[l] = (float)((const int8_t *)from)[index + l];
        return v;
    }
    if (dtype == DTYPE_F8) { /* as in vec_ymm.h */
        for (int l = 0; l < VEC_N; l++) {
            const uint32_t bits = ((const uint8_t *)from)[index + l];
            v.lane[l] = half_to_float((uint16_t)((bits & 0x80) << 8 | (bits & 0x7f) << 7));
        }
        return v;
    }
    for (int l = 0; l < VEC_N; l++) {
        const uint16_t bits = ((const uint16_t *)from)[index + l];
        v.lane[l] = dtype == DTYPE_BF16 ? bits_float((uint32_t)bits << 16) : half_to_float(bits);
    }
    return v;
}

static inline void vec_store(float *to, vec v) { memcpy(to, &v, sizeof v); }

static inline vec vec_add(vec a, vec b)
{
    for (int l = 0; l < VEC_N; l++)
        a.lane[l] += b.lane[l];
    return a;
}

static inline vec vec_sub(vec a, vec b)
{
    for (int l = 0; l < VEC_N; l++)
        a.lane[l] -= b.lane[l];
    return a;
}

static inline vec vec_mul(vec a, vec b)
{
    for (int l = 0; l < VEC_N; l++)
        a.lane[l] *= b.lane[l];
    return a;
}

static inline vec vec_fma(vec a, vec b, vec c)
{
    for (int l = 0; l < VEC_N; l++)
        c.lane[l] = fmaf(a.lane[l], b.lane[l], c.lane[l]);
    return c;
}

/* a where a > b, else b. */
static inline vec vec_max(vec a, vec b)
{
    for (int l = 0; l < VEC_N; l++)
        a.lane[l] = a.lane[l] > b.lane[l] ? a.lane[l] : b.lane[l];
    return a;
}

/* The sum of all lanes, by the tree of operations.h. */
static inline float lanes_sum(const vec parts[PARTS])
{
    vec v = parts[0];
    for (int step = LANES / 2; step > 0; step /= 2)
        for (int l = 0; l < step; l++)
            v.lane[l] += v.lane[l + step];
    return v.lane[0];
}

/* Keep a vector in a register: what follows does not load it again. */
#define KEEP_VEC(v) ((void)(v))

#endif
