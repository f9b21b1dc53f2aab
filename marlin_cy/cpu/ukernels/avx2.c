/* AVX2: vpmaddubsw multiplies 32 unsigned weights by 32 signed activations and adds pairs of neighbouring products to
 * 16-bit sums. One vpmaddwd per plane then widens the 16-bit sums to 32 bits. With two planes it multiplies plane 0 by
 * 256.
 *
 * A weight is at most 15 and an activation at most 128 in magnitude. The sum of a pair is therefore at most 3840, and
 * the sum of eight pairs (the two halves of four blocks) fits 16 bits. Weights of 4-bit floats are at most 24: a pair
 * is at most 6144, and four pairs (two blocks) fit.
 *
 * Larger multiplicands, those of 8-bit codes and of IQ4_NL, are in avx2_wide.h. Many rows of groups of 32, and of codes of
 * 8 bits that use only six, are in avx2_bytes.h.
 *
 * Registers, of 16: `rows * planes` (6) times two halves of 16-bit sums, 2 weights, activation, product. The 32-bit
 * sums are in memory, and are updated once for each 16-bit sum.
 */
#include "isa.h"

#ifdef MARLIN_CY_X86
#define ROWOPS static inline __attribute__((always_inline, target("avx2,fma,f16c")))
#include "quantize.h"
#include "rowops.h"
#include "x86.h"
#include "ymm.h"

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define KERNEL static inline __attribute__((always_inline, target("avx2,fma,f16c")))

enum { PLANE_ROWS = 6 };

/* Blocks whose products are added in 16 bits: a power of two, so that it divides the blocks of every group. */
KERNEL int blocks_of_16_bits(int codes)
{
    const int pairs = INT16_MAX / (2 * 128 * code_types[codes].max_multiplicand);
    return pairs >= 8 ? 4 : pairs >= 4 ? 2 : 1;
}

