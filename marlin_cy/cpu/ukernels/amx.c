/* AMX: one TDPBSSD multiplies 16 rows of 64 activations by 64 x 16 weights less their zero points, in 16 cycles.
 *
 * Tile registers, of 8; each is 16 rows of 64 bytes:
 *
 *   tmm0, tmm1   C: 32-bit sums of an even step, tile 0's and tile 1's of the weights
 *   tmm2, tmm3   C: of an odd step
 *   tmm4         A: 64 values of K, a row of activations each
 *   tmm6, tmm7   B: 16 quads of K, a row of 16 columns x 4 weights each; tile 0's and tile 1's
 *
 * A step is one plane of up to 16 rows, over a group of K. Each group ends in a float step, for which the sums pass
 * through memory to vector registers. Nothing of that waits for what has just been multiplied: while a step's products
 * are under way, the sums of the step before are stored, and of those stored earlier the float step is done; and the
 * next group is unpacked. So vector and matrix units work at the same time.
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

/* A group of a task, made ready for the multiplication. */
typedef struct {
    const int8_t *weights[2]; /* less zero points, per tile: quads of K, each of 16 columns */
    const __m512 *scale;      /* per tile */
    int size;                 /* values of K */
    const int8_t *a;          /* of the task's first row */
    const act_meta *meta;
} group_view;

/* Sums of products that wait for their float step: rows one after the other. */
typedef struct {
    const int32_t *products; /* tile 0's, and SUMS further tile 1's; 2 * SUMS further again those of plane 1 */
    const act_meta *meta;
    const __m512 *scale;
    float *sums;
    int rows;
} pending_rows;

KERNEL void add_rows(const pending_rows *pending, int begin, int end, int planes)
{
    const __m512 scale[2] = {pending->scale[0], pending->scale[1]};
    const int32_t *products = pending->products + begin * TILE_N;
    const act_meta *meta = pending->meta + begin;
    float *sums = pending->sums + begin * PAIR_N;
    for (int r = begin; r < end; r++, products += TILE_N, meta++, sums += PAIR_N) {
        const __m512 row_scale = _mm512_set1_ps(meta->scale);
        for (int t = 0; t < 2; t++) {
            __m512i total = _mm512_load_si512(products + t * SUMS);
            if (planes == 2)
                total = _mm512_add_epi32(_mm512_slli_epi32(total, 8), _mm512_load_si512(products + (2 + t) * SUMS));
            add_group(sums + t * TILE_N, total, scale[t], row_scale);
        }
    }
}

KERNEL void multiply(const group_view *view, const int8_t *a, ptrdiff_t a_stride, int k_step, int odd)
{
    if (odd) {
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_zero(0);
        _tile_zero(1);
    }
    for (int k = 0; k < view->size; k += k_step) {
        _tile_loadd(6, view->weights[0] + k * TILE_N, 4 * TILE_N);
        _tile_loadd(4, a + k, a_stride);
        _tile_loadd(7, view->weights[1] + k * TILE_N, 4 * TILE_N);
        if (odd) {
            _tile_dpbssd(2, 4, 6);
            _tile_dpbssd(3, 4, 7);
        } else {
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
        }
    }
}

KERNEL void store_products(int32_t *products, int odd)
{
    if (odd) {
        _tile_stored(2, products, 4 * TILE_N);
        _tile_stored(3, products + SUMS, 4 * TILE_N);
    } else {
        _tile_stored(0, products, 4 * TILE_N);
        _tile_stored(1, products + SUMS, 4 * TILE_N);
    }
}

KERNEL void unpack_tile(int8_t *w, const uint8_t *packed, const uint8_t *ahead, const uint8_t *header, int blocks,
                        int codes)
{
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512i zeros = _mm512_mullo_epi32(load_zeros(header), _mm512_set1_epi32(0x01010101)); /* each four times */
    for (int b = 0; b < blocks; b++) {
        const __m512i both = _mm512_load_si512(packed + b * BLOCK_BYTES);
        _mm_prefetch((const char *)ahead + b * BLOCK_BYTES, _MM_HINT_T1);
        _mm_prefetch((const char *)packed + (b + blocks) * BLOCK_BYTES, _MM_HINT_T0);
        const __m512i low = _mm512_and_si512(both, mask), high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
        _mm512_store_si512(w + 2 * b * BLOCK_BYTES, _mm512_sub_epi8(weights_of(low, codes), zeros));
        _mm512_store_si512(w + (2 * b + 1) * BLOCK_BYTES, _mm512_sub_epi8(weights_of(high, codes), zeros));
    }
}

