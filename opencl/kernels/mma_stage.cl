#include "mma.cl"

// A stage of gemm_mma_tiled in local memory, and the products of its weights and tokens.
//
// With normalised float16 scales, weights are float16, and all of K is one sum. With other scale records, and with groups
// of 16 rows, codes minus zero points are float16, which is exact, and the sums of each 32 or 16 rows are multiplied by
// the scales in float32. Normalised scales are below 2^15, as the packer stores them.

#define SCALED_WEIGHTS (PLAIN_SCALES && !GROUP_16)
#define CHUNKS 8                                            // of 16 bytes in a token's 64 values
#define COPIES (ROWS * CHUNKS / (LANES * WAVES))            // chunks that each work-item copies for one stage
// A stage holds the tokens, which all waves read, and then for each wave words [BLOCK_QUADS][S][LANES] of 16 bytes and,
// of four bytes each, RECORD_UINTS of a record [HALVES][S][LANES], ZERO_UINTS of zero points [HALVES][S][LANES], and
// ROWS_UINTS of a BlockRecord [S][LANES].
#define RECORD_UINTS ((RECORD_BYTES + 3) / 4)
#define ZERO_UINTS (SYMMETRIC ? 0 : 1)
#define ROWS_UINTS (TWO_LEVELS ? 1 + MINIMA : 0)
#define TOKEN_BYTES (ROWS * CHUNKS * 16)
#define LANE_UINTS (HALVES * (RECORD_UINTS + ZERO_UINTS) + ROWS_UINTS)
#define WAVE_BYTES (LANES * S * (16 * BLOCK_QUADS + 4 * LANE_UINTS))
#define SCALES_AT (LANES * 16 * S * BLOCK_QUADS)
#define ZEROS_AT (SCALES_AT + LANES * 4 * HALVES * S * RECORD_UINTS)
#define ROWS_AT (ZEROS_AT + LANES * 4 * HALVES * S * ZERO_UINTS)
#define STAGE_BYTES (TOKEN_BYTES + WAVES * WAVE_BYTES)

// Values of two bytes are copied as the four bytes that contain them: uint x / 2 of value x. MY_SHORTS takes a lane's two.
#define MY_SHORTS(bytes) ((bytes) >> (g & 1) * 16 & 0xffffu)
#if CODE_BITS == 8
#define MY_ZEROS(bytes) (bytes)
#else
#define MY_ZEROS(bytes) MY_SHORTS(bytes)
#endif

// The addresses of a lane's words, records and zeros of S strips.
typedef struct {
    __global const uint4 *words[S];
    __global const Record *records[S];
    __global const ZeroPair *zeros[S];
#if TWO_LEVELS
    __global const BlockRecord *of_rows[S];
#endif
} Source;

static inline Source source_of(Expert expert, uint first_strip, uint strips, uint blocks, uint groups, uint lane)
{
    Source source;
#pragma unroll
    for (int s = 0; s < S; s++) {
        const uint strip = min(first_strip + s, strips - 1), group = strip * groups * 8 + lane / 4;
        source.words[s] = expert.words + (ulong)strip * blocks * (BLOCK_QUADS * LANES) + lane;
        source.records[s] = expert.records + group;
        source.zeros[s] = expert.zeros + group;
#if TWO_LEVELS
        source.of_rows[s] = expert.of_rows + strip * blocks_of_rows(blocks) * 8 + lane / 4;
#endif
    }
    return source;
}

// Copies a value of `type` as uints that are S * LANES apart.
#define COPY_UINTS(to4, at, type, from)                                                             \
    {                                                                                               \
        if (sizeof(type) == 2)                                                                      \
            copy_async4((to4) + (at), (__global const uint *)((from) - (g & 1)));                   \
        else {                                                                                      \
            _Pragma("unroll") for (uint u = 0; u < sizeof(type) / 4; u++)                           \
                copy_async4((to4) + (at) + u * (S * LANES * 4), (__global const uint *)(from) + u); \
        }                                                                                           \
    }
#if TWO_LEVELS
#define COPY_OF_ROWS(to4, source, s, block)                 \
    COPY_UINTS(to4, ROWS_AT + (s) * LANES * 4, BlockRecord, \
               (source).of_rows[s] + (BLOCK_K * (block) >> BLOCK_SHIFT) * 8)
#else
#define COPY_OF_ROWS(to4, source, s, block)
#endif

