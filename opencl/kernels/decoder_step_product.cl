// Products of a whole step in one launch: a wave multiplies one or two strips of packed weights, over some blocks of K.
//
// Rows are float16 in local or global memory, or one row of float32 in global memory. With TENSOR they are the columns of
// mma.m16n8k16, as in gemm_mma_direct.cl; without it the same lanes compute the same partial sums by dot products:
//
//   TENSOR 1   a lane has the sums of columns g and g + 8 with tokens 2 t and 2 t + 1, over all rows of K of the wave
//   TENSOR 0   a lane has the sums of columns g and g + 8 with all tokens, over its own rows of K

#if TENSOR
#include "mma_block.cl"
#define K_LANES 1 // lanes whose sums of a column are added
typedef float4 Total;
#define TOTALS 1 // of a strip
#else
#define K_LANES 4
#define LANES 32
typedef float2 Total;
#define TOTALS TOKENS
#endif

// A packed matrix from its first strip on: what `common.cl` draws as the sections of an expert.
typedef struct {
    __global const uint4 *words;
    __global const uint *scales;
    __global const ushort *zeros;
} Sections;

static inline Sections sections_of(ulong expert, uint strips, uint blocks, uint groups)
{
    Sections found;
    found.words = (__global const uint4 *)expert;
    found.scales = (__global const uint *)expert + strips * blocks * BLOCK_WORDS;
    found.zeros = (__global const ushort *)(found.scales + strips * groups * 8);
    return found;
}

#if !TENSOR
// The codes of two words as numbers: columns g (low) and g + 8 (high) of eight rows, without the zero point.
static inline void code_values(uint2 words, float8 *low, float8 *high)
{
#if HAS_ZERO_POINTS
    const uint2 codes = code_integers(words);
    const uint2 even = codes & 0x0f0f0f0fu, odd = codes >> 4 & 0x0f0f0f0fu;
    const float unit = 1;
    const float offset = 0;
#else
    uint2 even, odd;
    code_bytes(words, &even, &odd);
    const float unit = 1.0f / UNITS_PER_ONE, offset = SYMMETRIC_ZERO;
#endif
    // Bytes are rows 0 2 1 3.
    const uint8 e =
        (uint8)(even.x, even.x >> 16, even.x >> 8, even.x >> 24, even.y, even.y >> 16, even.y >> 8, even.y >> 24);
    const uint8 o = (uint8)(odd.x, odd.x >> 16, odd.x >> 8, odd.x >> 24, odd.y, odd.y >> 16, odd.y >> 8, odd.y >> 24);
    *low = (convert_float8(e & 0xffu) - offset) * unit;
    *high = (convert_float8(o & 0xffu) - offset) * unit;
}

static inline float sum_of8(float8 value)
{
    const float4 four = value.lo + value.hi;
    return four.x + four.y + (four.z + four.w);
}
#endif

// Defines
//
//   name(totals, sections, strip, step, blocks, groups, group_shift, k, begin, end, lane, ...)
//
// which adds to totals the products of strip + i * step, for i below `strips`, over blocks begin to end - 1. It reads the
// first `rows` rows: EARLY before the products of `depth` blocks, together with the weights, or else one by one.
#if TENSOR
#define READ_ROWS(x, rows, LOAD)                 \
    {                                            \
        const bool reads = exists && g < (rows); \
        (x)[0] = (x)[1] = (uint4)(0);            \
        if (reads)                               \
            (x)[0] = LOAD(g, block * 8 + t);     \
        if (reads && BLOCK_K * block + 32 < k)   \
            (x)[1] = LOAD(g, block * 8 + 4 + t); \
    }
