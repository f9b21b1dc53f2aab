/* The AVX-512 intrinsics that the 512-bit ISAs use, by AVX2, for machines without AVX-512: compile avx512vnni.c and amx.c
 * with `-include` this file. An intrinsic that is missing here does not compile: add it.
 *
 * Their probes find everything. Addresses that AVX-512 would answer with an exception abort.
 */
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "x86.h"

/* Instructions of the machine, in place of those of AVX-512. */
#define ZMM_TARGET "avx2,fma,f16c"
/* A vector of 512 bits does not fit a register: GCC cannot keep it there. */
#define KEEP(vector) ((void)(vector))
#define USE(vector) ((void)(vector))

#define x86_support(cpu, os, has, lacks) ((void)(cpu), (void)(os), (isa_support){1, "emulated by the tests"})

#define EMULATED static inline __attribute__((always_inline, target(ZMM_TARGET)))

typedef int8_t bytes_16 __attribute__((vector_size(16)));
typedef uint8_t unsigned_bytes_16 __attribute__((vector_size(16)));
typedef uint16_t words_16 __attribute__((vector_size(32)));
typedef int8_t bytes_64 __attribute__((vector_size(64)));
typedef uint16_t words_32 __attribute__((vector_size(64)));
typedef int32_t ints_16 __attribute__((vector_size(64)));
typedef uint32_t unsigned_16 __attribute__((vector_size(64)));

#define EIGHT_TIMES(x) x, x, x, x, x, x, x, x
#define SIXTEEN_TIMES(x) EIGHT_TIMES(x), EIGHT_TIMES(x)
#define SIXTY_FOUR_TIMES(x) SIXTEEN_TIMES(x), SIXTEEN_TIMES(x), SIXTEEN_TIMES(x), SIXTEEN_TIMES(x)

EMULATED __m256i half_of(__m512i v, int half)
{
    __m256i halves[2];
    memcpy(halves, &v, sizeof v);
    return halves[half];
}

EMULATED __m512i join(__m256i low, __m256i high)
{
    const __m256i halves[2] = {low, high};
    __m512i v;
    memcpy(&v, halves, sizeof v);
    return v;
}

EMULATED __m256 float_half_of(__m512 v, int half) { return (__m256)half_of((__m512i)v, half); }

EMULATED __m512 join_floats(__m256 low, __m256 high) { return (__m512)join((__m256i)low, (__m256i)high); }

EMULATED void require_aligned(const void *address)
{
    if ((uintptr_t)address % 64) {
        fprintf(stderr, "AVX-512 fault: %p is not a multiple of 64\n", address);
        abort();
    }
}

/* Loads and stores. */

EMULATED __m512i emulated_loadu_si512(const void *from)
{
    __m512i v;
    memcpy(&v, from, sizeof v);
    return v;
}

EMULATED __m512i emulated_load_si512(const void *from)
{
    require_aligned(from);
    return emulated_loadu_si512(from);
}

EMULATED void emulated_store_si512(void *to, __m512i v)
{
    require_aligned(to);
    memcpy(to, &v, sizeof v);
}

EMULATED __m512 emulated_loadu_ps(const void *from)
{
    __m512 v;
    memcpy(&v, from, sizeof v);
    return v;
}

EMULATED __m512 emulated_load_ps(const void *from)
{
    require_aligned(from);
    return emulated_loadu_ps(from);
}

EMULATED void emulated_storeu_ps(void *to, __m512 v) { memcpy(to, &v, sizeof v); }

EMULATED void emulated_store_ps(void *to, __m512 v)
{
    require_aligned(to);
    memcpy(to, &v, sizeof v);
}

/* Constants, and parts of vectors. */

EMULATED __m512i emulated_setzero_si512(void) { return (__m512i){0}; }

EMULATED __m512 emulated_setzero_ps(void) { return (__m512){0}; }

EMULATED __m512i emulated_set1_epi8(int8_t x) { return (__m512i)(bytes_64){SIXTY_FOUR_TIMES(x)}; }

EMULATED __m512i emulated_set1_epi32(int32_t x) { return (__m512i)(ints_16){SIXTEEN_TIMES(x)}; }

EMULATED __m512 emulated_set1_ps(float x) { return (__m512){SIXTEEN_TIMES(x)}; }

EMULATED __m512i emulated_broadcast_i32x4(__m128i x)
{
    const __m256i twice = _mm256_broadcastsi128_si256(x);
    return join(twice, twice);
}

