#define CHOSEN_SPACE __local
#define ROUTE_ITEMS (32 * STEP_WAVES)
#include "activation.cl"
#include "decoder.cl"
#include "codes.cl"
#include "route_token.cl"

// decoder_step: a step of few tokens through all layers in one launch, in phases:
//
//   0  norm of x, query, key and value projections                                             to `heads`
//   1  norms of heads, RoPE, append to the cache, attention to a run of positions              to `attended` or `partial`
//   2  join the runs                            (left out if every row has one run)            to `attended`
//   3  output projection                                                                       added to x
//   4  norm of x, router                                                                       to `logits`
//   5  experts of each token, gate and up projections, activation                              to `inner`
//   6  down projections, weighted sum                                                          added to x
//
// and after the last layer the head: 7 norm of x, logits, and each work-group's best; 8 the best of all.
//
// With RESIDENT all work-groups of the launch are resident, and wait for each other after each phase. Without it every
// phase is a launch. The idea of running a whole model in one persistent kernel is that of Hazy Research, "Look Ma, No
// Bubbles! Designing a Low-Latency Megakernel for Llama-1B", 2025.
//
// Build options
//   MMA                        1: products by tensor cores (mma.cl)
//   RESIDENT                   see above
//   TOKENS                     rows of a step, at most: 1 to 8
//   STEP_WAVES                 waves of 32 work-items in a work-group
//   LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, EXPERTS, TOP_K, VOCABULARY
//   PAIRS_ROTATED, INTERLEAVED of RoPE; 0 pairs: none
//   HEADS_TOGETHER             heads that a work-group attends with, a divisor of HEADS / KV_HEADS
//   QKV_TEAM, GATE_TEAM        waves that share a strip: divisors of STEP_WAVES
//   QKV_SHIFT, O_SHIFT, GATE_SHIFT, DOWN_SHIFT     group_shift of the weights
//   GATE_WORDS, DOWN_WORDS     expert_words
//   EXPERTS_PER_PART           experts in a buffer
//   EMBEDDING_TYPE, ROUTER_TYPE, HEAD_TYPE         element types, as INPUT_TYPE
//   NORMALISE, TOPK_GROUPS, NUM_GROUPS, and the options of routing.cl, codes.cl and decoder.cl
//   LAYER_BYTES                of a layer's entry, as the host sees it

#define WAVE 32
#define ITEMS (WAVE * STEP_WAVES)
#define QKV ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
#define ATTENDED (HEADS * HEAD_DIM)
#define HIDDEN_BLOCKS ((HIDDEN + BLOCK_K - 1) / BLOCK_K)
#define ATTENDED_BLOCKS ((ATTENDED + BLOCK_K - 1) / BLOCK_K)
#define INNER_BLOCKS ((INNER + BLOCK_K - 1) / BLOCK_K)
#define GROUPS_OF(k, shift) (((k) + (1 << (shift)) - 1) >> (shift))
#define X_OCTETS (HIDDEN_BLOCKS * 8 + 4) // with 4 more, eight rows lie in different banks
#define FOURS ((HIDDEN / 4 + ITEMS - 1) / ITEMS) // of a row, of a work-item

// A layer: addresses on the device.
typedef struct {
    ulong qkv[3], o, gate_up[8], down[8]; // experts in parts
    ulong mixer_norm, ffn_norm, q_norm, k_norm, qkv_bias, o_bias;
    ulong cosine, sine, keys, values, router, router_bias, correction;
    uint qkv_strips[3], pad;              // strips of the store that each projection is in
    uint qkv_first[3], pad2;              // its first strip there
    float qkv_factor[3], o_factor, gate_up_factor, down_factor;
    float scale, norm_eps, head_eps, routing_factor;
    uint window, pad3;
} Layer;
typedef char layer_has_the_size_that_the_host_expects[sizeof(Layer) == LAYER_BYTES ? 1 : -1];

#define load_embedding JOIN(load_, EMBEDDING_TYPE)
#define ROUTER JOIN(TYPE_, ROUTER_TYPE)
#define load_router JOIN(load_, ROUTER_TYPE)
#define HEAD JOIN(TYPE_, HEAD_TYPE)
#define load8_head JOIN(load8_, HEAD_TYPE)

