// Rows of a step in one launch: sums over a work-group, RMS norm, and the wish for a later phase's weights.

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
        for (uint j = 0; j < WAVES; j++)
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
    float4 weights[FOURS]; // loaded together with x
#pragma unroll
    for (uint j = 0; j < FOURS; j++)
        weights[j] = vload4(min(item + j * ITEMS, HIDDEN / 4 - 1u), (__global const float *)norm);
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
    for (uint r = 0; r < TOKENS; r++) {
        const float factor = 1 / sqrt(squares[r] / HIDDEN + eps);
#pragma unroll
        for (uint j = 0; j < FOURS; j++)
            normed[r][j] *= weights[j] * factor;
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

// The blocks of K, from x to y - 1, of one of `members` waves that share them.
static inline uint2 share_of_blocks(uint blocks, uint members, uint member)
{
    const uint run = (blocks + members - 1) / members, begin = min(member * run, blocks);
    return (uint2)(begin, min(begin + run, blocks));
}

// The address of an expert whose stack lies in `parts`; `words` of it.
static inline ulong expert_address(__constant const ulong *parts, uint expert, ulong words)
{
    return parts[expert / EXPERTS_PER_PART] + expert % EXPERTS_PER_PART * (4 * words);
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
