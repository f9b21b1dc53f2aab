/* The contract between the framework (Cython: tiles, rows, threads, workspace) and the code that
 * knows an instruction set. Every ISA fills one `ukernel_table`; a NULL entry is inherited from
 * the more general ISA that isa.c names.
 *
 * Whatever the ISA, the same input gives the same bits: integer sums are exact, and the float steps
 * are those of marlin_cy/reference.py, in its order, each rounded to nearest even.
 *
 * PACKED TILE: 16 columns (TILE_N), all of K. `groups` is the number of groups, `blocks` is K / 8.
 *
 *   0                          48*groups      header_bytes                header_bytes + 64*blocks
 *   | group 0 | group 1 | .... | pad to 64 B  | block 0 | block 1 | ....  |
 *        |                                         |
 *        | 16 x 16-bit scale, 16 x uint8 zero      | 16 lanes of 4 bytes, lane n = column n:
 *                                                  |   byte t:  low nibble   q[8*block + t,     n]
 *                                                  |            high nibble  q[8*block + t + 4, n]
 *
 * One 64-byte load, one `and`, one shift and `and` give two vectors in which every 32-bit lane holds
 * four consecutive values of K of one column: the operand of vpdpbusd, vpmaddubsw and their like.
 *
 * QUANTISED ACTIVATIONS: group-major, so that the rows of one group lie together.
 *
 *   a    + group * a_group_stride + row * a_row_stride:   group_size * planes bytes,
 *          plane 0 of the group's values, a byte each, then plane 1 of them if there are two.
 *          Two planes: value = 256 * plane0 + plane1. One plane: value = plane0. Each in -128..127.
 *   meta + group * meta_group_stride + row:               scale, and the sum of the group's values.
 */
#ifndef MARLIN_CY_UKERNEL_H
#define MARLIN_CY_UKERNEL_H

#include <stddef.h>
#include <stdint.h>

enum {
    TILE_N = 16,             /* columns in a packed tile */
    PAIR_N = 2 * TILE_N,     /* columns of a task: two tiles, so that a broadcast activation is used twice */
    BLOCK_K = 8,             /* values of K in a block */
    BLOCK_BYTES = 64,        /* bytes of a block: 16 columns x 8 values x 4 bits */
    GROUP_HEADER_BYTES = 48, /* 16 scales, float16 or bfloat16, and 16 uint8 zeros */
    MAX_GROUP_K = 128,       /* the largest group: 128 * 24 * 32639 stays far below 2^31 */
    GROUP_K_STEP = 32,       /* every group, the last one too, has a multiple of this many values */
    MAX_MC = 96,           /* rows of a task: the largest mc of a ukernel_table */
};

enum { DTYPE_F32 = 0, DTYPE_F16 = 1, DTYPE_BF16 = 2 };

/* What 4-bit codes stand for. Kernels multiply by unsigned integers w(q):
 *
 *   CODES_UINT4   w(q) = q
 *   CODES_E2M1    w(q) = e2m1_weights[q], twice the value of a 4-bit float plus 12; the packed zero points are 12, and
 *                 scales are halved once they are float32, which is exact whatever the 16-bit scale was */
enum { CODES_UINT4 = 0, CODES_E2M1 = 1, CODES_COUNT = 2, SYMMETRIC_ZERO = 8, E2M1_ZERO = 12 };

