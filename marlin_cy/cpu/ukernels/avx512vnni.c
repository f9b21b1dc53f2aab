/* AVX-512 with VNNI: a row of a tile is one 512-bit vector of 16 lanes, one lane per column. The two tiles of a task
 * are multiplied together, so that each broadcast activation is used twice. A task of a single tile, of which a product
 * has at most one for each expert and block of rows, is multiplied as if both tiles were this one: kernels of their own
 * would double the code and the time to compile it.
 *
 * Registers, of 32: `rows * planes` (8) times two tiles of 32-bit sums, 4 weights, mask, activation. Twelve rows times
 * two tiles would fit by count, but the compilers spill them, and the gain is small: with 8, the inner loop on unpacked
 * weights already does 16 vpdpbusd for 10 loads.
 */
#include "isa.h"

#ifdef MARLIN_CY_X86
#include <string.h>

#include "quantize.h"
#include "x86.h"
#include "zmm.h"

#define TARGET __attribute__((target(ZMM_TARGET)))
#define KERNEL static inline __attribute__((always_inline, target(ZMM_TARGET)))
#define ROWOPS KERNEL

enum {
    PLANE_ROWS = 8,
    UNPACKED_BLOCK = 4 * LINE_BYTES,  /* per block: (values 0-3, tile 0), (0-3, tile 1), (4-7, 0), (4-7, 1) */
};

typedef struct {
    const uint8_t *packed[2]; /* blocks of this group, per tile */
    const uint8_t *ahead[2];  /* where to prefetch far ahead: one block for each block that is read */
    uint8_t *unpacked;        /* memory for the unpacked weights of both tiles */
    int blocks;
    const int8_t *a;
    const act_meta *meta;
    __m512 scale[2];
    int symmetric;         /* whether all zero points are the code type's symmetric_zero */
    __m512i zero_factor[2]; /* if not */
    float *sums;           /* [m][PAIR_N] of the groups so far */
} group_view;

/* Where a micro-kernel gets its weights. With few rows, each micro-kernel unpacks them in registers. With more rows,
 * the first micro-kernel also stores the unpacked weights, and the others load them. The stores cost a tenth of the
 * products (on Zen 4), which is too much for a single other micro-kernel: two micro-kernels unpack separately. */
enum { UNPACK, UNPACK_AND_KEEP, UNPACKED };

/* -symmetric_zero times the sum of a row's activations: the first value of the row's sums. `codes` is a constant, and
 * meta->symmetric_sum is -8 times the sum, so its other multiples are exact. */
KERNEL __m512i symmetric_begin(const act_meta *meta, int codes)
{
    const __m512i begin = _mm512_set1_epi32(meta->symmetric_sum);
    const int zero = code_types[codes].symmetric_zero;
    if (zero == SYMMETRIC_ZERO)
        return begin;
    if (zero == SYMMETRIC_ZERO + SYMMETRIC_ZERO / 2)
        return _mm512_add_epi32(begin, _mm512_srai_epi32(begin, 1));
    return _mm512_mullo_epi32(_mm512_srai_epi32(begin, 3), _mm512_set1_epi32(zero));
}

KERNEL __m512i broadcast_quad(const int8_t *a)
{
    int32_t quad;
    memcpy(&quad, a, sizeof quad);
    return _mm512_set1_epi32(quad);
}

KERNEL void prefetch_line(const group_view *view, int t, ptrdiff_t place)
{
    _mm_prefetch((const char *)view->ahead[t] + place, _MM_HINT_T1);
    _mm_prefetch((const char *)view->packed[t] + place + PREFETCH_NEAR, _MM_HINT_T0);
}

/* Load the weights of one block as bytes: w[values 0-3 or 4-7 of K][tile]. Codes of 8 bits need no unpacking. */
KERNEL void load_block(__m512i w[2][2], const group_view *view, int b, int source, int codes)
{
    const __m512i mask = _mm512_set1_epi8(15);
    const ptrdiff_t place = b * block_bytes(codes);
    uint8_t *const unpacked = view->unpacked + b * UNPACKED_BLOCK;
    for (int t = 0; t < 2; t++) {
        if (code_types[codes].bits == 8) {
            for (int quad = 0; quad < 2; quad++) {
                w[quad][t] = _mm512_load_si512(view->packed[t] + place + quad * LINE_BYTES);
                if (source != UNPACKED)
                    prefetch_line(view, t, place + quad * LINE_BYTES);
            }
            continue;
        }
        if (source == UNPACKED) {
            w[0][t] = _mm512_load_si512(unpacked + t * LINE_BYTES);
            w[1][t] = _mm512_load_si512(unpacked + (2 + t) * LINE_BYTES);
            continue;
        }
        const __m512i both = _mm512_load_si512(view->packed[t] + place);
        prefetch_line(view, t, place);
        w[0][t] = weights_of(_mm512_and_si512(both, mask), codes);
        w[1][t] = weights_of(_mm512_and_si512(_mm512_srli_epi16(both, 4), mask), codes);
        if (source == UNPACK_AND_KEEP) {
            _mm512_store_si512(unpacked + t * LINE_BYTES, w[0][t]);
            _mm512_store_si512(unpacked + (2 + t) * LINE_BYTES, w[1][t]);
        }
    }
}

