#include "ptx.cl"
#define RECORD_HALVES half2_to_float2
#include "records.cl"

// Shared by the kernels for NVIDIA tensor cores (compute capability 8.0 and later).
//
// Weights are the 16-row operand of mma.m16n8k16, and eight tokens are the columns of the other operand. A lane's word
// of packed nibbles is one fragment of 16 columns by 16 rows of K, and 16 bytes of a token's row are fragments for two
// steps. So neither operand needs shuffles or ldmatrix. Input is float16.
//
// There are two kernels:
//   gemm_mma_direct    for few rows per expert, where reading weights takes the time: waves split K
//   gemm_mma_tiled     for many rows per expert, where multiplying takes the time: waves share the tokens
//
// Build options of both, besides those of common.cl, codes.cl and records.cl
//   ROWS              rows of a tile: a multiple of 8
//   WAVES             waves of 32 work-items; the local size is 32 * WAVES
//   STRIPS_PER_WAVE   strips of 16 columns that a wave computes
//   DEPTH             blocks of K that are in flight at a time
//   GROUP_32          1: groups of 32 rows; 0: groups of 64 or 128 rows, or of 16 rows with GROUP_16
//   SPLIT             gemm_mma_direct only
//
// The kernels use more local memory than the 48 KiB that the driver reports; it allows as much as the hardware has.

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
#define HALVES (GROUP_16 ? 4 : 1 + GROUP_32)  // groups in a block of K
#define GROUP_K (BLOCK_K / HALVES)            // rows of a group in a block

// Sections of an expert.
typedef struct {
    __global const uint4 *words;            // [strips][blocks][BLOCK_QUADS][32]
    __global const Record *records;         // [strips][groups][8]
    __global const ZeroPair *zeros;         // [strips][groups][8]
#if TWO_LEVELS
    __global const BlockRecord *of_rows;    // [strips][blocks_of_rows(blocks)][8], in place of zeros
#endif
} Expert;

static inline Expert expert_at(__global const uint *base, uint strips, uint blocks, uint groups)
{
    Expert expert;
    expert.words = (__global const uint4 *)base;
    __global const uint *records = base + WORDS_OF_EXPERT(strips, blocks);
    expert.records = (__global const Record *)records;
    expert.zeros = (__global const ZeroPair *)(records + UINTS_OF_RECORDS(strips, groups));
#if TWO_LEVELS
    expert.of_rows = (__global const BlockRecord *)expert.zeros;
#endif
    return expert;
}

// A record that is loaded before issue_loads() (ptx.cl).
static inline Record load_early_record(__global const Record *p)
{
#if RECORD_BYTES == 16
    return load_early(p);
#elif RECORD_BYTES == 8
    return load_early_pair(p);
#elif RECORD_BYTES == 4
    return load_early_word(p);
#else
    return *p;
#endif
}

// The words of a lane in a block, in steps.
#if CODE_BITS == 8
typedef uint8 BlockWords;
#define BLOCK_STEP(words, step) \
    ((step) < 2 ? ((step) == 0 ? (words).s01 : (words).s23) : ((step) == 2 ? (words).s45 : (words).s67))
static inline BlockWords load_words_once(__global const uint4 *p)
{
    return (uint8)(load_once(p), load_once(p + LANES));
}
#else
typedef uint4 BlockWords;
#define BLOCK_STEP(words, step) \
    ((step) < 2 ? ((step) == 0 ? (words).x : (words).y) : ((step) == 2 ? (words).z : (words).w))
static inline BlockWords load_words_once(__global const uint4 *p) { return load_once(p); }
#endif

// The codes of a step as a float16 fragment of mma: EVEN_UNIT times their values in column g, and ODD_UNIT times in column
// g + 8.
#if !HAS_ZERO_POINTS
#define EVEN_UNIT CODE_UNIT
#define ODD_UNIT CODE_UNIT
static inline uint4 codes(uint word) { return code_halves(word); }
#elif CODE_BITS == 8
// Bytes without an exponent are subnormal float16, which tensor cores multiply exactly.
#define EVEN_UNIT 0x1p-24f
#define ODD_UNIT 0x1p-24f
static inline uint4 codes(uint2 words)
{
    const uint2 odd = words >> 8;
    return (uint4)(words.x, odd.x, words.y, odd.y) & 0x00ff00ffu;
}
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
#endif

// Adds the sums of a group's products to the total. token_sums: the sums of the tokens' values, for minima.
static inline float4 add_group(float4 total, float4 sum, float4 token_sums, Factors factors)
{
#if MINIMA
    total -= token_sums * factors.zzww;
#endif
    return total + sum * factors.xxyy;
}
