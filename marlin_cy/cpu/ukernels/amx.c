/* AMX: one TDPBSSD multiplies 16 rows of 64 activations by 64 x 16 weights, in 16 cycles. Zero points are subtracted
 * from the weights when they are unpacked. From codes of 8 bits, 128 is subtracted instead; where a zero point is
 * another one, the float epilogue adds the rest.
 *
 * K of a group is cut in two: the first DEPTH values (or all, if there are fewer), and the rest. Tile registers, of 8:
 *
 *                             B: tmm4   tmm5    first half of K: each row is 16 columns x 4 values of K
 *                                tmm6   tmm7    second half of K; tile 0 on the left, tile 1 on the right
 *   A: tmm2   tmm3            C: tmm0   tmm1    A: 16 rows of activations, first and second half of K
 *                                               C: their 32-bit sums
 *
 * B is loaded once per group and serves all rows of the task. A step is one plane of 16 rows: it loads A and multiplies
 * it by B.
 *
 * Software pipeline, three stages: (i) TDPBSSD of step s, (ii) TILESTORED of step s-1, (iii) float epilogue of step
 * s-2. The vector units run stage (iii), and unpack the next group, in small portions between the products of stage
 * (i). So vector and matrix units work at the same time.
 *
 * If the rows of a task are not a multiple of 16, the last 16 rows overlap the rows before them, and the float epilogue
 * skips the rows that are already done.
 */
#include "isa.h"

#ifdef MARLIN_CY_X86
#include "x86.h"

#ifdef COMPILER_HAS_AMX
#include <string.h>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "zmm.h"

#define TARGET __attribute__((target("amx-tile,amx-int8," ZMM_TARGET)))
#define KERNEL static inline __attribute__((always_inline, target("amx-tile,amx-int8," ZMM_TARGET)))

enum {
    REGISTER_ROWS = 16,                  /* tasks of fewer rows use AVX-512, which unpacks weights in registers */
    TERMS = 4,                           /* groups whose terms are kept: one is being unpacked, and up to three wait
                                          * for products or for the float epilogue */
    SUMS = REGISTER_ROWS * TILE_N,       /* elements of a C register */
    TILE_WEIGHTS = MAX_GROUP_K * TILE_N, /* weights of one tile's group */
    DEPTH = 64,                          /* values of K in a row of a register */
    PORTIONS = 2,                        /* portions of vector work in a step */
    SLOTS = 3,                           /* product buffers of 16 rows, one per pipeline stage */
};

/* The operand of ldtilecfg. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16]; /* by register; there are 8 */
    uint8_t rows[16];
} tile_config;

/* The compilers do not know that tile loads read memory. The barrier keeps earlier stores before them. */
#define COMPILER_BARRIER() __asm__ volatile("" ::: "memory")

/* Set the shapes of the registers for groups of `size` values of K. The second half of K may be empty; then its
 * registers are not configured. */
KERNEL void configure(int size)
{
    const int first = size < DEPTH ? size : DEPTH, k[2] = {first, size - first};
    tile_config config = {.palette = 1};
    for (int i = 0; i < 2; i++) { /* weight tile i (C), and half i of K (A and B) */
        config.rows[i] = REGISTER_ROWS;
        config.row_bytes[i] = 4 * TILE_N;
        if (k[i] == 0)
            continue;
        config.rows[2 + i] = REGISTER_ROWS;
        config.row_bytes[2 + i] = (uint16_t)k[i];
        for (int b = 4 + 2 * i; b < 6 + 2 * i; b++) {
            config.rows[b] = (uint8_t)(k[i] / 4);
            config.row_bytes[b] = 4 * TILE_N;
        }
    }
    COMPILER_BARRIER();
    _tile_loadconfig(&config);
}

/* What the float epilogue of a group needs, per tile. */
typedef struct {
    __m512 scale[2];
    __m512 minimum[2];   /* if has_minimum, divided by SYMMETRIC_ZERO */
    __m512i rest[2];     /* if has_rest: the zero_factor of what was not subtracted from the weights */
    int has_minimum, has_rest;
} group_terms;

/* A group of a task. */
typedef struct {
    group_terms *terms; /* groups use the TERMS entries in turn */
    int size;        /* values of K */
    const int8_t *a; /* of the task's first row */
    const act_meta *meta;
} group_view;

KERNEL group_view view_group(const gemm_task *task, group_terms terms[TERMS], int g)
{
    const int blocks = g < task->num_groups - 1 ? task->group_blocks : task->last_group_blocks;
    return (group_view){
        .terms = &terms[g % TERMS],
        .size = blocks * LANE_K,
        .a = task->a + g * task->a_group_stride + task->rows[0] * task->a_row_stride,
        .meta = task->meta + g * task->meta_group_stride + task->rows[0],
    };
}

