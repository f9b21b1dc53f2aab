/* AMX: one TDPBSSD multiplies 16 rows of 64 activations by 64 x 16 weights less their zero points, in 16 cycles.
 *
 * Tile registers, of 8; each is 16 rows of 64 bytes:
 *
 *                 B: tmm6   tmm7      16 quads of K, a row of 16 columns x 4 weights each; tile 0's and tile 1's
 *   A: tmm4       C: tmm0   tmm1      A: 64 values of K, a row of activations each; C: 32-bit sums
 *      tmm5          tmm2   tmm3
 *
 * A step is these four products over a group of K. Its two A are, with one plane, rows 0..15 and 16..31 of the step, and
 * with two the planes of 16 rows. Four sums in turn, because a product that adds to a sum waits for the one before, some
 * 64 cycles; and each B is used twice, because what else there is to do needs the load ports too.
 *
 * That is the float step, for which sums pass through memory to vector registers, and unpacking. Neither waits for what
 * has just been multiplied, and both go in small portions between the products of a step, so that vector and matrix
 * units work at the same time: while a step multiplies, the sums of the step before are stored, of those stored
 * during that one the float steps are done, and a part of the next group is unpacked.
 *
 * Rows that do not fill a tile are made to: the last 16 rows of a task overlap the ones before, and float steps skip
 * those that have been done.
 */
#include "ukernel.h"

#ifdef MARLIN_CY_AMX
#include <string.h>

#include "zmm.h"

#define TARGET __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")))
#define KERNEL \
    static inline __attribute__((         \
        always_inline, target("amx-tile,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")))

enum {
    REGISTER_ROWS = 16, /* fewer are left to AVX-512, which unpacks weights on the way to its products */
    SCALES = 4, /* groups whose scales are kept: float steps of the two before are yet to come while one is prepared */
    SUMS = REGISTER_ROWS * TILE_N, /* of a tile register */
    TILE_PRODUCTS = 2 * SUMS, /* of a step, in each tile of the weights */
    TILE_WEIGHTS = MAX_GROUP_K * TILE_N,
};

/* The operand of ldtilecfg. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16]; /* by register; there are 8 */
    uint8_t rows[16];
} tile_config;

/* The compilers' tile loads do not say that they read memory: what has been stored must stay before them. */
#define COMPILER_BARRIER() __asm__ volatile("" ::: "memory")

KERNEL void configure(int k)
{
    tile_config config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.rows[i] = (uint8_t)(i < 6 ? REGISTER_ROWS : k / 4);
        config.row_bytes[i] = (uint16_t)(i == 4 || i == 5 ? k : 4 * TILE_N);
    }
    COMPILER_BARRIER();
    _tile_loadconfig(&config);
}

/* A group of a task. */
typedef struct {
    int8_t *weights; /* less zero points: quads of K, each of 16 columns; TILE_WEIGHTS further those of tile 1 */
    __m512 *scale;   /* per tile */
    int size;        /* values of K */
    const int8_t *a; /* of the task's first row */
    const act_meta *meta;
} group_view;

/* A group's weights and scales take turns with those of other groups. */
KERNEL group_view view_group(const gemm_task *task, __m512 scales[SCALES][2], int g)
{
    const int blocks = g < task->num_groups - 1 ? task->group_blocks : task->last_group_blocks;
    return (group_view){
        .weights = (int8_t *)task->scratch->weights + g % 2 * 2 * TILE_WEIGHTS,
        .scale = scales[g % SCALES],
        .size = blocks * BLOCK_K,
        .a = task->a + g * task->a_group_stride + task->rows[0] * task->a_row_stride,
        .meta = task->meta + g * task->meta_group_stride + task->rows[0],
    };
}

/* What is left to unpack of a group. */
typedef struct {
    const uint8_t *packed[2], *ahead[2]; /* per tile */
    int8_t *weights;
    __m512i zeros[2]; /* each four times in a lane */
    int blocks;       /* left, of each tile */
} unpacking;

KERNEL unpacking begin_unpacking(const gemm_task *task, const group_view *view, int g, int tiles, int codes)
{
    const ptrdiff_t begin = (ptrdiff_t)g * task->group_blocks * BLOCK_BYTES, bytes = task_bytes(task);
    const ptrdiff_t ahead = begin + PREFETCH_FAR;
    unpacking left = {.weights = view->weights, .blocks = view->size / BLOCK_K};
    for (int t = 0; t < tiles; t++) {
        const uint8_t *const header = task->header[t] + g * GROUP_HEADER_BYTES;
        view->scale[t] = load_scales(header, task->scale_dtype, codes);
        left.zeros[t] = _mm512_mullo_epi32(load_zeros(header), _mm512_set1_epi32(0x01010101));
        left.packed[t] = task->body[t] + begin;
        left.ahead[t] = ahead < bytes ? task->body[t] + ahead : task->next[t] + (ahead - bytes);
    }
    return left;
}

