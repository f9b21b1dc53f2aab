// Code types: how the 4 or 8 bits of a weight become numbers. A program is built for one code type.
//
// Build options, from the code type's row in marlin_cy/weights/code_types.py (marlin_cy/opencl/gemm/codes.py)
//   CODES_UINT4, CODES_E2M1, CODES_IQ4_NL, CODES_UINT8
//                     the row's name; 1 for the program's code type, the others are not defined
//   CODE_BITS         the row's bits
//   HAS_ZERO_POINTS   1: each group has a zero point of its own
//   SYMMETRIC         1: zero points are not read: all are SYMMETRIC_ZERO, or there are no zero points
//   SYMMETRIC_ZERO    the row's symmetric_zero
//   UNITS_PER_ONE     the row's units_per_one
//
// A multiplicand is the integer UNITS_PER_ONE * value + offset of a code, where the offset is 0 with zero points and
// SYMMETRIC_ZERO without.
//
// Codes of 8 bits are their multiplicands, and have zero points: the kernels take the bytes as they are.
//
// To add a code type of 4 bits, add a branch below. With zero points it defines
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

#ifndef CODE_BITS
#define CODE_BITS 4
#endif
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

#elif defined(CODES_IQ4_NL)

// A table has a byte for each code: 0 to 7 in the first number, 8 to 15 in the second, the lowest byte first.
static inline uint iq4_nl_entry(uint code, ulong first, ulong second)
{
    return (uint)((code & 8 ? second : first) >> (code & 7) * 8) & 0xffu;
}

// Values are subnormal float16: seven bits of magnitude, and the sign, which the table has in its highest bit.
#define CODE_UNIT 0x1p-24f
static inline uint iq4_nl_half(uint code)
{
    const uint entry = iq4_nl_entry(code & 15, 0x8a96a3b1c1d3e8fful, 0x7159453526190d01ul);
    return (entry & 0x7fu) | (entry & 0x80u) << 8;
}

static inline uint4 code_halves(uint word)
{
    return (uint4)(iq4_nl_half(word) | iq4_nl_half(word >> 16) << 16,
                   iq4_nl_half(word >> 4) | iq4_nl_half(word >> 20) << 16,
                   iq4_nl_half(word >> 8) | iq4_nl_half(word >> 24) << 16,
                   iq4_nl_half(word >> 12) | iq4_nl_half(word >> 28) << 16);
}

// Values plus 127, of a code in each byte.
static inline uint iq4_nl_word(uint codes)
{
    uint word = 0;
    for (uint i = 0; i < 4; i++)
        word |= iq4_nl_entry(codes >> 8 * i & 15, 0x75695c4e3e2c1700ul, 0xf0d8c4b4a5988c80ul) << 8 * i;
    return word;
}

static inline void code_bytes(uint2 words, uint2 *low, uint2 *high)
{
    *low = (uint2)(iq4_nl_word(words.x), iq4_nl_word(words.y));
    *high = (uint2)(iq4_nl_word(words.x >> 4), iq4_nl_word(words.y >> 4));
}

#elif defined(CODES_UINT8)

#if CODE_BITS != 8 || !HAS_ZERO_POINTS
#error "codes of 8 bits need CODE_BITS=8 and HAS_ZERO_POINTS=1"
#endif

#else
#error "codes.cl has no branch for this code type"
#endif
