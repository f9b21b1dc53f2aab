/* The row operations of a decoder: what stands between the quantised products of a whole model.
 *
 * Every ISA gives the same bits for the same input, except for the payload and the sign of a NaN. Every step is one
 * IEEE operation on float32, fused only where a formula says fma; exp is exp_f32 of activate.h.
 *
 * SUMS BY LANES: value i of a row belongs to lane i mod LANES. A lane's sum is a chain of fma from zero, i ascending.
 * A row whose length is not a multiple of LANES is continued with zeros. A fixed tree then adds the lanes:
 *
 *   for step in 8, 4, 2, 1:   lane[l] = lane[l] + lane[l + step]   for l < step;   the sum is lane[0]
 *
 * PAGES: a cache of keys and values consists of pages of KV_BLOCK positions, of one head each.
 *
 *   keys    [d][KV_BLOCK]     position p of the page in column p
 *   values  [KV_BLOCK][dv]
 *
 * Strides of rows are in elements. No pointer needs an alignment beyond that of its elements. */
#ifndef MARLIN_CY_OPERATIONS_H
#define MARLIN_CY_OPERATIONS_H

#include <stddef.h>
#include <stdint.h>

enum {
    LANES = 16,                               /* partial sums of a row */
    KV_BLOCK = 16,                            /* positions of a page */
    CHUNK_PAGES = 16,                         /* pages of a chunk: the unit in which attention is summed */
    ATTENTION_CHUNK = CHUNK_PAGES * KV_BLOCK, /* positions of a chunk */
    MAX_QUERIES = 64,                         /* most queries of an attention_task */
    MAX_HEAD_DIM = 640,                       /* most values of a key, and of a value */
};

/* dst[i] = (src[i] * r) * weight[i] with r = 1 / sqrt(sum / n + eps); sum is that of src[i]^2, by lanes. weight may be
 * NULL: the last product is left out. dst may be src. */
typedef void rms_norm_fn(float *dst, const float *src, const float *weight, float eps, int64_t n);

/* dst[i] = rms_norm(src)[i] * silu(gate[i]); silu(g) = g / (1 + exp(-g)). dst may be src or gate. Source: Qwen3-Next. */
typedef void gated_rms_norm_fn(float *dst, const float *src, const float *weight, const float *gate, float eps,
                               int64_t n);

/* x[i] = x[i] * (factor / sqrt(sum + 1e-6)); sum is that of x[i]^2, by lanes. */
typedef void l2_normalize_fn(float *x, float factor, int64_t n);

/* dst[i] = dst[i] + src[i] */
typedef void add_fn(float *dst, const float *src, int64_t n);

/* Rotate the pairs of one head, in place. Pair i is (x[i], x[i + pairs]), or (x[2 i], x[2 i + 1]) if interleaved:
 *
 *   a, b = fma(a, cos[i], -(b * sin[i])), fma(b, cos[i], a * sin[i]) */
typedef void rope_fn(float *x, const float *cos, const float *sin, int64_t pairs, int interleaved);

/* x[i] = x[i] * sigmoid(gate[i]); sigmoid(g) = 1 / (1 + exp(-g)); a NaN gives a NaN. */
typedef void sigmoid_gate_fn(float *x, const float *gate, int64_t n);

/* dst[i] = activation(gate[i], up[i]), as glu_epilogue. dst may be gate or up. */
typedef void glu_rows_fn(float *dst, const float *gate, const float *up, int64_t n, int activation);

/* A product of m rows and n rows of weights, each of k values:
 *
 *   total = 0
 *   for chunk in chunks of CHUNK_K values of k:                       (in ascending order; the first has no addition)
 *       total = total + (sum of x[r][i] * w[c][i] over the chunk, by lanes)
 *   out[r][c] = total + bias[c]                       (without the addend if it is NULL)
 *
 * A weight of 8 bits, which is a DTYPE_I8 or a DTYPE_F8, is the element times scales[c][i / scale_k], rounded to float32:
 * products have the bits of those by float32 weights. No element is NaN, and scales are less than 2^120.
 *
 * m, n, k >= 1. out overlaps no input. */
typedef struct {
    const float *x;
    ptrdiff_t x_stride;
    int64_t m;
    const void *w;
    int dtype; /* of w */
    ptrdiff_t w_stride;
    int64_t n, k;
    const float *scales;    /* [n][scale_stride], of weights of 8 bits; NULL for others */
    ptrdiff_t scale_stride; /* at least k / scale_k, rounded up */
    int64_t scale_k;        /* a multiple of LANES, or at least k */
    const float *bias;      /* [n] */
    float *out;
    ptrdiff_t out_stride;
} dense_task;

typedef void dense_fn(const dense_task *task);

/* Scratch memory of a thread: a task writes it before it reads it, and nothing survives the task. */
typedef struct {
    float scores[MAX_QUERIES][ATTENTION_CHUNK];
    float page[MAX_HEAD_DIM * KV_BLOCK]; /* a page as float32 */
} attention_scratch;

