// Shared by all kernels: element types, the layout of packed weights, and the rows of a tile.
//
// Every program begins with this file. It is OpenCL C 1.2 without extensions.
//
// Build options
//   INPUT_TYPE, OUTPUT_TYPE   0 float32, 1 float16, 2 bfloat16 (stored as ushort)
//   PARTS                     buffers that hold the stack's experts: 1, 2, 4 or 8
//   ROUTED                    1: rows are given by vLLM's routing arrays; 0: by a list of tiles
//   ROWS                      rows (tokens) in a tile
//   WHOLE_BLOCKS              1: block_size is at most ROWS, so that a block is one tile
//   BIAS                      one of BIAS_*, below
//   SPLIT                     1: a gemm uses its arguments partial and splits
//   ROW_FACTOR                1: a gemm uses its argument row_factor
//   ALIGNED                   1: input_offset is a multiple of 8 elements, so that load8_input can use wide loads

#ifndef INPUT_TYPE
#define INPUT_TYPE 0
#endif
#ifndef OUTPUT_TYPE
#define OUTPUT_TYPE 0
#endif
#ifndef PARTS
#define PARTS 1
#endif
#ifndef ROUTED
#define ROUTED 0
#endif
#ifndef ROWS
#define ROWS 8
#endif
#ifndef WHOLE_BLOCKS
#define WHOLE_BLOCKS 0
#endif
#ifndef ALIGNED
#define ALIGNED 0
#endif
// The bias that a gemm adds: none, one for the output's columns, or one for each expert's columns.
#define BIAS_NONE 0
#define BIAS_OF_OUTPUT 1
#define BIAS_OF_EXPERT 2
#ifndef BIAS
#define BIAS BIAS_NONE
#endif
#ifndef SPLIT
#define SPLIT 0
#endif
#ifndef ROW_FACTOR
#define ROW_FACTOR 0
#endif

// Element types --------------------------------------------------------------------------------

#define TYPE_0 float
#define TYPE_1 half
#define TYPE_2 ushort
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define INPUT JOIN(TYPE_, INPUT_TYPE)
#define OUTPUT JOIN(TYPE_, OUTPUT_TYPE)

static inline float bfloat16_to_float(ushort bits) { return as_float((uint)bits << 16); }

// Round to nearest, ties to even. A NaN stays a NaN.
static inline ushort float_to_bfloat16(float value)
{
    uint bits = as_uint(value);
    uint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (ushort)(isnan(value) ? ((bits >> 16) | 0x40u) : rounded);
}

// Two float16, or eight, in memory order.
static inline float2 halves_to_float2(uint bits) { return vload_half2(0, (const half *)&bits); }
static inline float8 halves_to_float8(uint4 bits)
{
    return (float8)(halves_to_float2(bits.x), halves_to_float2(bits.y), halves_to_float2(bits.z),
                    halves_to_float2(bits.w));
}

static inline float8 bfloat16s_to_float8(uint4 bits)
{
    const uint4 even = bits << 16, odd = bits & 0xffff0000u;
    return as_float8((uint8)(even.x, odd.x, even.y, odd.y, even.z, odd.z, even.w, odd.w));
}

#define DEFINE_LOAD(code, body1, body8)                                                                    \
    static inline float JOIN(load_, code)(__global const JOIN(TYPE_, code) * p, ulong i) { return body1; } \
    static inline float8 JOIN(load8_, code)(__global const JOIN(TYPE_, code) * p, ulong i) { return body8; }
#if ALIGNED // loads of uint4, as compilers split a load of eight shorts
DEFINE_LOAD(0, p[i], (float8)(((__global const float4 *)(p + i))[0], ((__global const float4 *)(p + i))[1]))
DEFINE_LOAD(1, vload_half(i, p), halves_to_float8(*(__global const uint4 *)(p + i)))
DEFINE_LOAD(2, bfloat16_to_float(p[i]), bfloat16s_to_float8(*(__global const uint4 *)(p + i)))
#else
DEFINE_LOAD(0, p[i], vload8(0, p + i))
DEFINE_LOAD(1, vload_half(i, p), vload_half8(0, p + i))
DEFINE_LOAD(2, bfloat16_to_float(p[i]), as_float8(convert_uint8(vload8(0, p + i)) << 16))
#endif

