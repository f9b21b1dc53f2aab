/* Shared by the 512-bit ISAs. The 16 columns of a tile are one vector of 32-bit lanes, one lane per column. */
#ifndef MARLIN_CY_ZMM_H
#define MARLIN_CY_ZMM_H

#include <immintrin.h>

#include "ukernel.h"

/* tests/avx512_emulation.h has its own, for machines without AVX-512. */
#ifndef ZMM_TARGET
#define ZMM_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c"

/* Keep a vector in its register: without it GCC copies sums around the loop and stores some of them. */
#define KEEP(vector) __asm__("" : "+v"(vector))

/* Keep the compiler from dropping the computation of a vector that nothing reads. */
#define USE(vector) __asm__ volatile("" : : "v"(vector))
#endif

#define ZMM static inline __attribute__((always_inline, target(ZMM_TARGET)))

/* Bytes ahead in each of the two streams of packed weights: far ahead into the second-level cache, and near ahead from
 * there into the first. A single prefetch into the first-level cache, 1024 or 3072 bytes ahead, occupies its few miss
 * buffers: on Zen 4 a task of one row then reads up to 30% slower. */
enum { PREFETCH_FAR = 4096, PREFETCH_NEAR = 512 };

ZMM __m512 load_halves(const uint8_t *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }

/* 16 scales, minima, sub-scales or sub-minima. */
ZMM __m512 load_floats(const uint8_t *from, int scales)
{
    if (scale_records[scales].scale_bytes == 4)
        return _mm512_loadu_ps(from);
    if (scale_records[scales].scale_bytes == 1) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)from);
        return _mm512_cvtepi32_ps(scales == SCALES_TWO_LEVEL ? _mm512_cvtepi8_epi32(bytes)
                                                             : _mm512_cvtepu8_epi32(bytes));
    }
    if (scales == SCALES_BF16)
        return _mm512_castsi512_ps(
            _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
    return load_halves(from);
}

/* The scales of a record, divided by units_per_one. */
ZMM __m512 load_scales(group_record record, int scales, int codes)
{
    __m512 floats = load_floats(record.scale, scales);
    if (scale_records[scales].has_blocks)
        floats = _mm512_mul_ps(floats, load_halves(record.block));
    return code_types[codes].units_per_one == 1 ? floats : _mm512_mul_ps(floats, _mm512_set1_ps(unit_scale(codes)));
}

/* The minima of a record that has minima, divided by SYMMETRIC_ZERO. */
ZMM __m512 load_minima(group_record record, int scales)
{
    __m512 floats = load_floats(record.minimum, scales);
    if (scale_records[scales].has_blocks)
        floats = _mm512_mul_ps(floats, load_halves(record.block + TILE_N * BLOCK_SCALE_BYTES));
    return _mm512_mul_ps(floats, _mm512_set1_ps(1.0f / SYMMETRIC_ZERO));
}

/* The zero points of a record, one 32-bit integer per lane. */
ZMM __m512i load_zeros(group_record record, int scales, int codes)
{
    if (!stores_zeros(scales))
        return _mm512_set1_epi32(constant_zero(scales, codes));
    if (code_types[codes].zero_bytes == 2)
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)record.minimum));
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)record.minimum));
}

/* The factor of a row's sum where zero points are not symmetric_zero: symmetric_zero - zero. With zero points of one
 * byte it is a pair (z, 256 * z) of 16 bits, which vpmaddwd multiplies by act_meta.sum_split. */
ZMM __m512i zero_factor(__m512i symmetric_minus_zero, int codes)
{
    if (code_types[codes].zero_bytes == 2)
        return symmetric_minus_zero;
    return _mm512_mask_blend_epi16(0xaaaaaaaa, symmetric_minus_zero, _mm512_slli_epi32(symmetric_minus_zero, 24));
}

/* A zero_factor times the sum of a row's activations; symmetric_sum is -8 times the sum. */
ZMM __m512i zero_term(__m512i factor, const act_meta *meta, int codes)
{
    if (code_types[codes].zero_bytes == 2)
        return _mm512_mullo_epi32(factor, _mm512_set1_epi32(-(meta->symmetric_sum >> 3)));
    return _mm512_madd_epi16(factor, _mm512_set1_epi32(meta->sum_split));
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

/* The step that follows with minima: `rows` rows of one tile, which are rows[0], rows[1], ... of `meta`, or its first
 * rows where `rows` is NULL. Not inlined, so that groups without minima keep their registers. */
static __attribute__((noinline, target(ZMM_TARGET))) void add_minima(float *sums, __m512 minimum, const act_meta *meta,
                                                                     const int32_t *rows, int count)
{
    for (int r = 0; r < count; r++, sums += PAIR_N) {
        const act_meta *const row = meta + (rows ? rows[r] : r);
        const __m512 factor = _mm512_set1_ps(row->scale * (float)row->symmetric_sum);
        _mm512_store_ps(sums, _mm512_fmadd_ps(factor, minimum, _mm512_load_ps(sums)));
    }
}

/* The tiles of a task. A task of a single tile multiplies it twice, and nothing reads the sums of the second copy. */
typedef struct {
    const uint8_t *header[2], *body[2], *next[2];
} task_tiles;

ZMM task_tiles tiles_of(const gemm_task *task)
{
    const int second = task->header[1] != NULL;
    return (task_tiles){
        .header = {task->header[0], task->header[second]},
        .body = {task->body[0], task->body[second]},
        .next = {task->next[0], task->next[second]},
    };
}

/* Where the sums over the groups so far are: in the output, or in the scratch memory if they are to be added to the
 * output. Those of a single tile are in the scratch memory too: columns 16..31 of the output must not change. */
ZMM float *sums_of(const gemm_task *task)
{
    return task->accumulate || !task->header[1] ? task->scratch->sums : task->out;
}

/* Write the sums in the scratch memory, if they are there, to the output, or add them to it. */
ZMM void put_out(const gemm_task *task)
{
    const float *const sums = sums_of(task);
    const int tiles = task->header[1] ? 2 : 1;
    for (int r = 0; r < task->m && sums != task->out; r++)
        for (int t = 0; t < tiles; t++) {
            float *const out = task->out + r * PAIR_N + t * TILE_N;
            const __m512 sum = _mm512_load_ps(sums + r * PAIR_N + t * TILE_N);
            _mm512_store_ps(out, task->accumulate ? _mm512_add_ps(_mm512_load_ps(out), sum) : sum);
        }
}

#endif