// Local memory, in floats. A phase begins with `scratch`; the normed rows of a layer stay from phase 4 to phase 5.
#define SCRATCH_ROWS (TOKENS * 16 > 32 ? TOKENS * 16 : 32)
#define SCRATCH_SUMS (STEP_WAVES * QUADS * SCRATCH_ROWS)
#define SCRATCH_NORM (TOKENS * (ITEMS + WAVE))
#define ROUTED_WORDS (4 * ((EXPERTS + 3) / 4) + (NUM_GROUPS) + TOP_K + 2 * ITEMS)
#define MAX_OF(a, b) ((a) > (b) ? (a) : (b))
#define SCRATCH MAX_OF(MAX_OF(SCRATCH_SUMS, SCRATCH_NORM), ROUTED_WORDS)
#define QUARTERS 4
#define KEYS (ITEMS / QUARTERS)
#define SLOTS (HEADS_TOGETHER * HEAD_DIM / CHUNK)
#define VALUE_LANES (ITEMS / SLOTS)
#define ATTEND_QUERIES ((HEADS_TOGETHER + 2) * HEAD_DIM)
#define ATTEND_SCORES (QUARTERS * HEADS_TOGETHER * KEYS)
#define ATTEND_SUMS (VALUE_LANES * HEADS_TOGETHER * HEAD_DIM)
#define ATTEND_FLOATS \
    (ATTEND_QUERIES + MAX_OF(ATTEND_SCORES, ATTEND_SUMS) + HEADS_TOGETHER * KEYS + 4 * HEADS_TOGETHER + ITEMS)
#define LOCAL_FLOATS MAX_OF(SCRATCH + 4 + 4 * TOKENS * X_OCTETS, ATTEND_FLOATS)

#define EACH(i, n) for (uint i = get_local_id(0); i < (n); i += ITEMS)

#if SLOTS > ITEMS || ITEMS % SLOTS
#error "the local size must be a multiple of HEADS_TOGETHER * HEAD_DIM / 8"
#endif
#if HIDDEN % 16 || INNER % 16 || HEAD_DIM % 32 || ATTENDED % 32
#error "decoder_step.cl: sizes"
#endif

#include "decoder_step_product.cl"

// Rows ---------------------------------------------------------------------------------------------

// Sums of each row's partial sums over the work-items; `sums` holds TOKENS * (ITEMS + WAVE) floats.
__attribute__((always_inline)) static inline void sum_rows(float values[TOKENS], __local float *sums)
{
    const uint item = get_local_id(0);
    __local float *seconds = sums + TOKENS * ITEMS;
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint r = 0; r < TOKENS; r++)
        sums[r * ITEMS + item] = values[r];
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint i = item; i < TOKENS * WAVE; i += ITEMS) {
        float sum = 0;
#pragma unroll
        for (uint j = 0; j < STEP_WAVES; j++)
            sum += sums[i / WAVE * ITEMS + j * WAVE + i % WAVE];
        seconds[i] = sum;
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint r = 0; r < TOKENS; r++) {
        float4 sum = (float4)(0);
#pragma unroll
        for (uint j = 0; j < WAVE / 4; j++)
            sum += vload4(r * (WAVE / 4) + j, seconds);
        values[r] = sum.x + sum.y + (sum.z + sum.w);
    }
}

// The RMS norms of the rows of x. Work-item i has fours i, i + ITEMS, ... of each row.
//   table      NULL, or the embedding: x is read from it, and the first work-group writes x
__attribute__((always_inline)) static inline void norm_x(float4 normed[TOKENS][FOURS], uint rows, __global float *x,
                                                         __global const int *batch, ulong table, ulong norm, float eps,
                                                         __local float *sums)
{
    const uint item = get_local_id(0);
    float squares[TOKENS];
#pragma unroll
    for (uint r = 0; r < TOKENS; r++) {
        squares[r] = 0;
#pragma unroll
        for (uint j = 0; j < FOURS; j++) {
            const uint four = item + j * ITEMS;
            normed[r][j] = (float4)(0);
            if (r < rows && four < HIDDEN / 4) {
                if (table) {
                    __global const JOIN(TYPE_, EMBEDDING_TYPE) *words =
                        (__global const JOIN(TYPE_, EMBEDDING_TYPE) *)table;
                    const ulong at = (uint)STEP_ROW(batch, r).x * (ulong)HIDDEN + 4 * four;
                    normed[r][j] = (float4)(load_embedding(words, at), load_embedding(words, at + 1),
                                            load_embedding(words, at + 2), load_embedding(words, at + 3));
                    if (get_group_id(0) == 0)
                        vstore4(normed[r][j], r * (HIDDEN / 4) + four, x);
                } else {
                    normed[r][j] = vload4(r * (HIDDEN / 4) + four, x);
                }
                squares[r] += dot(normed[r][j], normed[r][j]);
            }
        }
    }
    sum_rows(squares, sums);
#pragma unroll
    for (uint j = 0; j < FOURS; j++) {
        const uint four = item + j * ITEMS;
        const float4 weight = four < HIDDEN / 4 ? vload4(four, (__global const float *)norm) : (float4)(0);
#pragma unroll
        for (uint r = 0; r < TOKENS; r++)
            normed[r][j] *= weight * (1 / sqrt(squares[r] / HIDDEN + eps));
    }
}

