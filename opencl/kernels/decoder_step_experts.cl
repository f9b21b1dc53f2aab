// The feed-forward network of a step in one launch: router, experts, and their weighted sum.

__attribute__((always_inline)) static inline void score_experts(__constant Layer *layer, uint rows,
                                                                __global const int *batch, __global float *x,
                                                                __global float *logits, __global uint *inner_most,
                                                                __global float *weights, __local float *scratch,
                                                                __local uint4 *kept)
{
    const uint item = get_local_id(0);
    float4 normed[TOKENS][FOURS];
    norm_x(normed, rows, x, batch, 0, layer->ffn_norm, layer->norm_eps, scratch);
    keep_normed(normed, kept);
    if (get_group_id(0) == 0)
        EACH(i, rows * TOP_K)
    inner_most[i] = 0;
#if SHARED
    score_shared(layer, rows, normed, weights, inner_most, scratch);
    if (layer->is_dense)
        return;
#endif
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
    __constant Layer *layer, uint rows, bool normed_is_kept, __global const int *batch, __global float *x,
    __global const float *logits, __global int *ids, __global float *weights, __global float *inner,
    __global uint *inner_most, __local float *scratch, __local uint4 *kept, __local int *chosen, __local float *weighed)
{
    const uint item = get_local_id(0), lane = item % WAVE, wave = item / WAVE;
    if (!normed_is_kept) {
        float4 normed[TOKENS][FOURS];
        norm_x(normed, rows, x, batch, 0, layer->ffn_norm, layer->norm_eps, scratch);
        keep_normed(normed, kept);
    }
    route_rows(rows, logits, layer->routing_factor, (__global const float *)layer->correction, chosen, weighed,
               (__local uint *)scratch);
    if (get_group_id(0) == 0)
        EACH(i, rows * TOP_K)
        {
            ids[i] = chosen[i];
            weights[i] = weighed[i];
        }
#if RESIDENT
    for (uint pair = 0; pair < rows * TOP_K; pair++)
        prefetch_strip(expert_address(layer->down, (uint)chosen[pair], DOWN_WORDS), HIDDEN / STRIP_N, INNER_BLOCKS,
                       GROUPS_OF(INNER, DOWN_SHIFT), get_group_id(0));
#endif
    const uint teams = WAVES / GATE_TEAM, team = wave / GATE_TEAM, member = wave % GATE_TEAM;
    const uint2 share = share_of_blocks(HIDDEN_BLOCKS, GATE_TEAM, member);
    const uint strips = INNER / STRIP_N, tasks = rows * TOP_K * strips, all = get_num_groups(0) * teams;
    for (uint base = 0; base < tasks; base += all) {
        const uint task = base + team * get_num_groups(0) + get_group_id(0), pair = task / strips;
        Total totals[2 * TOTALS] = {0};
        if (task < tasks) {
            const Sections m = sections_of(expert_address(layer->gate_up, (uint)chosen[pair], GATE_WORDS),
                                           2 * INNER / STRIP_N, HIDDEN_BLOCKS, GROUPS_OF(HIDDEN, GATE_SHIFT));
            products_of_local(totals, m, task % strips, strips, HIDDEN_BLOCKS, GROUPS_OF(HIDDEN, GATE_SHIFT),
                              GATE_SHIFT, HIDDEN, share.x, share.y, lane, kept + pair / TOP_K * X_OCTETS);
            __local float *sums = scratch + wave * (K_LANES * 32);
            EACH_SUM(totals, layer->gate_up_factor, sums, 32, 32, 1, lane, PUT_SET)
            EACH_SUM(totals + TOTALS, layer->gate_up_factor, sums + 16, 32, 32, 1, lane, PUT_SET)
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        EACH(i, teams * 16)
        {
            const uint its_task = base + i / 16 * get_num_groups(0) + get_group_id(0);
            uint magnitude = 0;
            if (its_task < tasks) {
                __local const float *sums = scratch + i / 16 * (GATE_TEAM * K_LANES * 32) + i % 16;
                float gate = group_total(sums, GATE_TEAM * K_LANES, 32);
                float up = group_total(sums + 16, GATE_TEAM * K_LANES, 32);
#if EXPERT_BIASES
                __global const float *bias = (__global const float *)layer->gate_up_bias +
                                             (uint)chosen[its_task / strips] * (2ul * INNER) +
                                             its_task % strips * STRIP_N + i % 16;
                gate += bias[0];
                up += bias[INNER];
#endif
                const float value = activated(gate, up);
                inner[its_task / strips * (ulong)INNER + its_task % strips * STRIP_N + i % 16] = value;
                magnitude = as_uint(value) & 0x7fffffffu;
            }
#if TENSOR // the sixteen columns are lanes of one wave
            UNROLLED for (uint mask = 1; mask < 16; mask *= 2) magnitude =
                max(magnitude, as_uint(exchange(as_float(magnitude), mask)));
            const bool counts = i % 16 == 0;
#else
            const bool counts = true;
#endif
            if (counts && its_task < tasks)
                atomic_max(inner_most + its_task / strips, magnitude);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
}

// A strip of all (token, choice) pairs is a work-group's. PARTS_OF_PAIR waves share a pair.
#define ALL_PAIRS (TOKENS * TOP_K)
#define PARTS_OF_PAIR (ALL_PAIRS < WAVES ? WAVES / ALL_PAIRS : 1)
__attribute__((always_inline)) static inline void project_down(__constant Layer *layer, bool is_last, uint rows,
                                                               bool choices_are_kept, __global float *x,
                                                               __global const int *ids, __global const float *weights,
                                                               __global const float *inner,
                                                               __global const uint *inner_most, __local float *scratch,
                                                               __local int *chosen, __local float *weighed)
{
    const uint item = get_local_id(0), lane = item % WAVE, wave = item / WAVE;
    if (!choices_are_kept) {
        EACH(i, rows * TOP_K)
        {
            chosen[i] = ids[i];
            weighed[i] = weights[i];
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
#if RESIDENT
    if (!is_last) {
        if (get_group_id(0) == get_num_groups(0) - 1) {
            prefetch_bytes(layer[1].mixer_norm, 4 * HIDDEN);
            prefetch_bytes(layer[1].ffn_norm, 4 * HIDDEN);
        }
#if !DENSE
        for (uint strip = get_group_id(0); strip < QKV / STRIP_N; strip += get_num_groups(0)) {
            const uint part = part_of_strip(strip);
            prefetch_strip(layer[1].qkv[part], layer[1].qkv_strips[part], HIDDEN_BLOCKS, GROUPS_OF(HIDDEN, QKV_SHIFT),
                           layer[1].qkv_first[part] + strip - first_strip_of(part));
        }
#endif
    }
#endif
    const uint at_once = WAVES / PARTS_OF_PAIR, part = wave % PARTS_OF_PAIR;
    const uint2 share = share_of_blocks(INNER_BLOCKS, PARTS_OF_PAIR, part);
    for (uint strip = get_group_id(0); strip < HIDDEN / STRIP_N; strip += get_num_groups(0)) {
        __local float *own = scratch + wave * (K_LANES * TOKENS * 16);
        for (uint i = lane; i < K_LANES * TOKENS * 16; i += WAVE)
            own[i] = 0;
        barrier(CLK_LOCAL_MEM_FENCE);
        for (uint pair = wave / PARTS_OF_PAIR; pair < rows * TOP_K; pair += at_once) {
            const int exponent = exponent_of_row(inner_most[pair]);
            const Sections m = sections_of(expert_address(layer->down, (uint)chosen[pair], DOWN_WORDS),
                                           HIDDEN / STRIP_N, INNER_BLOCKS, GROUPS_OF(INNER, DOWN_SHIFT));
            Total total[TOTALS] = {0};
            product_of_floats(total, m, strip, 0, INNER_BLOCKS, GROUPS_OF(INNER, DOWN_SHIFT), DOWN_SHIFT, INNER,
                              share.x, share.y, lane, (__global const uint4 *)(inner + pair * (ulong)INNER),
                              ldexp(1.0f, -exponent));
            const float factor = ldexp(layer->down_factor, exponent) * weighed[pair];
            EACH_SUM(total, factor, own + pair / TOP_K * 16, TOKENS * 16, 16, 1, lane, PUT_ADD)
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        EACH(i, rows * 16)
        {
            float sum = group_total(scratch + i, WAVES * K_LANES, TOKENS * 16);
#if EXPERT_BIASES
            __global const float *bias = (__global const float *)layer->down_bias + strip * STRIP_N + i % 16;
            for (uint pair = i / 16 * TOP_K; pair < (i / 16 + 1) * TOP_K; pair++)
                sum = fma(weighed[pair], bias[(uint)chosen[pair] * (ulong)HIDDEN], sum);
#endif
            x[i / 16 * (ulong)HIDDEN + strip * STRIP_N + i % 16] += sum;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
}
