// Networks that every row takes in a step in one launch: shared experts beside the routed ones, and dense layers in place of
// them. All rows meet the same weights, so a strip is one product of all rows.
//
//   inner         the rows of the network follow those of the experts: float [TOKENS][SHARED_INNER]
//   inner_most    and so do their largest magnitudes, uint [TOKENS]
//   weights       and the rows' factors, float [TOKENS]

#define SHARED_ROWS(inner) ((inner) + TOKENS * TOP_K * (ulong)INNER)
#define SHARED_MOST(inner_most) ((inner_most) + TOKENS * TOP_K)
#define SHARED_FACTORS(weights) ((weights) + TOKENS * TOP_K)
#define BLOCKS_OF(k) (((k) + BLOCK_K - 1) / BLOCK_K)

#if TENSOR
#define LOAD_SHARED(r, octet)                                                                \
    float8_to_halves(as_float4(load_early(rows + (r) * (k / 4) + 2 * (octet))) * factors[r], \
                     as_float4(load_early(rows + (r) * (k / 4) + 2 * (octet) + 1)) * factors[r])
#else
#define LOAD_SHARED(r, octet) (vload8((r) * (k / 8) + (octet), (__global const float *)rows) * factors[r])
#endif
DEFINE_STRIP_PRODUCT(product_of_shared, 1, O_DEPTH, TOKENS, 1, LOAD_SHARED, __global const uint4 *rows,
                     __local const float *factors)

static inline Sections shared_sections(__constant Layer *layer, uint part)
{
    return sections_of(layer->shared[part], layer->shared_strips[part], HIDDEN_BLOCKS,
                       GROUPS_OF(HIDDEN, layer->shared_shift[part]));
}

// The factors of the rows, by the first work-group: sigmoid of the product with a gate, or 1. `normed` as norm_x leaves it.
// The largest magnitudes are reset.
__attribute__((always_inline)) static inline void score_shared(__constant Layer *layer, uint rows,
                                                               const float4 normed[TOKENS][FOURS],
                                                               __global float *weights, __global uint *inner_most,
                                                               __local float *scratch)
{
    const uint item = get_local_id(0);
#if RESIDENT
    for (uint part = 0; part < 2; part++)
        for (uint strip = get_group_id(0); strip < layer->shared_inner / STRIP_N; strip += get_num_groups(0))
            prefetch_strip(layer->shared[part], layer->shared_strips[part], HIDDEN_BLOCKS,
                           GROUPS_OF(HIDDEN, layer->shared_shift[part]), layer->shared_first[part] + strip);
#endif
    if (get_group_id(0))
        return;
    EACH(r, rows)
    SHARED_MOST(inner_most)[r] = 0;
    float sums[TOKENS];
#pragma unroll
    for (uint r = 0; r < TOKENS; r++)
        sums[r] = 0;
    if (layer->shared_gate)
#pragma unroll
        for (uint j = 0; j < FOURS; j++) {
            const uint four = item + j * ITEMS;
            if (four < HIDDEN / 4) {
                const float4 weight = vload4(four, (__global const float *)layer->shared_gate);
#pragma unroll
                for (uint r = 0; r < TOKENS; r++)
                    sums[r] += dot(weight, normed[r][j]);
            }
        }
    sum_rows(sums, scratch);
    if (item == 0)
        for (uint r = 0; r < rows; r++)
            SHARED_FACTORS(weights)[r] = layer->shared_gate ? 1 / (1 + exp(-sums[r])) : 1;
    barrier(CLK_LOCAL_MEM_FENCE);
}

