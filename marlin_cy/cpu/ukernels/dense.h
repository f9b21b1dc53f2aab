/* Dense products, over the vectors of a vec_*.h. The including file defines KERNEL, TARGET and the tiles:
 *
 *   ONE_ROW_COLS           rows of weights that one row of x is multiplied by at once
 *   TILE_ROWS, TILE_COLS   rows of x by rows of weights of a tile
 *
 * A tile keeps PARTS vectors of sums for each of its outputs, its rows of weights in one vector each, and one vector
 * of x.
 */
#ifndef MARLIN_CY_DENSE_H
#define MARLIN_CY_DENSE_H

#include "norms.h"

/* A tile's operands, and how far its loops go. */
typedef struct {
    const float *x;
    ptrdiff_t x_stride;
    const char *w;
    ptrdiff_t w_stride; /* bytes */
    ptrdiff_t ahead;    /* bytes from a weight to what is prefetched with it; 0: nothing */
    int64_t k;          /* at most CHUNK_K */
} dense_view;

/* total[r][c] = the sum of a chunk. `rows`, `cols` and `dtype` are constants. */
KERNEL void dense_chunk(float *total, const dense_view *view, int rows, int cols, int dtype)
{
    enum { MOST = TILE_ROWS * TILE_COLS > ONE_ROW_COLS ? TILE_ROWS * TILE_COLS : ONE_ROW_COLS };
    const int element = dtype == DTYPE_F32 ? 4 : 2;
    vec sum[MOST][PARTS];
    int64_t i = 0;
#pragma GCC unroll 32
    for (int o = 0; o < rows * cols; o++)
#pragma GCC unroll 2
        for (int part = 0; part < PARTS; part++)
            sum[o][part] = vec_set(0.0f);
    for (; i + LANES <= view->k; i += LANES) {
#pragma GCC unroll 2
        for (int part = 0; part < PARTS; part++) {
            vec w[TILE_COLS > ONE_ROW_COLS ? TILE_COLS : ONE_ROW_COLS];
#pragma GCC unroll 8
            for (int c = 0; c < cols; c++)
                w[c] = vec_load_as(view->w + c * view->w_stride, i + part * VEC_N, dtype);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                const vec x = vec_load(view->x + r * view->x_stride + i + part * VEC_N);
#pragma GCC unroll 8
                for (int c = 0; c < cols; c++)
                    sum[r * cols + c][part] = vec_fma(x, w[c], sum[r * cols + c][part]);
            }
        }
        if (rows == 1)
#pragma GCC unroll 8
            for (int c = 0; c < cols; c++)
                PREFETCH(view->w + c * view->w_stride + i * element + view->ahead, _MM_HINT_T0);
    }
    if (i < view->k) {
        vec x[PARTS], w[PARTS];
        for (int r = 0; r < rows; r++) {
            load_tail(x, view->x + r * view->x_stride + i, view->k - i, DTYPE_F32);
            for (int c = 0; c < cols; c++) {
                load_tail(w, view->w + c * view->w_stride + i * element, view->k - i, dtype);
                for (int part = 0; part < PARTS; part++)
                    sum[r * cols + c][part] = vec_fma(x[part], w[part], sum[r * cols + c][part]);
            }
        }
    }
#pragma GCC unroll 32
    for (int o = 0; o < rows * cols; o++)
        total[o] = lanes_sum(sum[o]);
}

/* Write a chunk's totals of a tile to the output, or add them to it; the last chunk adds the bias. */
KERNEL void put_totals(const dense_task *task, const float *total, int64_t row, int64_t col, int rows, int cols,
                       int first, int last)
{
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++) {
            float *const out = task->out + (row + r) * task->out_stride + col + c;
            const float sum = first ? total[r * cols + c] : *out + total[r * cols + c];
            *out = last && task->bias ? sum + task->bias[col + c] : sum;
        }
}

