// needs ptx.cl
//
// What the kernels for NVIDIA tensor cores (compute capability 8.0 and later) share.
//
// Weights are the 16-row operand of mma.m16n8k16 and eight tokens its columns. A lane's word of packed
// nibbles is one fragment of 16 columns by 16 rows of K, and 16 bytes of a token's row are its fragments for
// two steps, so neither side needs a shuffle, nor ldmatrix. Input is float16.
//
// Two kernels divide the work:
//   gemm_mma_direct    few rows an expert: weight bytes are what takes time, waves split K
//   gemm_mma_tiled     many rows an expert: tensor cores are what takes time, waves share the tokens
//
// Build options of both, besides those of common.cl
//   ROWS              8 * r: rows of a tile
//   WAVES             of 32 work-items; the local size is 32 * WAVES
//   STRIPS_PER_WAVE   strips of 16 columns that a wave computes
//   DEPTH             blocks of K that are on their way at once
//   GROUP_32          1: groups of 32 rows; 0: of 64 or 128
//   SPLIT             in direct only
//
// They use more local memory than the driver reports: it says 48 KiB and gives what the hardware has.

#ifndef WAVES
#define WAVES 8
#endif
#ifndef STRIPS_PER_WAVE
#define STRIPS_PER_WAVE 2
#endif
#ifndef DEPTH
#define DEPTH 2
#endif
#ifndef GROUP_32
#define GROUP_32 0
#endif

#define S STRIPS_PER_WAVE
#define TOKEN_TILES (ROWS / 8)
#define LANES 32
#define HALVES (1 + GROUP_32)  // groups in a block of K

// Weights ----------------------------------------------------------------------------------------

// Sections of an expert.
typedef struct {
    __global const uint4 *words;    // [strips][blocks][32]
    __global const uint *scales;    // [strips][groups][8]
    __global const ushort *zeros;   // [strips][groups][8]
} Expert;

static inline Expert expert_at(__global const uint *base, uint strips, uint blocks, uint groups)
{
    Expert expert;
    expert.words = (__global const uint4 *)base;
    expert.scales = base + (ulong)strips * blocks * BLOCK_WORDS;
    expert.zeros = (__global const ushort *)(expert.scales + (ulong)strips * groups * 8);
    return expert;
}

// Of a lane's two zero points (bytes), from the four bytes that its copy brought.
#define MY_ZEROS(bytes) ((bytes) >> (g & 1) * 16 & 0xffffu)

// For kernels that copy weights to local memory: where a lane's words, scales and zeros of S strips are.
typedef struct {
    __global const uint4 *words[S];
    __global const uint *scales[S];
    __global const ushort *zeros[S];
} Source;

static inline Source source_of(Expert expert, uint first_strip, uint strips, uint blocks, uint groups, uint lane)
{
    Source source;
#pragma unroll
    for (int s = 0; s < S; s++) {
        const uint strip = min(first_strip + s, strips - 1), group = strip * groups * 8 + lane / 4;
        source.words[s] = expert.words + (ulong)strip * blocks * LANES + lane;
        source.scales[s] = expert.scales + group;
        source.zeros[s] = expert.zeros + group;
    }
    return source;
}

// Copy one block: words to `to` on, scales and zeros (the 4 bytes that contain the lane's 2) to `to4` + SCALES_AT and
// ZEROS_AT on, which the kernels define.
#define COPY_WEIGHTS(to, to4, source, block)                                                         \
    {                                                                                                \
        _Pragma("unroll") for (int s = 0; s < S; s++)                                                \
            copy_async((to) + s * LANES * 16, (source).words[s] + (block) * LANES);                  \
        _Pragma("unroll") for (int h = 0; h < HALVES; h++)                                           \
        {                                                                                            \
            const uint group = min((BLOCK_K * (block) + 32 * h) >> group_shift, groups - 1) * 8;     \
            _Pragma("unroll") for (int s = 0; s < S; s++)                                            \
            {                                                                                        \
                const uint at = (h * S + s) * LANES * 4;                                             \
                copy_async4((to4) + SCALES_AT + at, (source).scales[s] + group);                     \
                if (!SYMMETRIC)                                                                      \
                    copy_async4((to4) + ZEROS_AT + at,                                               \
                                (__global const uint *)((source).zeros[s] + group - (g & 1)));       \
            }                                                                                        \
        }                                                                                            \
    }

