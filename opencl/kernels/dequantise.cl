#include "wave_tiled.cl"

// Weights as floats, for gemm_portable and gemm_portable_tiled.
//
//   Terms        what a lane needs of a group: its factors and zero points
//   dequantise   the weights of a step
//
// The weights of a step times WEIGHT_UNIT, four rows each of columns g (low) and g + 8 (high). With normalised float16
// scales and codes of 4 bits, weights are exact.
#if !HAS_ZERO_POINTS
typedef Factors Terms;
static inline Terms terms_of(Factors factors, float2 zero) { return factors; }

static inline void dequantise(uint word, Terms terms, float4 *low, float4 *high)
{
    const uint4 codes = code_halves(word);
    *low = (float4)(halves_to_float2(codes.x), halves_to_float2(codes.z)) * terms.x;
    *high = (float4)(halves_to_float2(codes.y), halves_to_float2(codes.w)) * terms.y;
}
#elif CODE_BITS == 4 && PLAIN_SCALES
typedef struct {
    float2 scale, offset;
} Terms;

static inline Terms terms_of(Factors factors, float2 zero)
{
    Terms terms;
    terms.scale = factors;
    terms.offset = -((float2)(2048, 128) + zero) * factors;
    return terms;
}

// q * scale + offset: a nibble at bit 12 of the float 2^11, or at bit 16 of the float 2^7, adds its value to the float.
static inline void dequantise(uint word, Terms terms, float4 *low, float4 *high)
{
    word = code_integers(word);
    uint4 at = (uint4)(word << 12, word >> 4, word << 4, word >> 12);
    *low = as_float4((at & 0xf000u) | 0x45000000u) * terms.scale.x + terms.offset.x;
    *high = as_float4((at & 0xf0000u) | 0x43000000u) * terms.scale.y + terms.offset.y;
}
#else
typedef struct {
    Factors factors;
    float2 magic; // the floats whose lowest bits are codes, plus zero points
} Terms;

#if CODE_BITS == 8
#define MAGIC (float2)(0x1p23f, 0x1p23f)
#else
#define MAGIC (float2)(2048, 128)
#endif
static inline Terms terms_of(Factors factors, float2 zero)
{
    Terms terms;
    terms.factors = factors;
    terms.magic = MAGIC + zero;
    return terms;
}

// The difference of code and zero point is exact, then comes one multiply-add.
static inline void dequantise(StepWords words, Terms terms, float4 *low, float4 *high)
{
#if CODE_BITS == 8
    const uint4 at = (uint4)(words.x, words.x >> 16, words.y, words.y >> 16);
    *low = as_float4((at & 0xffu) | 0x4b000000u) - terms.magic.x;
    *high = as_float4((at >> 8 & 0xffu) | 0x4b000000u) - terms.magic.y;
#else
    const uint word = code_integers(words);
    const uint4 at = (uint4)(word << 12, word >> 4, word << 4, word >> 12);
    *low = as_float4((at & 0xf000u) | 0x45000000u) - terms.magic.x;
    *high = as_float4((at & 0xf0000u) | 0x43000000u) - terms.magic.y;
#endif
#if MINIMA
    *low = fma(*low, (float4)(terms.factors.x), (float4)(-terms.factors.z));
    *high = fma(*high, (float4)(terms.factors.y), (float4)(-terms.factors.w));
#else
    *low *= terms.factors.x;
    *high *= terms.factors.y;
#endif
}
#endif