/* A block is two quads of K. */
KERNEL void unpack_blocks(unpacking *left, int most, int tiles, int codes)
{
    const __m512i mask = _mm512_set1_epi8(15);
    const int blocks = left->blocks < most ? left->blocks : most;
    for (int b = 0; b < blocks; b++)
        for (int t = 0; t < tiles; t++) {
            const __m512i both = _mm512_load_si512(left->packed[t] + b * BLOCK_BYTES);
            _mm_prefetch((const char *)left->ahead[t] + b * BLOCK_BYTES, _MM_HINT_T1);
            _mm_prefetch((const char *)left->packed[t] + b * BLOCK_BYTES + PREFETCH_NEAR, _MM_HINT_T0);
            const __m512i low = _mm512_and_si512(both, mask), high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
            int8_t *const w = left->weights + t * TILE_WEIGHTS + 2 * b * BLOCK_BYTES;
            _mm512_store_si512(w, _mm512_sub_epi8(weights_of(low, codes), left->zeros[t]));
            _mm512_store_si512(w + BLOCK_BYTES, _mm512_sub_epi8(weights_of(high, codes), left->zeros[t]));
        }
    for (int t = 0; t < tiles; t++) {
        left->packed[t] += blocks * BLOCK_BYTES;
        left->ahead[t] += blocks * BLOCK_BYTES;
    }
    left->weights += 2 * blocks * BLOCK_BYTES;
    left->blocks -= blocks;
}

/* Rows of a step that wait for their float step. */
typedef struct {
    const int32_t *products; /* row after row of tile 0; TILE_PRODUCTS further those of tile 1; plane 1's are SUMS further */
    const act_meta *meta;
    const __m512 *scale; /* per tile */
    float *sums;
    int rows;
} pending_rows;

KERNEL void add_rows(pending_rows *pending, int most, int planes)
{
    const __m512 scale[2] = {pending->scale[0], pending->scale[1]};
    const int rows = pending->rows < most ? pending->rows : most;
    const int32_t *products = pending->products;
    const act_meta *meta = pending->meta;
    float *sums = pending->sums;
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        const __m512 row_scale = _mm512_set1_ps(meta[r].scale);
        for (int t = 0; t < 2; t++) {
            const int32_t *const product = products + r * TILE_N + t * TILE_PRODUCTS;
            __m512i total = _mm512_load_si512(product);
            if (planes == 2)
                total = _mm512_add_epi32(_mm512_slli_epi32(total, 8), _mm512_load_si512(product + SUMS));
            add_group(sums + r * PAIR_N + t * TILE_N, total, scale[t], row_scale);
        }
    }
    pending->products += rows * TILE_N;
    pending->meta += rows;
    pending->sums += rows * PAIR_N;
    pending->rows -= rows;
}

/* Where a step's sums are stored. */
typedef struct {
    int32_t *first, *second; /* of the first and of the second A, if there is one, of tile 0; TILE_PRODUCTS further tile 1 */
} step_products;

KERNEL void store_products(step_products to)
{
    _tile_stored(0, to.first, 4 * TILE_N);
    _tile_stored(1, to.first + TILE_PRODUCTS, 4 * TILE_N);
    if (to.second) {
        _tile_stored(2, to.second, 4 * TILE_N);
        _tile_stored(3, to.second + TILE_PRODUCTS, 4 * TILE_N);
    }
}

/* What vector units do during a step, a portion after every second product. */
typedef struct {
    pending_rows *pending;
    unpacking *left;
    int rows, blocks; /* in a portion */
} side_work;

KERNEL void do_portion(const side_work *side, int planes, int tiles, int codes)
{
    add_rows(side->pending, side->rows, planes);
    unpack_blocks(side->left, side->blocks, tiles, codes);
    COMPILER_BARRIER();
}