EMULATED __m512 emulated_castsi512_ps(__m512i v) { return (__m512)v; }

EMULATED __m256 emulated_castps512_ps256(__m512 v) { return float_half_of(v, 0); }

EMULATED __m256 emulated_extractf32x8_ps(__m512 v, int half) { return float_half_of(v, half); }

/* Conversions. */

EMULATED __m512i emulated_cvtepi8_epi32(__m128i x) { return (__m512i)__builtin_convertvector((bytes_16)x, ints_16); }

EMULATED __m512i emulated_cvtepu8_epi32(__m128i x)
{
    return (__m512i)__builtin_convertvector((unsigned_bytes_16)x, ints_16);
}

EMULATED __m512i emulated_cvtepu16_epi32(__m256i x) { return (__m512i)__builtin_convertvector((words_16)x, ints_16); }

EMULATED __m128i emulated_cvtepi32_epi8(__m512i v) { return (__m128i)__builtin_convertvector((ints_16)v, bytes_16); }

EMULATED __m512 emulated_cvtepi32_ps(__m512i v)
{
    return join_floats(_mm256_cvtepi32_ps(half_of(v, 0)), _mm256_cvtepi32_ps(half_of(v, 1)));
}

EMULATED __m512i emulated_cvtps_epi32(__m512 v)
{
    return join(_mm256_cvtps_epi32(float_half_of(v, 0)), _mm256_cvtps_epi32(float_half_of(v, 1)));
}

EMULATED __m512 emulated_cvtph_ps(__m256i x)
{
    return join_floats(_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1)));
}

/* Integers. */

EMULATED __m512i emulated_and_si512(__m512i a, __m512i b) { return a & b; }

EMULATED __m512i emulated_add_epi32(__m512i a, __m512i b) { return (__m512i)((unsigned_16)a + (unsigned_16)b); }

EMULATED __m512i emulated_sub_epi32(__m512i a, __m512i b) { return (__m512i)((unsigned_16)a - (unsigned_16)b); }

EMULATED __m512i emulated_mullo_epi32(__m512i a, __m512i b) { return (__m512i)((unsigned_16)a * (unsigned_16)b); }

EMULATED __m512i emulated_sub_epi8(__m512i a, __m512i b)
{
    return join(_mm256_sub_epi8(half_of(a, 0), half_of(b, 0)), _mm256_sub_epi8(half_of(a, 1), half_of(b, 1)));
}

EMULATED __m512i emulated_slli_epi32(__m512i v, unsigned by) { return (__m512i)((unsigned_16)v << by); }

EMULATED __m512i emulated_srai_epi32(__m512i v, unsigned by) { return (__m512i)((ints_16)v >> by); }

EMULATED __m512i emulated_srli_epi16(__m512i v, unsigned by) { return (__m512i)((words_32)v >> by); }

EMULATED __m512i emulated_max_epu32(__m512i a, __m512i b)
{
    return join(_mm256_max_epu32(half_of(a, 0), half_of(b, 0)), _mm256_max_epu32(half_of(a, 1), half_of(b, 1)));
}

EMULATED __m512i emulated_madd_epi16(__m512i a, __m512i b)
{
    return join(_mm256_madd_epi16(half_of(a, 0), half_of(b, 0)), _mm256_madd_epi16(half_of(a, 1), half_of(b, 1)));
}

/* In each lane, the sum of four products of an unsigned and a signed byte: two of even bytes, two of odd bytes. */
EMULATED __m256i products_of_quads(__m256i w, __m256i x)
{
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
    return _mm256_add_epi32(even, odd);
}

EMULATED __m512i emulated_dpbusd_epi32(__m512i sum, __m512i w, __m512i x)
{
    const __m512i products =
        join(products_of_quads(half_of(w, 0), half_of(x, 0)), products_of_quads(half_of(w, 1), half_of(x, 1)));
    return emulated_add_epi32(sum, products);
}

EMULATED __m512i emulated_shuffle_epi8(__m512i v, __m512i at)
{
    return join(_mm256_shuffle_epi8(half_of(v, 0), half_of(at, 0)), _mm256_shuffle_epi8(half_of(v, 1), half_of(at, 1)));
}

EMULATED __m512i emulated_mask_blend_epi16(__mmask32 mask, __m512i a, __m512i b)
{
    const words_32 of_a = (words_32)a, of_b = (words_32)b;
    words_32 v;
    for (int i = 0; i < 32; i++)
        v[i] = mask >> i & 1 ? of_b[i] : of_a[i];
    return (__m512i)v;
}

