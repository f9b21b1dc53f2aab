// route: which experts each token goes to, and with what weights; the formula stands in marlin_cy/moe/routing.py.
//
// Not to be built with -cl-fast-relaxed-math or -cl-finite-math-only: NaN and infinities mean something here.
//
// Build options
//   SCORING    an expert's score, from its logit: 0 softmax, 1 softmax_topk (the logit itself; weights are the softmax
//              of the logits picked), 2 sigmoid
//   CORRECTED  1: experts are picked by score + bias, and weighed by the score alone
//   GROUPING   1: only experts of the topk_groups best groups are picked, and a group is as good as its best expert;
//              2: the same, and it is as good as the sum of its two best

// Work-items in a work-group: a power of two, one wave where waves are as wide or wider.
#ifndef ROUTE_ITEMS
#define ROUTE_ITEMS 32
#endif
#ifndef SCORING
#define SCORING 0
#endif
#ifndef CORRECTED
#define CORRECTED 0
#endif
#ifndef GROUPING
#define GROUPING 0
#endif
#define SOFTMAX 0
#define SOFTMAX_TOPK 1
#define SIGMOID 2

// Unsigned integers in the order of floats, equal where they are equal; 0 comes before all but NaNs.
static inline uint rank_of(float value)
{
    const uint bits = value == 0 ? 0 : as_uint(value);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

static inline float float_of(uint rank) { return as_float(rank >> 31 ? rank & 0x7fffffffu : ~rank); }

// An expert's key: the rank of what it is picked by, then how early it comes.
static inline ulong key_of(uint rank, uint expert) { return ((ulong)rank << 32) | ~expert; }

// The largest of what work-items have, for all of them. `values` is free again on return.
// PoCL 3.0 crashes when it has to inline a static function with barriers itself, after the compiler.
__attribute__((always_inline)) static inline ulong largest_of_items(ulong value, __local ulong *values)
{
    const uint me = get_local_id(0);
    values[me] = value;
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint half_size = ROUTE_ITEMS / 2; half_size > 0; half_size /= 2) {
        if (me < half_size)
            values[me] = max(values[me], values[me + half_size]);
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    value = values[0];
    barrier(CLK_LOCAL_MEM_FENCE);
    return value;
}

// Their sum, alike.
__attribute__((always_inline)) static inline float sum_of_items(float value, __local float *values)
{
    const uint me = get_local_id(0);
    values[me] = value;
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint half_size = ROUTE_ITEMS / 2; half_size > 0; half_size /= 2) {
        if (me < half_size)
            values[me] += values[me + half_size];
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    value = values[0];
    barrier(CLK_LOCAL_MEM_FENCE);
    return value;
}

// What an expert weighs, but for the sums by which weights are divided.
static inline float weight_of(float logit, float largest)
{
#if SCORING == SIGMOID
    return 1 / (1 + exp(-logit));
#else
    return exp(logit - largest);
#endif
}

#if GROUPING
// The two largest of two pairs, each with the larger first.
static inline uint2 two_largest(uint2 a, uint2 b)
{
    return (uint2)(max(a.x, b.x), max(min(a.x, b.x), max(a.y, b.y)));
}

// Makes the choices of experts 0 that lie in other groups than the topk_groups best; of equal groups the earlier is
// the better. `lanes` work-items look through one group.
//   choices   ranks [num_experts]
//   groups    room for ranks [num_groups]
__attribute__((always_inline)) static inline void close_groups(__local uint *choices, __local uint *groups,
                                                               uint num_experts, uint num_groups, uint topk_groups,
                                                               __local uint2 *pairs)
{
    const uint me = get_local_id(0), size = num_experts / num_groups, lanes = max(ROUTE_ITEMS / num_groups, 1u);
    const uint step = ROUTE_ITEMS / lanes, lane = me % lanes;
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint first = 0; first < num_groups; first += step) {
        const uint group = first + me / lanes;
        const bool exists = group < num_groups;
        uint2 best = (uint2)(0);
        if (exists)
            for (uint i = lane; i < size; i += lanes)
                best = two_largest(best, (uint2)(choices[group * size + i], 0));
        pairs[me] = best;
        barrier(CLK_LOCAL_MEM_FENCE);
        if (exists && lane == 0) {
            for (uint other = 1; other < lanes; other++)
                best = two_largest(best, pairs[me + other]);
            groups[group] = GROUPING == 2 ? rank_of(float_of(best.x) + float_of(best.y)) : best.x;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    for (uint group = me / lanes; group < num_groups; group += step) {
        const uint own = groups[group];
        uint better = 0;
        for (uint other = 0; other < num_groups; other++)
            better += groups[other] > own || (groups[other] == own && other < group);
        if (better >= topk_groups)
            for (uint i = lane; i < size; i += lanes)
                choices[group * size + i] = 0;
    }
    barrier(CLK_LOCAL_MEM_FENCE);
}
#endif

// The top_k best experts of each row of logits, best first, of equal ones the smaller index first, and their weights.
// One work-group a token. A NaN or +inf among the logits, or none but -inf, gives ids 0 to top_k - 1 with weights of
// NaN.
//   logits         INPUT [tokens][num_experts]
//   top_k          1 to num_experts
//   normalise      whether a token's weights are divided by their sum; 1 where SCORING is 1
//   factor         what they are multiplied by at the end
//   bias           float32 [num_experts] (CORRECTED), finite
//   num_groups     divides num_experts (GROUPING); topk_groups of them hold top_k experts or more
//   ids, weights   int32 and float32 [tokens][top_k]
//   choices        local uint [num_experts]; with GROUPING [num_experts + num_groups]
__attribute__((reqd_work_group_size(ROUTE_ITEMS, 1, 1)))
__kernel void route(__global const INPUT *restrict logits, const ulong logits_offset, const uint num_experts,
                    const uint top_k, const int normalise, const float factor, __global const float *restrict bias,
                    const uint num_groups, const uint topk_groups, __global int *restrict ids, const ulong ids_offset,
                    __global float *restrict weights, const ulong weights_offset, __local uint *restrict choices)
{
    __local float floats[ROUTE_ITEMS];
    __local ulong keys[ROUTE_ITEMS];
#if GROUPING
    __local uint2 pairs[ROUTE_ITEMS];
#endif
    const uint me = get_local_id(0);
    const ulong token = get_group_id(0);
    const ulong row = logits_offset + token * num_experts;
    ids += ids_offset + token * top_k;
    weights += weights_offset + token * top_k;

    float largest = -INFINITY;
    for (uint e = me; e < num_experts; e += ROUTE_ITEMS) {
        const float logit = load_input(logits, row + e);
        largest = fmax(largest, isnan(logit) ? INFINITY : logit);
    }
    largest = float_of(largest_of_items(rank_of(largest), keys));
    const bool bad = isinf(largest); // the same for all work-items, which do the same and drop the result

    float sum = 0.0f;
    for (uint e = me; e < num_experts; e += ROUTE_ITEMS) {
        const float logit = load_input(logits, row + e);
        const float score = SCORING == SOFTMAX_TOPK ? logit : weight_of(logit, largest);
        sum += score;
        choices[e] = rank_of(score);
    }
    sum = SCORING == SOFTMAX ? sum_of_items(sum, floats) : 1.0f;
#if CORRECTED
    for (uint e = me; e < num_experts; e += ROUTE_ITEMS)
        choices[e] = rank_of(float_of(choices[e]) / sum + bias[e]);
#endif
#if GROUPING
    close_groups(choices, choices + num_experts, num_experts, num_groups, topk_groups, pairs);
#endif

    // Each work-item holds the best of its own experts that were not picked, and looks for the next
    // one when that was: the largest key below the last one picked.
    float total = 0.0f;
    ulong own = ~0ul, picked = ~0ul;
    for (uint j = 0; j < top_k; j++) {
        if (own == picked) {
            own = 0;
            for (uint e = me; e < num_experts; e += ROUTE_ITEMS) {
                const ulong key = key_of(choices[e], e);
                own = max(own, key < picked ? key : 0ul);
            }
        }
        picked = largest_of_items(own, keys);
        const bool mine = j % ROUTE_ITEMS == me;
        if (mine)
            ids[j] = bad ? (int)j : (int)~(uint)picked;
#if !CORRECTED && SCORING != SOFTMAX_TOPK
        const float weight = float_of((uint)(picked >> 32)) / sum;
        total += weight;
        if (mine)
            weights[j] = weight;
#endif
    }
#if CORRECTED || SCORING == SOFTMAX_TOPK
    // What experts were picked by is not what they weigh.
#if SCORING == SOFTMAX_TOPK
    largest = -INFINITY;
    for (uint j = me; j < top_k; j += ROUTE_ITEMS)
        largest = fmax(largest, load_input(logits, row + ids[j]));
    largest = float_of(largest_of_items(rank_of(largest), keys));
#endif
    for (uint j = me; j < top_k; j += ROUTE_ITEMS) {
        const float weight = weight_of(load_input(logits, row + ids[j]), largest) / sum;
        total += weight;
        weights[j] = weight;
    }
    total = sum_of_items(total, floats);
#endif
    const float divisor = normalise ? total + 1e-20f : 1.0f;
    for (uint j = me; j < top_k; j += ROUTE_ITEMS)
        weights[j] = bad ? NAN : weights[j] / divisor * factor;
}