/* rows, planes, source and codes are constants wherever this is inlined. */
KERNEL void micro_kernel(const gemm_task *task, const group_view *view, int row, int rows, int planes, int source,
                         int codes)
{
    const int8_t *a[PLANE_ROWS];
    float row_scale[PLANE_ROWS];
    __m512i sum[PLANE_ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        const ptrdiff_t index = task->rows[row + r];
        const act_meta *const meta = view->meta + index;
        const __m512i begin = symmetric_begin(meta, codes);
        row_scale[r] = meta->scale;
        a[r] = view->a + index * task->a_row_stride;
        for (int plane = 0; plane < planes; plane++) {
            for (int t = 0; t < 2; t++)
                sum[r * planes + plane][t] = plane == planes - 1 ? begin : _mm512_setzero_si512();
        }
    }
    for (int block = 0; block < view->blocks; block++) {
        __m512i w[2][2];
        const ptrdiff_t plane0 = block * LANE_K, plane1 = plane0 + view->blocks * LANE_K;
        load_block(w, view, block, source, codes);
#pragma GCC unroll 2
        for (int quad = 0; quad < 2; quad++)
#pragma GCC unroll 8
            for (int i = 0; i < rows * planes; i++) {
                const __m512i x = broadcast_quad(a[i / planes] + (i % planes ? plane1 : plane0) + 4 * quad);
                for (int t = 0; t < 2; t++) {
                    sum[i][t] = _mm512_dpbusd_epi32(sum[i][t], w[quad][t], x);
                    KEEP(sum[i][t]);
                }
            }
    }
    if (!view->symmetric) /* after the products: there it costs nothing if the group is symmetric */
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const act_meta *const meta = view->meta + task->rows[row + r];
            for (int t = 0; t < 2; t++) {
                __m512i *const last = &sum[r * planes + planes - 1][t];
                *last = _mm512_add_epi32(*last, zero_term(view->zero_factor[t], meta, codes));
            }
        }
    /* A local variable, because the compiler must assume that a vector store changes *view. */
    float *const sums = view->sums + row * PAIR_N;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < 2; t++) {
            __m512i total = sum[r * planes][t];
            if (planes == 2)
                total = _mm512_add_epi32(_mm512_slli_epi32(total, 8), sum[r * planes + 1][t]);
            add_group(sums + r * PAIR_N + t * TILE_N, total, view->scale[t], _mm512_set1_ps(row_scale[r]));
        }
}

KERNEL void some_rows(const gemm_task *task, const group_view *view, int row, int rows, int planes, int source,
                      int codes)
{
    const int most = PLANE_ROWS / planes;
    switch (rows) {
    case 1: micro_kernel(task, view, row, 1, planes, source, codes); break;
    case 2: micro_kernel(task, view, row, 2, planes, source, codes); break;
    case 3: micro_kernel(task, view, row, 3, planes, source, codes); break;
    case 4: micro_kernel(task, view, row, 4, planes, source, codes); break;
    case 5:
        if (most >= 5)
            micro_kernel(task, view, row, 5, planes, source, codes);
        break;
    case 6:
        if (most >= 6)
            micro_kernel(task, view, row, 6, planes, source, codes);
        break;
    case 7:
        if (most >= 7)
            micro_kernel(task, view, row, 7, planes, source, codes);
        break;
    case 8:
        if (most >= 8)
            micro_kernel(task, view, row, 8, planes, source, codes);
        break;
    }
}

KERNEL void rows_of_group(const gemm_task *task, const group_view *view, int planes, int codes)
{
    const int most = PLANE_ROWS / planes;
    if (task->m <= 2 * most) {
        for (int row = 0; row < task->m; row += most)
            some_rows(task, view, row, task->m - row < most ? task->m - row : most, planes, UNPACK, codes);
        return;
    }
    micro_kernel(task, view, 0, most, planes, UNPACK_AND_KEEP, codes);
    for (int row = most; row < task->m; row += most)
        some_rows(task, view, row, task->m - row < most ? task->m - row : most, planes, UNPACKED, codes);
}

