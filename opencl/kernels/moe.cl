// The parts of a Mixture-of-Experts layer around its two products: weighing of tokens and combination. Routing is in
// routing.cl, grouping by expert in align.cl.
//
// Do not build with -cl-fast-relaxed-math or -cl-finite-math-only: NaNs have a meaning here.
//
// Build options
//   FACTOR_ITEMS   work-items in a work-group of `shared_factor`: a power of two
//   WEIGHTED       0: all weights of `combine` are 1
//   SHARED         `combine` starts from 0: zero; 1: the shared expert's row; 2: the shared expert's row times the
//                  token's factor

#ifndef FACTOR_ITEMS
#define FACTOR_ITEMS 256
#endif
#ifndef WEIGHTED
#define WEIGHTED 1
#endif
#ifndef SHARED
#define SHARED 0
#endif

// Weighing -------------------------------------------------------------------------------------

// output[token] = weights[token] * input[token]: the experts' input, in layers that apply weights before the products.
// A work-group for each token, of any local size.
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

// factors[token] = 1 / (1 + exp(-sum over i of input[token][i] * gate[i])): a token's factor of the shared expert.
// A work-group for each token.
//   input     INPUT [tokens][width]
//   gate      float32 [width]
//   factors   float32 [tokens]
__attribute__((reqd_work_group_size(FACTOR_ITEMS, 1, 1))) __kernel void shared_factor(
    __global const INPUT *restrict input, const ulong input_offset, __global const float *restrict gate,
    __global float *restrict factors, const uint width)
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

// output[token] = sum over j of weights[token][j] * input[token * top_k + j], j ascending: a chain of fused
// multiply-adds from zero or from the shared expert's row. A row whose id is not an expert's is left out, and may hold
// anything.
//
// A work-item sums four columns of a token. Local size: any. groups_per_token = ceil(width / (4 * local size)). There
// are tokens * groups_per_token work-groups.
//   input     [tokens * top_k][width]; input_offset is a multiple of 4, as is width
//   shared    INPUT [tokens][width] (SHARED)
//   factors   float32 [tokens] (SHARED 2)
//   output    [tokens][width]
__kernel void combine(__global const INPUT *restrict input, const ulong input_offset, __global const int *restrict ids,
                      const ulong ids_offset, __global const float *restrict weights, const ulong weights_offset,
                      const uint num_experts, const uint top_k, __global const INPUT *restrict shared,
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
    // Four rows at a time, so that four loads are in flight; rows that are left out are loaded, too.
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