/* A step; `before` is where the sums of the step before go, which gives its registers up. */
KERNEL void multiply(const group_view *view, const int8_t *const a[2], ptrdiff_t a_stride, int k_step,
                     step_products before, const side_work *side, int planes, int tiles, int codes)
{
    for (int k = 0; k < view->size; k += k_step) {
        const int8_t *const weights = view->weights + k * TILE_N;
        _tile_loadd(6, weights, 4 * TILE_N);
        _tile_loadd(4, a[0] + k, a_stride);
        _tile_loadd(7, weights + (tiles - 1) * TILE_WEIGHTS, 4 * TILE_N);
        if (k == 0) {
            _tile_stored(0, before.first, 4 * TILE_N);
            _tile_stored(1, before.first + TILE_PRODUCTS, 4 * TILE_N);
            _tile_zero(0);
            _tile_zero(1);
        }
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        do_portion(side, planes, tiles, codes);
        if (k == 0 && before.second) {
            _tile_stored(2, before.second, 4 * TILE_N);
            _tile_stored(3, before.second + TILE_PRODUCTS, 4 * TILE_N);
        }
        if (a[1]) {
            _tile_loadd(5, a[1] + k, a_stride);
            if (k == 0) {
                _tile_zero(2);
                _tile_zero(3);
            }
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
        do_portion(side, planes, tiles, codes);
    }
}

KERNEL int divide_up(int a, int b) { return (a + b - 1) / b; }

/* `planes`, `tiles` and `codes` are constants. */
KERNEL void gemm_tiles(const gemm_task *task, int planes, int tiles, int codes)
{
    /* Of two steps, in turn: what one stores, the next one's vector units read. */
    _Alignas(64) int32_t products[2][2 * TILE_PRODUCTS];
    __m512 scales[SCALES][2]; /* of groups, in turn */
    const int m = task->m, step_rows = planes == 2 ? REGISTER_ROWS : 2 * REGISTER_ROWS;
    const int k_step = (task->group_blocks | task->last_group_blocks) * BLOCK_K % 64 ? 32 : 64;
    const ptrdiff_t stride = task->a_row_stride;
    /* Of the groups so far: not in out if they are to be added to it, or if a single tile has those of a second, which
     * out must not see. */
    float *const sums = task->accumulate || tiles == 1 ? task->scratch->sums : task->out;
    pending_rows stored = {.scale = scales[0]}, multiplied = stored; /* of the last step but one, and of the last */
    step_products before = {.first = products[1]};
    int slot = 0;

    memset(sums, 0, (size_t)m * PAIR_N * sizeof(float));
    memset(scales, 0, sizeof scales);
    configure(k_step);
    group_view view = view_group(task, scales, 0);
    unpacking left = begin_unpacking(task, &view, 0, tiles, codes);
    unpack_blocks(&left, left.blocks, tiles, codes);
    COMPILER_BARRIER();
    for (int g = 0; g < task->num_groups; g++) {
        group_view next = view;
        if (g + 1 < task->num_groups) {
            next = view_group(task, scales, g + 1);
            left = begin_unpacking(task, &next, g + 1, tiles, codes);
        }
        const int portions = 2 * divide_up(view.size, k_step);
        const side_work side = {
            .pending = &stored,
            .left = &left,
            .rows = divide_up(step_rows, portions),
            .blocks = divide_up(left.blocks, portions * divide_up(m, step_rows)),
        };
        for (int begin = 0; begin < m; begin += step_rows) {
            const int rows = m - begin < step_rows ? m - begin : step_rows;
            const int first = rows < REGISTER_ROWS ? m - REGISTER_ROWS : begin; /* the last ones overlap */
            /* The second A is plane 1, or the last 16 of more than 16 rows; these may overlap the first 16, and then
             * overwrite sums by the same. */
            const int second = planes == 2 ? REGISTER_ROWS : rows - REGISTER_ROWS;
            const int8_t *const a0 = view.a + first * stride;
            const int8_t *const a[2] = {a0, planes == 2 ? a0 + view.size : second > 0 ? a0 + second * stride : NULL};
            multiply(&view, a, stride, k_step, before, &side, planes, tiles, codes);
            before = (step_products){
                .first = products[slot],
                .second = a[1] ? products[slot] + second * TILE_N : NULL,
            };
            stored = multiplied;
            multiplied = (pending_rows){
                .products = products[slot] + (begin - first) * TILE_N,
                .meta = view.meta + begin,
                .scale = view.scale,
                .sums = sums + begin * PAIR_N,
                .rows = rows,
            };
            slot = 1 - slot;
        }
        view = next;
    }
    store_products(before);
    _tile_release();
    add_rows(&stored, step_rows, planes);
    add_rows(&multiplied, step_rows, planes);
    if (task->accumulate)
        add_to_out(task, tiles);
    else if (tiles == 1)
        for (int r = 0; r < m; r++)
            _mm512_store_ps(task->out + r * PAIR_N, _mm512_load_ps(sums + r * PAIR_N));
}

KERNEL void gemm(const gemm_task *task, int planes, int codes)
{
    if (task->m < REGISTER_ROWS)
        ukernels_avx512vnni.gemm[codes][planes - 1](task);
    else if (task->header[1])
        gemm_tiles(task, planes, 2, codes);
    else
        gemm_tiles(task, planes, 1, codes);
}

TARGET static void gemm_u4_i8(const gemm_task *task) { gemm(task, 1, CODES_UINT4); }

TARGET static void gemm_u4_i16(const gemm_task *task) { gemm(task, 2, CODES_UINT4); }

TARGET static void gemm_e2m1_i8(const gemm_task *task) { gemm(task, 1, CODES_E2M1); }

TARGET static void gemm_e2m1_i16(const gemm_task *task) { gemm(task, 2, CODES_E2M1); }

const ukernel_table ukernels_amx = {
    .name = "amx",
    .gemm = {{gemm_u4_i8, gemm_u4_i16}, {gemm_e2m1_i8, gemm_e2m1_i16}},
    .row_step = REGISTER_ROWS,
    /* Sums (12 KiB), activations of a group (12, or 24 with two planes) and its weights (4) fit L1, which has 48 KiB
     * where there is AMX. With 48 rows weights are unpacked more often: at 64 an expert, layers took 1.15 to 1.3 times
     * as long. */
    .max_rows = 96,
    .matrix_rows = REGISTER_ROWS,
};
#endif
