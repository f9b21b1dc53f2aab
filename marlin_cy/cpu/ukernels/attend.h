/* Attention over one chunk of a paged cache, over the vectors of a vec_*.h. The including file defines KERNEL, TARGET,
 * ROWOPS and the tiles:
 *
 *   QUERY_TILE   most queries of a tile: 2, 6 or 8
 *   TILE_SUMS    vectors of sums that a tile keeps in registers: QUERY_TILE * PARTS at least
 *
 * A tile of scores is queries by pages: a page's scores of one query are PARTS vectors, and each value of a query is
 * broadcast. A tile of values is queries by columns, and each weight e[p] is broadcast. With few queries, a tile has
 * more pages or more columns, so that enough independent sums hide the latency of a multiply-add.
 *
 * With more than WIDE_TILES tiles of queries, each page is widened to float32 once, in the scratch memory. With fewer,
 * each tile widens it in registers.
 */
#ifndef MARLIN_CY_ATTEND_H
#define MARLIN_CY_ATTEND_H

#include "activate.h"

enum {
    WIDE_TILES = 2,
    TILE_PAGES = TILE_SUMS / (QUERY_TILE * PARTS), /* pages of a tile of scores, with several tiles of queries */
};

/* Vectors of one query in a tile. */
KERNEL int vecs_per_query(int queries)
{
    return 8 * queries <= TILE_SUMS ? 8 : 4 * queries <= TILE_SUMS ? 4 : 2 * queries <= TILE_SUMS ? 2 : PARTS;
}

/* Call KERNEL `function` with a constant number of queries, 1 to QUERY_TILE, and a constant dtype. */
#define CASE(number, dtype, function, ...) \
    case number: function(number, dtype, __VA_ARGS__); break;
#if QUERY_TILE >= 6
#define CASES_TO_6(dtype, function, ...)  \
    CASE(3, dtype, function, __VA_ARGS__) \
    CASE(4, dtype, function, __VA_ARGS__) \
    CASE(5, dtype, function, __VA_ARGS__) \
    CASE(6, dtype, function, __VA_ARGS__)
#else
#define CASES_TO_6(dtype, function, ...)
#endif
#if QUERY_TILE >= 8
#define CASES_TO_8(dtype, function, ...)  \
    CASE(7, dtype, function, __VA_ARGS__) \
    CASE(8, dtype, function, __VA_ARGS__)
#else
#define CASES_TO_8(dtype, function, ...)
#endif
#define BY_QUERIES(queries, dtype, function, ...) \
    switch (queries) {                            \
        CASE(1, dtype, function, __VA_ARGS__)     \
        CASE(2, dtype, function, __VA_ARGS__)     \
        CASES_TO_6(dtype, function, __VA_ARGS__)  \
        CASES_TO_8(dtype, function, __VA_ARGS__)  \
    }
#define BY_QUERIES_AND_DTYPE(queries, dtype, function, ...)                        \
    switch (dtype) {                                                               \
    case DTYPE_F32: BY_QUERIES(queries, DTYPE_F32, function, __VA_ARGS__) break;   \
    case DTYPE_F16: BY_QUERIES(queries, DTYPE_F16, function, __VA_ARGS__) break;   \
    case DTYPE_BF16: BY_QUERIES(queries, DTYPE_BF16, function, __VA_ARGS__) break; \
    }

/* Scores of `queries` queries from `query` on and `pages` pages from `page` on; keys are the pages' addresses.
 * `queries`, `pages` and `dtype` are constants. */
KERNEL void score_tile(int queries, int dtype, const attention_task *task, const char *const *keys, int query, int page,
                       int pages)
{
    vec sum[TILE_SUMS];
    const float *const q = task->q + query * task->q_stride;
#pragma GCC unroll 32
    for (int s = 0; s < queries * pages * PARTS; s++)
        sum[s] = vec_set(0.0f);
    for (int i = 0; i < task->d; i++) {
#pragma GCC unroll 8
        for (int g = 0; g < pages; g++) {
            vec key[PARTS];
#pragma GCC unroll 2
            for (int part = 0; part < PARTS; part++)
                key[part] = vec_load_as(keys[g], (int64_t)i * KV_BLOCK + part * VEC_N, dtype);
#pragma GCC unroll 8
            for (int r = 0; r < queries; r++) {
                const vec x = vec_set(q[r * task->q_stride + i]);
#pragma GCC unroll 2
                for (int part = 0; part < PARTS; part++) {
                    const int s = (r * pages + g) * PARTS + part;
                    sum[s] = vec_fma(x, key[part], sum[s]);
                }
            }
        }
    }
    const vec scale = vec_set(task->scale);
#pragma GCC unroll 8
    for (int r = 0; r < queries; r++)
#pragma GCC unroll 16
        for (int s = 0; s < pages * PARTS; s++)
            vec_store(task->scratch->scores[query + r] + page * KV_BLOCK + s * VEC_N,
                      vec_mul(scale, sum[r * pages * PARTS + s]));
}

