// route_token: chooses a token's experts, and their weights. The formula is in marlin_cy/moe/routing.py.
//
// Do not build with -cl-fast-relaxed-math or -cl-finite-math-only: NaNs and infinities have a meaning here.
//
// Build options
//   ROUTE_ITEMS   work-items in a work-group
//   LOGITS_TYPE   element type of logits, as common.cl's INPUT_TYPE (0)
//   SCORING       one of SCORING_*: an expert's score from its logit. With SCORING_SOFTMAX_TOPK the score is the logit
//                 itself, and weights are the softmax of the picked logits. With SCORING_SPARSEMIXER the score is the
//                 logit itself too, and each weight is a softmax over the logits that were not picked before it, as far
//                 as they are near: see mixed_weight
//   CORRECTED     1: experts are picked by score + bias; weights are computed from the score alone
//   SCALED        1: an expert's weight is multiplied by its scale
//   GROUPING      one of GROUPING_*: with GROUPING_MAX and GROUPING_TOP2_SUM, experts are picked from the topk_groups
//                 best groups only. A group's score is its best expert's, or the sum of its two best experts'

#define SCORING_SOFTMAX 0
#define SCORING_SOFTMAX_TOPK 1
#define SCORING_SIGMOID 2
#define SCORING_SQRT_SOFTPLUS 3
#define SCORING_SPARSEMIXER 4
#define GROUPING_NONE 0
#define GROUPING_MAX 1
#define GROUPING_TOP2_SUM 2

#ifndef ROUTE_ITEMS
#define ROUTE_ITEMS 128
#endif
#ifndef LOGITS_TYPE
#define LOGITS_TYPE 0
#endif
#ifndef SCORING
#define SCORING SCORING_SOFTMAX
#endif
#ifndef CORRECTED
#define CORRECTED 0
#endif
#ifndef GROUPING
#define GROUPING GROUPING_NONE
#endif
#ifndef SCALED
#define SCALED 0
#endif
#define SCORE_IS_LOGIT (SCORING == SCORING_SOFTMAX_TOPK || SCORING == SCORING_SPARSEMIXER)
// Where route_token writes its choices.
#ifndef CHOSEN_SPACE
#define CHOSEN_SPACE __global
#endif
#define LOGIT JOIN(TYPE_, LOGITS_TYPE)
#define load_logit JOIN(load_, LOGITS_TYPE)

