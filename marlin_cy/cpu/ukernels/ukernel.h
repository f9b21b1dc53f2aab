/* The contract between the framework (Cython: tiles, rows, threads, workspace) and the kernels of an instruction set.
 * Each ISA fills a `ukernel_table`; an entry that is NULL or 0 is inherited from its parent (isa.h).
 *
 * Every ISA gives the same bits for the same input: integer sums are exact, and the float steps are those of
 * marlin_cy/reference.py, in its order, each rounded to nearest even.
 *
 * PACKED TILE: 16 columns (TILE_N) by all of K. `blocks` is K / 8 (LANE_K).
 *
 *   0                           header_bytes
 *   | header | pad to 64 bytes | block 0 | block 1 | ....  |
 *       |                          |
 *       | scales of all groups:    | 16 lanes of 4 bytes, lane n = column n:
 *       | see scale_records.h      |   byte t:  low nibble   q[8*block + t,     n]
 *                                  |            high nibble  q[8*block + t + 4, n]
 *                                  |
 *                                  | or, with codes of 8 bits, twice 16 lanes of 4 bytes:
 *                                  |   byte t of the first 16 lanes    q[8*block + t,     n]
 *                                  |   byte t of the last 16 lanes     q[8*block + t + 4, n]
 *
 * One 64-byte load, one `and`, one shift and `and` give two vectors; with codes of 8 bits, two loads do. Each 32-bit
 * lane of these vectors holds four consecutive values of K of one column, which is the operand of vpdpbusd, vpmaddubsw
 * and similar instructions.
 *
 * QUANTISED ACTIVATIONS are group-major: the rows of one group are contiguous.
 *
 *   a    + group * a_group_stride + row * a_row_stride:   group_size * planes bytes,
 *          plane 0 of the group's values, one byte each, then plane 1 if there are two planes.
 *          Two planes: value = 256 * plane0 + plane1. One plane: value = plane0. Each byte is in -128..127.
 *   meta + group * meta_group_stride + row:               scale, and the sum of the group's values.
 */
#ifndef MARLIN_CY_UKERNEL_H
#define MARLIN_CY_UKERNEL_H

#include <stddef.h>
#include <stdint.h>

#include "code_types.h"
#include "operations.h"
#include "scale_records.h"

enum {
    PAIR_N = 2 * TILE_N, /* columns of a task: two tiles, so that each broadcast activation is used twice */
    LANE_K = 8,          /* values of K in a lane, so in a block */
    LINE_BYTES = 64,     /* bytes of 16 lanes; a block has one or two such lines */
    MAX_GROUP_K = 128,   /* the largest group: 128 * 256 * 32639 is below 2^31 */
    GROUP_K_STEP = 16,   /* the length of every group, including the last, is a multiple of this, and of min_group */
    CHUNK_K = 1024,      /* K is summed in chunks of this length: see marlin_cy/reference.py */
    MAX_MC = 96,         /* the largest mc of a ukernel_table */
    MAX_PLANES = 2,      /* bytes of a quantised activation */
};

/* The largest magnitude of a quantised activation, by the number of planes. For two planes it is
 * 256 * 127 + 127, the largest value that two signed bytes can represent. */
enum { QMAX_INT8 = 127, QMAX_INT16 = 32639 };

/* DTYPE_I8 and DTYPE_F8, which is E4M3 without infinities, are only of the weights of dense products. */
enum { DTYPE_F32 = 0, DTYPE_F16 = 1, DTYPE_BF16 = 2, DTYPE_I8 = 3, DTYPE_F8 = 4 };

/* The activations of a MoE layer; their definitions are in marlin_cy/activations.py. */
enum {
    ACTIVATION_SILU = 0,
    ACTIVATION_GELU = 1,
    ACTIVATION_GELU_TANH = 2,
    ACTIVATION_SWIGLUOAI = 3,
    ACTIVATION_SILU_CLAMP10 = 4,
    ACTIVATION_RELU2 = 5, /* of up alone: rectify is what a layer without gates uses */
};