/* Everything about group g but its rows; its weights and scales take turns with those of other groups. */
KERNEL group_view prepare(const gemm_task *task, __m512 scales[SCALES][2], int g, int tiles, int codes)
{
    const int blocks = g < task->num_groups - 1 ? task->group_blocks : task->last_group_blocks;
    const ptrdiff_t begin = (ptrdiff_t)g * task->group_blocks * BLOCK_BYTES, bytes = task_bytes(task);
    const ptrdiff_t ahead = begin + PREFETCH_FAR;
    int8_t *const weights = (int8_t *)task->scratch->weights + g % 2 * (MAX_GROUP_K * PAIR_N);
    __m512 *const scale = scales[g % SCALES];
    group_view view = {
        .scale = scale,
        .size = blocks * BLOCK_K,
        .a = task->a + g * task->a_group_stride + task->rows[0] * task->a_row_stride,
        .meta = task->meta + g * task->meta_group_stride + task->rows[0],
    };
    for (int t = 0; t < 2; t++) {
        const int of = t < tiles ? t : 0; /* a single tile is its own neighbour, whose sums nobody reads */
        int8_t *const w = weights + of * (MAX_GROUP_K * TILE_N);
        const uint8_t *const header = task->header[of] + g * GROUP_HEADER_BYTES;
        if (t < tiles)
            unpack_tile(w, task->body[t] + begin,
                        ahead < bytes ? task->body[t] + ahead : task->next[t] + (ahead - bytes), header, blocks, codes);
        scale[t] = load_scales(header, task->scale_dtype, codes);
        view.weights[t] = w;
    }
    COMPILER_BARRIER();
    return view;
}

/* `planes` and `codes` are constants. */
KERNEL void gemm(const gemm_task *task, int planes, int codes)
{
    if (task->m < REGISTER_ROWS) {
        ukernels_avx512vnni.gemm[codes][planes - 1](task);
        return;
    }
    /* Of two blocks of rows; see pending_rows. */
    _Alignas(64) int32_t products[2][4 * SUMS];
    __m512 scales[SCALES][2]; /* of groups, in turn */
    const int m = task->m, tiles = task->header[1] ? 2 : 1;
    const int k_step = (task->group_blocks | task->last_group_blocks) * BLOCK_K % 64 ? 32 : 64;
    const ptrdiff_t stride = task->a_row_stride;
    /* Of the groups so far: not in out if they are to be added to it, or if a single tile has those of a second, which
     * out must not see. */
    float *const sums = task->accumulate || tiles == 1 ? task->scratch->sums : task->out;
    const pending_rows none = {.scale = scales[0], .products = products[0]};
    pending_rows pending[2] = {none, none};
    int block = 0; /* the last bit of its number: whose turn it is of products and pending */

    memset(sums, 0, (size_t)m * PAIR_N * sizeof(float));
    configure(k_step);
    group_view view = prepare(task, scales, 0, tiles, codes);
    for (int g = 0; g < task->num_groups; g++) {
        group_view next = view;
        for (int begin = 0; begin < m; begin += REGISTER_ROWS) {
            const int first = begin + REGISTER_ROWS <= m ? begin : m - REGISTER_ROWS; /* the last ones overlap */
            const int8_t *const a = view.a + first * stride;
            pending_rows *const mine = &pending[block], *const before = &pending[1 - block];
            if (planes == 2) {
                multiply(&view, a, stride, k_step, 0);
                add_rows(mine, mine->rows / 2, mine->rows, 2);
                store_products(products[1 - block] + 2 * SUMS, 1);
                multiply(&view, a + view.size, stride, k_step, 1);
                if (begin == 0 && g + 1 < task->num_groups)
                    next = prepare(task, scales, g + 1, tiles, codes);
                add_rows(before, 0, before->rows / 2, 2);
                store_products(products[block], 0);
            } else {
                if (block)
                    multiply(&view, a, stride, k_step, 1);
                else
                    multiply(&view, a, stride, k_step, 0);
                if (begin == 0 && g + 1 < task->num_groups)
                    next = prepare(task, scales, g + 1, tiles, codes);
                add_rows(mine, 0, mine->rows, 1);
                if (block)
                    store_products(products[0], 0);
                else
                    store_products(products[1], 1);
            }
            *mine = (pending_rows){
                .products = products[block] + (begin - first) * TILE_N,
                .meta = view.meta + begin,
                .scale = view.scale,
                .sums = sums + begin * PAIR_N,
                .rows = m - begin < REGISTER_ROWS ? m - begin : REGISTER_ROWS,
            };
            block = 1 - block;
        }
        view = next;
    }
    add_rows(&pending[block], planes == 2 ? pending[block].rows / 2 : 0, pending[block].rows, planes);
    if (planes == 2)
        store_products(products[1 - block] + 2 * SUMS, 1);
    else if (block)
        store_products(products[0], 0);
    else
        store_products(products[1], 1);
    add_rows(&pending[1 - block], 0, pending[1 - block].rows, planes);
    _tile_release();
    if (task->accumulate)
        add_to_out(task, tiles);
    else if (tiles == 1)
        for (int r = 0; r < m; r++)
            _mm512_store_ps(task->out + r * PAIR_N, _mm512_load_ps(sums + r * PAIR_N));
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