// The rank of a float: an unsigned integer. Ranks have the order of the floats, and equal floats have equal ranks.
// Every float but a NaN has a rank above 0.
static inline uint rank_of(float value)
{
    const uint bits = value == 0 ? 0 : as_uint(value);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

static inline float float_of(uint rank) { return as_float(rank >> 31 ? rank & 0x7fffffffu : ~rank); }

// An expert's weight before the division by a sum.
static inline float weight_of(float logit, float largest)
{
#if SCORING == SCORING_SIGMOID
    return 1 / (1 + exp(-logit));
#elif SCORING == SCORING_SQRT_SOFTPLUS
    return sqrt(logit > 40 ? logit : log1p(exp(logit)));
#else
    return exp(logit - largest);
#endif
}

#if SCORING == SCORING_SPARSEMIXER
// One over the sum of exp(logit - most) over all experts but those before expert `own` in order, and but those with
// most - logit > 2 * jitter * max(|logit|, most), where `most` is the logit of `own`.
static inline float mixed_weight(__global const LOGIT *logits, ulong row, uint num_experts, uint own, float jitter)
{
    const float most = load_logit(logits, row + own);
    float total = 0;
    for (uint e = 0; e < num_experts; e++) {
        const float logit = load_logit(logits, row + e);
        const bool before = logit > most || (logit == most && e < own);
        if (!before && most - logit <= 2 * jitter * fmax(fabs(logit), most))
            total += exp(logit - most);
    }
    return 1 / total;
}
#endif

#if GROUPING
// The two largest of four numbers, the larger first. Each pair has its larger number first.
static inline uint2 two_largest(uint2 a, uint2 b) { return (uint2)(max(a.x, b.x), max(min(a.x, b.x), max(a.y, b.y))); }

// Sets the choices of experts outside the topk_groups best groups to 0. Of equal groups the earlier one is better.
// `lanes` work-items read one group.
//   choices   ranks [num_experts]
//   groups    ranks [num_groups], written here
__attribute__((always_inline)) static inline void mask_groups(__local uint *choices, __local uint *groups,
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
            groups[group] = GROUPING == GROUPING_TOP2_SUM ? rank_of(float_of(best.x) + float_of(best.y)) : best.x;
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

// The weight of choice j among a row's choices, from their weights before the division (SCORING_SOFTMAX_TOPK: logits).
static inline float weight_of_pick(__local const float *picked, uint j, uint top_k, int normalise)
{
    float largest = picked[0], total = 0;
#if SCORING == SCORING_SOFTMAX_TOPK
    for (uint i = 1; i < top_k; i++)
        largest = fmax(largest, picked[i]);
#define PICKED_WEIGHT(i) exp(picked[i] - largest)
#else
#define PICKED_WEIGHT(i) picked[i]
#endif
    for (uint i = 0; i < top_k; i++)
        total += PICKED_WEIGHT(i);
    return PICKED_WEIGHT(j) / (normalise ? total + 1e-20f : 1.0f);
}

// The top_k best experts of each row of logits, best first, and their weights. Of equal experts the smaller index comes
// first. There is a work-group for each token. If a row has a NaN or +inf, or only -inf, its ids are 0 to top_k - 1 and
// its weights NaN. Each work-item compares its experts with all others, four at a time: this takes fewer steps than
// sharing the comparisons, which needs barriers for each of the top_k experts.
//   logits         LOGIT [tokens][num_experts]
//   top_k          1 to num_experts
//   normalise      whether a token's weights are divided by their sum; 1 with SCORING_SOFTMAX_TOPK, 0 with SCORING_SPARSEMIXER
//   factor         the weights are multiplied by it at the end
//   scale          float32 [num_experts] (SCALED), finite
//   jitter         (SCORING_SPARSEMIXER)
//   bias           float32 [num_experts] (CORRECTED), finite
//   num_groups     divides num_experts (GROUPING); topk_groups groups have at least top_k experts
//   ids, weights   int32 and float32 [tokens][top_k]
//   fours          local uint4 [num_experts / 4, rounded up]: a rank of each expert
//   groups         local uint [num_groups] (GROUPING)
//   picked         local float [top_k]
// ids is not restrict, as route_align reads ids that other work-groups wrote.
#define ROUTE_ARGS                                                                                              \
    __global const LOGIT *restrict logits, const ulong logits_offset, const uint num_experts, const uint top_k, \
        const int normalise, const float factor, __global const float *restrict scale, const float jitter,      \
        __global const float *restrict bias, const uint num_groups, const uint topk_groups, __global int *ids,  \
        const ulong ids_offset, __global float *restrict weights, const ulong weights_offset,                   \
        __local uint4 *restrict fours, __local uint *restrict groups, __local float *restrict picked
// The arguments of ROUTE_ARGS that route_token takes.
#define ROUTE_NAMES                                                                                              \
    logits + logits_offset, num_experts, top_k, normalise, factor, scale, jitter, bias, num_groups, topk_groups, \
        ids + ids_offset, weights + weights_offset, fours, groups, picked

// Routes one token; called by a whole work-group.
//   pairs   local uint2 [ROUTE_ITEMS] (GROUPING)
__attribute__((always_inline)) static inline void route_token(
    ulong token, __global const LOGIT *logits, uint num_experts, uint top_k, int normalise, float factor,
    __global const float *scale, float jitter, __global const float *bias, uint num_groups, uint topk_groups,
    CHOSEN_SPACE int *ids, CHOSEN_SPACE float *weights, __local uint4 *fours, __local uint *groups,
    __local float *picked, __local uint2 *pairs)
{
    __local uint *choices = (__local uint *)fours;
    const uint me = get_local_id(0), num_fours = (num_experts + 3) / 4;
    const ulong row = token * num_experts;
    ids += token * top_k;
    weights += token * top_k;

    for (uint e = me; e < 4 * num_fours; e += ROUTE_ITEMS) {
        const float logit = e < num_experts ? load_logit(logits, row + e) : -INFINITY;
        choices[e] = rank_of(isnan(logit) ? INFINITY : logit);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    uint4 most = fours[0];
    for (uint i = 1; i < num_fours; i++)
        most = max(most, fours[i]);
    const float largest = float_of(max(max(most.x, most.y), max(most.z, most.w)));
    const bool bad = isinf(largest); // the same for all work-items
    barrier(CLK_LOCAL_MEM_FENCE);

    // The padding of the last four experts is never picked. With softmax it has a score of 0, which adds nothing to the
    // sum and comes after all other scores of 0; otherwise it has rank 0.
    for (uint e = me; e < 4 * num_fours; e += ROUTE_ITEMS) {
        const float logit = e < num_experts ? load_logit(logits, row + e) : 0;
        const uint rank = rank_of(SCORE_IS_LOGIT ? logit : weight_of(logit, largest));
        choices[e] = e < num_experts ? rank : SCORING == SCORING_SOFTMAX ? rank_of(0) : 0;
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    float sum = 1;
#if SCORING == SCORING_SOFTMAX
    float4 sums = 0;
    for (uint i = 0; i < num_fours; i++)
        sums += as_float4(fours[i] & 0x7fffffffu); // float_of, for scores that are not negative
    sum = sums.x + sums.y + sums.z + sums.w;
#endif
#if CORRECTED
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint e = me; e < 4 * num_fours; e += ROUTE_ITEMS)
        choices[e] = e < num_experts ? rank_of(float_of(choices[e]) / sum + bias[e]) : 0;
    barrier(CLK_LOCAL_MEM_FENCE);
#endif
#if GROUPING
    mask_groups(choices, groups, num_experts, num_groups, topk_groups, pairs);
#endif

    for (uint e = me; e < num_experts; e += ROUTE_ITEMS) {
        const uint own = choices[e];
        if (own == 0)
            continue;
        // Counts the experts that come before: with a larger rank, or the same rank and a smaller index. A comparison
        // of vectors is -1 where it is true.
        int4 minus_before = 0;
        uint4 index = (uint4)(0, 1, 2, 3);
        for (uint i = 0; i < num_fours; i++, index += 4)
            minus_before += fours[i] > own + as_uint4(index < e);
        const uint place = -(minus_before.x + minus_before.y + minus_before.z + minus_before.w);
        if (place < top_k && !bad) {
            ids[place] = e;
#if SCORING == SCORING_SPARSEMIXER
            picked[place] = mixed_weight(logits, row, num_experts, e, jitter);
#elif SCORING == SCORING_SOFTMAX_TOPK
            picked[place] = load_logit(logits, row + e);
#elif CORRECTED
            picked[place] = weight_of(load_logit(logits, row + e), largest) / sum;
#else
            picked[place] = float_of(own) / sum;
#endif
        }
    }
    barrier(SCALED ? CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE : CLK_LOCAL_MEM_FENCE); // ids are read again below
    for (uint j = me; j < top_k; j += ROUTE_ITEMS) {
        if (bad)
            ids[j] = j;
        const float own_scale = SCALED && !bad ? scale[ids[j]] : 1;
        weights[j] = bad ? NAN : weight_of_pick(picked, j, top_k, normalise) * factor * own_scale;
    }
}