static inline float4 load4_0(__global const float *p, ulong i) { return vload4(0, p + i); }
static inline float4 load4_1(__global const half *p, ulong i) { return vload_half4(0, p + i); }
static inline float4 load4_2(__global const ushort *p, ulong i)
{
    return as_float4(convert_uint4(vload4(0, p + i)) << 16);
}

static inline void store_0(float value, __global float *p, ulong i) { p[i] = value; }
static inline void store_1(float value, __global half *p, ulong i) { vstore_half_rte(value, i, p); }
static inline void store_2(float value, __global ushort *p, ulong i) { p[i] = float_to_bfloat16(value); }

// load_input, load4_input, load8_input: element i, or elements i to i + 3 or i + 7, of a buffer of INPUT, as float.
// store_output: stores a float in a buffer of OUTPUT.
#define load_input JOIN(load_, INPUT_TYPE)
#define load4_input JOIN(load4_, INPUT_TYPE)
#define load8_input JOIN(load8_, INPUT_TYPE)
#define store_output JOIN(store_, OUTPUT_TYPE)

// The packed weight ----------------------------------------------------------------------------
//
// K is padded to blocks of 64 rows, N to strips of 16 columns. The layout of one expert, in uints:
//
//   words     [strips][k_blocks][32 lanes][4 steps]               codes of 4 bits
//             [strips][k_blocks][2 halves][32 lanes][2 steps][2]   codes of 8 bits
//   records   [strips][groups][8]    of columns g and g + 8, g = 0..7: their scales or sub-scales, column g first, and
//                                    then their minima or sub-minima, if there are any
//   and one of these, or neither:
//   zeros     [strips][groups][8]    zero points of columns g and g + 8: bytes, or ushorts with codes of 8 bits. Left
//                                    out for code types without zero points, with minima, and with two levels
//   blocks    [strips][ceil(k / 256)][8]   with two levels: float16 scales of columns g and g + 8, and then their minima
//
// It is padded to expert_words. records.cl has the types of a record. Scales of float16 without minima are normalised: a
// power of two brings the stack's largest scale between 2^14 and 2^15.
//
// Lane 4 * g + t of step s holds columns g and g + 8 of the strip, at rows
//
//   64 * block + 32 * (s / 2) + 8 * t + 4 * (s % 2) + {0, 1, 2, 3}
//
// or, with groups of 16 rows, so that a step has rows of one group, at rows
//
//   64 * block + 32 * (s / 2) + 16 * (s % 2) + 4 * t + {0, 1, 2, 3}
//
// Codes of 4 bits are in nibbles {0, 4, 2, 6} for column g and {1, 5, 3, 7} for column g + 8. So
//
// - a lane's rows of two steps are eight consecutive rows (with groups of 16, two runs of four);
// - (word & 0x0f0f0f0f) is column g as four bytes in row order 0, 2, 1, 3;
// - nibbles 0 and 4 lie in the lowest bits of the two float16 of a 32-bit register.
//
// Codes of 8 bits are in bytes 0 and 2 of a step's first word for rows 0 and 1 of column g, in its bytes 1 and 3 for
// column g + 8, and in its second word for rows 2 and 3. So (word & 0x00ff00ff) is in the lowest bits of two float16.
//
// The order is that of mma.m16n8k16's first operand, as in Marlin (Frantar et al., "MARLIN: Mixed-Precision
// Auto-Regressive Parallel Inference on Large Language Models", 2024), with K permuted within 32 rows.
//
// A group is 16, 32, 64 or 128 rows of packed K: group_shift is 4, 5, 6 or 7. The meaning of a code is in codes.cl.

#define STRIP_N 16
#define BLOCK_K 64
#define BLOCK_WORDS 128