/* rows, planes, source and codes are constants wherever this is inlined. */
KERNEL void micro_kernel(const gemm_task *task, const group_view *view, const group_header *header, int row, int rows,
                         int planes, int source, int codes)
{
    const __m256i ones = _mm256_set1_epi16(1), by_256 = _mm256_set1_epi16(256);
    const ptrdiff_t blocks = view->blocks, blocks_per_sum = blocks_of_16_bits(codes);
    const int32_t *const indices = task->rows + row;
    float *sums = view->sums + (ptrdiff_t)row * PAIR_N;
    const int8_t *a[PLANE_ROWS];
    const act_meta *meta[PLANE_ROWS];
    __m256i total[PLANE_ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        const ptrdiff_t index = indices[r];
        for (int plane = 0; plane < planes; plane++)
            a[r * planes + plane] = view->a + index * task->a_row_stride + plane * blocks * LANE_K;
        meta[r] = view->meta + index;
        total[r][0] = zero_term(header, meta[r], 0, codes);
        total[r][1] = zero_term(header, meta[r], 1, codes);
    }
    for (ptrdiff_t block = 0; block < blocks; block += blocks_per_sum) {
        __m256i sum16[PLANE_ROWS][2];
#pragma GCC unroll 4
        for (int b = 0; b < blocks_per_sum; b++) {
#pragma GCC unroll 2
            for (int quad = 0; quad < 2; quad++) {
                __m256i w[2];
                load_quad(w, view, block + b, quad, source, codes);
#pragma GCC unroll 8
                for (int i = 0; i < rows * planes; i++) {
                    const __m256i x = broadcast_quad(a[i] + (block + b) * LANE_K + 4 * quad);
                    for (int half = 0; half < 2; half++) {
                        __m256i product = _mm256_maddubs_epi16(w[half], x);
                        KEEP(product);
                        sum16[i][half] = b + quad == 0 ? product : _mm256_add_epi16(sum16[i][half], product);
                        KEEP(sum16[i][half]);
                    }
                }
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < rows * planes; i++)
            for (int half = 0; half < 2; half++) {
                const __m256i weight = planes == 2 && i % 2 == 0 ? by_256 : ones;
                const __m256i sum32 = _mm256_madd_epi16(sum16[i][half], weight);
                total[i / planes][half] = _mm256_add_epi32(total[i / planes][half], sum32);
            }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        const __m256 row_scale = _mm256_set1_ps(meta[r]->scale);
        for (int half = 0; half < 2; half++, sums += 8)
            add_group(sums, total[r][half], header->scale[half], row_scale);
        sums += PAIR_N - TILE_N;
    }
}

#include "ymm_driver.h"
#include "avx2_group.h"
#include "avx2_bytes.h"
#include "avx2_wide.h"

/* Functions of their own: one function with all kernels would have its registers assigned differently. */
YMM_CALL void gemm_any_groups_i8(const gemm_task *task) { gemm(task, 1, CODES_UINT4); }

YMM_CALL void gemm_any_groups_i16(const gemm_task *task) { gemm(task, 2, CODES_UINT4); }

YMM_CALL void gemm_groups_of_32_i8(const gemm_task *task) { gemm_groups_of_32(task, 1); }

YMM_CALL void gemm_groups_of_32_i16(const gemm_task *task) { gemm_groups_of_32(task, 2); }

/* Whether the kernels for many rows of groups of 32 take less time than those of any group. */
KERNEL int has_many_rows_of_32(const gemm_task *task)
{
    const int plain = task->scales == SCALES_F16 || task->scales == SCALES_BF16;
    return task->group_blocks == 4 && task->m > (plain ? ROWS : 1);
}

TARGET static void gemm_u4_i8(const gemm_task *task)
{
    (has_many_rows_of_32(task) ? gemm_groups_of_32_i8 : gemm_any_groups_i8)(task);
}

TARGET static void gemm_u4_i16(const gemm_task *task)
{
    (has_many_rows_of_32(task) ? gemm_groups_of_32_i16 : gemm_any_groups_i16)(task);
}

TARGET static void gemm_e2m1_i8(const gemm_task *task) { gemm(task, 1, CODES_E2M1); }

TARGET static void gemm_e2m1_i16(const gemm_task *task) { gemm(task, 2, CODES_E2M1); }

YMM_CALL void gemm_iq4(const gemm_task *task, int planes) { gemm_wide(task, planes, CODES_IQ4_NL); }

YMM_CALL void gemm_u8(const gemm_task *task, int planes) { gemm_wide(task, planes, CODES_UINT8); }

TARGET static void gemm_iq4_i8(const gemm_task *task) { gemm_iq4(task, 1); }

TARGET static void gemm_iq4_i16(const gemm_task *task) { gemm_iq4(task, 2); }

TARGET static void gemm_u8_i8(const gemm_task *task) { gemm_u8(task, 1); }

TARGET static void gemm_u8_i16(const gemm_task *task) { gemm_u8(task, 2); }

/* Store 32 values as bytes; each fits a byte. Two levels of saturating packs work within 128-bit halves, so one
 * permutation of 32-bit lanes then restores the order. */
KERNEL void store_bytes(int8_t *to, const __m256i value[4])
{
    const __m256i low = _mm256_packs_epi32(value[0], value[1]), high = _mm256_packs_epi32(value[2], value[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i *)to, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
}

KERNEL void store_16_bytes(int8_t *to, const __m256i value[2])
{
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(value[0], value[1]), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    _mm_storeu_si128((__m128i *)to, bytes);
}

/* Quantise 16 values of a group of `size`: a group of 16, which only codes of 8 bits have. Returns their sums. */
KERNEL __m256i quantize_16(int8_t *a, const float *x, int size, int planes, __m256 inverse)
{
    __m256i value[2], low[2], high[2];
    for (int j = 0; j < 2; j++) {
        value[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * j), inverse));
        low[j] = _mm256_srai_epi32(_mm256_slli_epi32(value[j], 24), 24);
        high[j] = _mm256_srai_epi32(_mm256_sub_epi32(value[j], low[j]), 8);
    }
    store_16_bytes(a, planes == 2 ? high : value);
    if (planes == 2)
        store_16_bytes(a + size, low);
    return _mm256_add_epi32(value[0], value[1]);
}