#define DEFINE_STRIP_PRODUCT(name, strips, depth, rows, EARLY, LOAD, ...)                                            \
    static inline void name(Total *totals, const Sections m, uint strip, uint step, uint blocks, uint groups,        \
                            uint group_shift, uint k, uint begin, uint end, uint lane, __VA_ARGS__)                  \
    {                                                                                                                \
        const uint g = lane / 4, t = lane % 4;                                                                       \
        _Pragma("unroll 1") for (uint chunk = begin; chunk < end; chunk += depth)                                    \
        {                                                                                                            \
            uint4 words[depth][strips], x[depth][2];                                                                 \
            uint scales[depth][strips][HALVES], zeros[depth][strips][HALVES];                                        \
            _Pragma("unroll") for (uint d = 0; d < depth; d++)                                                       \
            {                                                                                                        \
                const bool exists = chunk + d < end;                                                                 \
                const uint block = exists ? chunk + d : chunk;                                                       \
                _Pragma("unroll") for (uint i = 0; i < strips; i++)                                                  \
                {                                                                                                    \
                    const uint number = strip + i * step;                                                            \
                    words[d][i] = load_once(m.words + (number * blocks + block) * LANES + lane);                     \
                    _Pragma("unroll") for (uint h = 0; h < HALVES; h++)                                              \
                    {                                                                                                \
                        const uint group = min((BLOCK_K * block + 32 * h) >> group_shift, groups - 1);               \
                        const uint at = (number * groups + group) * 8 + g;                                           \
                        scales[d][i][h] = load_early_word(m.scales + at);                                            \
                        zeros[d][i][h] = SYMMETRIC ? 0 : m.zeros[at];                                                \
                    }                                                                                                \
                }                                                                                                    \
                if (EARLY)                                                                                           \
                    READ_ROWS(x[d], rows, LOAD)                                                                      \
            }                                                                                                        \
            issue_loads();                                                                                           \
            _Pragma("unroll") for (uint d = 0; d < depth; d++)                                                       \
            {                                                                                                        \
                const bool exists = chunk + d < end;                                                                 \
                const uint block = exists ? chunk + d : chunk;                                                       \
                if (!EARLY)                                                                                          \
                    READ_ROWS(x[d], rows, LOAD)                                                                      \
                float4 token_sums[HALVES];                                                                           \
                sum_tokens(token_sums, x[d][0], x[d][1]);                                                            \
                _Pragma("unroll") for (uint i = 0; i < strips; i++)                                                  \
                {                                                                                                    \
                    float2 scale[HALVES];                                                                            \
                    _Pragma("unroll") for (uint h = 0; h < HALVES; h++) scale[h] = half2_to_float2(scales[d][i][h]); \
                    totals[i] = add_block(totals[i], words[d][i], x[d][0], x[d][1], token_sums, scale, zeros[d][i]); \
                }                                                                                                    \
            }                                                                                                        \
        }                                                                                                            \
    }
#else
#define DEFINE_STRIP_PRODUCT(name, strips, depth, rows, EARLY, LOAD, ...)                                     \
    static inline void name(Total *totals, const Sections m, uint strip, uint step, uint blocks, uint groups, \
                            uint group_shift, uint k, uint begin, uint end, uint lane, __VA_ARGS__)           \
    {                                                                                                         \
        const uint g = lane / 4, t = lane % 4;                                                                \
        for (uint block = begin; block < end; block++)                                                        \
            for (uint i = 0; i < strips; i++) {                                                               \
                const uint number = strip + i * step;                                                         \
                const uint4 words = m.words[(number * blocks + block) * LANES + lane];                        \
                for (uint h = 0; h < 2 && BLOCK_K * block + 32 * h < k; h++) {                                \
                    const uint group = min((BLOCK_K * block + 32 * h) >> group_shift, groups - 1);            \
                    const uint at = (number * groups + group) * 8 + g;                                        \
                    const float2 scale = vload_half2(at, (__global const half *)m.scales);                    \
                    float2 zero = (float2)(HAS_ZERO_POINTS ? SYMMETRIC_ZERO : 0);                             \
                    if (!SYMMETRIC)                                                                           \
                        zero = (float2)(m.zeros[at] & 0xff, m.zeros[at] >> 8);                                \
                    float8 low, high;                                                                         \
                    code_values(h ? words.zw : words.xy, &low, &high);                                        \
                    low = (low - zero.x) * scale.x;                                                           \
                    high = (high - zero.y) * scale.y;                                                         \
                    for (uint r = 0; r < (rows); r++) {                                                       \
                        const float8 x = LOAD(r, block * 8 + 4 * h + t);                                      \
                        totals[i * TOTALS + r] += (float2)(sum_of8(low * x), sum_of8(high * x));              \
                    }                                                                                         \
                }                                                                                             \
            }                                                                                                 \
    }