#if PARTS == 1
#define WEIGHT_PARTS __global const uint *restrict w0
#define PART_OF(part) (w0)
#elif PARTS == 2
#define WEIGHT_PARTS __global const uint *restrict w0, __global const uint *restrict w1
#define PART_OF(part) ((part) == 0 ? w0 : w1)
#elif PARTS == 4
#define WEIGHT_PARTS                                                                                      \
    __global const uint *restrict w0, __global const uint *restrict w1, __global const uint *restrict w2, \
        __global const uint *restrict w3
#define PART_OF(part) ((part) < 2 ? ((part) == 0 ? w0 : w1) : ((part) == 2 ? w2 : w3))
#elif PARTS == 8
#define WEIGHT_PARTS                                                                                          \
    __global const uint *restrict w0, __global const uint *restrict w1, __global const uint *restrict w2,     \
        __global const uint *restrict w3, __global const uint *restrict w4, __global const uint *restrict w5, \
        __global const uint *restrict w6, __global const uint *restrict w7
#define PART_OF(part)                                                              \
    ((part) < 4 ? ((part) < 2 ? ((part) == 0 ? w0 : w1) : ((part) == 2 ? w2 : w3)) \
                : ((part) < 6 ? ((part) == 4 ? w4 : w5) : ((part) == 6 ? w6 : w7)))
#else
#error "PARTS must be 1, 2, 4 or 8"
#endif

// The arguments of every gemm that describe its weights.
//   experts_per_part   experts in each buffer except the last
//   expert_words       uints from one expert to the next
//   k                  rows of packed K: a multiple of 32
//   n                  columns of an expert
//   groups             packed groups
//   weight_factor, tiny_factor
//                      powers of two by which every product is multiplied at the end. Their product may be below the
//                      smallest float. tiny_factor is 1 unless the stack's scales are below 2^-105
#define WEIGHT_ARGS                                                                                            \
    WEIGHT_PARTS, const uint num_experts, const uint experts_per_part, const ulong expert_words, const uint k, \
        const uint n, const uint groups, const uint group_shift, const float weight_factor, const float tiny_factor

#if PARTS == 1
#define EXPERT_BASE(expert) (w0 + (uint)(expert) * expert_words)
#else
#define EXPERT_BASE(expert) \
    (PART_OF((uint)(expert) / experts_per_part) + ((uint)(expert) % experts_per_part) * expert_words)
#endif
#define STRIPS ((n + STRIP_N - 1) / STRIP_N)
#define K_BLOCKS ((k + BLOCK_K - 1) / BLOCK_K)

// Row tiles ------------------------------------------------------------------------------------
//
// A row tile is up to ROWS rows of one expert.
//
// ROUTED=1: a block of block_size slots has parts = ceil(block_size / ROWS); tile i is part i % parts of block
// i / parts of the routing arrays.
//
// ROUTED=0: tile i is
//   list[8 * i ..] = expert, first column, columns, first output column, first input row,
//                    first output row, rows, 0
// The columns are columns of the expert, and the first is a multiple of 8.
//
// WORK_ARGS     declares a kernel's arguments
// WORK          passes a kernel's arguments to a function
// WORK_PARAMS   declares a function's parameters
// WORK_NAMES    passes a function's parameters to another function

#if ROUTED
//   past, past_limit   slots in use: *past, at most past_limit
//   valid              ids below this are rows, others are padding
//   slot_input         1: slot s reads input row s, as rows were gathered by slot; 0: id i reads input row i / top_k
#define WORK_ARGS                                                                                                    \
    __global const int *restrict sorted_ids, const ulong sorted_offset, __global const int *restrict expert_ids,     \
        const ulong expert_offset, __global const int *restrict past, const ulong past_offset, const int past_limit, \
        const int valid, const int block_size, const int top_k, const int slot_input
#define WORK                                                                                                          \
    sorted_ids + sorted_offset, expert_ids + expert_offset, past + past_offset, past_limit, valid, block_size, top_k, \
        slot_input
#define WORK_PARAMS                                                                                     \
    __global const int *restrict sorted_ids, __global const int *restrict expert_ids,                   \
        __global const int *restrict past, const int past_limit, const int valid, const int block_size, \
        const int top_k, const int slot_input
