/* Shared by the two 256-bit ISAs. The 16 columns of a tile are two vectors ("halves" 0 and 1) of eight 32-bit lanes,
 * one lane per column.
 */
#ifndef MARLIN_CY_YMM_H
#define MARLIN_CY_YMM_H

#include <immintrin.h>
#include <string.h>

#include "ukernel.h"

#define YMM static inline __attribute__((always_inline, target("avx2,fma,f16c")))

/* Functions of rare cases. They are not inlined, so that the common case keeps its registers. */
#define YMM_CALL static __attribute__((noinline, target("avx2,fma,f16c")))

enum {
    UNPACKED_BLOCK = 2 * LINE_BYTES,
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

/* The terms of a group: scales as floats, divided by units_per_one, and
 *
 *   minus_zero   negated zero points. With zero points of one byte they are pairs (-zero, -256 * zero) of 16 bits, which
 *                vpmaddwd multiplies by act_meta.sum_split */
typedef struct {
    __m256 scale[2];
    __m256i minus_zero[2];
} group_header;

YMM __m256 load_halves(const uint8_t *from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)); }

YMM __m256 load_bfloats(const uint8_t *from)
{
    const __m128i bits = _mm_loadu_si128((const __m128i *)from);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

/* Eight scales, minima, sub-scales or sub-minima, from those of column 0; `half` is the half of the columns. */
YMM __m256 load_floats(const uint8_t *from, int scales, int half)
{
    if (scale_records[scales].scale_bytes == 4)
        return _mm256_loadu_ps((const float *)(const void *)from + 8 * half);
    if (scale_records[scales].scale_bytes == 1) {
        const __m128i bytes = _mm_loadl_epi64((const __m128i *)(from + 8 * half));
        return _mm256_cvtepi32_ps(scales == SCALES_TWO_LEVEL ? _mm256_cvtepi8_epi32(bytes)
                                                             : _mm256_cvtepu8_epi32(bytes));
    }
    return scales == SCALES_BF16 ? load_bfloats(from + 16 * half) : load_halves(from + 16 * half);
}

/* Eight negated zero points in the form of minus_zero. */
YMM __m256i minus_zero_of(__m256i zero, int codes)
{
    const __m256i minus = _mm256_sub_epi32(_mm256_setzero_si256(), zero);
    if (code_types[codes].zero_bytes == 2)
        return minus;
    return _mm256_blend_epi16(minus, _mm256_slli_epi32(minus, 24), 0xaa);
}

YMM __m256i load_zeros(const uint8_t *from, int half, int codes)
{
    if (code_types[codes].zero_bytes == 2)
        return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(from + 16 * half)));
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(from + 8 * half)));
}

/* The terms of a record. */
YMM group_header load_terms(group_record record, int scales, int codes)
{
    group_header h;
    for (int half = 0; half < 2; half++) {
        h.scale[half] = load_floats(record.scale, scales, half);
        if (scale_records[scales].has_blocks)
            h.scale[half] = _mm256_mul_ps(h.scale[half], load_halves(record.block + 16 * half));
        if (code_types[codes].units_per_one != 1)
            h.scale[half] = _mm256_mul_ps(h.scale[half], _mm256_set1_ps(unit_scale(codes)));
        h.minus_zero[half] = minus_zero_of(stores_zeros(scales) ? load_zeros(record.minimum, half, codes)
                                                                : _mm256_set1_epi32(constant_zero(scales, codes)),
                                           codes);
    }
    return h;
}

/* The minima of half of the columns as floats, divided by SYMMETRIC_ZERO. */
YMM __m256 load_minima(group_record record, int scales, int half)
{
    __m256 minimum = load_floats(record.minimum, scales, half);
    if (scale_records[scales].has_blocks)
        minimum = _mm256_mul_ps(minimum, load_halves(record.block + TILE_N * BLOCK_SCALE_BYTES + 16 * half));
    return _mm256_mul_ps(minimum, _mm256_set1_ps(1.0f / SYMMETRIC_ZERO));
}

/* What a driver knows of a task's scale record while it is compiled. A task of one row loads terms for each step of its
 * micro-kernel, so there constants count: the record itself is known, or that it is one of the two plain ones (PLAIN), or
 * nothing (ANY). Tasks of more rows (MANY_ROWS) share one driver. */
enum { PLAIN = -1, ANY = -2, MANY_ROWS = -3 };

YMM_CALL void load_any(group_header *h, group_record record, int scales, int codes)
{
    *h = load_terms(record, scales, codes);
}

/* `known` is a constant: PLAIN, ANY, MANY_ROWS, or `scales` itself. */
YMM group_header load_header(group_record record, int scales, int codes, int known)
{
    const int plain = scales == SCALES_F16 || scales == SCALES_BF16;
    group_header h;
    if (known == ANY || (known == MANY_ROWS && !plain)) {
        load_any(&h, record, scales, codes);
        const group_header copy = h;
        return copy;
    }
    if (known == PLAIN || known == MANY_ROWS)
        return scales == SCALES_BF16 ? load_terms(record, SCALES_BF16, codes) : load_terms(record, SCALES_F16, codes);
    return load_terms(record, known, codes);
}