/* `cols` outputs of one row, over all of K. */
KERNEL void dense_row(const dense_task *task, int64_t row, int64_t col, int cols, int dtype)
{
    const int element = dtype == DTYPE_F32 ? 4 : 2;
    float total[ONE_ROW_COLS];
    dense_view view = {
        .x = task->x + row * task->x_stride,
        .w = (const char *)task->w + col * task->w_stride * element,
        .w_stride = task->w_stride * element,
        .ahead = ONE_ROW_COLS * task->w_stride * element,
    };
    for (int64_t k = 0; k < task->k; k += CHUNK_K) {
        view.k = task->k - k < CHUNK_K ? task->k - k : CHUNK_K;
        dense_chunk(total, &view, 1, cols, dtype);
        put_totals(task, total, row, col, 1, cols, k == 0, k + CHUNK_K >= task->k);
        view.x += CHUNK_K;
        view.w += CHUNK_K * element;
    }
}

/* All rows by `cols` rows of weights, which are widened to float32 chunk by chunk. */
KERNEL void dense_panel(const dense_task *task, int64_t col, int cols, int dtype)
{
    const int element = dtype == DTYPE_F32 ? 4 : 2;
    float widened[TILE_COLS * CHUNK_K], total[TILE_ROWS * TILE_COLS];
    for (int64_t k = 0; k < task->k; k += CHUNK_K) {
        const int first = k == 0, last = k + CHUNK_K >= task->k;
        const int64_t size = last ? task->k - k : CHUNK_K;
        dense_view view = {.x = task->x + k, .x_stride = task->x_stride, .k = size};
        view.w = (const char *)task->w + (col * task->w_stride + k) * element;
        view.w_stride = task->w_stride * element;
        if (dtype != DTYPE_F32) {
            for (int c = 0; c < cols; c++) {
                const char *const from = view.w + c * view.w_stride;
                int64_t i = 0;
                for (; i + LANES <= size; i += LANES)
                    for (int part = 0; part < PARTS; part++)
                        vec_store(widened + c * CHUNK_K + i + part * VEC_N, vec_load_as(from, i + part * VEC_N, dtype));
                if (i < size) {
                    vec tail[PARTS];
                    load_tail(tail, from + i * element, size - i, dtype);
                    for (int part = 0; part < PARTS; part++)
                        vec_store(widened + c * CHUNK_K + i + part * VEC_N, tail[part]);
                }
            }
            view.w = (const char *)widened;
            view.w_stride = CHUNK_K * sizeof(float);
        }
        int64_t row = 0;
        for (; row + TILE_ROWS <= task->m; row += TILE_ROWS, view.x += TILE_ROWS * task->x_stride) {
            dense_chunk(total, &view, TILE_ROWS, cols, DTYPE_F32);
            put_totals(task, total, row, col, TILE_ROWS, cols, first, last);
        }
        for (; row < task->m; row++, view.x += task->x_stride) {
            dense_chunk(total, &view, 1, cols, DTYPE_F32);
            put_totals(task, total, row, col, 1, cols, first, last);
        }
    }
}

KERNEL void dense_by(const dense_task *task, int dtype)
{
    int64_t col = 0;
    if (task->m == 1) {
        for (; col + ONE_ROW_COLS <= task->n; col += ONE_ROW_COLS)
            dense_row(task, 0, col, ONE_ROW_COLS, dtype);
        for (; col < task->n; col++)
            dense_row(task, 0, col, 1, dtype);
        return;
    }
    for (; col + TILE_COLS <= task->n; col += TILE_COLS)
        dense_panel(task, col, TILE_COLS, dtype);
    for (; col < task->n; col++)
        dense_panel(task, col, 1, dtype);
}

TARGET static void dense(const dense_task *task)
{
    switch (task->dtype) {
    case DTYPE_F32: dense_by(task, DTYPE_F32); break;
    case DTYPE_F16: dense_by(task, DTYPE_F16); break;
    case DTYPE_BF16: dense_by(task, DTYPE_BF16); break;
    }
}

#define DENSE_KERNELS .dense = dense

#endif