#define WORK_NAMES sorted_ids, expert_ids, past, past_limit, valid, block_size, top_k, slot_input
#else
#define WORK_ARGS __global const int *restrict list, const int listed
#define WORK list, listed
#define WORK_PARAMS __global const int *restrict list, const int listed
#define WORK_NAMES list, listed
#endif

// Row tiles of a block.
#define BLOCK_PARTS (WHOLE_BLOCKS ? 1 : (block_size + ROWS - 1) / ROWS)

typedef struct {
    int expert;        // -1: the tile is empty
    int first;         // first slot (ROUTED) or input row
    int rows;          // slots or rows, at most ROWS
    uint column;       // first column of the expert, a multiple of 8
    uint columns;      // number of columns
    uint out_column;   // output column of the first column
    int out_first;     // first output row (ROUTED=0)
} Tile;

// Number of row tiles.
static inline int num_row_tiles(WORK_PARAMS)
{
#if ROUTED
    return clamp(past[0], 0, past_limit) / block_size * BLOCK_PARTS;
#else
    return listed;
#endif
}

// Whether tile i, below the host's upper bound, is below num_row_tiles().
static inline bool row_tile_exists(int i, WORK_PARAMS)
{
#if ROUTED
    return (i / BLOCK_PARTS + 1) * block_size <= past[0];
#else
    return true;
#endif
}

static inline Tile row_tile(int i, uint num_experts, uint n, WORK_PARAMS)
{
    Tile tile;
#if ROUTED
    int block = i / BLOCK_PARTS, part = i - block * BLOCK_PARTS;
    int expert = expert_ids[block];
    tile.expert = (uint)expert < num_experts ? expert : -1;
    tile.first = block * block_size + part * ROWS;
    tile.rows = min(ROWS, block_size - part * ROWS);
    tile.column = 0;
    tile.columns = n;
    tile.out_column = 0;
    tile.out_first = 0;
#else
    __global const int *entry = list + 8 * (ulong)i;
    tile.expert = entry[0];
    tile.column = (uint)entry[1];
    tile.columns = (uint)entry[2];
    tile.out_column = (uint)entry[3];
    tile.first = entry[4];
    tile.out_first = entry[5];
    tile.rows = entry[6];
#endif
    return tile;
}

// (input row, output row) of row r of a tile; (-1, -1) for padding.
static inline int2 row_of(Tile tile, int r, WORK_PARAMS)
{
    if (r >= tile.rows)
        return (int2)(-1, -1);
#if ROUTED
    int id = sorted_ids[tile.first + r];
    if ((uint)id >= (uint)valid)
        return (int2)(-1, -1);
    return (int2)(slot_input ? tile.first + r : top_k == 1 ? id : (int)((uint)id / (uint)top_k), id);
#else
    return (int2)(tile.first + r, tile.out_first + r);
#endif
}

// The bias of a column of a tile's output. With BIAS_OF_EXPERT an output row holds all columns of an expert.
#if BIAS == BIAS_OF_EXPERT
#define BIAS_AT(tile, out_column) bias[(ulong)(tile).expert * n + (out_column)]
#else
#define BIAS_AT(tile, out_column) bias[out_column]
#endif

// The arguments of every gemm.
//   row_factor           float32: products of input row i are multiplied by row_factor[i]
//   bias                 float32: BIAS_OF_OUTPUT [output columns], BIAS_OF_EXPERT [num_experts][n]
//   partial, splits      K is cut into `splits` runs; their sums go to `partial`, and reduce_splits adds them
//   tiles_capacity       upper bound of the number of row tiles
#define GEMM_ARGS                                                                                               \
    WEIGHT_ARGS, __global const INPUT *restrict input, const ulong input_offset,                                \
        __global const float *restrict row_factor, __global OUTPUT *restrict output, const ulong output_offset, \
        const uint output_stride, __global const float *restrict bias, __global float *restrict partial,        \
        const uint tiles_capacity, const int splits, WORK_ARGS
