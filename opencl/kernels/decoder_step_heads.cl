// The projections of attention in a step in one launch.

#if !DENSE
// Of the projections side by side: which one a strip belongs to, 0 query, 1 key, 2 value, and its first strip.
static inline uint part_of_strip(uint strip)
{
    return strip < QUERIES_WIDTH / STRIP_N ? 0 : strip < (QUERIES_WIDTH + NUM_KV_HEADS * HEAD_DIM) / STRIP_N ? 1 : 2;
}
static inline uint first_strip_of(uint part)
{
    return part == 0 ? 0 : (QUERIES_WIDTH + (part - 1) * NUM_KV_HEADS * HEAD_DIM) / STRIP_N;
}
#endif

__attribute__((always_inline)) static inline void project_heads(__constant Layer *layer, bool first, uint rows,
                                                                __global const int *batch, ulong table,
                                                                __global float *x, __global float *heads,
                                                                __local float *scratch, __local uint4 *kept)
{
#if DENSE
    __local float *floats = (__local float *)kept;
    {
        float4 normed[TOKENS][FOURS];
        norm_x(normed, rows, x, batch, first ? table : 0, layer->mixer_norm, layer->norm_eps, scratch);
        keep_floats(normed, floats);
    }
    project_dense(layer->qkv[0], layer->qkv_bias, QKV, HIDDEN, rows, false, heads, floats, scratch);
#else
    const uint item = get_local_id(0), lane = item % WAVE, wave = item / WAVE;
    const uint teams = WAVES / QKV_TEAM, team = wave / QKV_TEAM, member = wave % QKV_TEAM;
    const uint2 share = share_of_blocks(HIDDEN_BLOCKS, QKV_TEAM, member);
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
            const Sections m =
                sections_of(layer->qkv[part], layer->qkv_strips[part], HIDDEN_BLOCKS, GROUPS_OF(HIDDEN, QKV_SHIFT));
            product_of_local(total, m, layer->qkv_first[part] + strip - first_strip_of(part), 0, HIDDEN_BLOCKS,
                             GROUPS_OF(HIDDEN, QKV_SHIFT), QKV_SHIFT, HIDDEN, share.x, share.y, lane, kept);
            EACH_SUM(total, layer->qkv_factor[part], scratch + wave * (K_LANES * TOKENS * 16), TOKENS * 16, 16, TOKENS,
                     lane, PUT_SET)
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        EACH(i, teams * TOKENS * 16)
        {
            const uint its_team = i / (TOKENS * 16), r = i / 16 % TOKENS, c = i % 16;
            const uint its_strip = base + its_team * get_num_groups(0) + get_group_id(0);
            if (its_strip < strips && r < rows) {
                const uint column = its_strip * STRIP_N + c;
                float sum = group_total(scratch + its_team * (QKV_TEAM * K_LANES * TOKENS * 16) + r * 16 + c,
                                        QKV_TEAM * K_LANES, TOKENS * 16);
                if (layer->qkv_bias)
                    sum += ((__global const float *)layer->qkv_bias)[column];
                heads[r * (ulong)QKV + column] = sum;
            }
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
#endif
}

__attribute__((always_inline)) static inline void project_output(__constant Layer *layer, uint rows, __global float *x,
                                                                 __global const half *attended, __local float *scratch,
                                                                 __local uint4 *kept)
{
#if RESIDENT
    if (get_group_id(0) < EXPERTS)
        prefetch_bytes(layer->router + get_group_id(0) * (ulong)(HIDDEN * sizeof(ROUTER)), HIDDEN * sizeof(ROUTER));
#endif
#if DENSE
    __local float *floats = (__local float *)kept;
    EACH(i, rows * (ATTENDED / 8))
    vstore8(load8_1(attended, 8 * (ulong)i), i, floats);
    barrier(CLK_LOCAL_MEM_FENCE);
    project_dense(layer->o, layer->o_bias, HIDDEN, ATTENDED, rows, true, x, floats, scratch);
#else
    const uint item = get_local_id(0), lane = item % WAVE, wave = item / WAVE;
    const uint2 share = share_of_blocks(ATTENDED_BLOCKS, WAVES, wave);
    const Sections m = sections_of(layer->o, HIDDEN / STRIP_N, ATTENDED_BLOCKS, GROUPS_OF(ATTENDED, O_SHIFT));
    for (uint strip = get_group_id(0); strip < HIDDEN / STRIP_N; strip += get_num_groups(0)) {
        Total total[TOTALS] = {0};
        product_of_halves(total, m, strip, 0, ATTENDED_BLOCKS, GROUPS_OF(ATTENDED, O_SHIFT), O_SHIFT, ATTENDED, share.x,
                          share.y, lane, (__global const uint4 *)attended);
        EACH_SUM(total, layer->o_factor, scratch + wave * (K_LANES * TOKENS * 16), TOKENS * 16, 16, TOKENS, lane,
                 PUT_SET)
        barrier(CLK_LOCAL_MEM_FENCE);
        EACH(i, rows * 16)
        {
            const uint r = i / 16, column = strip * STRIP_N + i % 16;
            float sum = group_total(scratch + i, WAVES * K_LANES, TOKENS * 16);
            if (layer->o_bias)
                sum += ((__global const float *)layer->o_bias)[column];
            x[r * (ulong)HIDDEN + column] += sum;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
#endif
}
