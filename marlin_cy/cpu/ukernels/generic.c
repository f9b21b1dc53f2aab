/* Portable C, for every architecture. All other ISAs are tested against it.
 *
 * Activations are joined from their planes, and weights are unpacked to 16 bits, one group at a time. The products are
 * 16 x 16 -> 32 bits, summed along K in a loop that compilers vectorise.
 */
#define ROWOPS static inline

/* Functions that must be inlined, so that each instance of gemm has its code type and number of planes as constants. */
#if defined(__GNUC__) || defined(__clang__)
#define KERNEL static inline __attribute__((always_inline))
#else
#define KERNEL static inline
#endif
#define TARGET

#include "isa.h"
#include "quantize.h"
#include "rowops.h"

static float half_to_float(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) /* infinity, NaN (made quiet) */
        return bits_float(sign | 0x7f800000 | magnitude << 13 | (magnitude > 0x7c00 ? 0x400000 : 0));
    if (magnitude < 0x0400) /* subnormal: a multiple of 2^-24 */
        return bits_float(float_bits((float)magnitude * 0x1p-24f) | sign);
    return bits_float(sign | ((magnitude << 13) + (112u << 23)));
}

static uint16_t float_to_half(float x)
{
    uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) /* NaN: quiet, payload kept */
        return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
    if (magnitude >= 0x477ff000) /* 65520 and more round to infinity */
        return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) /* below 2^-14: adding 0.5 leaves units of 2^-24, rounded to even, in the low bits */
        return (uint16_t)(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | ((magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13));
}

/* Tiles of the row operations. A vector of all lanes is 4 to 16 registers, so a tile of two by two fills them. */
enum { ONE_ROW_COLS = 2, TILE_ROWS = 2, TILE_COLS = 2, DELTA_STEP = LANES, TILE_SUMS = 2 };
#define QUERY_TILE 2

static void widen(float *dst, const void *src, int dtype, int64_t n)
{
    if (dtype == DTYPE_F32)
        memcpy(dst, src, (size_t)n * sizeof *dst);
    else if (dtype == DTYPE_BF16)
        widen_bf16(dst, src, n);
    else
        for (int64_t i = 0; i < n; i++)
            dst[i] = half_to_float(((const uint16_t *)src)[i]);
}

static inline void narrow_values(void *dst, const float *src, int dtype, int64_t n)
{
    if (dtype == DTYPE_F32)
        memcpy(dst, src, (size_t)n * sizeof *src);
    else if (dtype == DTYPE_BF16)
        narrow_bf16(dst, src, n);
    else
        for (int64_t i = 0; i < n; i++)
            ((uint16_t *)dst)[i] = float_to_half(src[i]);
}

static void narrow(void *dst, const float *src, int dtype, int64_t n) { narrow_values(dst, src, dtype, n); }

static void store_rows(char *dst, ptrdiff_t row_bytes, const int64_t *rows, int m, const float *sums, const float *bias,
                       int n, int dtype)
{
    store_sums(dst, row_bytes, rows, m, sums, bias, n, dtype);
}

static void glu_epilogue(float *dst, ptrdiff_t row_floats, const int64_t *rows, int m, const float *sums,
                         const float *gate_bias, const float *up_bias, int activation)
{
    glu_epilogue_sums(dst, row_floats, rows, m, sums, gate_bias, up_bias, activation);
}

static void axpy(float *dst, const float *src, float weight, int64_t n) { axpy_rows(dst, src, weight, n); }

#include "elementwise.h"
#include "vec_c.h"
#include "attend.h"
#include "delta.h"
#include "dense.h"