static const uint8_t e2m1_weights[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

/* What a MoE layer does with a gate and an up; the formulas are in marlin_cy/moe/layer.py. */
enum { ACTIVATION_SILU = 0, ACTIVATION_GELU = 1, ACTIVATION_GELU_TANH = 2, ACTIVATION_SWIGLUOAI = 3 };

/* Quantised groups whose largest magnitude is below this are taken as zero, so that neither
 * qmax / amax nor amax / qmax leaves the range of normal floats. */
#define QUANTIZE_MIN_AMAX 0x1p-100f

/* Scale of one row's group, and the sum of its quantised values in two forms:
 *
 *   sum_split       for a product with any zero point by one multiply-add of 16-bit pairs:
 *                   sum = 256 * (sum_split >> 16) + (sum_split & 0xffff), the upper half signed
 *   symmetric_sum   -SYMMETRIC_ZERO * sum: what is added where zero points are SYMMETRIC_ZERO, with no product at all
 *
 * A scale of NaN marks a group that held a NaN or an infinity. */
typedef struct {
    float scale;
    int32_t sum_split;
    int32_t symmetric_sum;
} act_meta;

/* What each thread owns: written and read by one task, meaningless afterwards. */
typedef struct {
    uint8_t weights[MAX_GROUP_K * PAIR_N * 2]; /* one unpacked group; the ISA's own order */
    float sums[MAX_MC * PAIR_N];             /* sums of the groups so far */
} gemm_scratch;

/* One task: m rows by one or two tiles, over `num_groups` consecutive groups.
 *
 *   sum[r][c] = 0
 *   for g in groups:                                              (in ascending order)
 *       t = sum_k a[g][rows[r]][k] * (w(q[k][c]) - zero[g][c])    (exact, |t| < 2^31)
 *       s = meta[g][rows[r]].scale * scale[g][c]                  (rounded; with CODES_E2M1, half of scale)
 *       sum[r][c] = fma((float)t, s, sum[r][c])                   (two roundings: of t, of the fma)
 *   out[r][c] = accumulate ? out[r][c] + sum[r][c] : sum[r][c]
 *
 * out is [m][PAIR_N] float32; with one tile, columns 16..31 are not touched. Everything that is
 * pointed to is aligned to 64 bytes, but for header (16), a (8), meta (4) and rows (4). Nothing
 * overlaps; next may be any address. 1 <= m <= MAX_MC, num_groups >= 1.
 */
typedef struct {
    const uint8_t *header[2]; /* first group's scales and zeros, per tile; [1] is NULL with one tile */
    const uint8_t *body[2];   /* first group's first block, per tile */
    const uint8_t *next[2];   /* what the caller will probably read next, per tile: for prefetching only */
    int scale_dtype; /* of the headers' scales: DTYPE_F16 or DTYPE_BF16 */
    int num_groups;
    int group_blocks;      /* blocks in every group but the last */
    int last_group_blocks; /* blocks in the last */
    const int8_t *a;
    ptrdiff_t a_group_stride, a_row_stride; /* bytes */
    const act_meta *meta;
    ptrdiff_t meta_group_stride; /* elements */
    const int32_t *rows;         /* [m] */
    int m;
    int accumulate;
    float *out;
    gemm_scratch *scratch;
} gemm_task;

/* Bytes of a task's blocks, in each tile. */
static inline ptrdiff_t task_bytes(const gemm_task *task)
{
    return ((ptrdiff_t)(task->num_groups - 1) * task->group_blocks + task->last_group_blocks) * BLOCK_BYTES;
}

/* Quantise one row of k finite or non-finite floats, group by group (the last may be shorter):
 *
 *   amax = max |x|;  qmax = planes == 2 ? 32639 : 127
 *   scale = amax / qmax;  value = rint(x * (qmax / amax))           (each operation rounded)
 *   amax < QUANTIZE_MIN_AMAX: scale = 0, all values 0
 *   a NaN or an infinity:     scale = NaN, all values 0
 *
 * a and meta point to the row's entry in group 0. */
typedef void quantize_row_fn(const float *x, int64_t k, int group_size, int planes, int8_t *a,
                             ptrdiff_t a_group_stride, act_meta *meta, ptrdiff_t meta_group_stride);

/* dst[i] = src[i], between float32 and `dtype`; to float16 and bfloat16 rounded to nearest even. */
typedef void widen_fn(float *dst, const void *src, int dtype, int64_t n);
typedef void narrow_fn(void *dst, const float *src, int dtype, int64_t n);

/* Write a task's sums to where they belong. Row r of `sums` is at sums + r * PAIR_N and goes to
 * dst + rows[r] * row_bytes; n is a multiple of 8.
 *
 *   dst[i] = sums[i] + bias[i] (bias may be NULL), rounded to `dtype` as by narrow */
typedef void store_rows_fn(char *dst, ptrdiff_t row_bytes, const int64_t *rows, int m, const float *sums,
                           const float *bias, int n, int dtype);

/* The same for a task whose first tile holds gates and whose second holds ups: 16 float32 a row.
 *
 *   gate = sums[i] + gate_bias[i];  up = sums[TILE_N + i] + up_bias[i]    (both biases may be NULL: nothing is added)
 *   dst[i] = activation(gate, up)
 *
 * An activation is within 6 * 2^-24 * |gate * up| of its formula (swigluoai: |gate| * (1 + |up|), both clamped), which
 * rowops.h derives, and (1 + |up|) times the smallest float; a NaN gives NaN, infinities what the formula gives. */
typedef void glu_epilogue_fn(float *dst, ptrdiff_t row_floats, const int64_t *rows, int m, const float *sums,
                          const float *gate_bias, const float *up_bias, int activation);

/* dst[i] = fma(weight, src[i], dst[i]) */
typedef void axpy_fn(float *dst, const float *src, float weight, int64_t n);

/* x[i] = exp(x[i] - max x) / sum of these, in place; the sum in ascending order; all NaN if any is. */
typedef void softmax_fn(float *x, int64_t n);

/* x[i] = 1 / (1 + exp(-x[i])), in place; a NaN stays one. */
typedef void sigmoid_fn(float *x, int64_t n);

typedef void gemm_fn(const gemm_task *task);

typedef struct {
    const char *name;
    gemm_fn *gemm[CODES_COUNT][2]; /* by codes, and planes - 1 */
    int mr;         /* tasks of a multiple of this many rows leave no part of a register or of a tile empty */
    int mc;         /* tasks have no more rows than this, a multiple of mr, at most MAX_MC */
    int min_matrix_rows;      /* tasks of this many rows or more are for a matrix unit, and have consecutive rows,
                           * rows[i] = rows[0] + i; 0: no tasks are */
    quantize_row_fn *quantize_row;
    widen_fn *widen;
    narrow_fn *narrow;
    store_rows_fn *store_rows;
    glu_epilogue_fn *glu_epilogue;
    axpy_fn *axpy;
    softmax_fn *softmax;
    sigmoid_fn *sigmoid;
} ukernel_table;

/* One table an ISA; on other architectures than x86-64 only the first is compiled. */
extern const ukernel_table ukernels_generic;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define MARLIN_CY_X86 1
extern const ukernel_table ukernels_avx2;
extern const ukernel_table ukernels_avx512vnni;
#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define MARLIN_CY_AVXVNNI 1
#define MARLIN_CY_AMX 1
extern const ukernel_table ukernels_avxvnni;
extern const ukernel_table ukernels_amx;
#endif
#endif

#endif