TARGET static void quantize_row(const float *x, int64_t k, int group_size, int planes, int8_t *a,
                                ptrdiff_t a_group_stride, act_meta *meta, ptrdiff_t meta_group_stride)
{
    const float qmax = qmax_of(planes);
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    for (int64_t begin = 0; begin < k; begin += group_size, a += a_group_stride, meta += meta_group_stride) {
        const int size = k - begin < group_size ? (int)(k - begin) : group_size;
        const float *const group = x + begin;
        __m256i max_bits = _mm256_setzero_si256();
        for (int i = 0; i < size; i += 8)
            max_bits = _mm256_max_epu32(max_bits,
                                        _mm256_and_si256(magnitude, _mm256_loadu_si256((const __m256i *)(group + i))));
        __m128i max4 = _mm_max_epu32(_mm256_castsi256_si128(max_bits), _mm256_extracti128_si256(max_bits, 1));
        max4 = _mm_max_epu32(max4, _mm_shuffle_epi32(max4, 0x4e));
        max4 = _mm_max_epu32(max4, _mm_shuffle_epi32(max4, 0xb1));
        const uint32_t amax_bits = (uint32_t)_mm_cvtsi128_si32(max4);
        const float amax = group_amax(amax_bits, a, size * planes, meta);
        if (amax == 0.0f)
            continue;
        const __m256 inverse = _mm256_set1_ps(qmax / amax);
        __m256i sums = _mm256_setzero_si256();
        for (int i = 0; i + 32 <= size; i += 32) {
            __m256i value[4];
            for (int j = 0; j < 4; j++) {
                value[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(group + i + 8 * j), inverse));
                sums = _mm256_add_epi32(sums, value[j]);
            }
            if (planes == 1) {
                store_bytes(a + i, value);
                continue;
            }
            __m256i high[4];
            for (int j = 0; j < 4; j++) {
                const __m256i low = _mm256_srai_epi32(_mm256_slli_epi32(value[j], 24), 24);
                high[j] = _mm256_srai_epi32(_mm256_sub_epi32(value[j], low), 8);
                value[j] = low;
            }
            store_bytes(a + i, high);
            store_bytes(a + size + i, value);
        }
        if (size % 32 != 0)
            sums = _mm256_add_epi32(sums, quantize_16(a + size - 16, group + size - 16, size, planes, inverse));
        __m128i sum4 = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        sum4 = _mm_add_epi32(sum4, _mm_shuffle_epi32(sum4, 0x4e));
        sum4 = _mm_add_epi32(sum4, _mm_shuffle_epi32(sum4, 0xb1));
        const int32_t sum = _mm_cvtsi128_si32(sum4);
        *meta = group_meta(amax / qmax, sum);
    }
}

TARGET static void widen(float *dst, const void *src, int dtype, int64_t n)
{
    if (dtype == DTYPE_F32) {
        memcpy(dst, src, (size_t)n * sizeof *dst);
    } else if (dtype == DTYPE_BF16) {
        widen_bf16(dst, src, n);
    } else {
        const uint16_t *half = src;
        int64_t i = 0;
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(half + i))));
        for (; i < n; i++)
            dst[i] = _cvtsh_ss(half[i]);
    }
}

