#include "decoder.cl"
#include "ptx.cl"

// Shared by the kernels of attention by tensor cores. Scores are logarithms to base 2.

#define LANES 32
#define LOG2_E 1.44269504f
#define BASE_EXP native_exp2 // of weights

// mma of the cache's type, and two floats as a pair of that type.
#if CACHE_TYPE == 2
#define MMA mma_bfloat16
#define PAIR float2_to_bfloat2
#else
#define MMA mma
#define PAIR float2_to_half2
#endif

static inline void store_pair(float2 value, __global OUTPUT *output, ulong at)
{
#if OUTPUT_TYPE == 0
    *(__global float2 *)(output + at) = value;
#elif OUTPUT_TYPE == 1
    *(__global uint *)(output + at) = float2_to_half2(value);
#else
    *(__global uint *)(output + at) = float2_to_bfloat2(value);
#endif
}

// soft_cap * tanh(x / soft_cap) to base 2, from x / soft_cap. The absolute error of tanh is 1e-7.
static inline float capped(float x, float soft_cap)
{
    return soft_cap * LOG2_E * (1 - 2 / (native_exp2(2 * LOG2_E * x) + 1));
}

// The weight of sums whose maximum is `high` beside others. Sums of no positions have the maximum -INFINITY; a NaN stays.
static inline float beside(float high, float highest) { return high == -INFINITY ? 0 : native_exp2(high - highest); }

static inline float2 gated(float2 value, __global const float *gate)
{
    return value / (1 + (float2)(exp(-gate[0]), exp(-gate[1])));
}
