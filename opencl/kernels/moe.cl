// The Mixture-of-Experts layer around its two products: grouping by expert, weighing, combination. Routing is in
// routing.cl.
//
// Not to be built with -cl-fast-relaxed-math or -cl-finite-math-only: NaN means something here.
//
// Build options
//   WEIGHTED   0: `combine` takes all weights for 1
//   SHARED     1: `combine` starts from a shared expert's rows; 2: from these times the token's factor; 0: from zero

// Work-items in a group of `align` and of `shared_factor`: powers of two.
#ifndef ALIGN_ITEMS
#define ALIGN_ITEMS 256
#endif
#ifndef FACTOR_ITEMS
#define FACTOR_ITEMS 256
#endif
#ifndef WEIGHTED
#define WEIGHTED 1
#endif
#ifndef SHARED
#define SHARED 0
#endif

// Grouping by expert ---------------------------------------------------------------------------

// Pairs (of a token and a choice) whose experts are looked at at a time: a bit each in local memory.
#define TILE_WORDS (4 * ALIGN_ITEMS)
#define TILE_PAIRS (32 * TILE_WORDS)

// Sum over the work-items before this one, and over all. `sums` is free again on return.
// PoCL 3.0 crashes when it has to inline a static function with barriers itself, after the compiler.
__attribute__((always_inline)) static inline uint2 sums_over_group(uint value, __local uint *sums)
{
    uint me = get_local_id(0);
    sums[me] = value;
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint distance = 1; distance < ALIGN_ITEMS; distance *= 2) {
        uint before = me >= distance ? sums[me - distance] : 0;
        barrier(CLK_LOCAL_MEM_FENCE);
        sums[me] += before;
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    uint2 result = (uint2)(sums[me] - value, sums[ALIGN_ITEMS - 1]);
    barrier(CLK_LOCAL_MEM_FENCE);
    return result;
}