/* A group whose largest magnitude is below this is quantised to zeros, so that neither qmax / amax nor amax / qmax
 * leaves the range of normal floats. */
#define QUANTIZE_MIN_AMAX 0x1p-100f

/* Scale of one row's group, and the sum of its quantised values in two forms:
 *
 *   sum_split       the factor of any zero point, as one multiply-add of 16-bit pairs:
 *                   sum = 256 * (sum_split >> 16) + (sum_split & 0xffff), the upper half signed
 *   symmetric_sum   -SYMMETRIC_ZERO * sum: added where all zero points are SYMMETRIC_ZERO, without a multiplication;
 *                   as a float, the factor of minima
 *
 * A scale of NaN marks a group that held a NaN or an infinity. */
typedef struct {
    float scale;
    int32_t sum_split;
    int32_t symmetric_sum;
} act_meta;

/* Scratch memory of a thread: a task writes it before it reads it, and nothing survives the task. */
typedef struct {
    uint8_t weights[MAX_GROUP_K * PAIR_N * 2]; /* one unpacked group, in an order that the ISA chooses */
    float sums[MAX_MC * PAIR_N];               /* sums over the groups so far */
    int16_t joined[MAX_MC * MAX_GROUP_K];      /* activations of one group, for ISAs that join planes */
} gemm_scratch;

/* One task: m rows by one or two tiles, over `num_groups` consecutive groups.
 *
 *   sum[r][c] = 0
 *   for g in groups:                                              (in ascending order)
 *       t = sum_k a[g][rows[r]][k] * (w(q[k][c]) - zero[g][c])    (exact, |t| < 2^31; w is in code_types.h)
 *       s = meta[g][rows[r]].scale * (scale[g][c] / units_per_one)                  (rounded once, by the product)
 *       sum[r][c] = fma((float)t, s, sum[r][c])                   (two roundings: of t, of the fma)
 *       with minima:
 *       u = meta[g][rows[r]].scale * (float)meta[g][rows[r]].symmetric_sum          (two roundings)
 *       sum[r][c] = fma(u, minimum[g][c] / SYMMETRIC_ZERO, sum[r][c])
 *   out[r][c] = accumulate ? out[r][c] + sum[r][c] : sum[r][c]
 *
 * With two levels, scale and minimum are the float32 products of the block's and the group's, which are exact.
 *
 * out is [m][PAIR_N] float32; with one tile, columns 16..31 are not touched. Every pointer is aligned to 64 bytes,
 * except header (16), a (8), meta (4) and rows (4). The memory areas do not overlap; `next` may be any address.
 * 1 <= m <= MAX_MC, num_groups >= 1.
 */
typedef struct {
    const uint8_t
        *header[2]; /* first group's scales, with two levels its block's, per tile; [1] is NULL with one tile */
    const uint8_t *body[2];   /* first group's first block, per tile */
    const uint8_t *next[2];   /* the memory that the caller will probably read next, per tile: for prefetching only */
    int scales; /* the headers' scale record, SCALES_*; with two levels, the first group begins a block */
    int num_groups;
    int group_blocks; /* blocks in every group except the last */
    int last_group_blocks; /* blocks in the last group */
    const int8_t *a;
    ptrdiff_t a_group_stride, a_row_stride; /* bytes */
    const act_meta *meta;
    ptrdiff_t meta_group_stride; /* elements */
    const int32_t *rows; /* [m] */
    int m;
    int accumulate;
    float *out;
    gemm_scratch *scratch;
} gemm_task;

/* Bytes of a task's blocks, in each tile. */
static inline ptrdiff_t task_bytes(const gemm_task *task, int codes)
{
    return ((ptrdiff_t)(task->num_groups - 1) * task->group_blocks + task->last_group_blocks) * block_bytes(codes);
}

typedef void gemm_fn(const gemm_task *task);

