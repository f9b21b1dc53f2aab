/* Shared by the two 256-bit ISAs. The 16 columns of a tile are two vectors ("halves" 0 and 1) of eight 32-bit lanes,
 * one lane per column.
 */
#ifndef MARLIN_CY_YMM_H
#define MARLIN_CY_YMM_H

#include <immintrin.h>
#include <string.h>

#include "ukernel.h"

#define YMM static inline __attribute__((always_inline, target("avx2,fma,f16c")))

enum {
    UNPACKED_BLOCK = 2 * BLOCK_BYTES,
    PREFETCH_FAR = 4096, /* bytes ahead in the stream of packed weights: into the second-level cache */
    PREFETCH_NEAR = 512, /* bytes ahead: from there into the first-level cache */
};

/* Keep a sum or a product in its register, and additions in their order. Without it GCC turns a chain of vector
 * additions into a tree whose products are stored on the stack, and copies sums around the loop. */
#define KEEP(vector) __asm__("" : "+x"(vector))

/* Keep the compiler from dropping the computation of a vector that nothing reads. */
#define USE(vector) __asm__ volatile("" : : "x"(vector))

/* Four activations of one row and plane, in every lane. */
YMM __m256i broadcast_quad(const int8_t *a)
{
    int32_t quad;
    memcpy(&quad, a, sizeof quad);
    return _mm256_set1_epi32(quad);
}

/* Scales as floats, and negated zero points as pairs (-zero, -256 * zero) of 16 bits, which vpmaddwd multiplies by
 * act_meta.sum_split. */
typedef struct {
    __m256 scale[2];
    __m256i minus_zero[2];
} group_header;

YMM __m256 load_scales(const uint8_t *from, int scale_dtype)
{
    const __m128i bits = _mm_loadu_si128((const __m128i *)from);
    if (scale_dtype == DTYPE_BF16)
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    return _mm256_cvtph_ps(bits);
}

YMM group_header load_header(const uint8_t *header, int scale_dtype, int codes)
{
    group_header h;
    for (int half = 0; half < 2; half++) {
        h.scale[half] = load_scales(header + 16 * half, scale_dtype);
        if (code_types[codes].units_per_one != 1)
            h.scale[half] = _mm256_mul_ps(h.scale[half], _mm256_set1_ps(unit_scale(codes)));
        const __m256i zero = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(header + 32 + 8 * half)));
        const __m256i minus = _mm256_sub_epi32(_mm256_setzero_si256(), zero);
        h.minus_zero[half] = _mm256_blend_epi16(minus, _mm256_slli_epi32(minus, 24), 0xaa);
    }
    return h;
}

/* Multiplicands from nibbles, one byte each. `codes` is a constant. */
YMM __m256i weights_of(__m256i nibbles, int codes)
{
    if (code_types[codes].is_identity)
        return nibbles;
    const __m128i table = _mm_loadu_si128((const __m128i *)code_types[codes].multiplicands);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), nibbles);
}

/* One group of one tile, as the micro-kernel sees it. */
typedef struct {
    const uint8_t *packed; /* its blocks */
    const uint8_t *ahead;  /* where to prefetch far ahead: one block for each block that is read */
    uint8_t *unpacked;     /* memory for the unpacked weights */
    int blocks;
    const int8_t *a;
    const act_meta *meta;
    float *sums; /* the tile's first column in row 0 of the task's sums */
} group_view;

/* Where a micro-kernel gets its weights. With few rows, one micro-kernel unpacks them in registers. With more rows, the
 * first micro-kernel also stores the unpacked weights, and the others load them. */
enum { UNPACK, UNPACK_AND_KEEP, UNPACKED };

/* Load four values of K of a block as bytes: values 0-3 (quad 0) or 4-7 (quad 1), for the columns of each half.
 * `unpacked` has them in the same order. `quad`, `source` and `codes` are constants. */
YMM void load_quad(__m256i w[2], const group_view *view, int b, int quad, int source, int codes)
{
    const uint8_t *const packed = view->packed + b * BLOCK_BYTES;
    __m256i *const unpacked = (__m256i *)(view->unpacked + b * UNPACKED_BLOCK) + 2 * quad;
    if (source != UNPACKED && quad == 0) {
        _mm_prefetch((const char *)view->ahead + b * BLOCK_BYTES, _MM_HINT_T1);
        _mm_prefetch((const char *)packed + PREFETCH_NEAR, _MM_HINT_T0);
    }
    for (int half = 0; half < 2; half++) {
        if (source == UNPACKED) {
            w[half] = _mm256_load_si256(unpacked + half);
            continue;
        }
        const __m256i both = _mm256_load_si256((const __m256i *)packed + half);
        w[half] = weights_of(_mm256_and_si256(quad ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15)), codes);
        if (source == UNPACK_AND_KEEP)
            _mm256_store_si256(unpacked + half, w[half]);
    }
}

/* The float step of one row and half; the zero point is already subtracted from `total`. */
YMM void add_group(float *sums, __m256i total, __m256 scale, float row_scale)
{
    const __m256 s = _mm256_mul_ps(_mm256_set1_ps(row_scale), scale);
    _mm256_store_ps(sums, _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), s, _mm256_load_ps(sums)));
}

/* Write the sums of the groups to the output of a task, or add them to it. */
YMM void finish(const gemm_task *task, int columns)
{
    for (int r = 0; r < task->m; r++)
        for (int c = 0; c < columns; c += 8) {
            float *const out = task->out + r * PAIR_N + c;
            const __m256 sum = _mm256_load_ps(task->scratch->sums + r * PAIR_N + c);
            _mm256_store_ps(out, task->accumulate ? _mm256_add_ps(_mm256_load_ps(out), sum) : sum);
        }
}

#endif
