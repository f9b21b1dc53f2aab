#include "mma.cl"

// Products of one strip and one block of K with eight tokens, by tensor cores.

// The initial value of a group's sums, with which they become sums of (q - z) * x. x: the sums of the tokens' values.
static inline float4 start_of(float4 x, uint zeros)
{
#if !HAS_ZERO_POINTS
    return (float4)(0);
#else
#if SYMMETRIC
    const float even = -SYMMETRIC_ZERO * EVEN_UNIT, odd = -SYMMETRIC_ZERO * ODD_UNIT;
#else
    const float even = -EVEN_UNIT * LOW_ZERO(zeros), odd = -ODD_UNIT * HIGH_ZERO(zeros);
#endif
    return (float4)(even * x.x, even * x.y, odd * x.z, odd * x.w);
#endif
}

// The sums of eight tokens' values over one block of K, by group: x and y are their fragments of 16 bytes.
static inline void sum_tokens(float4 sums[HALVES], uint4 x, uint4 y)
{
    const uint4 ones = (uint4)(0x3c003c00u);
#if GROUP_16
    sums[0] = mma(ones, x.x, x.y, (float4)(0));
    sums[1] = mma(ones, x.z, x.w, (float4)(0));
    sums[2] = mma(ones, y.x, y.y, (float4)(0));
    sums[3] = mma(ones, y.z, y.w, (float4)(0));
#else
    float4 sum = mma(ones, x.x, x.y, (float4)(0));
    sum = mma(ones, x.z, x.w, sum);
    sums[0] = sum;
    sum = mma(ones, y.x, y.y, GROUP_32 ? (float4)(0) : sum);
    sums[GROUP_32] = mma(ones, y.z, y.w, sum);
#endif
}

// The factors of a group, the minima in the units of the sums.
static inline Factors group_factors(Record record, BlockRecord block)
{
#if MINIMA
    return factors_of(record, block) * (float4)(1, 1, EVEN_UNIT, ODD_UNIT);
#else
    return factors_of(record, block);
#endif
}

// Adds the products of one strip and one block with eight tokens to their totals.
static inline float4 add_block(float4 total, BlockWords words, uint4 x, uint4 y, const float4 token_sums[HALVES],
                               const Factors factors[HALVES], const uint zeros[HALVES])
{
    float4 sum = start_of(token_sums[0], zeros[0]);
    sum = mma(codes(BLOCK_STEP(words, 0)), x.x, x.y, sum);
#if GROUP_16
    total = add_group(total, sum, token_sums[0], factors[0]);
    sum = start_of(token_sums[1], zeros[1]);
#endif
    sum = mma(codes(BLOCK_STEP(words, 1)), x.z, x.w, sum);
#if GROUP_32 || GROUP_16
    total = add_group(total, sum, token_sums[HALVES / 2 - 1], factors[HALVES / 2 - 1]);
    sum = start_of(token_sums[HALVES / 2], zeros[HALVES / 2]);
#endif
    sum = mma(codes(BLOCK_STEP(words, 2)), y.x, y.y, sum);
#if GROUP_16
    total = add_group(total, sum, token_sums[2], factors[2]);
    sum = start_of(token_sums[3], zeros[3]);
#endif
    sum = mma(codes(BLOCK_STEP(words, 3)), y.z, y.w, sum);
    return add_group(total, sum, token_sums[HALVES - 1], factors[HALVES - 1]);
}