/* Quantise one row of k floats, finite or not, group by group (the last group may be shorter):
 *
 *   amax = max |x|;  qmax = planes == 2 ? QMAX_INT16 : QMAX_INT8
 *   scale = amax / qmax;  value = rint(x * (qmax / amax))           (each operation rounded)
 *   amax < QUANTIZE_MIN_AMAX: scale = 0, all values 0
 *   a NaN or an infinity:     scale = NaN, all values 0
 *
 * a and meta point to the row's entry in group 0. */
typedef void quantize_row_fn(const float *x, int64_t k, int group_size, int planes, int8_t *a, ptrdiff_t a_group_stride,
                             act_meta *meta, ptrdiff_t meta_group_stride);

/* dst[i] = src[i], between float32 and `dtype`; to float16 and bfloat16 rounded to nearest even. */
typedef void widen_fn(float *dst, const void *src, int dtype, int64_t n);
typedef void narrow_fn(void *dst, const float *src, int dtype, int64_t n);

/* Write the sums of a task to their rows of the output. Row r of `sums` is at sums + r * PAIR_N and goes to
 * dst + rows[r] * row_bytes; n is a multiple of 8.
 *
 *   dst[i] = sums[i] + bias[i] (bias may be NULL), rounded to `dtype` as by narrow */
typedef void store_rows_fn(char *dst, ptrdiff_t row_bytes, const int64_t *rows, int m, const float *sums,
                           const float *bias, int n, int dtype);

/* The same for a task whose first tile holds gates and whose second tile holds ups: 16 float32 per row.
 *
 *   gate = sums[i] + gate_bias[i];  up = sums[TILE_N + i] + up_bias[i]    (both biases may be NULL: nothing is added)
 *   dst[i] = activation(gate, up)
 *
 * The error of an activation is at most 6 * 2^-24 * |gate * up| (swigluoai: |gate| * (1 + |up|), both clamped; relu2:
 * half a unit in the last place), which
 * rowops.h derives, plus (1 + |up|) times the smallest float. A NaN gives NaN; infinities follow the formula. */
typedef void glu_epilogue_fn(float *dst, ptrdiff_t row_floats, const int64_t *rows, int m, const float *sums,
                             const float *gate_bias, const float *up_bias, int activation);

/* dst[i] = fma(weight, src[i], dst[i]) */
typedef void axpy_fn(float *dst, const float *src, float weight, int64_t n);

/* x[i] = exp(x[i] - max x) / sum of these, in place; the sum in ascending order; all NaN if any x[i] is NaN. */
typedef void softmax_fn(float *x, int64_t n);

/* x[i] = 1 / (1 + exp(-x[i])), in place; a NaN stays a NaN. */
typedef void sigmoid_fn(float *x, int64_t n);

typedef struct {
    gemm_fn *gemm[CODES_COUNT][MAX_PLANES]; /* by code type, and planes - 1 */
    int mr; /* row granularity of the micro-kernel (MR) */
    int mc; /* most rows of a task (MC): a multiple of mr, at most MAX_MC */
    int min_matrix_rows; /* 0, or the least m with which tasks use a matrix unit; the rows of such tasks must be
                          * consecutive, rows[i] = rows[0] + i */
    quantize_row_fn *quantize_row;
    widen_fn *widen;
    narrow_fn *narrow;
    store_rows_fn *store_rows;
    glu_epilogue_fn *glu_epilogue;
    axpy_fn *axpy;
    softmax_fn *softmax;
    sigmoid_fn *sigmoid;
    /* operations.h */
    rms_norm_fn *rms_norm;
    gated_rms_norm_fn *gated_rms_norm;
    l2_normalize_fn *l2_normalize;
    add_fn *add;
    rope_fn *rope;
    sigmoid_gate_fn *sigmoid_gate;
    glu_rows_fn *glu_rows;
    dense_fn *dense;
    attention_fn *attention;
    attention_merge_fn *attention_merge;
    attention_finish_fn *attention_finish;
    store_keys_fn *store_keys;
    short_conv_fn *short_conv;
    delta_gates_fn *delta_gates;
    delta_rule_fn *delta_rule;
} ukernel_table;

#endif