// codes: a word's, as the float16 fragment of mma, in column g EVEN_UNIT times their values and in column g + 8 ODD_UNIT
// times: what that is off by is put right at the end.
// start_of: what the products of a group start from, so that they end as sums of (q - z) * x; x: sums of the tokens'
// values.
#if CODES == 1
#define EVEN_UNIT E2M1_UNIT
#define ODD_UNIT E2M1_UNIT
static inline uint4 codes(uint word) { return e2m1_halves(word); }
static inline float4 start_of(float4 x, uint zeros) { return (float4)(0); }
#else
// Nibbles as they are, under no exponent, are subnormal float16, which tensor cores take exactly.
#define EVEN_UNIT 0x1p-24f
#define ODD_UNIT 0x1p-20f
static inline uint4 codes(uint word)
{
    const uint next = word >> 8;
    return (uint4)(word & 0x000f000fu, word & 0x00f000f0u, next & 0x000f000fu, next & 0x00f000f0u);
}

static inline float4 start_of(float4 x, uint zeros)
{
#if SYMMETRIC
    const float even = -8 * EVEN_UNIT, odd = -8 * ODD_UNIT;
#else
    const float even = -EVEN_UNIT * (zeros & 0xffu), odd = -ODD_UNIT * (zeros >> 8);
#endif
    return (float4)(even * x.x, even * x.y, odd * x.z, odd * x.w);
}
#endif

// Sums of the 16-byte fragments x and y of eight tokens over one block of K, one or two groups.
static inline void sum_tokens(float4 sums[HALVES], uint4 x, uint4 y)
{
    const uint4 ones = (uint4)(0x3c003c00u);
    float4 sum = mma(ones, x.x, x.y, (float4)(0));
    sum = mma(ones, x.z, x.w, sum);
    sums[0] = sum;
    sum = mma(ones, y.x, y.y, GROUP_32 ? (float4)(0) : sum);
    sums[GROUP_32] = mma(ones, y.z, y.w, sum);
}

// The products of one strip and one block with eight tokens, added to their totals.
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

// Sums of waves that split K -----------------------------------------------------------------------
//
// Local memory holds [WAVES][ROWS][SUMS_STRIDE] floats; work-items add up and store what is LANES * WAVES
// apart in [ROWS][SUM_COLUMNS].

#define SUM_COLUMNS (STRIP_N * S)
#define SUMS_STRIDE (SUM_COLUMNS + 4)  // 4 keeps a store's 32 lanes on 32 banks
#define OUTPUTS ((ROWS * SUM_COLUMNS + LANES * WAVES - 1) / (LANES * WAVES))
#define OUTPUT_ROW(o) ((item + (o) * LANES * WAVES) / SUM_COLUMNS)
#define OUTPUT_COLUMN(o) ((item + (o) * LANES * WAVES) % SUM_COLUMNS)

// One wave's totals for strip s and token tile i.
static inline void put_sums(__local float *sums, float4 total, uint wave, uint s, uint i, uint g, uint t)
{
    __local float *token = sums + (wave * ROWS + 8 * i + 2 * t) * SUMS_STRIDE + STRIP_N * s + g;
    token[0] = total.x;
    token[SUMS_STRIDE] = total.y;
    token[8] = total.z;
    token[SUMS_STRIDE + 8] = total.w;
}

// Of all waves.
// Where work-items do not divide the tile, the last sums of some are of no row: these read another's.
#if ROWS * SUM_COLUMNS % (LANES * WAVES)
#define SUM_OF_WAVES(o) sum_of_waves(sums, min(OUTPUT_ROW(o), (uint)ROWS - 1), OUTPUT_COLUMN(o))
#else
#define SUM_OF_WAVES(o) sum_of_waves(sums, OUTPUT_ROW(o), OUTPUT_COLUMN(o))
#endif
static inline float sum_of_waves(__local const float *sums, uint r, uint c)
{
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WAVES; w++)
        sum += sums[(w * ROWS + r) * SUMS_STRIDE + c];
    return sum;
}

// Where a kernel stores sum o of the tile whose first strip is first_strip; row: as of row_of(tile, OUTPUT_ROW(o), WORK).
#define STORE_SUM(o, row, sum)                                                                       \
    {                                                                                                \
        const uint column = STRIP_N * first_strip + OUTPUT_COLUMN(o);                                \
        if ((row).y >= 0 && column >= tile.column && column < tile.column + tile.columns) {          \
            const uint to = tile.out_column + (column - tile.column);                                \
            const float result = (sum) * (weight_factor * (column & 8 ? 1 / ODD_UNIT : 1 / EVEN_UNIT)) * \
                                 (ROW_FACTOR ? tiny_factor * row_factor[(row).x] : tiny_factor);     \
            if (SPLIT)                                                                               \
                partial[PARTIAL_AT(OUTPUT_ROW(o), column)] = result;                                 \
            else                                                                                     \
                store_output(BIAS ? result + BIAS_AT(tile, to) : result, output,                     \
                             output_offset + (ulong)(row).y * output_stride + to);                   \
        }                                                                                            \
    }