// Normed rows as float16, with zeros beyond HIDDEN.
__attribute__((always_inline)) static inline void keep_normed(const float4 normed[TOKENS][FOURS], __local uint4 *x)
{
    const uint item = get_local_id(0);
#pragma unroll
    for (uint r = 0; r < TOKENS; r++) {
#pragma unroll
        for (uint j = 0; j < FOURS; j++) {
            const uint four = item + j * ITEMS;
            if (four < HIDDEN / 4)
                vstore_half4_rte(normed[r][j], r * (2 * X_OCTETS) + four, (__local half *)x);
        }
        for (uint four = HIDDEN / 4 + item; four < 2 * X_OCTETS; four += ITEMS)
            vstore_half4_rte((float4)(0), r * (2 * X_OCTETS) + four, (__local half *)x);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
}

static inline float group_total(__local const float *sums, uint count, uint stride)
{
    float sum = 0;
    for (uint i = 0; i < count; i++)
        sum += sums[i * stride];
    return sum;
}

// Weights for a later phase are brought to the second-level cache while work-groups wait for each other.
#if RESIDENT
static inline void prefetch_bytes(ulong from, uint bytes)
{
    EACH(i, (bytes + 127) / 128)
        prefetch_line((__global const uchar *)from + 128 * i);
}

// Codes and scales of a strip.
static inline void prefetch_strip(ulong matrix, uint strips, uint blocks, uint groups, uint strip)
{
    if (strip < strips) {
        prefetch_bytes(matrix + strip * blocks * (4ul * BLOCK_WORDS), blocks * 4 * BLOCK_WORDS);
        prefetch_bytes(matrix + strips * blocks * (4ul * BLOCK_WORDS) + strip * groups * 32ul, groups * 32);
    }
}
#endif

// Phases -------------------------------------------------------------------------------------------

// Of the projections side by side: which one a strip belongs to, 0 query, 1 key, 2 value, and its first strip.
static inline uint part_of_strip(uint strip)
{
    return strip < ATTENDED / STRIP_N ? 0 : strip < (ATTENDED + KV_HEADS * HEAD_DIM) / STRIP_N ? 1 : 2;
}
static inline uint first_strip_of(uint part)
{
    return part == 0 ? 0 : (ATTENDED + (part - 1) * KV_HEADS * HEAD_DIM) / STRIP_N;
}

__attribute__((always_inline)) static inline void project_heads(__global const Layer *layer, bool first, uint rows,
                                                                __global const int *batch, ulong table,
                                                                __global float *x, __global float *heads,
                                                                __local float *scratch, __local uint4 *kept)
{
    const uint item = get_local_id(0), lane = item % WAVE, wave = item / WAVE;
    const uint teams = STEP_WAVES / QKV_TEAM, team = wave / QKV_TEAM, member = wave % QKV_TEAM;
    const uint run = (HIDDEN_BLOCKS + QKV_TEAM - 1) / QKV_TEAM;
    const uint begin = min(member * run, (uint)HIDDEN_BLOCKS), end = min(begin + run, (uint)HIDDEN_BLOCKS);
#if RESIDENT
    prefetch_strip(layer->o, HIDDEN / STRIP_N, ATTENDED_BLOCKS, GROUPS_OF(ATTENDED, O_SHIFT), get_group_id(0));
#endif
    {
        float4 normed[TOKENS][FOURS];
        norm_x(normed, rows, x, batch, first ? table : 0, layer->mixer_norm, layer->norm_eps, scratch);
        keep_normed(normed, kept);
    }
    const uint strips = QKV / STRIP_N, turns = (strips + get_num_groups(0) * teams - 1) / (get_num_groups(0) * teams);
    for (uint turn = 0; turn < turns; turn++) {
        const uint base = turn * get_num_groups(0) * teams, strip = base + team * get_num_groups(0) + get_group_id(0);
        Total total[TOTALS] = {0};
        if (strip < strips) {
            const uint part = part_of_strip(strip);
            const Sections m = sections_of(layer->qkv[part], layer->qkv_strips[part], HIDDEN_BLOCKS,
                                           GROUPS_OF(HIDDEN, QKV_SHIFT));
            product_of_local(total, m, layer->qkv_first[part] + strip - first_strip_of(part), 0, HIDDEN_BLOCKS,
                             GROUPS_OF(HIDDEN, QKV_SHIFT), QKV_SHIFT, HIDDEN, begin, end, lane, kept);
            EACH_SUM(total, layer->qkv_factor[part], scratch + wave * (QUADS * TOKENS * 16), TOKENS * 16, 16, TOKENS,
                     lane, PUT_SET)
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        EACH(i, teams * TOKENS * 16)
        {
            const uint its_team = i / (TOKENS * 16), r = i / 16 % TOKENS, c = i % 16;
            const uint its_strip = base + its_team * get_num_groups(0) + get_group_id(0);
            if (its_strip < strips && r < rows) {
                const uint column = its_strip * STRIP_N + c;
                float sum = group_total(scratch + its_team * (QKV_TEAM * QUADS * TOKENS * 16) + r * 16 + c,
                                        QKV_TEAM * QUADS, TOKENS * 16);
                if (layer->qkv_bias)
                    sum += ((__global const float *)layer->qkv_bias)[column];
                heads[r * (ulong)QKV + column] = sum;
            }
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
}

#include "decoder_step_attend.cl"

__attribute__((always_inline)) static inline void project_output(__global const Layer *layer, uint rows,
                                                                 __global float *x, __global const half *attended,
                                                                 __local float *scratch)
{
    const uint item = get_local_id(0), lane = item % WAVE, wave = item / WAVE;
    const uint run = (ATTENDED_BLOCKS + STEP_WAVES - 1) / STEP_WAVES;
    const uint begin = min(wave * run, (uint)ATTENDED_BLOCKS), end = min(begin + run, (uint)ATTENDED_BLOCKS);
#if RESIDENT
    if (get_group_id(0) < EXPERTS)
        prefetch_bytes(layer->router + get_group_id(0) * (ulong)(HIDDEN * sizeof(ROUTER)), HIDDEN * sizeof(ROUTER));
#endif
    const Sections m =
        sections_of(layer->o, HIDDEN / STRIP_N, ATTENDED_BLOCKS, GROUPS_OF(ATTENDED, O_SHIFT));
    for (uint strip = get_group_id(0); strip < HIDDEN / STRIP_N; strip += get_num_groups(0)) {
        Total total[TOTALS] = {0};
        product_of_halves(total, m, strip, 0, ATTENDED_BLOCKS, GROUPS_OF(ATTENDED, O_SHIFT), O_SHIFT, ATTENDED, begin,
                          end, lane, (__global const uint4 *)attended);
        EACH_SUM(total, layer->o_factor, scratch + wave * (QUADS * TOKENS * 16), TOKENS * 16, 16, TOKENS, lane, PUT_SET)
        barrier(CLK_LOCAL_MEM_FENCE);
        EACH(i, rows * 16)
        {
            const uint r = i / 16, column = strip * STRIP_N + i % 16;
            float sum = group_total(scratch + i, STEP_WAVES * QUADS, TOKENS * 16);
            if (layer->o_bias)
                sum += ((__global const float *)layer->o_bias)[column];
            x[r * (ulong)HIDDEN + column] += sum;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
}

__attribute__((always_inline)) static inline void score_experts(__global const Layer *layer, uint rows,
                                                                __global const int *batch, __global float *x,
                                                                __global float *logits, __global uint *inner_most,
                                                                __local float *scratch, __local uint4 *kept)
{
    const uint item = get_local_id(0);
    float4 normed[TOKENS][FOURS];
    norm_x(normed, rows, x, batch, 0, layer->ffn_norm, layer->norm_eps, scratch);
    keep_normed(normed, kept);
    if (get_group_id(0) == 0)
        EACH(i, rows * TOP_K)
            inner_most[i] = 0;
    __global const ROUTER *router = (__global const ROUTER *)layer->router;
    for (uint expert = get_group_id(0); expert < EXPERTS; expert += get_num_groups(0)) {
        float sums[TOKENS];
#pragma unroll
        for (uint r = 0; r < TOKENS; r++)
            sums[r] = 0;
#pragma unroll
        for (uint j = 0; j < FOURS; j++) {
            const uint four = item + j * ITEMS;
            float4 weight = (float4)(0);
            if (four < HIDDEN / 4) {
                const ulong at = expert * (ulong)HIDDEN + 4 * four;
                weight = (float4)(load_router(router, at), load_router(router, at + 1), load_router(router, at + 2),
                                  load_router(router, at + 3));
            }
#pragma unroll
            for (uint r = 0; r < TOKENS; r++)
                sums[r] += dot(weight, normed[r][j]);
        }
        sum_rows(sums, scratch);
        if (item == 0)
            for (uint r = 0; r < TOKENS; r++)
                if (r < rows)
                    logits[r * EXPERTS + expert] =
                        sums[r] + (layer->router_bias ? ((__global const float *)layer->router_bias)[expert] : 0);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
}

// The product of gate and up for one (token, choice) and 16 of the inner columns is a task of a team of waves.
__attribute__((always_inline)) static inline void project_inner(
    __global const Layer *layer, uint rows, bool normed_is_kept, __global const int *batch, __global float *x,
    __global const float *logits, __global int *ids, __global float *weights, __global float *inner,
    __global uint *inner_most, __local float *scratch, __local uint4 *kept, __local int *chosen, __local float *weighed,
    __local uint *most)
{
    const uint item = get_local_id(0), lane = item % WAVE, wave = item / WAVE;
    if (!normed_is_kept) {
        float4 normed[TOKENS][FOURS];
        norm_x(normed, rows, x, batch, 0, layer->ffn_norm, layer->norm_eps, scratch);
        keep_normed(normed, kept);
    }
    __local uint *words = (__local uint *)scratch;
    for (uint r = 0; r < rows; r++)
        route_token(r, logits, EXPERTS, TOP_K, NORMALISE, layer->routing_factor,
                    (__global const float *)layer->correction, NUM_GROUPS, TOPK_GROUPS, chosen, weighed,
                    (__local uint4 *)words, words + 4 * ((EXPERTS + 3) / 4) + 2 * ITEMS,
                    (__local float *)(words + 4 * ((EXPERTS + 3) / 4) + 2 * ITEMS + NUM_GROUPS),
                    (__local uint2 *)(words + 4 * ((EXPERTS + 3) / 4)));
    barrier(CLK_LOCAL_MEM_FENCE);
    if (get_group_id(0) == 0)
        EACH(i, rows * TOP_K)
        {
            ids[i] = chosen[i];
            weights[i] = weighed[i];
        }
#if RESIDENT
    for (uint pair = 0; pair < rows * TOP_K; pair++) {
        const uint expert = (uint)chosen[pair];
        prefetch_strip(layer->down[expert / EXPERTS_PER_PART] + expert % EXPERTS_PER_PART * (ulong)(4 * DOWN_WORDS),
                       HIDDEN / STRIP_N, INNER_BLOCKS, GROUPS_OF(INNER, DOWN_SHIFT), get_group_id(0));
    }
#endif
    const uint teams = STEP_WAVES / GATE_TEAM, team = wave / GATE_TEAM, member = wave % GATE_TEAM;
    const uint run = (HIDDEN_BLOCKS + GATE_TEAM - 1) / GATE_TEAM;
    const uint begin = min(member * run, (uint)HIDDEN_BLOCKS), end = min(begin + run, (uint)HIDDEN_BLOCKS);
    const uint strips = INNER / STRIP_N, tasks = rows * TOP_K * strips, all = get_num_groups(0) * teams;
    for (uint base = 0; base < tasks; base += all) {
        const uint task = base + team * get_num_groups(0) + get_group_id(0), pair = task / strips;
        Total totals[2 * TOTALS] = {0};
        EACH(i, teams)
            most[i] = 0;
        if (task < tasks) {
            const uint expert = (uint)chosen[pair];
            const ulong weights_at =
                layer->gate_up[expert / EXPERTS_PER_PART] + expert % EXPERTS_PER_PART * (ulong)(4 * GATE_WORDS);
            const Sections m =
                sections_of(weights_at, 2 * INNER / STRIP_N, HIDDEN_BLOCKS, GROUPS_OF(HIDDEN, GATE_SHIFT));
            products_of_local(totals, m, task % strips, strips, HIDDEN_BLOCKS, GROUPS_OF(HIDDEN, GATE_SHIFT),
                              GATE_SHIFT, HIDDEN, begin, end, lane, kept + pair / TOP_K * X_OCTETS);
            __local float *sums = scratch + wave * (QUADS * 32);
            EACH_SUM(totals, layer->gate_up_factor, sums, 32, 32, 1, lane, PUT_SET)
            EACH_SUM(totals + TOTALS, layer->gate_up_factor, sums + 16, 32, 32, 1, lane, PUT_SET)
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        EACH(i, teams * 16)
        {
            const uint its_team = i / 16, its_task = base + its_team * get_num_groups(0) + get_group_id(0);
            if (its_task < tasks) {
                __local const float *sums = scratch + its_team * (GATE_TEAM * QUADS * 32) + i % 16;
                const float value = activated(group_total(sums, GATE_TEAM * QUADS, 32),
                                              group_total(sums + 16, GATE_TEAM * QUADS, 32));
                inner[its_task / strips * (ulong)INNER + its_task % strips * STRIP_N + i % 16] = value;
                atomic_max(most + its_team, as_uint(value) & 0x7fffffffu);
            }
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        EACH(i, teams)
        {
            const uint its_task = base + i * get_num_groups(0) + get_group_id(0);
            if (its_task < tasks)
                atomic_max(inner_most + its_task / strips, most[i]);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
}

// A strip of all (token, choice) pairs is a work-group's. PARTS_OF_PAIR waves share a pair.
#define ALL_PAIRS (TOKENS * TOP_K)
#define PARTS_OF_PAIR (ALL_PAIRS < STEP_WAVES ? STEP_WAVES / ALL_PAIRS : 1)
__attribute__((always_inline)) static inline void project_down(__global const Layer *layer, bool is_last, uint rows,
                                                               __global float *x, __global const int *ids,
                                                               __global const float *weights,
                                                               __global const float *inner,
                                                               __global const uint *inner_most, __local float *scratch)
{
    const uint item = get_local_id(0), lane = item % WAVE, wave = item / WAVE;
#if RESIDENT
    if (!is_last)
        for (uint strip = get_group_id(0); strip < QKV / STRIP_N; strip += get_num_groups(0)) {
            const uint part = part_of_strip(strip);
            prefetch_strip(layer[1].qkv[part], layer[1].qkv_strips[part], HIDDEN_BLOCKS, GROUPS_OF(HIDDEN, QKV_SHIFT),
                           layer[1].qkv_first[part] + strip - first_strip_of(part));
        }
#endif
    const uint at_once = STEP_WAVES / PARTS_OF_PAIR, part = wave % PARTS_OF_PAIR;
    const uint run = (INNER_BLOCKS + PARTS_OF_PAIR - 1) / PARTS_OF_PAIR;
    const uint begin = min(part * run, (uint)INNER_BLOCKS), end = min(begin + run, (uint)INNER_BLOCKS);
    for (uint strip = get_group_id(0); strip < HIDDEN / STRIP_N; strip += get_num_groups(0)) {
        __local float *own = scratch + wave * (QUADS * TOKENS * 16);
        for (uint i = lane; i < QUADS * TOKENS * 16; i += WAVE)
            own[i] = 0;
        barrier(CLK_LOCAL_MEM_FENCE);
        for (uint pair = wave / PARTS_OF_PAIR; pair < rows * TOP_K; pair += at_once) {
            const uint expert = (uint)ids[pair];
            const int exponent = exponent_of_row(inner_most[pair]);
            const ulong weights_at =
                layer->down[expert / EXPERTS_PER_PART] + expert % EXPERTS_PER_PART * (ulong)(4 * DOWN_WORDS);
            const Sections m =
                sections_of(weights_at, HIDDEN / STRIP_N, INNER_BLOCKS, GROUPS_OF(INNER, DOWN_SHIFT));
            Total total[TOTALS] = {0};
            product_of_floats(total, m, strip, 0, INNER_BLOCKS, GROUPS_OF(INNER, DOWN_SHIFT), DOWN_SHIFT, INNER, begin,
                              end, lane, (__global const uint4 *)(inner + pair * (ulong)INNER),
                              ldexp(1.0f, -exponent));
            const float factor = ldexp(layer->down_factor, exponent) * weights[pair];
            EACH_SUM(total, factor, own + pair / TOP_K * 16, TOKENS * 16, 16, 1, lane, PUT_ADD)
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        EACH(i, rows * 16)
            x[i / 16 * (ulong)HIDDEN + strip * STRIP_N + i % 16] +=
                group_total(scratch + i, STEP_WAVES * QUADS, TOKENS * 16);
        barrier(CLK_LOCAL_MEM_FENCE);
    }
}

#define PHASES 7

#if RESIDENT
// Waits for all work-groups; false if they do not come, or have given up. state: work-groups that have arrived since the
// device was opened; 1 once a work-group has given up.
__attribute__((always_inline)) static inline bool all_arrive(__global uint *state, uint target, uint patience,
                                                             __local uint *failed)
{
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
    if (get_local_id(0) == 0) {
        uint waits = 0, given_up = 0;
        add_release(state);
        while ((int)(load_acquire(state) - target) < 0 && !given_up) {
            waits++;
            if (waits >= patience || (waits % 256 == 0 && load_acquire(state + 1)))
                given_up = 1;
        }
        if (given_up)
            atomic_max(state + 1, 1u);
        *failed = given_up;
    }
    barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);
    return !*failed;
}
#endif

// Arguments
//   batch               the step (decoder.cl)
//   layers              Layer [LAYERS]
//   embedding           its address
//   x, heads, logits, inner              float [TOKENS][HIDDEN], [TOKENS][QKV], [TOKENS][EXPERTS], [TOKENS * TOP_K][INNER]
//   attended            half [TOKENS][ATTENDED]
//   partial, stats      float [TOKENS][HEADS][splits][HEAD_DIM], float2 [TOKENS][HEADS][splits]
//   ids, weights, inner_most             int, float and uint [TOKENS][TOP_K]
//   rows                of this step
//   splits              runs into which the positions of each row are cut
//   first, last         phases: first to last - 1
//   state, target, patience              of all_arrive: the first target; loads of the counter until a work-group gives up
__attribute__((reqd_work_group_size(ITEMS, 1, 1))) __kernel void decoder_step(
    __global const int *batch, __global const Layer *layers, const ulong embedding, __global float *x,
    __global float *heads, __global half *attended, __global float *partial, __global float2 *stats,
    __global float *logits, __global int *ids, __global float *weights, __global float *inner,
    __global uint *inner_most, const uint rows, const uint splits, const uint first, const uint last,
    __global uint *state, const uint target, const uint patience)
{
    __local float4 memory[(LOCAL_FLOATS + 3) / 4];
    __local int chosen[TOKENS * TOP_K];
    __local float weighed[TOKENS * TOP_K];
    __local uint most[STEP_WAVES];
    __local uint failed;
    __local float *scratch = (__local float *)memory;
    __local uint4 *kept = (__local uint4 *)(scratch + (SCRATCH + 3) / 4 * 4);
    uint arrived = target;
    for (uint phase = first; phase < last; phase++) {
        const uint number = phase / PHASES, kind = phase % PHASES;
        __global const Layer *layer = layers + number;
        if (kind == 0)
            project_heads(layer, number == 0, rows, batch, embedding, x, heads, scratch, kept);
        else if (kind == 1)
            attend_step(layer, rows, splits, batch, heads, attended, partial, stats, scratch);
        else if (kind == 2) {
            if (splits == 1)
                continue;
            join_splits(rows, splits, attended, partial, stats, scratch);
        } else if (kind == 3)
            project_output(layer, rows, x, attended, scratch);
        else if (kind == 4)
            score_experts(layer, rows, batch, x, logits, inner_most, scratch, kept);
        else if (kind == 5)
            project_inner(layer, rows, phase > first, batch, x, logits, ids, weights, inner, inner_most, scratch, kept,
                          chosen, weighed, most);
        else
            project_down(layer, number + 1 == LAYERS, rows, x, ids, weights, inner, inner_most, scratch);
#if RESIDENT
        if (phase + 1 < last) {
            if (!all_arrive(state, arrived, patience, &failed))
                return;
            arrived += get_num_groups(0);
        }
#endif
    }
}