/* Add `vecs` vectors of columns of the visible positions begin to end - 1 of a page. All but query, page, column, begin
 * and end are constants. */
KERNEL void value_columns(int queries, int dtype, const attention_task *task, const char *values, int query, int page,
                          int begin, int end, int column, int vecs)
{
    vec sum[TILE_SUMS];
    float *const out = task->out + query * task->out_stride + column;
    const float *const weights = task->scratch->scores[query] + page * KV_BLOCK;
#pragma GCC unroll 8
    for (int r = 0; r < queries; r++)
#pragma GCC unroll 8
        for (int c = 0; c < vecs; c++)
            sum[r * vecs + c] = vec_load(out + r * task->out_stride + c * VEC_N);
    for (int p = begin; p < end; p++) {
        vec value[8];
#pragma GCC unroll 8
        for (int c = 0; c < vecs; c++)
            value[c] = vec_load_as(values, (int64_t)p * task->dv + column + c * VEC_N, dtype);
#pragma GCC unroll 8
        for (int r = 0; r < queries; r++) {
            const vec weight = vec_set(weights[r * ATTENTION_CHUNK + p]);
#pragma GCC unroll 8
            for (int c = 0; c < vecs; c++)
                sum[r * vecs + c] = vec_fma(weight, value[c], sum[r * vecs + c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < queries; r++)
#pragma GCC unroll 8
        for (int c = 0; c < vecs; c++)
            vec_store(out + r * task->out_stride + c * VEC_N, sum[r * vecs + c]);
}

/* The same for all columns. `queries` and `dtype` are constants. */
KERNEL void value_tile(int queries, int dtype, const attention_task *task, const char *values, int query, int page,
                       int begin, int end)
{
    const int vecs = vecs_per_query(queries);
    int column = 0;
    for (; column + vecs * VEC_N <= task->dv; column += vecs * VEC_N)
        value_columns(queries, dtype, task, values, query, page, begin, end, column, vecs);
    for (; column < task->dv; column += LANES)
        value_columns(queries, dtype, task, values, query, page, begin, end, column, PARTS);
}

/* Visible positions of a page, of one query: begin to end - 1, none if begin >= end. */
KERNEL void visible_in_page(const attention_task *task, int query, int page, int *begin, int *end)
{
    *begin = task->begin[query] - page * KV_BLOCK;
    *end = task->end[query] - page * KV_BLOCK;
    *begin = *begin < 0 ? 0 : *begin;
    *end = *end > KV_BLOCK ? KV_BLOCK : *end;
}

TARGET static void add_values(const attention_task *task, const char *values, int dtype, int query, int queries,
                              int page, int begin, int end)
{
    if (begin < end)
        BY_QUERIES_AND_DTYPE(queries, dtype, value_tile, task, values, query, page, begin, end)
}

/* Values of one page for a tile of queries. Positions that all of them see are done together. The positions of the page
 * before and after these are done query by query. */
TARGET static void values_of_page(const attention_task *task, const char *values, int dtype, int query, int queries,
                                  int page)
{
    int first = 0, last = KV_BLOCK, begin, end;
    for (int r = query; r < query + queries; r++) {
        visible_in_page(task, r, page, &begin, &end);
        first = begin > first ? begin : first;
        last = end < last ? end : last;
    }
    if (first >= last)
        first = last = KV_BLOCK; /* query by query only */
    for (int r = query; r < query + queries && first > 0; r++) {
        visible_in_page(task, r, page, &begin, &end);
        add_values(task, values, dtype, r, 1, page, begin, end < first ? end : first);
    }
    add_values(task, values, dtype, query, queries, page, first, last);
    for (int r = query; r < query + queries && last < KV_BLOCK; r++) {
        visible_in_page(task, r, page, &begin, &end);
        add_values(task, values, dtype, r, 1, page, begin > last ? begin : last, end);
    }
}

KERNEL void widen_page(float *to, const char *page, int dtype, int n)
{
    for (int i = 0; i < n; i += VEC_N)
        vec_store(to + i, vec_load_as(page, i, dtype));
}

/* A page of n values, a multiple of LANES, as float32: at `place` of the scratch memory if it is not float32 already. */
TARGET static const char *page_as_float(const attention_task *task, const char *page, int n, int place)
{
    float *const widened = task->scratch->page + place * n;
    switch (task->dtype) {
    case DTYPE_F32: return page;
    case DTYPE_F16: widen_page(widened, page, DTYPE_F16, n); break;
    case DTYPE_BF16: widen_page(widened, page, DTYPE_BF16, n); break;
    }
    return (const char *)widened;
}

/* Pages of the chunk that a query sees: all of them are among begin to end - 1. */
typedef struct {
    int begin, end;
    char page[CHUNK_PAGES];
} seen_pages;

/* Queries are cut into tiles of nearly equal size. */
KERNEL int num_tiles(const attention_task *task) { return (task->m + QUERY_TILE - 1) / QUERY_TILE; }

KERNEL int first_query(const attention_task *task, int tile) { return task->m * tile / num_tiles(task); }

KERNEL void score_pages(int queries, int dtype, const attention_task *task, const char *const *keys, int *page, int end)
{
    const int pages = vecs_per_query(queries) / PARTS;
    for (; *page + pages <= end; *page += pages)
        score_tile(queries, dtype, task, keys + *page, 0, *page, pages);
}

TARGET static void add_scores(const attention_task *task, const char *key, int dtype, int query, int end, int page)
{
    BY_QUERIES_AND_DTYPE(end - query, dtype, score_tile, task, &key, query, page, 1);
}

/* Scores of TILE_PAGES pages from `page` on. */
TARGET static void add_scores_of_pages(const attention_task *task, const char *const *keys, int dtype, int query,
                                       int end, int page)
{
    BY_QUERIES_AND_DTYPE(end - query, dtype, score_tile, task, keys, query, page, TILE_PAGES);
}

/* Scores of all queries. Pages that no query sees lie between others at most if the queries see different parts of the
 * chunk. They get the scores of another page, which are not used. */
TARGET static void score_queries(const attention_task *task, const seen_pages *seen)
{
    const int tiles = num_tiles(task), widen = tiles > WIDE_TILES;
    const char *keys[CHUNK_PAGES];
    int page = seen->begin;
    for (int g = seen->begin, last = seen->begin; g < seen->end; g++) {
        last = seen->page[g] ? g : last;
        keys[g] = task->keys + task->pages[last] * task->key_stride;
    }
    if (tiles == 1)
        BY_QUERIES_AND_DTYPE(task->m, task->dtype, score_pages, task, keys, &page, seen->end)
    const int grouped = TILE_PAGES > 1 && TILE_PAGES * task->d <= MAX_HEAD_DIM; /* they fit the scratch memory */
    for (; grouped && page + TILE_PAGES <= seen->end; page += TILE_PAGES) {
        const char *group[TILE_PAGES];
        for (int g = 0; g < TILE_PAGES; g++)
            group[g] = widen ? page_as_float(task, keys[page + g], task->d * KV_BLOCK, g) : keys[page + g];
        for (int tile = 0; tile < tiles; tile++)
            add_scores_of_pages(task, group, widen ? DTYPE_F32 : task->dtype, first_query(task, tile),
                                first_query(task, tile + 1), page);
    }
    for (; page < seen->end; page++) {
        const char *const key = widen ? page_as_float(task, keys[page], task->d * KV_BLOCK, 0) : keys[page];
        for (int tile = 0; tile < tiles; tile++)
            add_scores(task, key, widen ? DTYPE_F32 : task->dtype, first_query(task, tile), first_query(task, tile + 1),
                       page);
    }
}

/* Turn the scores of one query into weights, and set its max and sum. */
ROWOPS void softmax_scores(const attention_task *task, int query)
{
    const int begin = task->begin[query], end = task->end[query];
    float *const s = task->scratch->scores[query];
    task->max[query] = -INFINITY;
    task->sum[query] = 0.0f;
    if (begin >= end)
        return;
    /* Whole pages from here on: invisible positions have no part in the maximum, and the weight 0. */
    const int first = begin / KV_BLOCK * KV_BLOCK, last = (end + KV_BLOCK - 1) / KV_BLOCK * KV_BLOCK;
    if (task->soft_cap != 0.0f)
        for (int p = first; p < last; p++)
            s[p] = task->soft_cap * tanh_f32(s[p] / task->soft_cap);
    for (int p = first; p < begin; p++)
        s[p] = -INFINITY;
    for (int p = end; p < last; p++)
        s[p] = -INFINITY;
    float lane[LANES], largest;
    vec max[PARTS], sum[PARTS];
    for (int part = 0; part < PARTS; part++) {
        max[part] = vec_set(-INFINITY);
        sum[part] = vec_set(0.0f);
    }
    for (int p = first; p < last; p += LANES)
        for (int part = 0; part < PARTS; part++)
            max[part] = vec_max(max[part], vec_load(s + p + part * VEC_N));
    for (int part = 0; part < PARTS; part++)
        vec_store(lane + part * VEC_N, max[part]);
    largest = lane[0];
    for (int l = 1; l < LANES; l++)
        largest = largest > lane[l] ? largest : lane[l];
    for (int p = first; p < last; p++)
        s[p] = exp_or_nan(s[p] - largest);
    for (int p = first; p < begin; p++)
        s[p] = 0.0f;
    for (int p = end; p < last; p++)
        s[p] = 0.0f;
    for (int p = first; p < last; p += LANES)
        for (int part = 0; part < PARTS; part++)
            sum[part] = vec_add(sum[part], vec_load(s + p + part * VEC_N));
    task->sum[query] = lanes_sum(sum);
    task->max[query] = task->sum[query] == task->sum[query] ? largest : NAN;
}

/* Weighted values of all queries. */
TARGET static void add_all_values(const attention_task *task, const seen_pages *seen)
{
    const int tiles = num_tiles(task), widen = tiles > WIDE_TILES;
    for (int page = seen->begin; page < seen->end; page++) {
        if (!seen->page[page])
            continue;
        const char *values = task->values + task->pages[page] * task->value_stride;
        if (widen)
            values = page_as_float(task, values, task->dv * KV_BLOCK, 0);
        for (int tile = 0; tile < tiles; tile++) {
            const int query = first_query(task, tile);
            values_of_page(task, values, widen ? DTYPE_F32 : task->dtype, query, first_query(task, tile + 1) - query,
                           page);
        }
    }
}

TARGET static void attention(const attention_task *task)
{
    seen_pages seen = {.begin = CHUNK_PAGES};
    for (int r = 0; r < task->m; r++) {
        const int begin = task->begin[r] / KV_BLOCK, end = (task->end[r] + KV_BLOCK - 1) / KV_BLOCK;
        memset(task->out + r * task->out_stride, 0, (size_t)task->dv * sizeof *task->out);
        if (task->begin[r] >= task->end[r])
            continue;
        memset(seen.page + begin, 1, (size_t)(end - begin));
        seen.begin = begin < seen.begin ? begin : seen.begin;
        seen.end = end > seen.end ? end : seen.end;
    }
    score_queries(task, &seen);
    for (int r = 0; r < task->m; r++)
        softmax_scores(task, r);
    add_all_values(task, &seen);
    for (int r = 0; r < task->m; r++)
        for (int c = 0; task->sum[r] != task->sum[r] && c < task->dv; c++)
            task->out[r * task->out_stride + c] = NAN;
}

/* The larger maximum; NaN if either is. */
ROWOPS float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }

TARGET static void attention_merge(float *max, float *sum, float *out, float max2, float sum2, const float *out2,
                                   int64_t n)
{
    if (sum2 == 0.0f)
        return;
    if (*sum == 0.0f) {
        *max = max2;
        *sum = sum2;
        memcpy(out, out2, (size_t)n * sizeof *out);
        return;
    }
    const float larger = max_or_nan(*max, max2), a = exp_or_nan(*max - larger), b = exp_or_nan(max2 - larger);
    *max = larger;
    *sum = fmaf(*sum, a, sum2 * b);
    for (int64_t i = 0; i < n; i++)
        out[i] = fmaf(out[i], a, out2[i] * b);
}

TARGET static void attention_finish(float *out, float max, float sum, const float *sink, int64_t n)
{
    if (sink) {
        const float larger = max_or_nan(max, *sink), a = max == -INFINITY ? 0.0f : exp_or_nan(max - larger);
        sum = fmaf(sum, a, exp_or_nan(*sink - larger));
        for (int64_t i = 0; i < n; i++)
            out[i] = out[i] * a;
    }
    for (int64_t i = 0; i < n; i++)
        out[i] = sum == 0.0f ? 0.0f : out[i] / sum;
}

#define ATTENTION_KERNELS \
    .attention = attention, .attention_merge = attention_merge, .attention_finish = attention_finish

#endif