/* A group that is being unpacked from blocks to weights minus zero points. */
typedef struct {
    const uint8_t *packed[2], *ahead[2]; /* per tile */
    int8_t *weights;                     /* [K / 4][16 columns][4 values of K]; tile 1 starts TILE_WEIGHTS further */
    __m512i zeros[2];                    /* each zero point four times in its lane */
    int blocks, done;                    /* of each tile */
} unpacking;

/* Whether zero points are left to the float epilogue. `codes` is a constant. */
KERNEL int leaves_zeros(int codes) { return code_types[codes].bits == 8; }

KERNEL unpacking begin_unpacking(const gemm_task *task, const task_tiles *tiles, const header_layout *layout,
                                 const group_view *view, int g, int codes)
{
    const ptrdiff_t begin = (ptrdiff_t)g * task->group_blocks * block_bytes(codes), bytes = task_bytes(task, codes);
    const ptrdiff_t ahead = begin + PREFETCH_FAR;
    unpacking group = {.weights = (int8_t *)task->scratch->weights, .blocks = view->size / LANE_K};
    group_terms *const terms = view->terms;
    terms->has_minimum = scale_records[task->scales].has_minimum;
    terms->has_rest = 0;
    for (int t = 0; t < 2; t++) {
        const group_record record = record_of(tiles->header[t], layout, g);
        __m512i zeros = load_zeros(record, task->scales, codes);
        terms->scale[t] = load_scales(record, task->scales, codes);
        if (terms->has_minimum)
            terms->minimum[t] = load_minima(record, task->scales);
        if (leaves_zeros(codes)) {
            const __m512i subtracted = _mm512_set1_epi32(code_types[codes].symmetric_zero);
            const __m512i rest = _mm512_sub_epi32(subtracted, zeros);
            terms->rest[t] = zero_factor(rest, codes);
            terms->has_rest |= _mm512_test_epi32_mask(rest, rest) != 0;
            zeros = subtracted;
        }
        group.zeros[t] = _mm512_mullo_epi32(zeros, _mm512_set1_epi32(0x01010101));
        group.packed[t] = tiles->body[t] + begin;
        group.ahead[t] = ahead < bytes ? tiles->body[t] + ahead : tiles->next[t] + (ahead - bytes);
    }
    return group;
}

/* Load four values of K of a block: values 0-3 (quad 0) or 4-7 (quad 1). */
KERNEL __m512i load_quad(const unpacking *group, int t, int b, int quad, int codes)
{
    const int bytes = code_types[codes].bits == 8;
    const ptrdiff_t place = b * block_bytes(codes) + bytes * quad * LINE_BYTES;
    const __m512i packed = _mm512_load_si512(group->packed[t] + place), mask = _mm512_set1_epi8(15);
    if (bytes || quad == 0) {
        _mm_prefetch((const char *)group->ahead[t] + place, _MM_HINT_T1);
        _mm_prefetch((const char *)group->packed[t] + place + PREFETCH_NEAR, _MM_HINT_T0);
    }
    if (bytes)
        return packed;
    return weights_of(_mm512_and_si512(quad ? _mm512_srli_epi16(packed, 4) : packed, mask), codes);
}

/* Unpack up to `most` more blocks of each tile. A block is two rows of B. */
KERNEL void unpack_blocks(unpacking *group, int most, int codes)
{
    const int end = group->done + most < group->blocks ? group->done + most : group->blocks;
    for (int b = group->done; b < end; b++)
        for (int t = 0; t < 2; t++) {
            int8_t *const w = group->weights + t * TILE_WEIGHTS + 2 * b * LINE_BYTES;
            for (int quad = 0; quad < 2; quad++)
                _mm512_store_si512(w + quad * LINE_BYTES,
                                   _mm512_sub_epi8(load_quad(group, t, b, quad, codes), group->zeros[t]));
        }
    group->done = end;
}

/* Up to 16 rows whose products wait for the float epilogue. */
typedef struct {
    const int32_t *products; /* rows of tile 0; tile 1 starts SUMS further, and plane 1 starts 2 * SUMS further */
    const act_meta *meta;
    const group_terms *terms;
    float *sums;
    int rows;
} pending_rows;