/* Attention of m queries over one chunk of a cache, for one head of keys and values. Query r sees the positions
 * begin[r] <= p < end[r] of the chunk, 0 <= p < ATTENTION_CHUNK:
 *
 *   s[p] = scale * (sum of q[r][i] * key[p][i])        a chain of fma from zero, i ascending
 *   s[p] = soft_cap * tanh(s[p] / soft_cap)            if soft_cap is not 0; tanh(z) = 1 - 2 / (1 + exp(2 z))
 *   max[r] = max of s
 *   e[p] = exp(s[p] - max[r])
 *   sum[r] = sum of e[p], by lanes                     additions; the lane is p mod LANES
 *   out[r][c] = sum of e[p] * value[p][c]              a chain of fma from zero, p ascending
 *
 * A query that sees no position has max = -infinity, sum = 0, out = 0. A position that a query does not see has no
 * influence on the query, and a page that no query sees is not read: it may have any index and any bits. Where a sum
 * is NaN, because a score is NaN or all scores are infinite, max and out are NaN as well.
 *
 * 1 <= m <= MAX_QUERIES, 1 <= d <= MAX_HEAD_DIM, dv <= MAX_HEAD_DIM is a positive multiple of LANES. */
typedef struct {
    int m, d, dv;
    const float *q;
    ptrdiff_t q_stride;
    const char *keys, *values;           /* page 0 of this head */
    ptrdiff_t key_stride, value_stride;  /* bytes from a page to the next */
    const int32_t *pages;                /* indices of the chunk's pages, up to CHUNK_PAGES */
    int dtype;                           /* of the pages: DTYPE_F32, DTYPE_F16 or DTYPE_BF16 */
    float scale, soft_cap;
    const int32_t *begin, *end; /* [m] */
    float *max, *sum;           /* [m] */
    float *out;                 /* [m][dv] */
    ptrdiff_t out_stride;
    attention_scratch *scratch;
} attention_task;

typedef void attention_fn(const attention_task *task);

/* Merge a chunk's result (max2, sum2, out2) into that of the chunks before it, for one query:
 *
 *   m = max(*max, max2), NaN if either is;  a = exp(*max - m), b = exp(max2 - m)
 *   *max = m;  *sum = fma(*sum, a, sum2 * b);  out[i] = fma(out[i], a, out2[i] * b)
 *
 * If sum2 is 0, the query sees nothing of the chunk, and nothing changes. Otherwise, if *sum is 0, the chunk's result
 * is copied: *max and out need not be set before the first chunk. */
typedef void attention_merge_fn(float *max, float *sum, float *out, float max2, float sum2, const float *out2,
                                int64_t n);

/* Divide a query's merged values by the sum of its weights:
 *
 *   with a sink (not NULL):   m = max(max, *sink), NaN if either is;  a = exp(max - m)         0 where max is -infinity
 *                             sum = fma(sum, a, exp(*sink - m));  out[i] = out[i] * a
 *   out[i] = out[i] / sum, or 0 if sum is 0 */
typedef void attention_finish_fn(float *out, float max, float sum, const float *sink, int64_t n);

/* page[i][position] = k[i], narrowed to `dtype` as by narrow: write one position's key to its page. The other positions
 * of the page are neither read nor written. d <= MAX_HEAD_DIM. */
typedef void store_keys_fn(void *page, const float *k, int position, int dtype, int d);

/* One token's causal depthwise convolution, followed by silu; `state` has the inputs of the width - 1 tokens before it.
 *
 *   input[t] = state[t] for t < width - 1;  input[width - 1] = x
 *   sum[c] = chain of fma(weight[t][c], input[t][c], .) from zero, t ascending
 *   dst[c] = silu(sum[c]);   state[t] = input[t + 1]
 *
 * weight is [width][channels] and state [width - 1][channels], both with rows `stride` elements apart. width >= 1. dst
 * may be x. */
typedef void short_conv_fn(float *dst, float *state, const float *x, const float *weight, ptrdiff_t stride,
                           int64_t channels, int width);

/* The gates of the delta rule for one token's n heads:
 *
 *   beta[i] = sigmoid(b[i]);   decay[i] = exp(-(exp(a_log[i]) * softplus(a[i] + dt_bias[i])))
 *   softplus(x) = max(x, 0) + log1p(exp(-|x|))
 *
 * A NaN gives a NaN. decay may be a, beta may be b. */
typedef void delta_gates_fn(float *decay, float *beta, const float *a, const float *b, const float *a_log,
                            const float *dt_bias, int64_t n);

/* The gated delta rule for consecutive tokens of one head, on `columns` values of the head. For each token t in order:
 *
 *   state[i][c] = state[i][c] * decay[t]
 *   delta[c] = (v[t][c] - (sum of k[t][i] * state[i][c])) * beta[t]
 *   state[i][c] = fma(k[t][i], delta[c], state[i][c])
 *   y[t][c] = sum of q[t][i] * state[i][c]
 *
 * Both sums are chains of fma from zero, i ascending. q and k are normalised. `columns` is a multiple of LANES; y
 * overlaps no input but v. Source: Qwen3-Next. */
typedef struct {
    int64_t tokens, key_dim, columns;
    const float *q, *k; /* [tokens][key_dim] */
    ptrdiff_t q_stride, k_stride;
    const float *v; /* [tokens][columns] */
    ptrdiff_t v_stride;
    const float *decay, *beta; /* [tokens] */
    ptrdiff_t gate_stride;     /* elements from a token's decay, or beta, to the next one's */
    float *state;              /* [key_dim][columns] */
    ptrdiff_t state_stride;
    float *y; /* [tokens][columns] */
    ptrdiff_t y_stride;
} delta_task;

typedef void delta_rule_fn(const delta_task *task);

#endif