/* Load the scales and zero points of group `g` of both tiles. `scales` and `layout` are constants for plain records. */
KERNEL void read_records(group_view *view, const task_tiles *tiles, const header_layout *layout, ptrdiff_t g,
                         int scales, int codes)
{
    __mmask16 asymmetric = 0;
    for (int t = 0; t < 2; t++) {
        const group_record record = record_of(tiles->header[t], layout, g);
        const __m512i zeros = load_zeros(record, scales, codes);
        const __m512i difference = _mm512_sub_epi32(_mm512_set1_epi32(code_types[codes].symmetric_zero), zeros);
        view->scale[t] = load_scales(record, scales, codes);
        view->zero_factor[t] = zero_factor(difference, codes);
        asymmetric |= _mm512_test_epi32_mask(difference, difference);
    }
    view->symmetric = !code_types[codes].has_zero_points || !asymmetric;
}

KERNEL void gemm(const gemm_task *task, int planes, int codes)
{
    const task_tiles tiles = tiles_of(task);
    group_view view = {
        .packed = {tiles.body[0], tiles.body[1]},
        .unpacked = task->scratch->weights,
        .a = task->a,
        .meta = task->meta,
        .sums = sums_of(task),
    };
    const int has_minimum = scale_records[task->scales].has_minimum;
    const header_layout layout = layout_of_header(task->scales, codes, task->group_blocks * LANE_K);
    const header_layout plain = layout_of_header(SCALES_F16, codes, LANE_K); /* of SCALES_BF16 too */
    for (int r = 0; r < task->m; r++)
        for (int t = 0; t < 2; t++)
            _mm512_store_ps(view.sums + r * PAIR_N + t * TILE_N, _mm512_setzero_ps());
    const ptrdiff_t bytes = task_bytes(task, codes);
    for (int g = 0; g < task->num_groups; g++) {
        view.blocks = g < task->num_groups - 1 ? task->group_blocks : task->last_group_blocks;
        for (int t = 0; t < 2; t++) {
            const ptrdiff_t ahead = (ptrdiff_t)g * task->group_blocks * block_bytes(codes) + PREFETCH_FAR;
            view.ahead[t] = ahead < bytes ? tiles.body[t] + ahead : tiles.next[t] + (ahead - bytes);
        }
        switch (task->scales) {
        case SCALES_F16: read_records(&view, &tiles, &plain, g, SCALES_F16, codes); break;
        case SCALES_BF16: read_records(&view, &tiles, &plain, g, SCALES_BF16, codes); break;
        default: read_records(&view, &tiles, &layout, g, task->scales, codes);
        }
        rows_of_group(task, &view, planes, codes);
        for (int t = 0; t < 2 && has_minimum; t++) {
            const __m512 minimum = load_minima(record_of(tiles.header[t], &layout, g), task->scales);
            add_minima(view.sums + t * TILE_N, minimum, view.meta, task->rows, task->m);
        }
        for (int t = 0; t < 2; t++)
            view.packed[t] += view.blocks * block_bytes(codes);
        view.a += task->a_group_stride;
        view.meta += task->meta_group_stride;
    }
    put_out(task);
}

/* Quantise 16 values at a time. vpmovdb keeps the low byte of each value, which is plane 1. Plane 0 is the upper byte
 * of value + 128: a low byte of 128 or more is negative in plane 1, and adding 128 carries it into plane 0. */