static void quantize_row(const float *x, int64_t k, int group_size, int planes, int8_t *a, ptrdiff_t a_group_stride,
                         act_meta *meta, ptrdiff_t meta_group_stride)
{
    const float qmax = qmax_of(planes);
    for (int64_t begin = 0; begin < k; begin += group_size, a += a_group_stride, meta += meta_group_stride) {
        const int size = k - begin < group_size ? (int)(k - begin) : group_size;
        /* Magnitudes are compared as integers, by their bits, where a NaN is larger than infinity. */
        uint32_t amax_bits = 0;
        for (int i = 0; i < size; i++) {
            uint32_t bits = float_bits(x[begin + i]) & 0x7fffffff;
            amax_bits = bits > amax_bits ? bits : amax_bits;
        }
        const float amax = group_amax(amax_bits, a, size * planes, meta);
        if (amax == 0.0f)
            continue;
        const float inverse = qmax / amax;
        int32_t sum = 0;
        for (int i = 0; i < size; i++) {
            const int32_t value = (int32_t)rintf(x[begin + i] * inverse);
            sum += value;
            if (planes == 2) {
                const int32_t low = (int8_t)(uint8_t)(value & 255);
                a[i] = (int8_t)((value - low) / 256);
                a[size + i] = (int8_t)low;
            } else {
                a[i] = (int8_t)value;
            }
        }
        *meta = group_meta(amax / qmax, sum);
    }
}

/* Unpack one tile's group to 16-bit weights [column][k]. `codes` is a constant where this is inlined. */
KERNEL void unpack_group(int16_t *restrict w, const uint8_t *restrict blocks, int num_blocks, int codes)
{
    const int is_identity = code_types[codes].is_identity;
    const uint8_t *const multiplicands = code_types[codes].multiplicands;
    for (int b = 0; b < num_blocks; b++, blocks += block_bytes(codes), w += LANE_K)
        for (int c = 0; c < TILE_N; c++)
            for (int t = 0; t < 4; t++) {
                if (code_types[codes].bits == 8) {
                    w[c * MAX_GROUP_K + t] = blocks[4 * c + t];
                    w[c * MAX_GROUP_K + t + 4] = blocks[LINE_BYTES + 4 * c + t];
                    continue;
                }
                const uint8_t low = blocks[4 * c + t] & 15, high = blocks[4 * c + t] >> 4;
                w[c * MAX_GROUP_K + t] = is_identity ? low : multiplicands[low];
                w[c * MAX_GROUP_K + t + 4] = is_identity ? high : multiplicands[high];
            }
}

static uint32_t load_16(const uint8_t *from) { return from[0] | (uint32_t)from[1] << 8; }

/* Scales, and what is subtracted, of one group for both tiles. */
typedef struct {
    float scale[PAIR_N], minimum[PAIR_N]; /* minima are divided by SYMMETRIC_ZERO */
    int32_t zero[PAIR_N];
} group_terms;

/* Scale or minimum `c` of a record, or of a block. */
static float load_float(const uint8_t *from, int scales, int c)
{
    switch (scales) {
    case SCALES_BF16: return bits_float(load_16(from + 2 * c) << 16);
    case SCALES_F32:
    case SCALES_F32_MIN: return bits_float(load_16(from + 4 * c) | load_16(from + 4 * c + 2) << 16);
    case SCALES_TWO_LEVEL: return (float)(int8_t)from[c];
    case SCALES_TWO_LEVEL_MIN: return (float)from[c];
    default: return half_to_float((uint16_t)load_16(from + 2 * c));
    }
}

/* The terms of a tile's columns, which are the task's from `first` on. */
static void load_terms(group_terms *terms, int first, group_record record, int scales, int codes)
{
    const scale_record *const row = &scale_records[scales];
    for (int c = 0; c < TILE_N; c++) {
        float scale = load_float(record.scale, scales, c);
        float minimum = row->has_minimum ? load_float(record.minimum, scales, c) : 0.0f;
        if (row->has_blocks) {
            scale *= load_float(record.block, SCALES_F16, c);
            if (row->has_minimum)
                minimum *= load_float(record.block, SCALES_F16, TILE_N + c);
        }
        terms->scale[first + c] = unit_scale(codes) * scale;
        terms->minimum[first + c] = minimum / SYMMETRIC_ZERO;
        terms->zero[first + c] = !stores_zeros(scales)               ? constant_zero(scales, codes)
                                 : code_types[codes].zero_bytes == 2 ? (int32_t)load_16(record.minimum + 2 * c)
                                                                     : record.minimum[c];
    }
}

/* One row's group as 16-bit values. */
KERNEL void join_planes(int16_t *restrict x, const int8_t *restrict a, int num_blocks, int planes)
{
    const int size = num_blocks * LANE_K;
    for (int i = 0; i < size; i++)
        x[i] = (int16_t)(planes == 2 ? a[i] * 256 + a[size + i] : a[i]);
}