EMULATED __mmask16 emulated_test_epi32_mask(__m512i a, __m512i b)
{
    const ints_16 both = (ints_16)(a & b);
    unsigned mask = 0;
    for (int i = 0; i < 16; i++)
        mask |= (unsigned)(both[i] != 0) << i;
    return (__mmask16)mask;
}

EMULATED int32_t emulated_reduce_add_epi32(__m512i v)
{
    uint32_t sum = 0;
    for (int i = 0; i < 16; i++)
        sum += ((unsigned_16)v)[i];
    return (int32_t)sum;
}

EMULATED uint32_t emulated_reduce_max_epu32(__m512i v)
{
    uint32_t most = 0;
    for (int i = 0; i < 16; i++)
        most = ((unsigned_16)v)[i] > most ? ((unsigned_16)v)[i] : most;
    return most;
}

/* Floats. */

EMULATED __m512 emulated_add_ps(__m512 a, __m512 b) { return a + b; }

EMULATED __m512 emulated_sub_ps(__m512 a, __m512 b) { return a - b; }

EMULATED __m512 emulated_mul_ps(__m512 a, __m512 b) { return a * b; }

EMULATED __m512 emulated_fmadd_ps(__m512 a, __m512 b, __m512 c)
{
    return join_floats(_mm256_fmadd_ps(float_half_of(a, 0), float_half_of(b, 0), float_half_of(c, 0)),
                       _mm256_fmadd_ps(float_half_of(a, 1), float_half_of(b, 1), float_half_of(c, 1)));
}

EMULATED __m512 emulated_max_ps(__m512 a, __m512 b)
{
    return join_floats(_mm256_max_ps(float_half_of(a, 0), float_half_of(b, 0)),
                       _mm256_max_ps(float_half_of(a, 1), float_half_of(b, 1)));
}

#undef _mm512_extractf32x8_ps
#define _mm512_add_epi32 emulated_add_epi32
#define _mm512_add_ps emulated_add_ps
#define _mm512_and_si512 emulated_and_si512
#define _mm512_broadcast_i32x4 emulated_broadcast_i32x4
#define _mm512_castps512_ps256 emulated_castps512_ps256
#define _mm512_castsi512_ps emulated_castsi512_ps
#define _mm512_cvtepi32_epi8 emulated_cvtepi32_epi8
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#define _mm512_dpbusd_epi32 emulated_dpbusd_epi32
#define _mm512_extractf32x8_ps emulated_extractf32x8_ps
#define _mm512_fmadd_ps emulated_fmadd_ps
#define _mm512_load_ps emulated_load_ps
#define _mm512_load_si512 emulated_load_si512
#define _mm512_loadu_ps emulated_loadu_ps
#define _mm512_loadu_si512 emulated_loadu_si512
#define _mm512_madd_epi16 emulated_madd_epi16
#define _mm512_mask_blend_epi16 emulated_mask_blend_epi16
#define _mm512_max_epu32 emulated_max_epu32
#define _mm512_max_ps emulated_max_ps
#define _mm512_mul_ps emulated_mul_ps
#define _mm512_mullo_epi32 emulated_mullo_epi32
#define _mm512_reduce_add_epi32 emulated_reduce_add_epi32
#define _mm512_reduce_max_epu32 emulated_reduce_max_epu32
#define _mm512_set1_epi32 emulated_set1_epi32
#define _mm512_set1_epi8 emulated_set1_epi8
#define _mm512_set1_ps emulated_set1_ps
#define _mm512_setzero_ps emulated_setzero_ps
#define _mm512_setzero_si512 emulated_setzero_si512
#define _mm512_shuffle_epi8 emulated_shuffle_epi8
#define _mm512_slli_epi32 emulated_slli_epi32
#define _mm512_srai_epi32 emulated_srai_epi32
#define _mm512_srli_epi16 emulated_srli_epi16
#define _mm512_store_ps emulated_store_ps
#define _mm512_store_si512 emulated_store_si512
#define _mm512_storeu_ps emulated_storeu_ps
#define _mm512_sub_epi32 emulated_sub_epi32
#define _mm512_sub_epi8 emulated_sub_epi8
#define _mm512_sub_ps emulated_sub_ps
#define _mm512_test_epi32_mask emulated_test_epi32_mask