// Copies one block: words to `to`, records to `to4` + SCALES_AT, zeros to `to4` + ZEROS_AT, and BlockRecords to `to4` +
// ROWS_AT.
#define COPY_WEIGHTS(to, to4, source, block)                                                                      \
    {                                                                                                             \
        _Pragma("unroll") for (int q = 0; q < BLOCK_QUADS; q++) _Pragma("unroll") for (int s = 0; s < S; s++)     \
            copy_async((to) + (q * S + s) * LANES * 16, (source).words[s] + ((block) * BLOCK_QUADS + q) * LANES); \
        _Pragma("unroll") for (int h = 0; h < HALVES; h++)                                                        \
        {                                                                                                         \
            const uint group = min((BLOCK_K * (block) + GROUP_K * h) >> group_shift, groups - 1) * 8;             \
            _Pragma("unroll") for (int s = 0; s < S; s++)                                                         \
            {                                                                                                     \
                const uint at = (h * RECORD_UINTS * S + s) * LANES * 4, zeros_at = (h * S + s) * LANES * 4;       \
                COPY_UINTS(to4, SCALES_AT + at, Record, (source).records[s] + group);                             \
                if (!SYMMETRIC)                                                                                   \
                    COPY_UINTS(to4, ZEROS_AT + zeros_at, ZeroPair, (source).zeros[s] + group);                    \
            }                                                                                                     \
        }                                                                                                         \
        _Pragma("unroll") for (int s = 0; s < S; s++) { COPY_OF_ROWS(to4, source, s, block) }                     \
    }

// The terms that dequantisation of codes with zero points subtracts, as pairs of float16: 1024 + z for column g; for
// column g + 8 -(64 + z), or 1024 + z with codes of 8 bits.
typedef struct {
    uint even, odd;
} Offsets;

#if HAS_ZERO_POINTS && CODE_BITS == 8
static inline Offsets offsets_of(uint z, uint z8)
{
    Offsets offsets;
    offsets.even = (0x6400u + z) * 0x10001u;
    offsets.odd = (0x6400u + z8) * 0x10001u;
    return offsets;
}

// q - z of a fragment, exactly: a byte below 0x6400 is the float16 1024 + q.
static inline uint4 dequantise(uint2 words, Offsets offsets)
{
    const uint low = 0x00ff00ffu, magic = 0x64006400u;
    return (
        uint4)(half2_sub((words.x & low) | magic, offsets.even), half2_sub((words.x >> 8 & low) | magic, offsets.odd),
               half2_sub((words.y & low) | magic, offsets.even), half2_sub((words.y >> 8 & low) | magic, offsets.odd));
}
#elif HAS_ZERO_POINTS
static inline Offsets offsets_of(uint z, uint z8)
{
    Offsets offsets;
    offsets.even = (0x6400u + z) * 0x10001u;
    offsets.odd = (0xd400u + (z8 << 4)) * 0x10001u;
    return offsets;
}

// q - z of a fragment, exactly: a nibble below 0x6400 is the float16 1024 + q, and four bits higher it is 1024 + 16 q.
// Source of the idea: Kim et al., "Who Says Elephants Can't Run", 2022; Marlin uses it too.
static inline uint4 dequantise(uint word, Offsets offsets)
{
    const uint magic = 0x64006400u, sixteenth = 0x2c002c00u;
    word = code_integers(word);
    const uint next = word >> 8;
    return (uint4)(half2_sub((word & 0x000f000fu) | magic, offsets.even),
                   half2_fma((word & 0x00f000f0u) | magic, sixteenth, offsets.odd),
                   half2_sub((next & 0x000f000fu) | magic, offsets.even),
                   half2_fma((next & 0x00f000f0u) | magic, sixteenth, offsets.odd));
}
#endif

// group_of: the constants of a group for a lane's two columns of a strip, from its uints in a stage.
// weights_of: a step's weights times WEIGHT_UNIT as a fragment, without their scales unless SCALED_WEIGHTS.
#if !SCALED_WEIGHTS
typedef struct {
    Factors factors;
#if HAS_ZERO_POINTS
    Offsets offsets;
#endif
} Group;

#if HAS_ZERO_POINTS
#define WEIGHT_UNIT 1.0f
static inline uint4 weights_of(StepWords words, Group group) { return dequantise(words, group.offsets); }
#else
#define WEIGHT_UNIT CODE_UNIT
static inline uint4 weights_of(uint word, Group group) { return code_halves(word); }
#endif

