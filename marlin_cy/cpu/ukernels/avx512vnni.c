/* AVX-512 with VNNI: a tile is one 512-bit vector of 16 lanes, a lane a column; both tiles of a task
 * are worked on together, so that each broadcast activation is used twice.
 *
 * Registers, of 32: `rows * planes` (8) times two tiles of 32-bit sums, 4 weights, mask, activation.
 * Twelve times two would fit by count, but the compilers spill them, and the gain is small: with 8 the
 * unpacked inner loop does 16 vpdpbusd for 10 loads.
 */
#include "ukernel.h"

#ifdef MARLIN_CY_X86
#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")))
#define KERNEL \
    static inline __attribute__((always_inline, target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")))

enum {
    PLANE_ROWS = 8,
    UNPACKED_BLOCK = 4 * BLOCK_BYTES, /* per block: (values 0-3, tile 0), (0-3, tile 1), (4-7, 0), (4-7, 1) */
    PREFETCH_BYTES = 2048,            /* ahead in each of the two streams; 1024 reads 3% less, 4096 no more, none 15% less */
};

typedef struct {
    const uint8_t *packed[2]; /* blocks of this group, per tile */
    const uint8_t *unpacked;  /* the same as bytes, both tiles */
    int blocks;
    const int8_t *a;
    const act_meta *meta;
    int g;
    __m512 scale[2];
    __m512i minus_zero[2]; /* pairs (-zero, -256 * zero), the factor that act_meta.sum_split is made for */
} group_view;

/* Pins a sum to its register: without it GCC copies sums around the loop and stores some of them. */
#define KEEP(sum) __asm__("" : "+v"(sum))

KERNEL __m512i broadcast_quad(const int8_t *a)
{
    int32_t quad;
    memcpy(&quad, a, sizeof quad);
    return _mm512_set1_epi32(quad);
}

KERNEL void load_header(group_view *view, int t, const uint8_t *header)
{
    view->scale[t] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)header));
    const __m512i zero = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(header + 2 * TILE_N)));
    const __m512i minus = _mm512_sub_epi32(_mm512_setzero_si512(), zero);
    view->minus_zero[t] = _mm512_mask_blend_epi16(0xaaaaaaaa, minus, _mm512_slli_epi32(minus, 24));
}

KERNEL void unpack_group(uint8_t *w, const uint8_t *const packed[2], int blocks, int tiles)
{
    const __m512i mask = _mm512_set1_epi8(15);
    for (int b = 0; b < blocks; b++, w += UNPACKED_BLOCK)
        for (int t = 0; t < tiles; t++) {
            const __m512i both = _mm512_load_si512(packed[t] + b * BLOCK_BYTES);
            _mm_prefetch((const char *)packed[t] + b * BLOCK_BYTES + PREFETCH_BYTES, _MM_HINT_T0);
            _mm512_store_si512(w + t * BLOCK_BYTES, _mm512_and_si512(both, mask));
            _mm512_store_si512(w + (2 + t) * BLOCK_BYTES, _mm512_and_si512(_mm512_srli_epi16(both, 4), mask));
        }
}

/* The weights of one block as bytes: w[values 0-3 or 4-7][tile]. */
KERNEL void load_block(__m512i w[2][2], const group_view *view, int b, int tiles, int packed)
{
    const __m512i mask = _mm512_set1_epi8(15);
    for (int t = 0; t < tiles; t++) {
        if (packed) {
            const __m512i both = _mm512_load_si512(view->packed[t] + b * BLOCK_BYTES);
            _mm_prefetch((const char *)view->packed[t] + b * BLOCK_BYTES + PREFETCH_BYTES, _MM_HINT_T0);
            w[0][t] = _mm512_and_si512(both, mask);
            w[1][t] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
        } else {
            w[0][t] = _mm512_load_si512(view->unpacked + b * UNPACKED_BLOCK + t * BLOCK_BYTES);
            w[1][t] = _mm512_load_si512(view->unpacked + b * UNPACKED_BLOCK + (2 + t) * BLOCK_BYTES);
        }
    }
}