// vLLM's moe_align_block_size, up to *past; what lies beyond is left as it was. One work-group an
// expert. Each counts the pairs of all experts, to know where its own slots begin, then marks its own
// pairs, a bit each, and writes them in ascending order. Nothing passes between work-groups, so one
// launch does it.
//   ids          int32 [pairs]; those that are not 0 to num_experts - 1 take no part
//   sorted_ids   int32 [pairs + num_experts * (block_size - 1)]; padding is `pairs`
//   expert_ids   int32 [a block_size-th of that]
//   past         int32 [1]: slots used
//   counts       local uint [num_experts]
// All numbers of slots are below 2^31.
__attribute__((reqd_work_group_size(ALIGN_ITEMS, 1, 1)))
__kernel void align(__global const int *restrict ids, const ulong ids_offset, const uint pairs,
                    const uint num_experts, const uint block_size, __global int *restrict sorted_ids,
                    const ulong sorted_offset, __global int *restrict expert_ids, const ulong expert_offset,
                    __global int *restrict past, const ulong past_offset, __local uint *restrict counts)
{
    __local uint marks[TILE_WORDS];
    __local uint sums[ALIGN_ITEMS];
    __local uint first_block;
    const uint me = get_local_id(0), expert = get_group_id(0);
    ids += ids_offset;
    sorted_ids += sorted_offset;

    for (uint e = me; e < num_experts; e += ALIGN_ITEMS)
        counts[e] = 0;
    if (me == 0)
        first_block = 0;
    barrier(CLK_LOCAL_MEM_FENCE);
    // Four at a time, to have as many loads under way.
    for (uint pair = me; pair < pairs; pair += 4 * ALIGN_ITEMS) {
        uint e[4];
        for (uint i = 0; i < 4; i++)
            e[i] = pair + i * ALIGN_ITEMS < pairs ? (uint)ids[pair + i * ALIGN_ITEMS] : ~0u;
        for (uint i = 0; i < 4; i++)
            if (e[i] < num_experts)
                atomic_inc(&counts[e[i]]);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    uint before = 0;
    for (uint e = me; e < expert; e += ALIGN_ITEMS)
        before += (counts[e] + block_size - 1) / block_size;
    if (before)
        atomic_add(&first_block, before);
    barrier(CLK_LOCAL_MEM_FENCE);
    const uint count = counts[expert], blocks = (count + block_size - 1) / block_size;
    __global int *slots = sorted_ids + (ulong)first_block * block_size;

    for (uint begin = 0, written = 0; written < count; begin += TILE_PAIRS) {
        for (uint i = 4 * me; i < 4 * me + 4; i++) // those that this work-item alone reads
            marks[i] = 0;
        barrier(CLK_LOCAL_MEM_FENCE);
        uint end = min(pairs - begin, (uint)TILE_PAIRS);
        for (uint i = me; i < end; i += 4 * ALIGN_ITEMS) {
            bool mine[4];
            for (uint j = 0; j < 4; j++)
                mine[j] = i + j * ALIGN_ITEMS < end && (uint)ids[begin + i + j * ALIGN_ITEMS] == expert;
            for (uint j = 0; j < 4; j++)
                if (mine[j])
                    atomic_or(&marks[(i + j * ALIGN_ITEMS) / 32], 1u << (i + j * ALIGN_ITEMS) % 32);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        uint own = 0;
        for (uint i = 4 * me; i < 4 * me + 4; i++)
            own += popcount(marks[i]);
        uint2 marked = sums_over_group(own, sums);
        uint slot = written + marked.x;
        for (uint i = 4 * me; i < 4 * me + 4; i++)
            for (uint left = marks[i]; left != 0; left &= left - 1)
                slots[slot++] = (int)(begin + 32 * i + 31 - clz(left & -left));
        written += marked.y;
    }
    for (uint slot = count + me; slot < blocks * block_size; slot += ALIGN_ITEMS)
        slots[slot] = (int)pairs;
    for (uint block = me; block < blocks; block += ALIGN_ITEMS)
        expert_ids[expert_offset + first_block + block] = (int)expert;
    if (expert == num_experts - 1 && me == 0)
        past[past_offset] = (int)((first_block + blocks) * block_size);
}

// Weighing -------------------------------------------------------------------------------------

// output[token] = weights[token] * input[token]: what experts are given where a token is weighed beforehand.
// tokens work-groups of any local size.
//   input     INPUT [tokens][width]; width is a multiple of 8
//   weights   float32 [tokens]
//   output    float32 [tokens][width]
__kernel void weigh_tokens(__global const INPUT *restrict input, const ulong input_offset,
                           __global const float *restrict weights, const ulong weights_offset,
                           __global float *restrict output, const uint width)
{
    const ulong token = get_group_id(0);
    const float weight = weights[weights_offset + token];
    input += input_offset + token * width;
    output += token * width;
    for (uint octet = get_local_id(0); octet < width / 8; octet += get_local_size(0))
        vstore8(weight * load8_input(input, 8 * octet), octet, output);
}

// factors[token] = 1 / (1 + exp(-sum over i of input[token][i] * gate[i])): how much of a shared expert a token gets.
// tokens work-groups.
//   input     INPUT [tokens][width]
//   gate      float32 [width]
//   factors   float32 [tokens]
__attribute__((reqd_work_group_size(FACTOR_ITEMS, 1, 1)))
__kernel void shared_factor(__global const INPUT *restrict input, const ulong input_offset,
                            __global const float *restrict gate, __global float *restrict factors, const uint width)
{
    __local float sums[FACTOR_ITEMS];
    const uint me = get_local_id(0);
    const ulong token = get_group_id(0), row = input_offset + token * width;
    float sum = 0.0f;
    for (uint i = me; i < width; i += FACTOR_ITEMS)
        sum = fma(load_input(input, row + i), gate[i], sum);
    sums[me] = sum;
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint half_size = FACTOR_ITEMS / 2; half_size > 0; half_size /= 2) {
        if (me < half_size)
            sums[me] += sums[me + half_size];
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    if (me == 0)
        factors[token] = 1 / (1 + exp(-sums[0]));
}

// Combination ----------------------------------------------------------------------------------

// Elements 4 i to 4 i + 3 of aligned rows.
#if INPUT_TYPE == 0
#define load_four(p, i) (((__global const float4 *)(p))[i])
#elif INPUT_TYPE == 1
#define load_four(p, i) vloada_half4(i, p)
#else
#define load_four(p, i) as_float4(convert_uint4(((__global const ushort4 *)(p))[i]) << 16)
#endif

// output[token] = sum over j of weights[token][j] * input[token * top_k + j], j ascending, a chain of
// fused multiply-adds from zero, or from what a shared expert gave. Rows whose id is no expert are left out,
// whatever they hold.
//
// A work-item sums four columns of a token: local size any, `groups_per_token` =
// ceil(width / (4 * local size)), tokens * groups_per_token work-groups.
//   input     [tokens * top_k][width]; input_offset is a multiple of 4, as is width
//   shared    INPUT [tokens][width] (SHARED)
//   factors   float32 [tokens] (SHARED 2)
//   output    [tokens][width]
__kernel void combine(__global const INPUT *restrict input, const ulong input_offset,
                      __global const int *restrict ids, const ulong ids_offset,
                      __global const float *restrict weights, const ulong weights_offset, const uint num_experts,
                      const uint top_k, __global const INPUT *restrict shared,
                      __global const float *restrict factors, __global OUTPUT *restrict output,
                      const ulong output_offset, const uint width, const uint groups_per_token)
{
    const uint fours = width / 4;
    const ulong token = get_group_id(0) / groups_per_token;
    const uint four = get_group_id(0) % groups_per_token * get_local_size(0) + get_local_id(0);
    if (four >= fours)
        return;
    ids += ids_offset + token * top_k;
    weights += weights_offset + token * top_k;
    input += input_offset + token * top_k * width;

#if SHARED
    float4 sum = load_four(shared, token * fours + four);
#if SHARED == 2
    sum *= factors[token];
#endif
#else
    float4 sum = (float4)(0.0f);
#endif
    // Four rows at a time, to have as many loads under way; what need not be added is loaded all the same.
    for (uint begin = 0; begin < top_k; begin += 4) {
        bool chosen[4];
        float weight[4];
        float4 product[4];
        for (uint i = 0; i < 4; i++) {
            uint j = min(begin + i, top_k - 1);
            chosen[i] = begin + i < top_k && (uint)ids[j] < num_experts;
            weight[i] = WEIGHTED ? weights[j] : 1.0f;
            product[i] = load_four(input, (ulong)j * fours + four);
        }
        for (uint i = 0; i < 4; i++)
            sum = chosen[i] ? fma((float4)(weight[i]), product[i], sum) : sum;
    }
    const ulong place = output_offset + token * width + 4 * (ulong)four;
    store_output(sum.x, output, place);
    store_output(sum.y, output, place + 1);
    store_output(sum.z, output, place + 2);
    store_output(sum.w, output, place + 3);
}
