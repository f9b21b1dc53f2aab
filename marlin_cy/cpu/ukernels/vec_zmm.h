/* Vectors of 512 bits: all lanes of a row. */
#ifndef MARLIN_CY_VEC_ZMM_H
#define MARLIN_CY_VEC_ZMM_H

#include "zmm.h"

enum { VEC_N = 16, PARTS = LANES / VEC_N };

typedef __m512 vec;

ZMM vec vec_set(float x) { return _mm512_set1_ps(x); }

ZMM vec vec_load(const float *from) { return _mm512_loadu_ps(from); }

/* Elements index to index + VEC_N - 1 of an array of `dtype`, which is a constant; those of DTYPE_F8 times 2^-8. */
ZMM vec vec_load_as(const void *from, int64_t index, int dtype)
{
    if (dtype == DTYPE_F32)
        return _mm512_loadu_ps((const float *)from + index);
    if (dtype == DTYPE_I8)
        return _mm512_cvtepi32_ps(
            _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)((const int8_t *)from + index))));
    if (dtype == DTYPE_F8) { /* as in vec_ymm.h */
        const __m256i signs = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)((const uint8_t *)from + index)));
        return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(signs, 7), _mm256_set1_epi16((short)0xbfff)));
    }
    const __m256i bits = _mm256_loadu_si256((const __m256i *)((const uint16_t *)from + index));
    if (dtype == DTYPE_BF16)
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    return _mm512_cvtph_ps(bits);
}

ZMM void vec_store(float *to, vec v) { _mm512_storeu_ps(to, v); }

ZMM vec vec_add(vec a, vec b) { return _mm512_add_ps(a, b); }

ZMM vec vec_sub(vec a, vec b) { return _mm512_sub_ps(a, b); }

ZMM vec vec_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }

ZMM vec vec_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }

/* a where a > b, else b. */
ZMM vec vec_max(vec a, vec b) { return _mm512_max_ps(a, b); }

/* The sum of all lanes, by the tree of operations.h. */
ZMM float lanes_sum(const vec parts[PARTS])
{
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(parts[0]), _mm512_extractf32x8_ps(parts[0], 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* Keep a vector in a register: what follows does not load it again. */
#define KEEP_VEC(v) KEEP(v)

#endif