/* Compilers turn this form into pmaddwd or smlal. */
static int32_t dot_product(const int16_t *restrict w, const int16_t *restrict x, int k)
{
    int32_t dot = 0;
    for (int i = 0; i < k; i++)
        dot += w[i] * x[i];
    return dot;
}

KERNEL void gemm(const gemm_task *task, int planes, int codes)
{
    enum { TILE_WEIGHTS = TILE_N * MAX_GROUP_K };
    int16_t *const weights = (int16_t *)(void *)task->scratch->weights;
    float *const sums = task->scratch->sums;
    const int num_tiles = task->header[1] ? 2 : 1;
    const uint8_t *body[2] = {task->body[0], task->body[1]};
    const header_layout layout = layout_of_header(task->scales, codes, task->group_blocks * LANE_K);

    for (int g = 0; g < task->num_groups; g++) {
        const int last = g == task->num_groups - 1;
        const int blocks = last ? task->last_group_blocks : task->group_blocks;
        group_terms terms;
        for (int t = 0; t < num_tiles; t++) {
            load_terms(&terms, t * TILE_N, record_of(task->header[t], &layout, g), task->scales, codes);
            unpack_group(weights + t * TILE_WEIGHTS, body[t], blocks, codes);
            body[t] += blocks * block_bytes(codes);
        }
        for (int r = 0; r < task->m; r++) {
            const act_meta *meta = task->meta + g * task->meta_group_stride + task->rows[r];
            const int32_t total = (meta->sum_split >> 16) * 256 + (meta->sum_split & 0xffff);
            float *sum = sums + r * PAIR_N, *out = task->out + r * PAIR_N;
            int16_t x[MAX_GROUP_K];
            join_planes(x, task->a + g * task->a_group_stride + task->rows[r] * task->a_row_stride, blocks, planes);
            for (int c = 0; c < num_tiles * TILE_N; c++) {
                const int32_t dot = dot_product(weights + c * MAX_GROUP_K, x, blocks * LANE_K);
                sum[c] = fmaf((float)(dot - terms.zero[c] * total), meta->scale * terms.scale[c], g ? sum[c] : 0.0f);
                if (scale_records[task->scales].has_minimum)
                    sum[c] = fmaf(meta->scale * (float)meta->symmetric_sum, terms.minimum[c], sum[c]);
                if (last)
                    out[c] = task->accumulate ? out[c] + sum[c] : sum[c];
            }
        }
    }
}

static void gemm_u4_i8(const gemm_task *task) { gemm(task, 1, CODES_UINT4); }

static void gemm_u4_i16(const gemm_task *task) { gemm(task, 2, CODES_UINT4); }

static void gemm_e2m1_i8(const gemm_task *task) { gemm(task, 1, CODES_E2M1); }

static void gemm_e2m1_i16(const gemm_task *task) { gemm(task, 2, CODES_E2M1); }

static void gemm_iq4_i8(const gemm_task *task) { gemm(task, 1, CODES_IQ4_NL); }

static void gemm_iq4_i16(const gemm_task *task) { gemm(task, 2, CODES_IQ4_NL); }

static void gemm_u8_i8(const gemm_task *task) { gemm(task, 1, CODES_UINT8); }

static void gemm_u8_i16(const gemm_task *task) { gemm(task, 2, CODES_UINT8); }

static void softmax(float *x, int64_t n) { softmax_row(x, n); }

static void sigmoid(float *x, int64_t n) { sigmoid_row(x, n); }

static isa_support probe(void) { return (isa_support){1, "portable C"}; }

const isa_descriptor isa_generic = {
    .name = "generic",
    .probe = probe,
    .kernels =
        {
            .gemm = {[CODES_UINT4] = {gemm_u4_i8, gemm_u4_i16},
                     [CODES_E2M1] = {gemm_e2m1_i8, gemm_e2m1_i16},
                     [CODES_IQ4_NL] = {gemm_iq4_i8, gemm_iq4_i16},
                     [CODES_UINT8] = {gemm_u8_i8, gemm_u8_i16}},
            .mr = 8,
            .mc =
                48, /* sums (6 KiB), activations of a group (12 KiB) and its weights (4 KiB) fit an L1 cache of 32 KiB */
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
