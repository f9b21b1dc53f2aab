// The head of a step in one launch: logits, and the token of the largest one.

// A token that may be the best: its logit, and its number; NONE if there is none yet.
#define NONE 0xffffffffu
#define FOUND (2 * TOKENS + 1)
static inline void keep_better(float *best, uint *place, float value, uint number)
{
    if (number != NONE && (*place == NONE || value > *best || (value == *best && number < *place))) {
        *best = value;
        *place = number;
    }
}

DEFINE_PAIR_PRODUCT(pair_of_head, HEAD_TYPE)

// A wave has two columns of the head at a time.
//   vocabulary   float [TOKENS][VOCABULARY]: the logits
//   best         uint2 [work-groups][TOKENS]: the bits of the best logit of a work-group, and its token
__attribute__((always_inline)) static inline void score_vocabulary(__constant Layer *layers, uint rows,
                                                                   __global const int *batch, __global float *x,
                                                                   ulong norm, ulong head, __global float *vocabulary,
                                                                   __global uint2 *best, __local float *scratch,
                                                                   __local float *kept)
{
    const uint lane = get_local_id(0) % WAVE, wave = get_local_id(0) / WAVE;
    {
        float4 normed[TOKENS][FOURS];
        norm_x(normed, rows, x, batch, 0, norm, layers->norm_eps, scratch);
        keep_floats(normed, kept);
    }
    float bests[TOKENS];
    uint places[TOKENS];
#pragma unroll
    for (uint r = 0; r < TOKENS; r++) {
        bests[r] = -INFINITY;
        places[r] = NONE;
    }
    const uint waves = get_num_groups(0) * WAVES;
    for (uint base = 0; base < VOCABULARY; base += 2 * waves) {
        const uint first = base + 2 * (wave * get_num_groups(0) + get_group_id(0));
        Partial sums[2][TOKENS];
        pair_of_head(sums, head, first, VOCABULARY, HIDDEN, kept, lane);
#pragma unroll
        for (uint r = 0; r < TOKENS; r++)
#pragma unroll
            for (uint c = 0; c < 2; c++) {
                const float sum = lane_sum(sum_of_partial(sums[c][r]), scratch);
                if (r < rows && first + c < VOCABULARY) {
                    if (lane == 0)
                        vocabulary[r * (ulong)VOCABULARY + first + c] = sum;
                    keep_better(bests + r, places + r, sum, first + c);
                }
            }
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    __local uint *words = (__local uint *)scratch;
#pragma unroll
    for (uint r = 0; r < TOKENS; r++)
        if (lane == 0) {
            scratch[wave * TOKENS + r] = bests[r];
            words[(WAVES + wave) * TOKENS + r] = places[r];
        }
    barrier(CLK_LOCAL_MEM_FENCE);
    EACH(r, TOKENS)
    {
        float value = -INFINITY;
        uint place = NONE;
        for (uint w = 0; w < WAVES; w++)
            keep_better(&value, &place, scratch[w * TOKENS + r], words[(WAVES + w) * TOKENS + r]);
        best[get_group_id(0) * TOKENS + r] = (uint2)(as_uint(value), place);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
}

// The first work-group takes the best token of all work-groups, and makes `batch` the step that follows: each row has the
// token that was chosen, and the next position. A wave has a row.
//   found   uint [TOKENS][2] and one more: the token of a row, 0 if all its logits are NaN, and the bits of its logit; the
//           number of the step
__attribute__((always_inline)) static inline void choose_tokens(uint rows, __global const uint2 *best,
                                                                __global uint *found, uint number, __global int *batch,
                                                                __local float *scratch)
{
    __local uint *words = (__local uint *)scratch + TOKENS * WAVE;
    if (get_group_id(0))
        return;
    EACH(i, TOKENS * WAVE)
    {
        float value = -INFINITY;
        uint place = NONE;
        for (uint group = i % WAVE; group < get_num_groups(0); group += WAVE) {
            const uint2 its = best[group * TOKENS + i / WAVE];
            keep_better(&value, &place, as_float(its.x), its.y);
        }
        scratch[i] = value;
        words[i] = place;
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    EACH(r, rows)
    {
        float value = -INFINITY;
        uint place = NONE;
        for (uint i = 0; i < WAVE; i++)
            keep_better(&value, &place, scratch[r * WAVE + i], words[r * WAVE + i]);
        vstore2((uint2)(place, as_uint(value)), r, found);
        __global int *record = batch + STEP_ROWS + 4 * r;
        record[0] = (int)place;
        record[1]++;
        if (r == 0)
            found[2 * TOKENS] = number;
    }
    barrier(CLK_LOCAL_MEM_FENCE);
}