KERNEL void narrow_values(void *dst, const float *src, int dtype, int64_t n)
{
    if (dtype == DTYPE_F32) {
        float *to = dst;
        for (int64_t i = 0; i < n; i++)
            to[i] = src[i];
    } else if (dtype == DTYPE_BF16) {
        narrow_bf16(dst, src, n);
    } else {
        uint16_t *half = dst;
        int64_t i = 0;
        for (; i + 8 <= n; i += 8)
            _mm_storeu_si128((__m128i *)(half + i),
                             _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
        for (; i < n; i++)
            half[i] = _cvtss_sh(src[i], _MM_FROUND_TO_NEAREST_INT);
    }
}

TARGET static void narrow(void *dst, const float *src, int dtype, int64_t n) { narrow_values(dst, src, dtype, n); }

/* Registers of the row operations, of 16: 12 sums, weights of a tile's columns (2, or 4 with one row and 8 sums), one
 * value of x. A multiply-add takes 4 cycles and two start per cycle, so 8 sums are the least that keep them busy. A
 * step of the delta rule's columns is 4 vectors, whose state (128 rows of 128 bytes) is half a first-level cache. */
enum { ONE_ROW_COLS = 4, TILE_ROWS = 3, TILE_COLS = 2, DELTA_STEP = 32, TILE_SUMS = 12 };
#define QUERY_TILE 6
#include "elementwise.h"
#include "vec_ymm.h"
#include "attend.h"
#include "delta.h"
#include "dense.h"

/* Nearly all calls are for a whole pair of tiles: a constant length makes their loops straight-line code. */
TARGET static void store_rows(char *dst, ptrdiff_t row_bytes, const int64_t *rows, int m, const float *sums,
                              const float *bias, int n, int dtype)
{
    if (n == PAIR_N && !bias && dtype == DTYPE_F32)
        store_sums(dst, row_bytes, rows, m, sums, NULL, PAIR_N, DTYPE_F32);
    else if (n == PAIR_N && !bias && dtype == DTYPE_BF16)
        store_sums(dst, row_bytes, rows, m, sums, NULL, PAIR_N, DTYPE_BF16);
    else
        store_sums(dst, row_bytes, rows, m, sums, bias, n, dtype);
}

TARGET static void glu_epilogue(float *dst, ptrdiff_t row_floats, const int64_t *rows, int m, const float *sums,
                                const float *gate_bias, const float *up_bias, int activation)
{
    glu_epilogue_sums(dst, row_floats, rows, m, sums, gate_bias, up_bias, activation);
}

TARGET static void axpy(float *dst, const float *src, float weight, int64_t n) { axpy_rows(dst, src, weight, n); }

TARGET static void softmax(float *x, int64_t n) { softmax_row(x, n); }

TARGET static void sigmoid(float *x, int64_t n) { sigmoid_row(x, n); }

/* vpmaddubsw gives 16-bit sums. The loop adds eight of them before a vpmaddwd, as gemm does for weights of 4 bits. */
TARGET static int64_t peak(int64_t steps)
{
    enum { ACCUMULATORS = 4, PAIRS_PER_SUM = 8, OPS = 8 * 8 }; /* 8 lanes of four products and four additions */
    const __m256i ones = _mm256_set1_epi16(1), w = _mm256_set1_epi8(3);
    __m256i sums[ACCUMULATORS], a = _mm256_set1_epi8(5);
#pragma GCC unroll 4
    for (int i = 0; i < ACCUMULATORS; i++)
        sums[i] = _mm256_setzero_si256();
    for (int64_t step = 0; step < steps; step++) {
        __m256i sums16[ACCUMULATORS];
#pragma GCC unroll 8
        for (int j = 0; j < PAIRS_PER_SUM; j++)
#pragma GCC unroll 4
            for (int i = 0; i < ACCUMULATORS; i++) {
                const __m256i product = _mm256_maddubs_epi16(w, a);
                sums16[i] = j == 0 ? product : _mm256_add_epi16(sums16[i], product);
                KEEP(a);
                KEEP(sums16[i]);
            }
#pragma GCC unroll 4
        for (int i = 0; i < ACCUMULATORS; i++) {
            sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(sums16[i], ones));
            KEEP(sums[i]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < ACCUMULATORS; i++)
        USE(sums[i]);
    return steps * ACCUMULATORS * PAIRS_PER_SUM * OPS;
}

static isa_support probe(void)
{
    const int cpu = cpuid_has(7, 0, CPUID_EBX, 1u << 5) && cpuid_has(1, 0, CPUID_ECX, 1u << 12 | 1u << 29);
    return x86_support(cpu, os_saves(XCR0_YMM), "AVX2, FMA and F16C", "the CPU lacks AVX2, FMA or F16C");
}

const isa_descriptor isa_avx2 = {
    .name = "avx2",
    .parent = &isa_generic,
    .probe = probe,
    .peak = peak,
    .kernels =
        {
            .gemm = {[CODES_UINT4] = {gemm_u4_i8, gemm_u4_i16},
                     [CODES_E2M1] = {gemm_e2m1_i8, gemm_e2m1_i16},
                     [CODES_IQ4_NL] = {gemm_iq4_i8, gemm_iq4_i16},
                     [CODES_UINT8] = {gemm_u8_i8, gemm_u8_i16}},
            .quantize_row = quantize_row,
            .widen = widen,
            .narrow = narrow,
            .store_rows = store_rows,
            .glu_epilogue = glu_epilogue,
            .axpy = axpy,
            .softmax = softmax,
            .sigmoid = sigmoid,
            ELEMENTWISE_KERNELS,
            NORM_KERNELS,
            DENSE_KERNELS,
            ATTENTION_KERNELS,
            DELTA_KERNELS,
        },
};
#endif