TARGET static void quantize_row(const float *x, int64_t k, int group_size, int planes, int8_t *a,
                                ptrdiff_t a_group_stride, act_meta *meta, ptrdiff_t meta_group_stride)
{
    const float qmax = qmax_of(planes);
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), half = _mm512_set1_epi32(128);
    for (int64_t begin = 0; begin < k; begin += group_size, a += a_group_stride, meta += meta_group_stride) {
        const int size = k - begin < group_size ? (int)(k - begin) : group_size;
        const float *const group = x + begin;
        __m512i max_bits = _mm512_setzero_si512();
        for (int i = 0; i < size; i += 16)
            max_bits = _mm512_max_epu32(max_bits, _mm512_and_si512(magnitude, _mm512_loadu_si512(group + i)));
        const uint32_t amax_bits = _mm512_reduce_max_epu32(max_bits);
        const float amax = group_amax(amax_bits, a, size * planes, meta);
        if (amax == 0.0f)
            continue;
        const __m512 inverse = _mm512_set1_ps(qmax / amax);
        __m512i sums = _mm512_setzero_si512();
        for (int i = 0; i < size; i += 16) {
            const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(group + i), inverse));
            const __m128i low = _mm512_cvtepi32_epi8(value);
            sums = _mm512_add_epi32(sums, value);
            _mm_storeu_si128((__m128i *)(a + (planes - 1) * size + i), low);
            if (planes == 2) {
                const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(value, half), 8);
                _mm_storeu_si128((__m128i *)(a + i), _mm512_cvtepi32_epi8(high));
            }
        }
        const int32_t sum = _mm512_reduce_add_epi32(sums);
        *meta = group_meta(amax / qmax, sum);
    }
}

/* Registers of the row operations, of 32: 24 sums, weights of a tile's columns (6 or 8), one value of x. A step of the
 * delta rule's columns is 4 vectors, whose state (128 rows of 256 bytes) fits the first-level cache. */
enum { ONE_ROW_COLS = 8, TILE_ROWS = 4, TILE_COLS = 6, DELTA_STEP = 64, TILE_SUMS = 24 };
#define QUERY_TILE 8
#include "vec_zmm.h"
#include "attend.h"
#include "delta.h"
#include "dense.h"

TARGET static void gemm_u4_i8(const gemm_task *task) { gemm(task, 1, CODES_UINT4); }

TARGET static void gemm_u4_i16(const gemm_task *task) { gemm(task, 2, CODES_UINT4); }

TARGET static void gemm_e2m1_i8(const gemm_task *task) { gemm(task, 1, CODES_E2M1); }

TARGET static void gemm_e2m1_i16(const gemm_task *task) { gemm(task, 2, CODES_E2M1); }

TARGET static void gemm_iq4_i8(const gemm_task *task) { gemm(task, 1, CODES_IQ4_NL); }

TARGET static void gemm_iq4_i16(const gemm_task *task) { gemm(task, 2, CODES_IQ4_NL); }

TARGET static void gemm_u8_i8(const gemm_task *task) { gemm(task, 1, CODES_UINT8); }

TARGET static void gemm_u8_i16(const gemm_task *task) { gemm(task, 2, CODES_UINT8); }

TARGET static int64_t peak(int64_t steps)
{
    enum { ACCUMULATORS = 12, OPS = 16 * 8 }; /* 16 lanes of four products and four additions */
    const __m512i w = _mm512_set1_epi8(3), a = _mm512_set1_epi8(5);
    __m512i sums[ACCUMULATORS];
#pragma GCC unroll 12
    for (int i = 0; i < ACCUMULATORS; i++)
        sums[i] = _mm512_setzero_si512();
    for (int64_t step = 0; step < steps; step++)
#pragma GCC unroll 12
        for (int i = 0; i < ACCUMULATORS; i++) {
            sums[i] = _mm512_dpbusd_epi32(sums[i], w, a);
            KEEP(sums[i]);
        }
#pragma GCC unroll 12
    for (int i = 0; i < ACCUMULATORS; i++)
        USE(sums[i]);
    return steps * ACCUMULATORS * OPS;
}

static isa_support probe(void)
{
    const uint32_t f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, vnni = 1u << 11;
    const int cpu = cpuid_has(7, 0, CPUID_EBX, f_dq_bw_vl) && cpuid_has(7, 0, CPUID_ECX, vnni);
    return x86_support(cpu, os_saves(XCR0_ZMM), "AVX-512 F, DQ, BW, VL and VNNI",
                       "the CPU lacks AVX-512 F, DQ, BW, VL or VNNI");
}

const isa_descriptor isa_avx512vnni = {
    .name = "avx512vnni",
    .parent = &isa_avx2,
    .probe = probe,
    .peak = peak,
    .kernels =
        {
            .gemm = {[CODES_UINT4] = {gemm_u4_i8, gemm_u4_i16},
                     [CODES_E2M1] = {gemm_e2m1_i8, gemm_e2m1_i16},
                     [CODES_IQ4_NL] = {gemm_iq4_i8, gemm_iq4_i16},
                     [CODES_UINT8] = {gemm_u8_i8, gemm_u8_i16}},
            .quantize_row = quantize_row,
            NORM_KERNELS,
            DENSE_KERNELS,
            ATTENTION_KERNELS,
            DELTA_KERNELS,
        },
};
#endif
