/* Dense products, over the vectors of a vec_*.h. The including file defines KERNEL, TARGET and the tiles:
 *
 *   ONE_ROW_COLS           rows of weights that one row of x is multiplied by at once
 *   TILE_ROWS, TILE_COLS   rows of x, at most 4, by rows of weights
 *
 * A tile keeps PARTS vectors of sums for each of its outputs, one vector of each of its rows of weights, and one vector
 * of x.
 *
 * FEW ROWS, up to TILE_ROWS: a tile reads the weights as they are, over a chunk of K. Its rows of weights are n / cols
 * rows apart, so that each runs through memory by itself, which keeps a prefetcher of the CPU busy. Measured on Zen 3
 * with one row of 2048 bfloat16, as shares of the read bandwidth: neighbouring rows 0.65, with software prefetches 0.72;
 * rows apart 0.96, with software prefetches 0.87; 8 rows apart 0.91.
 *
 * MORE ROWS: weights are widened to float32 once for BLOCK_ROWS rows, BLOCK_COLS rows of them and BLOCK_K values of K
 * at a time (16 KiB; float32 weights are copied). They stay in the first-level cache while tiles of rows of x
 * (TILE_ROWS * 2 KiB) pass by. Rows of x and of weights are often a multiple of 4 KiB apart, so that they share cache
 * sets: only the rows of x of one tile must be in the cache at once, and the copies of weights are spread out.
 *
 * WEIGHTS OF 8 BITS are multiplied by their scales where they are widened, in both cases.
 */
#ifndef MARLIN_CY_DENSE_H
#define MARLIN_CY_DENSE_H

#include "norms.h"

enum {
    BLOCK_ROWS = 64,
    BLOCK_COLS = 8 / TILE_COLS * TILE_COLS,
    BLOCK_K = 512,                 /* divides CHUNK_K */
    WIDENED_STRIDE = BLOCK_K + LANES, /* of widened rows of weights, so that they do not share cache sets */
};

/* The operands of a tile. */
typedef struct {
    const float *x;
    ptrdiff_t x_stride;
    const char *w;
    ptrdiff_t w_stride; /* bytes */
    const float *scales; /* of each row of weights of 8 bits, at the first value of K */
    ptrdiff_t scale_stride;
    int64_t scale_left, scale_k; /* values of K of the first scale, and of the next ones */
    float *sums;        /* [rows][cols][LANES] */
    ptrdiff_t sums_stride;
} dense_view;

/* The factor of elements as vec_load_as gives them. `dtype` is a constant. */
KERNEL vec scale_vec(float scale, int dtype) { return vec_set(dtype == DTYPE_F8 ? scale * 256.0f : scale); }

