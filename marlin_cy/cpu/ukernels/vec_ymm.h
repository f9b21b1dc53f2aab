/* Vectors of 256 bits: half of a row's lanes. */
#ifndef MARLIN_CY_VEC_YMM_H
#define MARLIN_CY_VEC_YMM_H

#include "ymm.h"

enum { VEC_N = 8, PARTS = LANES / VEC_N };

typedef __m256 vec;

YMM vec vec_set(float x) { return _mm256_set1_ps(x); }

YMM vec vec_load(const float *from) { return _mm256_loadu_ps(from); }

/* Elements index to index + VEC_N - 1 of an array of `dtype`, which is a constant; those of DTYPE_F8 times 2^-8. */
YMM vec vec_load_as(const void *from, int64_t index, int dtype)
{
    if (dtype == DTYPE_F32)
        return _mm256_loadu_ps((const float *)from + index);
    if (dtype == DTYPE_I8)
        return _mm256_cvtepi32_ps(
            _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)((const int8_t *)from + index))));
    if (dtype == DTYPE_F8) { /* float16 has the same bits from bit 7 on, and 8 more in its exponent's bias */
        const __m128i signs = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)((const uint8_t *)from + index)));
        return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(signs, 7), _mm_set1_epi16((short)0xbfff)));
    }
    const __m128i bits = _mm_loadu_si128((const __m128i *)((const uint16_t *)from + index));
    if (dtype == DTYPE_BF16)
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    return _mm256_cvtph_ps(bits);
}

YMM void vec_store(float *to, vec v) { _mm256_storeu_ps(to, v); }

YMM vec vec_add(vec a, vec b) { return _mm256_add_ps(a, b); }

YMM vec vec_sub(vec a, vec b) { return _mm256_sub_ps(a, b); }

YMM vec vec_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }

YMM vec vec_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }

/* a where a > b, else b. */
YMM vec vec_max(vec a, vec b) { return _mm256_max_ps(a, b); }

/* The sum of all lanes, by the tree of operations.h. */
YMM float lanes_sum(const vec parts[PARTS])
{
    const __m256 eight = _mm256_add_ps(parts[0], parts[1]);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* Keep a vector in a register: what follows does not load it again. */
#define KEEP_VEC(v) KEEP(v)

#endif
