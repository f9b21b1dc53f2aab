#include "mma.cl"

// Products of one strip and one block of K with eight tokens, by tensor cores.

// codes: the codes of a word as a float16 fragment of mma: EVEN_UNIT times their values in column g, and ODD_UNIT times
// in column g + 8. STORE_SUM divides by the units.
// start_of: the initial value of a group's sums, with which they become sums of (q - z) * x. x: the sums of the tokens'
// values.
#if !HAS_ZERO_POINTS
#define EVEN_UNIT CODE_UNIT
#define ODD_UNIT CODE_UNIT
static inline uint4 codes(uint word) { return code_halves(word); }
static inline float4 start_of(float4 x, uint zeros) { return (float4)(0); }
#else
// Nibbles without an exponent are subnormal float16, which tensor cores multiply exactly.
#define EVEN_UNIT 0x1p-24f
#define ODD_UNIT 0x1p-20f
static inline uint4 codes(uint word)
{
    word = code_integers(word);
    const uint next = word >> 8;
    return (uint4)(word & 0x000f000fu, word & 0x00f000f0u, next & 0x000f000fu, next & 0x00f000f0u);
}

static inline float4 start_of(float4 x, uint zeros)
{
#if SYMMETRIC
    const float even = -SYMMETRIC_ZERO * EVEN_UNIT, odd = -SYMMETRIC_ZERO * ODD_UNIT;
#else
    const float even = -EVEN_UNIT * (zeros & 0xffu), odd = -ODD_UNIT * (zeros >> 8);
#endif
    return (float4)(even * x.x, even * x.y, odd * x.z, odd * x.w);
}
#endif

// The sums of eight tokens' values over one block of K, by group: x and y are their fragments of 16 bytes.
static inline void sum_tokens(float4 sums[HALVES], uint4 x, uint4 y)
{
    const uint4 ones = (uint4)(0x3c003c00u);
    float4 sum = mma(ones, x.x, x.y, (float4)(0));
    sum = mma(ones, x.z, x.w, sum);
    sums[0] = sum;
    sum = mma(ones, y.x, y.y, GROUP_32 ? (float4)(0) : sum);
    sums[GROUP_32] = mma(ones, y.z, y.w, sum);
}

// Adds the products of one strip and one block with eight tokens to their totals.
static inline float4 add_block(float4 total, uint4 words, uint4 x, uint4 y, const float4 token_sums[HALVES],
                               const float2 scale[HALVES], const uint zeros[HALVES])
{
    float4 sum = start_of(token_sums[0], zeros[0]);
    sum = mma(codes(words.x), x.x, x.y, sum);
    sum = mma(codes(words.y), x.z, x.w, sum);
#if GROUP_32
    total += sum * scale[0].xxyy;
    sum = start_of(token_sums[1], zeros[1]);
#endif
    sum = mma(codes(words.z), y.x, y.y, sum);
    sum = mma(codes(words.w), y.z, y.w, sum);
    return total + sum * scale[GROUP_32].xxyy;
}