#define UINT_OF(at, s, u) mine4[((at) + ((u) * S + (s)) * LANES * 4) / 4]
#if RECORD_BYTES == 16
#define RECORD_AT(at, s) (uint4)(UINT_OF(at, s, 0), UINT_OF(at, s, 1), UINT_OF(at, s, 2), UINT_OF(at, s, 3))
#elif RECORD_BYTES == 8
#define RECORD_AT(at, s) (uint2)(UINT_OF(at, s, 0), UINT_OF(at, s, 1))
#elif RECORD_BYTES == 4
#define RECORD_AT(at, s) UINT_OF(at, s, 0)
#else
#define RECORD_AT(at, s) (ushort) MY_SHORTS(UINT_OF(at, s, 0))
#endif
#if TWO_LEVELS && MINIMA
#define OF_ROWS(s) (uint2)(UINT_OF(ROWS_AT, s, 0), UINT_OF(ROWS_AT, s, 1))
#elif TWO_LEVELS
#define OF_ROWS(s) UINT_OF(ROWS_AT, s, 0)
#else
#define OF_ROWS(s) 0
#endif
static inline Group group_of(Record record, BlockRecord of_rows, uint zeros)
{
    Group group;
    group.factors = factors_of(record, of_rows);
#if HAS_ZERO_POINTS && SYMMETRIC
    group.offsets = offsets_of(SYMMETRIC_ZERO, SYMMETRIC_ZERO);
#elif HAS_ZERO_POINTS
    group.offsets = offsets_of(LOW_ZERO(zeros), HIGH_ZERO(zeros));
#endif
    return group;
}
#define GROUP_AT(h, s)                                                                 \
    group_of(RECORD_AT(SCALES_AT + (h) * RECORD_UINTS * S * LANES * 4, s), OF_ROWS(s), \
             SYMMETRIC ? 0 : MY_ZEROS(UINT_OF(ZEROS_AT + (h) * S * LANES * 4, s, 0)))
#else
#define GROUP_AT(h, s)                                       \
    group_of(mine4[SCALES_AT / 4 + ((h) * S + (s)) * LANES], \
             SYMMETRIC ? 0 : MY_ZEROS(mine4[ZEROS_AT / 4 + ((h) * S + (s)) * LANES]))

// Products use float16 weights times WEIGHT_UNIT. The largest stored scale is between 2^14 and 2^15.
#if !HAS_ZERO_POINTS
#define WEIGHT_UNIT CODE_UNIT

typedef struct {
    uint even, odd;             // scales of a lane's two columns of a strip
} Group;

static inline Group group_of(uint scales, uint zeros)
{
    Group group;
    group.even = (scales & 0xffffu) * 0x10001u;
    group.odd = (scales >> 16) * 0x10001u;
    return group;
}

static inline uint4 weights_of(uint word, Group group)
{
    const uint4 q = code_halves(word);
    return (uint4)(half2_mul(q.x, group.even), half2_mul(q.y, group.odd), half2_mul(q.z, group.even),
                   half2_mul(q.w, group.odd));
}
#else
#define WEIGHT_UNIT (SYMMETRIC ? 0x1p-24f : 0x1p-10f)

typedef struct {
    uint even, odd;             // factors
    uint even_add, odd_add;     // SYMMETRIC: added to the product with the factor; otherwise: as in Offsets
} Group;

static inline Group group_of(uint scales, uint zeros)
{
    Group group;
    const uint even = (scales & 0xffffu) * 0x10001u, odd = (scales >> 16) * 0x10001u;
#if SYMMETRIC // codes without an exponent are q * 2^-24, and q * 2^-20 in high nibbles; z * scale is exact
    group.even = even;
    group.odd = CODE_BITS == 8 ? odd : half2_mul(odd, 0x2c002c00u); // 2^-4
    const uint minus_zero = (0x8000u | SYMMETRIC_ZERO) * 0x10001u; // -z * 2^-24
    group.even_add = half2_mul(even, minus_zero);
    group.odd_add = half2_mul(odd, minus_zero);
#else
    group.even = half2_mul(even, 0x14001400u);          // 2^-10
    group.odd = half2_mul(odd, 0x14001400u);
    const Offsets z = offsets_of(LOW_ZERO(zeros), HIGH_ZERO(zeros));
    group.even_add = z.even;
    group.odd_add = z.odd;
#endif
    return group;
}