/* Products of LANES values of K from i on. `rows`, `cols` and `dtype` are constants. */
KERNEL void dense_step(vec *sum, const dense_view *view, const vec *scales, int64_t i, int rows, int cols, int dtype)
{
#pragma GCC unroll 2
    for (int part = 0; part < PARTS; part++) {
        vec w[8];
#pragma GCC unroll 8
        for (int c = 0; c < cols; c++) {
            w[c] = vec_load_as(view->w + c * view->w_stride, i + part * VEC_N, dtype);
            if (is_scaled(dtype))
                w[c] = vec_mul(w[c], scales[c]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            vec x = vec_load(view->x + r * view->x_stride + i + part * VEC_N);
            KEEP_VEC(x); /* one load for all columns */
#pragma GCC unroll 8
            for (int c = 0; c < cols; c++) {
                const int s = (r * cols + c) * PARTS + part;
                sum[s] = vec_fma(x, w[c], sum[s]);
            }
        }
    }
}

/* Add the products of k values, a multiple of LANES, to the sums. `rows`, `cols` and `dtype` are constants. */
KERNEL void dense_tile(const dense_view *view, int64_t k, int rows, int cols, int dtype)
{
    vec sum[PARTS * (TILE_ROWS * TILE_COLS > ONE_ROW_COLS ? TILE_ROWS * TILE_COLS : ONE_ROW_COLS)], scales[8];
    const float *scale = view->scales;
    int64_t i = 0, end = is_scaled(dtype) && view->scale_left < k ? view->scale_left : k;
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
        for (int s = 0; s < cols * PARTS; s++)
            sum[r * cols * PARTS + s] = vec_load(view->sums + r * view->sums_stride + s * VEC_N);
    while (i < k) {
        if (is_scaled(dtype))
#pragma GCC unroll 8
            for (int c = 0; c < cols; c++)
                scales[c] = scale_vec(scale[c * view->scale_stride], dtype);
        for (; i < end; i += LANES)
            dense_step(sum, view, scales, i, rows, cols, dtype);
        scale++;
        end = k - i < view->scale_k ? k : i + view->scale_k;
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
        for (int s = 0; s < cols * PARTS; s++)
            vec_store(view->sums + r * view->sums_stride + s * VEC_N, sum[r * cols * PARTS + s]);
}

/* The same for a number of rows and columns that is not a constant: TILE_COLS or 1, or ONE_ROW_COLS with one row. */
KERNEL void dense_tile_of(const dense_view *view, int64_t k, int rows, int cols, int dtype)
{
    if (rows == 1 && cols == ONE_ROW_COLS)
        dense_tile(view, k, 1, ONE_ROW_COLS, dtype);
    else if (rows == 1 && cols == TILE_COLS)
        dense_tile(view, k, 1, TILE_COLS, dtype);
    else if (rows == 1)
        dense_tile(view, k, 1, 1, dtype);
    else if (rows == 2 && cols == TILE_COLS)
        dense_tile(view, k, 2, TILE_COLS, dtype);
    else if (rows == 2)
        dense_tile(view, k, 2, 1, dtype);
    else if (TILE_ROWS >= 3 && rows == 3 && cols == TILE_COLS)
        dense_tile(view, k, 3, TILE_COLS, dtype);
    else if (TILE_ROWS >= 3 && rows == 3)
        dense_tile(view, k, 3, 1, dtype);
    else if (TILE_ROWS >= 4 && cols == TILE_COLS)
        dense_tile(view, k, 4, TILE_COLS, dtype);
    else if (TILE_ROWS >= 4)
        dense_tile(view, k, 4, 1, dtype);
}

TARGET static void add_dense_tile(const dense_view *view, int64_t k, int rows, int cols, int dtype)
{
    switch (dtype) {
    case DTYPE_F32: dense_tile_of(view, k, rows, cols, DTYPE_F32); break;
    case DTYPE_F16: dense_tile_of(view, k, rows, cols, DTYPE_F16); break;
    case DTYPE_BF16: dense_tile_of(view, k, rows, cols, DTYPE_BF16); break;
    case DTYPE_I8: dense_tile_of(view, k, rows, cols, DTYPE_I8); break;
    case DTYPE_F8: dense_tile_of(view, k, rows, cols, DTYPE_F8); break;
    }
}

/* Add the products of the last `count` values of K, fewer than LANES: x and w point to them. */
TARGET static void dense_tail(const dense_view *view, int rows, int cols, int dtype, int count)
{
    for (int r = 0; r < rows; r++) {
        vec x[PARTS], w[PARTS];
        load_tail(x, view->x + r * view->x_stride, count, DTYPE_F32);
        for (int c = 0; c < cols; c++) {
            float *const sums = view->sums + r * view->sums_stride + c * LANES;
            load_tail(w, view->w + c * view->w_stride, count, dtype);
            if (is_scaled(dtype))
                for (int part = 0; part < PARTS; part++)
                    w[part] = vec_mul(w[part], scale_vec(view->scales[c * view->scale_stride], dtype));
            for (int part = 0; part < PARTS; part++)
                vec_store(sums + part * VEC_N, vec_fma(x[part], w[part], vec_load(sums + part * VEC_N)));
        }
    }
}

/* Write the sums of a chunk to the output, or add them to it. The last chunk adds the bias. Columns are `apart`
 * columns of the output apart. */
TARGET static void put_sums(const dense_task *task, const dense_view *view, int64_t row, int64_t col, int64_t apart,
                            int rows, int cols, int first, int last)
{
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) {
            float *const out = task->out + (row + r) * task->out_stride + col + c * apart;
            vec sums[PARTS];
            for (int part = 0; part < PARTS; part++)
                sums[part] = vec_load(view->sums + r * view->sums_stride + c * LANES + part * VEC_N);
            const float total = first ? lanes_sum(sums) : *out + lanes_sum(sums);
            *out = last && task->bias ? total + task->bias[col + c * apart] : total;
        }
}

/* Set the scales of a view whose first values are those at k, of row `col` of the weights on. */
KERNEL void set_scales(dense_view *view, const dense_task *task, int64_t col, int64_t k)
{
    if (!is_scaled(task->dtype))
        return;
    view->scales = task->scales + col * task->scale_stride + k / task->scale_k;
    view->scale_left = task->scale_k - k % task->scale_k;
}

/* Few rows: `cols` outputs of each, `apart` columns apart. */
TARGET static void dense_few(const dense_task *task, int64_t col, int64_t apart, int cols)
{
    const int rows = (int)task->m, element = element_size(task->dtype);
    float sums[LANES * (TILE_ROWS * TILE_COLS > ONE_ROW_COLS ? TILE_ROWS * TILE_COLS : ONE_ROW_COLS)];
    dense_view view = {
        .x = task->x,
        .x_stride = task->x_stride,
        .w = (const char *)task->w + col * task->w_stride * element,
        .w_stride = apart * task->w_stride * element,
        .scale_stride = apart * task->scale_stride,
        .scale_k = task->scale_k,
        .sums = sums,
        .sums_stride = cols * LANES,
    };
    for (int64_t k = 0; k < task->k; k += CHUNK_K) {
        const int last = k + CHUNK_K >= task->k;
        const int64_t size = last ? task->k - k : CHUNK_K, whole = size / LANES * LANES;
        memset(sums, 0, (size_t)(rows * cols) * LANES * sizeof *sums);
        set_scales(&view, task, col, k);
        add_dense_tile(&view, whole, rows, cols, task->dtype);
        view.x += whole;
        view.w += whole * element;
        if (whole < size) {
            set_scales(&view, task, col, k + whole);
            dense_tail(&view, rows, cols, task->dtype, (int)(size - whole));
        }
        put_sums(task, &view, 0, col, apart, rows, cols, k == 0, last);
    }
}

/* Widen n weights of one scale. `dtype` is a constant. */
KERNEL void widen_weights(float *to, const char *from, int64_t n, int dtype, float scale)
{
    const vec scales = scale_vec(scale, dtype);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
#pragma GCC unroll 2
        for (int part = 0; part < PARTS; part++) {
            const vec w = vec_load_as(from, i + part * VEC_N, dtype);
            vec_store(to + i + part * VEC_N, is_scaled(dtype) ? vec_mul(w, scales) : w);
        }
    if (i < n) {
        vec tail[PARTS];
        load_tail(tail, from + i * element_size(dtype), n - i, dtype);
        for (int part = 0; part < PARTS; part++)
            vec_store(to + i + part * VEC_N, is_scaled(dtype) ? vec_mul(tail[part], scales) : tail[part]);
    }
}

/* Widen `size` values of `cols` rows of weights, from `k` on. */
TARGET static void widen_rows(float *widened, const dense_task *task, int64_t col, int cols, int64_t k, int size)
{
    const int element = element_size(task->dtype);
    dense_view view = {.scales = NULL};
    for (int64_t at = k, n; at < k + size; at += n) {
        const char *w = (const char *)task->w + (col * task->w_stride + at) * element;
        float *to = widened + at - k;
        n = k + size - at;
        set_scales(&view, task, col, at);
        if (view.scales && view.scale_left < n)
            n = view.scale_left;
        for (int c = 0; c < cols; c++, w += task->w_stride * element, to += WIDENED_STRIDE)
            switch (task->dtype) {
            case DTYPE_F32: memcpy(to, w, (size_t)n * sizeof *to); break;
            case DTYPE_F16: widen_weights(to, w, n, DTYPE_F16, 1.0f); break;
            case DTYPE_BF16: widen_weights(to, w, n, DTYPE_BF16, 1.0f); break;
            case DTYPE_I8: widen_weights(to, w, n, DTYPE_I8, view.scales[c * task->scale_stride]); break;
            case DTYPE_F8: widen_weights(to, w, n, DTYPE_F8, view.scales[c * task->scale_stride]); break;
            }
    }
}

/* Add `size` products to the sums of `m` rows by `cols` columns. */
TARGET static void dense_block(const dense_view *block, int m, int cols, int size)
{
    const int tiles = (m + TILE_ROWS - 1) / TILE_ROWS, whole = size / LANES * LANES;
    for (int tile = 0; tile < tiles; tile++) {
        const int row = m * tile / tiles, rows = m * (tile + 1) / tiles - row; /* tiles of nearly equal size */
        dense_view view = *block;
        view.x += row * view.x_stride;
        view.sums += row * view.sums_stride;
        for (int c = 0; c + TILE_COLS <= cols; c += TILE_COLS) {
            add_dense_tile(&view, whole, rows, TILE_COLS, DTYPE_F32);
            view.w += TILE_COLS * view.w_stride;
            view.sums += TILE_COLS * LANES;
        }
        for (int c = 0; c < cols % TILE_COLS; c++) {
            add_dense_tile(&view, whole, rows, 1, DTYPE_F32);
            view.w += view.w_stride;
            view.sums += LANES;
        }
    }
    if (whole < size) {
        dense_view tail = *block;
        tail.x += whole;
        tail.w += whole * sizeof(float);
        dense_tail(&tail, m, cols, DTYPE_F32, size - whole);
    }
}

/* More rows: one chunk of K, from `chunk` on, for `cols` outputs, at most BLOCK_COLS, of `rows` rows, at most BLOCK_ROWS.
 */
TARGET static void dense_many(const dense_task *task, int64_t row, int64_t col, int rows, int cols, int64_t chunk)
{
    const int64_t end = task->k - chunk < CHUNK_K ? task->k : chunk + CHUNK_K;
    float sums[BLOCK_ROWS * BLOCK_COLS * LANES], widened[BLOCK_COLS * WIDENED_STRIDE];
    dense_view view = {
        .x_stride = task->x_stride,
        .w = (const char *)widened,
        .w_stride = WIDENED_STRIDE * sizeof *widened,
        .sums = sums,
        .sums_stride = BLOCK_COLS * LANES,
    };
    memset(sums, 0, (size_t)rows * BLOCK_COLS * LANES * sizeof *sums);
    for (int64_t k = chunk; k < end; k += BLOCK_K) {
        const int size = end - k < BLOCK_K ? (int)(end - k) : BLOCK_K;
        widen_rows(widened, task, col, cols, k, size);
        view.x = task->x + row * task->x_stride + k;
        dense_block(&view, rows, cols, size);
    }
    put_sums(task, &view, row, col, 1, rows, cols, chunk == 0, end == task->k);
}

/* A chunk of BLOCK_ROWS rows of x (256 KiB) stays in the second-level cache for all columns. */
TARGET static void dense_rows(const dense_task *task, int64_t row, int rows)
{
    for (int64_t chunk = 0; chunk < task->k; chunk += CHUNK_K)
        for (int64_t col = 0; col < task->n; col += BLOCK_COLS)
            dense_many(task, row, col, rows, task->n - col < BLOCK_COLS ? (int)(task->n - col) : BLOCK_COLS, chunk);
}

TARGET static void dense(const dense_task *task)
{
    int64_t col = 0;
    if (task->m > TILE_ROWS) {
        for (int64_t row = 0; row < task->m; row += BLOCK_ROWS)
            dense_rows(task, row, task->m - row < BLOCK_ROWS ? (int)(task->m - row) : BLOCK_ROWS);
        return;
    }
    const int cols = task->m == 1 ? ONE_ROW_COLS : TILE_COLS;
    const int64_t apart = task->n / cols;
    for (; col < apart; col++)
        dense_few(task, col, apart, cols);
    for (col = apart * cols; col < task->n; col++)
        dense_few(task, col, 1, 1);
}

#define DENSE_KERNELS .dense = dense

#endif