#endif

// Stores or adds a lane's sums at sums[quad][token][stride], columns 0 to 15, times `factor`. K_LANES of them are to be
// added up.
#if TENSOR
#define EACH_SUM(total, factor, sums, quad_stride, stride, tokens, lane, PUT)                \
    {                                                                                        \
        const uint g = (lane) / 4, first = 2 * ((lane) % 4);                                 \
        if (first < (tokens)) {                                                              \
            PUT((sums)[first * (stride) + g], (total)->x * ((factor) / EVEN_UNIT));          \
            PUT((sums)[first * (stride) + g + 8], (total)->z * ((factor) / ODD_UNIT));       \
        }                                                                                    \
        if (first + 1 < (tokens)) {                                                          \
            PUT((sums)[(first + 1) * (stride) + g], (total)->y * ((factor) / EVEN_UNIT));    \
            PUT((sums)[(first + 1) * (stride) + g + 8], (total)->w * ((factor) / ODD_UNIT)); \
        }                                                                                    \
    }
#else
#define EACH_SUM(total, factor, sums, quad_stride, stride, tokens, lane, PUT)     \
    for (uint r_ = 0; r_ < (tokens); r_++) {                                      \
        const uint at_ = (lane) % 4 * (quad_stride) + r_ * (stride) + (lane) / 4; \
        PUT((sums)[at_], (total)[r_].x * (factor));                               \
        PUT((sums)[at_ + 8], (total)[r_].y * (factor));                           \
    }
#endif
#define PUT_SET(place, value) (place) = (value)
#define PUT_ADD(place, value) (place) += (value)

// The factor that turns a row of float32 with the largest magnitude `most` (as bits) into float16, as in prepare.cl.
static inline int exponent_of_row(uint most)
{
    return most > 0 && most < 0x7f800000u ? max(ilogb(as_float(most)) - 13, -126) : 0;
}

// The rows: eight elements of row r from element 8 * octet on, as float16 or, without TENSOR, as float.
#if TENSOR
#define LOAD_LOCAL(r, octet) kept[(r) * X_OCTETS + (octet)]
#define LOAD_HALVES(r, octet) load_early(rows + (r) * (ulong)(ATTENDED / 8) + (octet))
#define LOAD_FLOATS(r, octet)                                           \
    float8_to_halves(as_float4(load_early(row + 2 * (octet))) * factor, \
                     as_float4(load_early(row + 2 * (octet) + 1)) * factor)
static inline uint4 float8_to_halves(float4 low, float4 high)
{
    return (uint4)(float2_to_half2(low.xy), float2_to_half2(low.zw), float2_to_half2(high.xy),
                   float2_to_half2(high.zw));
}
#else
#define LOAD_LOCAL(r, octet) vload_half8((r) * X_OCTETS + (octet), (__local const half *)kept)
#define LOAD_HALVES(r, octet) vload_half8((r) * (ulong)(ATTENDED / 8) + (octet), (__global const half *)rows)
#define LOAD_FLOATS(r, octet) (vload8(octet, (__global const float *)row) * factor)
#endif

// Blocks that a wave loads at a time, as measured on an H200.
#define QKV_DEPTH 8
#define O_DEPTH 4
#define GATE_DEPTH 4
#define DOWN_DEPTH 2
DEFINE_STRIP_PRODUCT(product_of_local, 1, QKV_DEPTH, TOKENS, 0, LOAD_LOCAL, __local const uint4 *kept)
DEFINE_STRIP_PRODUCT(products_of_local, 2, GATE_DEPTH, 1, 0, LOAD_LOCAL, __local const uint4 *kept)
DEFINE_STRIP_PRODUCT(product_of_halves, 1, O_DEPTH, TOKENS, 1, LOAD_HALVES, __global const uint4 *rows)
DEFINE_STRIP_PRODUCT(product_of_floats, 1, DOWN_DEPTH, 1, 1, LOAD_FLOATS, __global const uint4 *row, float factor)