static inline uint4 weights_of(StepWords words, Group group)
{
#if SYMMETRIC
    const uint4 q = codes(words);
    return (uint4)(half2_fma(q.x, group.even, group.even_add), half2_fma(q.y, group.odd, group.odd_add),
                   half2_fma(q.z, group.even, group.even_add), half2_fma(q.w, group.odd, group.odd_add));
#else
    Offsets z;
    z.even = group.even_add;
    z.odd = group.odd_add;
    const uint4 q = dequantise(words, z);
    return (uint4)(half2_mul(q.x, group.even), half2_mul(q.y, group.odd), half2_mul(q.z, group.even),
                   half2_mul(q.w, group.odd));
#endif
}
#endif
#endif

// The products of S strips and 32 rows of K with a token tile: a[s] has the weights of the two steps.
#if SCALED_WEIGHTS
#define ADD_PRODUCTS(total, i, a, x, group)                                                          \
    _Pragma("unroll") for (int s = 0; s < S; s++) total[s][i] = mma(a[s][0], x.x, x.y, total[s][i]); \
    _Pragma("unroll") for (int s = 0; s < S; s++) total[s][i] = mma(a[s][1], x.z, x.w, total[s][i]);
#else
#if MINIMA
#define SUMS_OF_TOKENS(b0, b1, sum) mma((uint4)(0x3c003c00u), b0, b1, sum)
#else
#define SUMS_OF_TOKENS(b0, b1, sum) (float4)(0)
#endif
#if GROUP_16
#define ADD_PRODUCTS(total, i, a, x, group)                                         \
    {                                                                               \
        const float4 first = SUMS_OF_TOKENS(x.x, x.y, (float4)(0));                 \
        const float4 second = SUMS_OF_TOKENS(x.z, x.w, (float4)(0));                \
        _Pragma("unroll") for (int s = 0; s < S; s++)                               \
        {                                                                           \
            float4 sum = mma(a[s][0], x.x, x.y, (float4)(0));                       \
            total[s][i] = add_group(total[s][i], sum, first, group[s][0].factors);  \
            sum = mma(a[s][1], x.z, x.w, (float4)(0));                              \
            total[s][i] = add_group(total[s][i], sum, second, group[s][1].factors); \
        }                                                                           \
    }
#else
#define ADD_PRODUCTS(total, i, a, x, group)                                                         \
    {                                                                                               \
        const float4 token_sums = SUMS_OF_TOKENS(x.z, x.w, SUMS_OF_TOKENS(x.x, x.y, (float4)(0)));  \
        float4 sum[S];                                                                              \
        _Pragma("unroll") for (int s = 0; s < S; s++) sum[s] = mma(a[s][0], x.x, x.y, (float4)(0)); \
        _Pragma("unroll") for (int s = 0; s < S; s++) sum[s] = mma(a[s][1], x.z, x.w, sum[s]);      \
        _Pragma("unroll") for (int s = 0; s < S; s++) total[s][i] =                                 \
            add_group(total[s][i], sum[s], token_sums, group[s][0].factors);                        \
    }
#endif
#endif

// The words of a lane's strip s in a stage, by halves of the block.
#if CODE_BITS == 8
#define LOAD_WORDS(w, s) (w)[0] = mine[(s) * LANES + lane], (w)[1] = mine[(S + (s)) * LANES + lane];
#else
#define LOAD_WORDS(w, s)                              \
    {                                                 \
        const uint4 words = mine[(s) * LANES + lane]; \
        (w)[0] = words.xy, (w)[1] = words.zw;         \
    }
#endif

// A lane's eight values of 32 of a token, in a stage: eight consecutive ones, or two runs of four with groups of 16.
#if GROUP_16
#define PAIRS_OF(chunk, t) (((__local const uint2 *)stage)[2 * (chunk) + (t) % 2])
#define TOKEN_VALUES(row, half_block)                                                   \
    (uint4)(PAIRS_OF((row) * CHUNKS + ((4 * (half_block) + t / 2) ^ ((g & 1) * 4)), t), \
            PAIRS_OF((row) * CHUNKS + ((4 * (half_block) + 2 + t / 2) ^ ((g & 1) * 4)), t))
#else
#define TOKEN_VALUES(row, half_block) stage[(row) * CHUNKS + ((4 * (half_block) + t) ^ ((g & 1) * 4))]
#endif