/* rows, planes, tiles and packed are constants wherever this is inlined. */
KERNEL void micro_kernel(const gemm_task *task, const group_view *view, int row, int rows, int planes, int tiles,
                         int packed)
{
    const int8_t *a[PLANE_ROWS];
    __m512i sum[PLANE_ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        a[r] = view->a + task->rows[row + r] * task->a_row_stride;
#pragma GCC unroll 8
    for (int i = 0; i < rows * planes; i++)
        for (int t = 0; t < tiles; t++)
            sum[i][t] = _mm512_setzero_si512();
    for (int block = 0; block < view->blocks; block++) {
        __m512i w[2][2];
        load_block(w, view, block, tiles, packed);
#pragma GCC unroll 2
        for (int quad = 0; quad < 2; quad++)
#pragma GCC unroll 8
            for (int i = 0; i < rows * planes; i++) {
                const int r = i / planes, plane = i % planes;
                const __m512i x = broadcast_quad(a[r] + (block * planes + plane) * BLOCK_K + 4 * quad);
                for (int t = 0; t < tiles; t++) {
                    sum[i][t] = _mm512_dpbusd_epi32(sum[i][t], w[quad][t], x);
                    KEEP(sum[i][t]);
                }
            }
    }
    const int last = view->g == task->num_groups - 1;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        const act_meta *meta = view->meta + task->rows[row + r];
        float *const sums = task->scratch->sums + (row + r) * PAIR_N, *const out = task->out + (row + r) * PAIR_N;
        for (int t = 0; t < tiles; t++) {
            __m512i total = sum[r * planes][t];
            if (planes == 2)
                total = _mm512_add_epi32(_mm512_slli_epi32(total, 8), sum[r * planes + 1][t]);
            total = _mm512_dpwssd_epi32(total, view->minus_zero[t], _mm512_set1_epi32(meta->sum_split));
            const __m512 s = _mm512_mul_ps(_mm512_set1_ps(meta->scale), view->scale[t]);
            const __m512 before = view->g ? _mm512_load_ps(sums + t * TILE_N) : _mm512_setzero_ps();
            __m512 after = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), s, before);
            if (last && task->accumulate)
                after = _mm512_add_ps(_mm512_load_ps(out + t * TILE_N), after);
            _mm512_store_ps((last ? out : sums) + t * TILE_N, after);
        }
    }
}

KERNEL void rows_of_group(const gemm_task *task, const group_view *view, int planes, int tiles, int packed)
{
    const int step = PLANE_ROWS / planes;
    for (int row = 0; row < task->m; row += step) {
        const int rows = task->m - row < step ? task->m - row : step;
        switch (rows) {
        case 1: micro_kernel(task, view, row, 1, planes, tiles, packed); break;
        case 2: micro_kernel(task, view, row, 2, planes, tiles, packed); break;
        case 3: micro_kernel(task, view, row, 3, planes, tiles, packed); break;
        case 4: micro_kernel(task, view, row, 4, planes, tiles, packed); break;
        case 5: if (step >= 5) micro_kernel(task, view, row, 5, planes, tiles, packed); break;
        case 6: if (step >= 6) micro_kernel(task, view, row, 6, planes, tiles, packed); break;
        case 7: if (step >= 7) micro_kernel(task, view, row, 7, planes, tiles, packed); break;
        case 8: if (step >= 8) micro_kernel(task, view, row, 8, planes, tiles, packed); break;
        }
    }
}

KERNEL void gemm_tiles(const gemm_task *task, int planes, int tiles)
{
    group_view view = {
        .packed = {task->body[0], task->body[1]},
        .unpacked = task->scratch->weights,
        .a = task->a,
        .meta = task->meta,
    };
    for (view.g = 0; view.g < task->num_groups; view.g++) {
        view.blocks = view.g < task->num_groups - 1 ? task->group_blocks : task->last_group_blocks;
        for (int t = 0; t < tiles; t++)
            load_header(&view, t, task->header[t] + view.g * GROUP_HEADER_BYTES);
        if (task->m * planes <= PLANE_ROWS) {
            rows_of_group(task, &view, planes, tiles, 1);
        } else {
            unpack_group(task->scratch->weights, view.packed, view.blocks, tiles);
            rows_of_group(task, &view, planes, tiles, 0);
        }
        for (int t = 0; t < tiles; t++)
            view.packed[t] += view.blocks * BLOCK_BYTES;
        view.a += task->a_group_stride;
        view.meta += task->meta_group_stride;
    }
}

KERNEL void gemm(const gemm_task *task, int planes)
{
    if (task->header[1])
        gemm_tiles(task, planes, 2);
    else
        gemm_tiles(task, planes, 1);
}

TARGET static void gemm_i16(const gemm_task *task) { gemm(task, 2); }

TARGET static void gemm_i8(const gemm_task *task) { gemm(task, 1); }

const ukernel_table ukernels_avx512vnni = {.name = "avx512vnni", .gemm_i16 = gemm_i16, .gemm_i8 = gemm_i8};
#endif