/* The float epilogue of rows [begin, end), which are constants. */
KERNEL void add_rows(const pending_rows *pending, int begin, int end, int planes, int codes)
{
    const group_terms *const terms = pending->terms;
    const __m512 scale[2] = {terms->scale[0], terms->scale[1]};
#pragma GCC unroll 16
    for (int r = begin; r < end; r++) {
        if (r >= pending->rows)
            break;
        const __m512 row_scale = _mm512_set1_ps(pending->meta[r].scale);
        for (int t = 0; t < 2; t++) {
            const int32_t *const product = pending->products + r * TILE_N + t * SUMS;
            __m512i total = _mm512_load_si512(product);
            if (planes == 2)
                total = _mm512_add_epi32(_mm512_slli_epi32(total, 8), _mm512_load_si512(product + 2 * SUMS));
            if (leaves_zeros(codes) && terms->has_rest)
                total = _mm512_add_epi32(total, zero_term(terms->rest[t], pending->meta + r, codes));
            add_group(pending->sums + r * PAIR_N + t * TILE_N, total, scale[t], row_scale);
        }
    }
    if (terms->has_minimum && begin < pending->rows) {
        const int count = (end < pending->rows ? end : pending->rows) - begin;
        for (int t = 0; t < 2; t++)
            add_minima(pending->sums + begin * PAIR_N + t * TILE_N, terms->minimum[t], pending->meta + begin, NULL,
                       count);
    }
}

KERNEL void store_products(int32_t *products)
{
    _tile_stored(0, products, 4 * TILE_N);
    _tile_stored(1, products + SUMS, 4 * TILE_N);
}

/* Work of the vector units while the matrix unit multiplies: the float epilogue of 16 rows, and a part of the
 * unpacking. */
typedef struct {
    const pending_rows *pending;
    unpacking *group;
    int blocks; /* of a portion */
} side_work;

/* Portions alternate with the products of 16 rows; `portion` is a constant. */
KERNEL void do_portion(const side_work *side, int portion, int planes, int codes)
{
    const int rows = REGISTER_ROWS / (PORTIONS * planes);
    add_rows(side->pending, portion * rows, (portion + 1) * rows, planes, codes);
    unpack_blocks(side->group, side->blocks, codes);
    COMPILER_BARRIER();
}

/* Load B of a group. Then its memory is free for the next group. */
KERNEL void load_weights(const int8_t *weights, int size)
{
    const int8_t *const neighbour = weights + TILE_WEIGHTS;
    COMPILER_BARRIER();
    _tile_loadd(4, weights, 4 * TILE_N);
    _tile_loadd(5, neighbour, 4 * TILE_N);
    if (size > DEPTH) {
        _tile_loadd(6, weights + DEPTH * TILE_N, 4 * TILE_N);
        _tile_loadd(7, neighbour + DEPTH * TILE_N, 4 * TILE_N);
    }
    COMPILER_BARRIER();
}

/* A step; `before` is the product buffer of the previous step. */
KERNEL void multiply(const int8_t *a, ptrdiff_t a_stride, int size, int32_t *before, const side_work *side, int plane,
                     int planes, int codes)
{
    _tile_loadd(2, a, a_stride);
    if (size > DEPTH)
        _tile_loadd(3, a + DEPTH, a_stride);
    store_products(before);
    _tile_zero(0);
    _tile_zero(1);
    _tile_dpbssd(0, 2, 4);
    _tile_dpbssd(1, 2, 5);
    do_portion(side, PORTIONS * plane, planes, codes);
    if (size > DEPTH) {
        _tile_dpbssd(0, 3, 6);
        _tile_dpbssd(1, 3, 7);
    }
    do_portion(side, PORTIONS * plane + 1, planes, codes);
}

KERNEL int divide_up(int a, int b) { return (a + b - 1) / b; }

