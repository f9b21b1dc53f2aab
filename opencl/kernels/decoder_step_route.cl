// Routing of a whole step in one launch. Every work-group routes all rows: that takes less time than waiting for one.

#define PADDED (4 * ((EXPERTS + 3) / 4))
#if GROUPING
#define ROUTED_WORDS (PADDED + NUM_GROUPS + TOP_K + 2 * ITEMS)
#else
#define ROUTED_WORDS (TOKENS * (PADDED + 2 * WAVE + TOP_K))
#endif

#if !GROUPING
static inline uint largest_of_row(__local const uint *words)
{
    uint4 most = vload4(0, words);
#pragma unroll
    for (uint i = 1; i < WAVE / 4; i++)
        most = max(most, vload4(i, words));
    return max(max(most.x, most.y), max(most.z, most.w));
}

static inline float sum_of_row(__local const float *values)
{
    float4 sum = vload4(0, values);
#pragma unroll
    for (uint i = 1; i < WAVE / 4; i++)
        sum += vload4(i, values);
    return sum.x + sum.y + (sum.z + sum.w);
}
#endif

// Fills chosen and weighed, [rows][TOP_K], as `route` does. `words` holds ROUTED_WORDS.
__attribute__((always_inline)) static inline void route_rows(uint rows, __global const float *logits, float factor,
                                                             __global const float *correction, __local int *chosen,
                                                             __local float *weighed, __local uint *words)
{
#if GROUPING
    for (uint r = 0; r < rows; r++)
        route_token(r, logits, EXPERTS, TOP_K, NORMALISE, factor, 0, 0, correction, NUM_GROUPS, TOPK_GROUPS, chosen,
                    weighed, (__local uint4 *)words, words + PADDED + 2 * ITEMS,
                    (__local float *)(words + PADDED + 2 * ITEMS + NUM_GROUPS), (__local uint2 *)(words + PADDED));
#else
    __local uint *mosts = words + TOKENS * PADDED;
    __local float *sums = (__local float *)(mosts + TOKENS * WAVE), *picked = sums + TOKENS * WAVE;
    EACH(i, rows * PADDED)
    {
        const uint e = i % PADDED;
        const float logit = e < EXPERTS ? logits[i / PADDED * EXPERTS + e] : -INFINITY;
        words[i] = rank_of(isnan(logit) ? INFINITY : logit);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    EACH(i, rows * WAVE)
    {
        uint most = 0;
        for (uint e = i % WAVE; e < PADDED; e += WAVE)
            most = max(most, words[i / WAVE * PADDED + e]);
        mosts[i] = most;
    }
    barrier(CLK_LOCAL_MEM_FENCE);
#define LARGEST(r) float_of(largest_of_row(mosts + (r) * WAVE))
    EACH(i, rows * PADDED)
    {
        const uint e = i % PADDED;
        const float logit = float_of(words[i]); // of a row without NaN; other rows are bad
        const uint rank = rank_of(SCORING == SCORING_SOFTMAX_TOPK ? logit : weight_of(logit, LARGEST(i / PADDED)));
        words[i] = e < EXPERTS ? rank : SCORING == SCORING_SOFTMAX ? rank_of(0) : 0;
    }
    barrier(CLK_LOCAL_MEM_FENCE);
#if SCORING == SCORING_SOFTMAX
    EACH(i, rows * WAVE)
    {
        float sum = 0;
        for (uint e = i % WAVE; e < PADDED; e += WAVE)
            sum += as_float(words[i / WAVE * PADDED + e] & 0x7fffffffu); // scores are not negative
        sums[i] = sum;
    }
    barrier(CLK_LOCAL_MEM_FENCE);
#define SUM(r) sum_of_row(sums + (r) * WAVE)
#else
#define SUM(r) 1.0f
#endif
#if CORRECTED
    EACH(i, rows * PADDED)
    {
        const uint e = i % PADDED;
        words[i] = e < EXPERTS ? rank_of(float_of(words[i]) / SUM(i / PADDED) + correction[e]) : 0;
    }
    barrier(CLK_LOCAL_MEM_FENCE);
#endif
    EACH(i, rows * EXPERTS)
    {
        const uint r = i / EXPERTS, e = i % EXPERTS;
        __local const uint4 *fours = (__local const uint4 *)(words + r * PADDED);
        const uint own = words[r * PADDED + e];
        const float largest = LARGEST(r);
        // Experts that come before: with a larger rank, or the same rank and a smaller index.
        int4 minus_before = 0;
        uint4 index = (uint4)(0, 1, 2, 3);
#pragma unroll 8
        for (uint j = 0; j < PADDED / 4; j++, index += 4)
            minus_before += fours[j] > own + as_uint4(index < e);
        const uint place = -(minus_before.x + minus_before.y + minus_before.z + minus_before.w);
        if (place < TOP_K && own && !isinf(largest)) {
            chosen[r * TOP_K + place] = e;
#if SCORING == SCORING_SOFTMAX_TOPK
            picked[r * TOP_K + place] = float_of(own);
#elif CORRECTED
            picked[r * TOP_K + place] = weight_of(logits[i], largest) / SUM(r);
#else
            picked[r * TOP_K + place] = float_of(own) / SUM(r);
#endif
        }
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    EACH(i, rows * TOP_K)
    {
        const bool bad = isinf(LARGEST(i / TOP_K));
        if (bad)
            chosen[i] = i % TOP_K;
        weighed[i] = bad ? NAN : weight_of_pick(picked + i / TOP_K * TOP_K, i % TOP_K, TOP_K, NORMALISE) * factor;
    }
#endif
    barrier(CLK_LOCAL_MEM_FENCE);
}