// Gate and up of 16 of the inner columns are a task of a team of waves. The last work-groups begin: the experts' tasks are
// dealt out from the first one on.
__attribute__((always_inline)) static inline void project_shared_inner(__constant Layer *layer, uint rows,
                                                                       bool normed_is_kept, __global const int *batch,
                                                                       __global float *x, __global float *inner,
                                                                       __global uint *inner_most,
                                                                       __local float *scratch, __local uint4 *kept)
{
    const uint item = get_local_id(0), lane = item % WAVE, wave = item / WAVE;
    if (!normed_is_kept) {
        float4 normed[TOKENS][FOURS];
        norm_x(normed, rows, x, batch, 0, layer->ffn_norm, layer->norm_eps, scratch);
        keep_normed(normed, kept);
    }
#if RESIDENT
    for (uint strip = get_group_id(0); strip < HIDDEN / STRIP_N; strip += get_num_groups(0))
        prefetch_strip(layer->shared[2], HIDDEN / STRIP_N, BLOCKS_OF(layer->shared_inner),
                       GROUPS_OF(layer->shared_inner, layer->shared_shift[2]), strip);
#endif
    const uint teams = WAVES / GATE_TEAM, team = wave / GATE_TEAM, member = wave % GATE_TEAM;
    const uint2 share = share_of_blocks(HIDDEN_BLOCKS, GATE_TEAM, member);
    const uint width = layer->shared_inner, strips = width / STRIP_N, all = get_num_groups(0) * teams;
    const uint group = get_num_groups(0) - 1 - get_group_id(0);
    for (uint base = 0; base < strips; base += all) {
        const uint strip = base + team * get_num_groups(0) + group;
        if (strip < strips) {
#pragma unroll 1
            for (uint part = 0; part < 2; part++) {
                Total total[TOTALS] = {0};
                product_of_local(total, shared_sections(layer, part), layer->shared_first[part] + strip, 0,
                                 HIDDEN_BLOCKS, GROUPS_OF(HIDDEN, layer->shared_shift[part]), layer->shared_shift[part],
                                 HIDDEN, share.x, share.y, lane, kept);
                EACH_SUM(total, layer->shared_factor[part], scratch + (wave * 2 + part) * (K_LANES * TOKENS * 16),
                         TOKENS * 16, 16, TOKENS, lane, PUT_SET)
            }
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        EACH(i, teams * TOKENS * 16)
        {
            const uint its_team = i / (TOKENS * 16), r = i / 16 % TOKENS, c = i % 16;
            const uint its_strip = base + its_team * get_num_groups(0) + group;
            if (its_strip < strips && r < rows) {
                float sums[2] = {0, 0};
                for (uint w = 0; w < GATE_TEAM; w++)
                    for (uint part = 0; part < 2; part++)
                        sums[part] += group_total(
                            scratch + ((its_team * GATE_TEAM + w) * 2 + part) * (K_LANES * TOKENS * 16) + r * 16 + c,
                            K_LANES, TOKENS * 16);
                const float value = activated(sums[0], sums[1]);
                SHARED_ROWS(inner)[r * (ulong)width + its_strip * STRIP_N + c] = value;
                atomic_max(SHARED_MOST(inner_most) + r, as_uint(value) & 0x7fffffffu);
            }
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
}

__attribute__((always_inline)) static inline void project_shared_down(__constant Layer *layer, uint rows,
                                                                      __global float *x, __global const float *weights,
                                                                      __global const float *inner,
                                                                      __global const uint *inner_most,
                                                                      __local float *scratch)
{
    const uint item = get_local_id(0), lane = item % WAVE, wave = item / WAVE, width = layer->shared_inner;
    const uint blocks = BLOCKS_OF(width), groups = GROUPS_OF(width, layer->shared_shift[2]);
    const uint2 share = share_of_blocks(blocks, WAVES, wave);
    __local float *factors = scratch + SCRATCH_SUMS;
    EACH(r, TOKENS)
    factors[r] = r < rows ? ldexp(1.0f, -exponent_of_row(SHARED_MOST(inner_most)[r])) : 0;
    barrier(CLK_LOCAL_MEM_FENCE);
    const Sections m = sections_of(layer->shared[2], HIDDEN / STRIP_N, blocks, groups);
    for (uint strip = get_group_id(0); strip < HIDDEN / STRIP_N; strip += get_num_groups(0)) {
        Total total[TOTALS] = {0};
        product_of_shared(total, m, strip, 0, blocks, groups, layer->shared_shift[2], width, share.x, share.y, lane,
                          (__global const uint4 *)SHARED_ROWS(inner), factors);
        EACH_SUM(total, layer->shared_factor[2], scratch + wave * (K_LANES * TOKENS * 16), TOKENS * 16, 16, TOKENS,
                 lane, PUT_SET)
        barrier(CLK_LOCAL_MEM_FENCE);
        EACH(i, rows * 16)
        {
            const uint r = i / 16;
            const float sum = group_total(scratch + i, WAVES * K_LANES, TOKENS * 16) * SHARED_FACTORS(weights)[r];
            x[r * (ulong)HIDDEN + strip * STRIP_N + i % 16] += ldexp(sum, exponent_of_row(SHARED_MOST(inner_most)[r]));
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
}