/* Minus the zero points of a half times the sum of a row's activations. */
YMM __m256i zero_term(const group_header *h, const act_meta *meta, int half, int codes)
{
    if (code_types[codes].zero_bytes == 2) /* symmetric_sum is -8 times the sum */
        return _mm256_mullo_epi32(h->minus_zero[half], _mm256_set1_epi32(-(meta->symmetric_sum >> 3)));
    return _mm256_madd_epi16(h->minus_zero[half], _mm256_set1_epi32(meta->sum_split));
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
 * `unpacked` has them in the same order; codes of 8 bits need no unpacking. `quad`, `source` and `codes` are
 * constants. */
YMM void load_quad(__m256i w[2], const group_view *view, ptrdiff_t b, int quad, int source, int codes)
{
    const int bytes = code_types[codes].bits == 8;
    const uint8_t *const packed = view->packed + b * block_bytes(codes) + bytes * quad * LINE_BYTES;
    __m256i *const unpacked = (__m256i *)(view->unpacked + b * UNPACKED_BLOCK) + 2 * quad;
    if (source != UNPACKED && (bytes || quad == 0)) {
        const uint8_t *const ahead = view->ahead + b * block_bytes(codes) + bytes * quad * LINE_BYTES;
        _mm_prefetch((const char *)ahead, _MM_HINT_T1);
        _mm_prefetch((const char *)packed + PREFETCH_NEAR, _MM_HINT_T0);
    }
    for (int half = 0; half < 2; half++) {
        if (source == UNPACKED && !bytes) {
            w[half] = _mm256_load_si256(unpacked + half);
            continue;
        }
        const __m256i both = _mm256_load_si256((const __m256i *)packed + half);
        if (bytes) {
            w[half] = both;
            continue;
        }
        w[half] = weights_of(_mm256_and_si256(quad ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15)), codes);
        if (source == UNPACK_AND_KEEP)
            _mm256_store_si256(unpacked + half, w[half]);
    }
}

/* The float step of one row and half; the zero point is already subtracted from `total`. `row_scale` is the row's scale
 * in every lane. */
YMM void add_group(float *sums, __m256i total, __m256 scale, __m256 row_scale)
{
    const __m256 s = _mm256_mul_ps(row_scale, scale);
    _mm256_store_ps(sums, _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), s, _mm256_load_ps(sums)));
}

/* The step that follows with minima, of one row. `minimum` is what load_minima returns, of each half. */
YMM void add_minimum(float *sums, const act_meta *meta, const __m256 minimum[2])
{
    const __m256 factor = _mm256_set1_ps(meta->scale * (float)meta->symmetric_sum);
    for (int half = 0; half < 2; half++, sums += 8)
        _mm256_store_ps(sums, _mm256_fmadd_ps(factor, minimum[half], _mm256_load_ps(sums)));
}

/* The same for all rows of a task and one tile. */
YMM_CALL void add_minima(const gemm_task *task, float *sums, const act_meta *meta, group_record record)
{
    const __m256 minimum[2] = {load_minima(record, task->scales, 0), load_minima(record, task->scales, 1)};
    const int32_t *const rows = task->rows;
    const ptrdiff_t m = task->m;
    for (ptrdiff_t r = 0; r < m; r++, sums += PAIR_N)
        add_minimum(sums, meta + rows[r], minimum);
}

/* The step with minima after a group of one tile, if the record has minima; `known` as for load_header. */
YMM void finish_group(const gemm_task *task, const group_view *view, group_record record, int known)
{
    if ((known == ANY || known == MANY_ROWS) && scale_records[task->scales].has_minimum)
        add_minima(task, view->sums, view->meta, record);
    if (known >= 0 && scale_records[known].has_minimum) {
        const __m256 minimum[2] = {load_minima(record, known, 0), load_minima(record, known, 1)};
        add_minimum(view->sums, view->meta + task->rows[0], minimum);
    }
}

/* Call a driver of tasks of one row with what is known of the task's record. */
#define WITH_KNOWN_RECORD(driver, task, planes, codes)             \
    do {                                                           \
        const int minima = code_types[codes].has_zero_points;      \
        if ((task)->scales == SCALES_TWO_LEVEL)                    \
            driver(task, planes, codes, SCALES_TWO_LEVEL);         \
        else if (minima && (task)->scales == SCALES_TWO_LEVEL_MIN) \
            driver(task, planes, codes, SCALES_TWO_LEVEL_MIN);     \
        else if (minima && (task)->scales == SCALES_F16_MIN)       \
            driver(task, planes, codes, SCALES_F16_MIN);           \
        else if ((task)->scales == SCALES_F32)                     \
            driver(task, planes, codes, SCALES_F32);               \
        else                                                       \
            driver(task, planes, codes, ANY);                      \
    } while (0)

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
