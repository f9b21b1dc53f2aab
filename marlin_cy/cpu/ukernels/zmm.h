/* Shared by the 512-bit ISAs. The 16 columns of a tile are one vector of 32-bit lanes, one lane per column. */
#ifndef MARLIN_CY_ZMM_H
#define MARLIN_CY_ZMM_H

#include <immintrin.h>

#include "ukernel.h"

#define ZMM \
    static inline __attribute__((always_inline, target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")))

/* Bytes ahead in each of the two streams of packed weights: far ahead into the second-level cache, and near ahead from
 * there into the first. A single prefetch into the first-level cache, 1024 or 3072 bytes ahead, occupies its few miss
 * buffers: on Zen 4 a task of one row then reads up to 30% slower. */
enum { PREFETCH_FAR = 4096, PREFETCH_NEAR = 512 };

/* The scales of a header as floats, divided by units_per_one. */
ZMM __m512 load_scales(const uint8_t *header, int scale_dtype, int codes)
{
    const __m256i scales = _mm256_loadu_si256((const __m256i *)header);
    const __m512 floats = scale_dtype == DTYPE_BF16
                              ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(scales), 16))
                              : _mm512_cvtph_ps(scales);
    return code_types[codes].units_per_one == 1 ? floats : _mm512_mul_ps(floats, _mm512_set1_ps(unit_scale(codes)));
}

/* The zero points of a header, one 32-bit integer per lane. */
ZMM __m512i load_zeros(const uint8_t *header)
{
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(header + 2 * TILE_N)));
}

/* Multiplicands from nibbles, one byte each. `codes` is a constant. */
ZMM __m512i weights_of(__m512i nibbles, int codes)
{
    if (code_types[codes].is_identity)
        return nibbles;
    const __m128i table = _mm_loadu_si128((const __m128i *)code_types[codes].multiplicands);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), nibbles);
}

/* The float step of one row and tile: `total` is the group's exact sum. */
ZMM void add_group(float *sums, __m512i total, __m512 scale, __m512 row_scale)
{
    const __m512 s = _mm512_mul_ps(row_scale, scale);
    _mm512_store_ps(sums, _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), s, _mm512_load_ps(sums)));
}

/* Add the sums in the scratch memory to the output. */
ZMM void add_to_out(const gemm_task *task, int tiles)
{
    for (int r = 0; r < task->m; r++)
        for (int t = 0; t < tiles; t++) {
            float *const out = task->out + r * PAIR_N + t * TILE_N;
            const __m512 sum = _mm512_load_ps(task->scratch->sums + r * PAIR_N + t * TILE_N);
            _mm512_store_ps(out, _mm512_add_ps(_mm512_load_ps(out), sum));
        }
}

#endif
