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

/* Add 16-bit integers to a sum in its register. With an intrinsic and KEEP, GCC copies some sums from register to
 * register in every step: 8% more instructions. */
#define ADD_16(sum, addend) __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(addend))

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
 *                vpmaddwd multiplies by act_meta.sum_split
 *   minimum      minima as floats, divided by SYMMETRIC_ZERO. With minima, all zero points are 0
 *   has_zeros    whether the record stores zero points. If not, all are equal, and minus_constant is the negated one */
typedef struct {
    __m256 scale[2];
    __m256i minus_zero[2];
    __m256 minimum[2];
    int has_minimum, has_zeros, minus_constant;
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

YMM __m256 load_minima(group_record record, int scales, int half)
{
    __m256 minimum = load_floats(record.minimum, scales, half);
    if (scale_records[scales].has_blocks)
        minimum = _mm256_mul_ps(minimum, load_halves(record.block + TILE_N * BLOCK_SCALE_BYTES + 16 * half));
    return _mm256_mul_ps(minimum, _mm256_set1_ps(1.0f / SYMMETRIC_ZERO));
}

/* The terms of a record. */
YMM group_header load_terms(group_record record, int scales, int codes)
{
    group_header h = {
        .has_minimum = scale_records[scales].has_minimum,
        .has_zeros = stores_zeros(scales),
        .minus_constant = -constant_zero(scales, codes),
    };
    for (int half = 0; half < 2; half++) {
        h.scale[half] = load_floats(record.scale, scales, half);
        if (scale_records[scales].has_blocks)
            h.scale[half] = _mm256_mul_ps(h.scale[half], load_halves(record.block + 16 * half));
        if (code_types[codes].units_per_one != 1)
            h.scale[half] = _mm256_mul_ps(h.scale[half], _mm256_set1_ps(unit_scale(codes)));
        h.minus_zero[half] = minus_zero_of(
            h.has_zeros ? load_zeros(record.minimum, half, codes) : _mm256_set1_epi32(-h.minus_constant), codes);
        if (h.has_minimum)
            h.minimum[half] = load_minima(record, scales, half);
    }
    return h;
}

/* What a driver knows of a task's scale record while it is compiled: that it is one of the two plain ones, nothing, or,
 * for a task of one row, the record itself. A task of one row loads terms for each step of its micro-kernel, so there
 * constants count. */
enum { PLAIN = -1, ANY = -2 };

/* The terms of the rarer records. Each case has straight-line code. */
YMM_CALL void load_any(group_header *h, group_record record, int scales, int codes)
{
#define CASE(scales) \
    case scales: *h = load_terms(record, scales, codes); break
    switch (scales) {
        CASE(SCALES_F32);
        CASE(SCALES_F16_MIN);
        CASE(SCALES_F32_MIN);
        CASE(SCALES_TWO_LEVEL);
        CASE(SCALES_TWO_LEVEL_MIN);
    }
#undef CASE
}

/* `known` is a constant: PLAIN, ANY, or `scales` itself. */
YMM void load_header(group_header *h, group_record record, int scales, int codes, int known)
{
    if (known >= 0)
        *h = load_terms(record, known, codes);
    else if (known == ANY && scales != SCALES_F16 && scales != SCALES_BF16)
        load_any(h, record, scales, codes);
    else if (scales == SCALES_F16)
        *h = load_terms(record, SCALES_F16, codes);
    else
        *h = load_terms(record, SCALES_BF16, codes);
}

/* Minus the zero points of both halves times the sum of a row's activations. */
YMM void zero_terms(__m256i terms[2], const group_header *h, const act_meta *meta, int codes)
{
    const int32_t sum = -(meta->symmetric_sum >> 3); /* symmetric_sum is -8 times the sum */
    if (code_types[codes].zero_bytes == 1)
        for (int half = 0; half < 2; half++)
            terms[half] = _mm256_madd_epi16(h->minus_zero[half], _mm256_set1_epi32(meta->sum_split));
    else if (h->has_zeros)
        for (int half = 0; half < 2; half++)
            terms[half] = _mm256_mullo_epi32(h->minus_zero[half], _mm256_set1_epi32(sum));
    else
        terms[0] = terms[1] = _mm256_set1_epi32(sum * h->minus_constant);
}

/* Multiplicands from nibbles, one byte each. `codes` is a constant. */
YMM __m256i weights_of(__m256i nibbles, int codes)
{
    if (code_types[codes].is_identity)
        return nibbles;
    const __m128i table = _mm_loadu_si128((const __m128i *)code_types[codes].multiplicands);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), nibbles);
}

/* Where a row of a task is, in bytes from row 0 of any group. */
typedef struct {
    ptrdiff_t a, meta;
} row_place;

YMM void find_rows(row_place *places, const gemm_task *task)
{
    for (int r = 0; r < task->m; r++)
        places[r] = (row_place){task->rows[r] * task->a_row_stride, task->rows[r] * (ptrdiff_t)sizeof(act_meta)};
}

/* One group of one tile, as the micro-kernel sees it. */
typedef struct {
    const uint8_t *packed; /* its blocks */
    const uint8_t *ahead;  /* where to prefetch far ahead: one block for each block that is read */
    uint8_t *unpacked;     /* memory for the unpacked weights */
    int blocks;
    const int8_t *a;
    const act_meta *meta;
    const row_place *places; /* of the task's rows, in a and meta */
    float *sums;             /* the tile's first column in row 0 of the task's sums */
} group_view;

YMM const act_meta *meta_of(const group_view *view, row_place place)
{
    return (const act_meta *)((const char *)view->meta + place.meta);
}

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

/* The float steps of one row. `total` is its sum of each half, without zero points if there are minima, which take their
 * place. `has_minimum` is a constant: what the header says. */
YMM void add_group(float *sums, const __m256i total[2], const group_header *h, const act_meta *meta, int has_minimum)
{
    const __m256 row_scale = _mm256_set1_ps(meta->scale);
    const __m256 factor = _mm256_set1_ps(has_minimum ? meta->scale * (float)meta->symmetric_sum : 0.0f);
    for (int half = 0; half < 2; half++, sums += 8) {
        __m256 sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[half]), _mm256_mul_ps(row_scale, h->scale[half]),
                                     _mm256_load_ps(sums));
        if (has_minimum)
            sum = _mm256_fmadd_ps(factor, h->minimum[half], sum);
        _mm256_store_ps(sums, sum);
    }
}

/* Call a driver with what is known of the task's record. */
#define WITH_KNOWN_RECORD(driver, task, planes, codes)           \
    do {                                                         \
        const int known = (task)->m == 1 ? (task)->scales : ANY; \
        const int minima = code_types[codes].has_zero_points;    \
        if (known == SCALES_F16)                                 \
            driver(task, planes, codes, SCALES_F16);             \
        else if (known == SCALES_BF16)                           \
            driver(task, planes, codes, SCALES_BF16);            \
        else if (known == SCALES_F32)                            \
            driver(task, planes, codes, SCALES_F32);             \
        else if (known == SCALES_TWO_LEVEL)                      \
            driver(task, planes, codes, SCALES_TWO_LEVEL);       \
        else if (minima && known == SCALES_F16_MIN)              \
            driver(task, planes, codes, SCALES_F16_MIN);         \
        else if (minima && known == SCALES_TWO_LEVEL_MIN)        \
            driver(task, planes, codes, SCALES_TWO_LEVEL_MIN);   \
        else                                                     \
            driver(task, planes, codes, ANY);                    \
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