/* `planes` and `codes` are constants. */
KERNEL void gemm_tiles(const gemm_task *task, int planes, int codes)
{
    _Alignas(64) int32_t products[2 * SLOTS][2 * SUMS]; /* by step; with one plane, half of them are not used */
    group_terms terms[TERMS];                           /* by group, in turn */
    const int m = task->m;
    const ptrdiff_t stride = task->a_row_stride;
    float *const sums = sums_of(task);
    const task_tiles tiles = tiles_of(task);
    const header_layout layout = layout_of_header(task->scales, codes, task->group_blocks * LANE_K);
    pending_rows stored = {.terms = terms}, multiplied = stored;
    int slot = 0;
    int32_t *before = products[slot];

    memset(sums, 0, (size_t)m * PAIR_N * sizeof(float));
    memset(terms, 0, sizeof terms);
    group_view view = view_group(task, terms, 0);
    unpacking unpacked = begin_unpacking(task, &tiles, &layout, &view, 0, codes);
    unpack_blocks(&unpacked, unpacked.blocks, codes);
    configure(view.size);
    for (int g = 0; g < task->num_groups; g++) {
        group_view next = view;
        load_weights((int8_t *)task->scratch->weights, view.size);
        if (g + 1 < task->num_groups) {
            next = view_group(task, terms, g + 1);
            unpacked = begin_unpacking(task, &tiles, &layout, &next, g + 1, codes);
        }
        const int portions = PORTIONS * planes * divide_up(m, REGISTER_ROWS);
        const side_work side = {&stored, &unpacked, divide_up(unpacked.blocks, portions)};
        for (int begin = 0; begin < m; begin += REGISTER_ROWS) {
            const int first = begin + REGISTER_ROWS <= m ? begin : m - REGISTER_ROWS; /* the last 16 rows overlap */
#pragma GCC unroll 2
            for (int plane = 0; plane < planes; plane++) {
                const int8_t *const a = view.a + first * stride + plane * view.size;
                multiply(a, stride, view.size, before, &side, plane, planes, codes);
                before = products[slot + plane];
            }
            stored = multiplied;
            multiplied = (pending_rows){
                .products = products[slot] + (begin - first) * TILE_N,
                .meta = view.meta + begin,
                .terms = view.terms,
                .sums = sums + begin * PAIR_N,
                .rows = REGISTER_ROWS - (begin - first),
            };
            slot = (slot + planes) % (planes * SLOTS);
        }
        if (next.size != view.size) { /* configuring clears all registers */
            store_products(before);
            before = products[slot];
            configure(next.size);
        }
        view = next;
    }
    store_products(before);
    _tile_release();
    add_rows(&stored, 0, REGISTER_ROWS, planes, codes);
    add_rows(&multiplied, 0, REGISTER_ROWS, planes, codes);
    put_out(task);
}

KERNEL void gemm(const gemm_task *task, int planes, int codes)
{
    if (task->m < REGISTER_ROWS)
        isa_avx512vnni.kernels.gemm[codes][planes - 1](task);
    else
        gemm_tiles(task, planes, codes);
}

TARGET static void gemm_u4_i8(const gemm_task *task) { gemm(task, 1, CODES_UINT4); }

TARGET static void gemm_u4_i16(const gemm_task *task) { gemm(task, 2, CODES_UINT4); }

TARGET static void gemm_e2m1_i8(const gemm_task *task) { gemm(task, 1, CODES_E2M1); }

TARGET static void gemm_e2m1_i16(const gemm_task *task) { gemm(task, 2, CODES_E2M1); }

TARGET static void gemm_iq4_i8(const gemm_task *task) { gemm(task, 1, CODES_IQ4_NL); }

TARGET static void gemm_iq4_i16(const gemm_task *task) { gemm(task, 2, CODES_IQ4_NL); }

TARGET static void gemm_u8_i8(const gemm_task *task) { gemm(task, 1, CODES_UINT8); }

TARGET static void gemm_u8_i16(const gemm_task *task) { gemm(task, 2, CODES_UINT8); }

/* Linux saves tiles only for a process that has requested it. The permission covers all threads and children of the
 * process. A second request has no effect. */
static int ask_for_tiles(void)
{
#if defined(__linux__) && defined(SYS_arch_prctl)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 0;
#endif
}

static isa_support probe(void)
{
    const int cpu = cpuid_has(7, 0, CPUID_EDX, 1u << 24 | 1u << 25);
    const isa_support found = x86_support(cpu, os_saves(XCR0_ZMM | XCR0_TILES),
                                          "AMX TILE and INT8, and AVX-512 with VNNI", "the CPU lacks AMX TILE or INT8");
    if (found.available && !ask_for_tiles())
        return (isa_support){0, "the CPU has it, but the operating system does not permit its use"};
    return found;
}
#else
static isa_support probe(void) { return (isa_support){0, "built by a compiler that does not know AMX"}; }
#endif

const isa_descriptor isa_amx = {
    .name = "amx",
    .parent = &isa_avx512vnni,
    .probe = probe,
#ifdef COMPILER_HAS_AMX
    .kernels =
        {
            .gemm = {[CODES_UINT4] = {gemm_u4_i8, gemm_u4_i16},
                     [CODES_E2M1] = {gemm_e2m1_i8, gemm_e2m1_i16},
                     [CODES_IQ4_NL] = {gemm_iq4_i8, gemm_iq4_i16},
                     [CODES_UINT8] = {gemm_u8_i8, gemm_u8_i16}},
            .mr = REGISTER_ROWS,
            /* Sums (12 KiB), activations of a group (12 KiB, or 24 KiB with two planes) and its weights (4 KiB) fit the L1
         * cache, which has 48 KiB on CPUs with AMX. With mc = 48, weights are unpacked more often: a product of 256
         * rows takes 1.05 to 1.16 times as long. With mc = 128 it takes 0.95 to 1.1 times as long. */
            .mc = 96,
            .min_matrix_rows = REGISTER_ROWS,
        },
#endif
};
#endif
