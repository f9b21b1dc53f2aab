// Code types: how the 4 bits of a weight become numbers. A program is built for one code type.
//
// Build options, from the code type's row in marlin_cy/weights/code_types.py (marlin_cy/opencl/gemm/codes.py)
//   CODES_UINT4, CODES_E2M1: the row's name; 1 for the program's code type, the others are not defined
//   HAS_ZERO_POINTS   1: each group has a zero point of its own
//   SYMMETRIC         1: zero points are not read: all are SYMMETRIC_ZERO, or there are no zero points
//   SYMMETRIC_ZERO    the row's symmetric_zero
//   UNITS_PER_ONE     the row's units_per_one
//
// A multiplicand is the integer UNITS_PER_ONE * value + offset of a code, where the offset is 0 with zero points and
// SYMMETRIC_ZERO without.
//
// To add a code type, add a branch below. With zero points it defines
//
//   code_integers(words)   uint, uint2 or uint4: the words, each nibble replaced by its multiplicand, 0 to 15
//
// and without zero points
//
//   code_halves(word)      the values times CODE_UNIT as float16, exactly: a uint4 of pairs, the low half first.
//                          Pair i has the values of nibbles i and i + 4
//   CODE_UNIT              a power of two
//   code_bytes(words, low, high)
//                          multiplicands as bytes: of nibbles 0, 2, 4, 6 in *low, of nibbles 1, 3, 5, 7 in *high

#if !defined(HAS_ZERO_POINTS) || !defined(SYMMETRIC) || !defined(SYMMETRIC_ZERO) || !defined(UNITS_PER_ONE)
#error "codes.cl needs HAS_ZERO_POINTS, SYMMETRIC, SYMMETRIC_ZERO and UNITS_PER_ONE"
#endif
#if !HAS_ZERO_POINTS && !SYMMETRIC
#error "HAS_ZERO_POINTS=0 needs SYMMETRIC=1"
#endif

#if defined(CODES_UINT4)

#define code_integers(words) (words)

#elif defined(CODES_E2M1)

// A code is a sign, two bits of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 for 0 to 7, and their
// negatives for 8 to 15. The bits move to the places of a float16's sign, exponent and mantissa. Because the
// exponent's bias differs, every value is multiplied by 2^-14, including the subnormal value.
// Source of the idea: Xia et al., "FP6-LLM", 2024.
#define CODE_UNIT 0x1p-14f
static inline uint4 code_halves(uint word)
{
    const uint even = (word << 1 & 0x0e0e0e0eu) | (word << 4 & 0x80808080u); // the upper bytes
    const uint odd = (word >> 3 & 0x0e0e0e0eu) | (word & 0x80808080u);
    return (uint4)(even << 8 & 0xff00ff00u, odd << 8 & 0xff00ff00u, even & 0xff00ff00u, odd & 0xff00ff00u);
}

// Nibbles become magnitudes 0, 1, 2, 3, 4, 6, 8, 12, or 15 minus that where the code is negative. In bytes, that
// becomes 12 plus or minus the magnitude.
static inline void code_bytes(uint2 words, uint2 *low, uint2 *high)
{
    const uint2 large = words >> 2 & 0x11111111u, negative = (words >> 3 & 0x11111111u) * 15;
    const uint2 magnitude = (words & 0x77777777u) + (words & 3 * large) + 2 * (words & words >> 1 & large);
    const uint2 flipped = magnitude ^ negative;
    *low = (flipped & 0x0f0f0f0fu) + 0x0c0c0c0cu - (negative & 0x0f0f0f0fu);
    *high = (flipped >> 4 & 0x0f0f0f0fu) + 0x0c0c0c0cu - (negative >> 4 & 0x0f0f0f0fu);
}

#else
#error "codes.cl has no branch for this code type: expected CODES_UINT4 or CODES_E2M1"
#endif
