#include "codes.cl"
#include "ptx.cl"

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
// Build options of both, besides those of common.cl and codes.cl
//   ROWS              rows of a tile: a multiple of 8
//   WAVES             waves of 32 work-items; the local size is 32 * WAVES
//   STRIPS_PER_WAVE   strips of 16 columns that a wave computes
//   DEPTH             blocks of K that are in flight at a time
//   GROUP_32          1: groups of 32 rows; 0: groups of 64 or 128 rows
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
#define HALVES (1 + GROUP_32)  // groups in a block of K

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
