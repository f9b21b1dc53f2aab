#include "ptx.cl"

// dense_tiles: products by weights of 8 or 16 bits for many rows, by tensor cores. The formula and the arguments are those
// of decoder_dense.cl.
//
// Weights are as they are. Rows are split into two numbers of the weights' type, x = high + low, and both are multiplied:
// sums in float32 then differ from those of float32 rows by 2^-16 of the terms with bfloat16, and by 2^-22 with float16.
// float16 holds rows up to 65504; larger values give NaN. Rows of the weights' own type are not split.
//
// Weights of 8 bits are multiplied as float16, and their sums by the scales: the sums of all of K, or, if SCALE_K is not 0,
// those of a wave's part of a stage. SCALE_K is a multiple of WAVE_K.
//
// A work-group computes TILE_ROWS rows and COLUMNS columns, STAGE_K values of K at a time. COLUMN_WAVES waves have
// WAVE_COLUMNS columns each; K_WAVES of them share these, each with its own part of K, and their sums are added at the end.
// Rows go to local memory as pairs, and weights from memory to registers. Both are read a stage ahead:
//
//   m16n8k16: 16 rows, 8 columns, 16 of K       operands: rows, weights
//
// 16 bytes are eight values of a row or a column: operands of two products, as in decoder_attention_tiles_mma.cl. The chunks
// of 16 bytes of a row in local memory are
//
//   8 * row + (chunk ^ 4 * (row % 2))
//
// so that the eight lanes that read together (two rows, four chunks) use all banks.
//
// Build options
//   INPUT_TYPE, WEIGHT_TYPE   of common.cl; WEIGHT_TYPE is 1 or 2, or of scaled.cl
//   SCALE_K                   of scaled.cl
//   ROW_STRIPS                TILE_ROWS is 16 * ROW_STRIPS
//   COLUMN_WAVES, K_WAVES
//
// k, all strides and all offsets are multiples of 8.

#ifndef WEIGHT_TYPE
#define WEIGHT_TYPE 2
#endif
#include "scaled.cl"
#ifndef ROW_STRIPS
#define ROW_STRIPS 4
#define COLUMN_WAVES 8
#define K_WAVES 1
#endif

#define WEIGHT JOIN(TYPE_, WEIGHT_TYPE)
#define LANES 32
#define WAVES (COLUMN_WAVES * K_WAVES)
#define ITEMS (LANES * WAVES)
#define TILE_ROWS (16 * ROW_STRIPS)
#define COLUMN_TILES 4
#define WAVE_COLUMNS (8 * COLUMN_TILES)
#define COLUMNS (WAVE_COLUMNS * COLUMN_WAVES)
#define WAVE_K 64
#define WAVE_CHUNKS (WAVE_K / 8)
#define STAGE_K (WAVE_K * K_WAVES)
#define OPERAND_TYPE (HAS_SCALES ? 1 : WEIGHT_TYPE)
#define SPLIT_X (INPUT_TYPE != OPERAND_TYPE)
#define X_PARTS (1 + SPLIT_X)
#define ROW_CHUNKS (TILE_ROWS * K_WAVES * WAVE_CHUNKS)
#define ROW_LOADS ((ROW_CHUNKS + ITEMS - 1) / ITEMS)
#define STAGE_SLOTS (X_PARTS * ROW_CHUNKS)
#define SUM_SLOTS ((K_WAVES - 1) * COLUMN_WAVES * ROW_STRIPS * COLUMN_TILES * LANES)
#define SLOTS (2 * STAGE_SLOTS > SUM_SLOTS ? 2 * STAGE_SLOTS : SUM_SLOTS)

#if WEIGHT_TYPE == 2
#define MMA mma_bfloat16
#define PAIR float2_to_bfloat2
#define UNPAIR bfloat2_to_float2
#else
#define MMA mma
#define PAIR float2_to_half2
#define UNPAIR half2_to_float2
#endif

static inline uint4 pairs_of(float8 x) { return (uint4)(PAIR(x.s01), PAIR(x.s23), PAIR(x.s45), PAIR(x.s67)); }

// Eight weights in memory, and as an operand.
#if HAS_SCALES
#define STORED uint2
#define OPERAND(stored) (WEIGHT_TYPE == 3 ? float8s_to_halves8(stored) : pairs_of(convert_float8(as_char8(stored))))
#define LOAD_STORED(from) load_early_pair((__global const uint2 *)(from))
#else
#define STORED uint4
#define OPERAND(stored) (stored)
#define LOAD_STORED(from) load_early((__global const uint4 *)(from))
#endif

static inline float8 unpaired(uint4 x) { return (float8)(UNPAIR(x.x), UNPAIR(x.y), UNPAIR(x.z), UNPAIR(x.w)); }

// Groups: columns, rows, batch.
WAVE_OF_32 __attribute__((reqd_work_group_size(ITEMS, 1, 1))) __kernel void dense_tiles(
    __global const INPUT *restrict x, const uint x_offset, const uint x_stride, const uint x_batch,
    __global const WEIGHT *restrict weight, __global const float *restrict scales, __global const float *restrict bias,
    __global float *restrict out, const uint out_offset, const uint out_stride, const uint out_batch, const uint rows,
    const uint n, const uint k)
{
    __local uint4 room[SLOTS];
    const uint item = get_local_id(0), lane = item % LANES, wave = item / LANES, g = lane / 4, t = lane % 4;
    const uint k_wave = wave % K_WAVES, column_wave = wave / K_WAVES;
    const uint first = get_group_id(0) * COLUMNS + column_wave * WAVE_COLUMNS, first_row = get_group_id(1) * TILE_ROWS;
    x += x_offset + get_group_id(2) * (ulong)x_batch;
    weight += get_group_id(2) * (ulong)n * k;

    // The chunks of rows that this work-item brings, and the weights of its lane.
    __global const INPUT *rows_from[ROW_LOADS];
    UNROLLED for (uint i = 0; i < ROW_LOADS; i++)
    {
        const uint index = item + i * ITEMS, row = first_row + index / (K_WAVES * WAVE_CHUNKS);
        rows_from[i] = x + (ulong)min(row, rows - 1) * x_stride + index % (K_WAVES * WAVE_CHUNKS) * 8;
    }
    __global const WEIGHT *weights_from[COLUMN_TILES];
    UNROLLED for (uint c = 0; c < COLUMN_TILES; c++) weights_from[c] =
        weight + (ulong)min(first + 8 * c + g, n - 1) * k + k_wave * WAVE_K + 8 * t;

#if HAS_SCALES
    // The scales of a lane's two columns of a tile, for both of its rows.
#define SCALES(c, at)                                                          \
    (float4)(scale_at(scales, min(first + 8 * (c) + 2 * t, n - 1), at, k),     \
             scale_at(scales, min(first + 8 * (c) + 2 * t + 1, n - 1), at, k), \
             scale_at(scales, min(first + 8 * (c) + 2 * t, n - 1), at, k),     \
             scale_at(scales, min(first + 8 * (c) + 2 * t + 1, n - 1), at, k))
#endif

    float8 next_rows[ROW_LOADS];
    STORED next[2][COLUMN_TILES];
    uint4 weights[2][COLUMN_TILES];
    // K may end inside a stage. What is behind the end is 0 on both sides, as it may be NaN in memory.
#define READ_STAGE(base)                                                                                    \
    {                                                                                                       \
        UNROLLED for (uint j = 0; j < 2; j++) UNROLLED for (uint c = 0; c < COLUMN_TILES; c++) next[j][c] = \
            (base) + k_wave * WAVE_K + 32 * j + 8 * t < k ? LOAD_STORED(weights_from[c] + (base) + 32 * j)  \
                                                          : (STORED)(0);                                    \
        UNROLLED for (uint i = 0; i < ROW_LOADS; i++) next_rows[i] =                                        \
            (base) + (item + i * ITEMS) % (K_WAVES * WAVE_CHUNKS) * 8 < k ? load8_input(rows_from[i], base) \
                                                                          : (float8)(0);                    \
    }
#define STORE_STAGE(stage)                                                                    \
    {                                                                                         \
        UNROLLED for (uint c = 0; c < COLUMN_TILES; c++)                                      \
        {                                                                                     \
            weights[0][c] = OPERAND(next[0][c]);                                              \
            weights[1][c] = OPERAND(next[1][c]);                                              \
        }                                                                                     \
        UNROLLED for (uint i = 0; i < ROW_LOADS; i++)                                         \
        {                                                                                     \
            const uint index = item + i * ITEMS, row = index / (K_WAVES * WAVE_CHUNKS);       \
            __local uint4 *to = room + (stage) * STAGE_SLOTS + (index ^ 4 * (row % 2));       \
            if (ROW_CHUNKS % ITEMS == 0 || index < ROW_CHUNKS) {                              \
                const uint4 high = pairs_of(next_rows[i]);                                    \
                to[0] = high;                                                                 \
                if (SPLIT_X)                                                                  \
                    to[(X_PARTS - 1) * ROW_CHUNKS] = pairs_of(next_rows[i] - unpaired(high)); \
            }                                                                                 \
        }                                                                                     \
    }
    float4 sums[ROW_STRIPS][COLUMN_TILES];
    UNROLLED for (uint s = 0; s < ROW_STRIPS; s++) UNROLLED for (uint c = 0; c < COLUMN_TILES; c++) sums[s][c] =
        (float4)(0);
    READ_STAGE(0)
    STORE_STAGE(0)
    uint stage = 0;
    for (uint base = 0; base < k; base += STAGE_K) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (base + STAGE_K < k)
            READ_STAGE(base + STAGE_K)
        __local const uint4 *mine = room + stage * STAGE_SLOTS + g * (K_WAVES * WAVE_CHUNKS) + k_wave * WAVE_CHUNKS + t;
#define ADD_PRODUCTS(j, s, sums)                                                                 \
    UNROLLED for (uint part = 0; part < X_PARTS; part++)                                         \
    {                                                                                            \
        __local const uint4 *chunk =                                                             \
            mine + part * ROW_CHUNKS + 16 * (s) * (K_WAVES * WAVE_CHUNKS) + 4 * ((j) ^ (g & 1)); \
        const uint4 a = chunk[0], b = chunk[8 * K_WAVES * WAVE_CHUNKS];                          \
        UNROLLED for (uint c = 0; c < COLUMN_TILES; c++)(sums)[c] =                              \
            MMA((uint4)(a.x, b.x, a.y, b.y), weights[j][c].x, weights[j][c].y, (sums)[c]);       \
        UNROLLED for (uint c = 0; c < COLUMN_TILES; c++)(sums)[c] =                              \
            MMA((uint4)(a.z, b.z, a.w, b.w), weights[j][c].z, weights[j][c].w, (sums)[c]);       \
    }
#if HAS_SCALES && SCALE_K
        UNROLLED for (uint s = 0; s < ROW_STRIPS; s++)
        {
            float4 staged[COLUMN_TILES];
            UNROLLED for (uint c = 0; c < COLUMN_TILES; c++) staged[c] = (float4)(0);
            UNROLLED for (uint j = 0; j < 2; j++) ADD_PRODUCTS(j, s, staged)
                UNROLLED for (uint c = 0; c < COLUMN_TILES; c++) sums[s][c] =
                    fma(staged[c], SCALES(c, min(base + k_wave * WAVE_K, k - 1)), sums[s][c]);
        }
#else
        UNROLLED for (uint j = 0; j < 2; j++) UNROLLED for (uint s = 0; s < ROW_STRIPS; s++) ADD_PRODUCTS(j, s, sums[s])
#endif
        stage = 1 - stage;
        if (base + STAGE_K < k)
            STORE_STAGE(stage)
    }

#if K_WAVES > 1
    // The sums of the other waves of the same columns.
    __local float4 *others = (__local float4 *)room;
    barrier(CLK_LOCAL_MEM_FENCE);
    UNROLLED for (uint s = 0; s < ROW_STRIPS; s++) UNROLLED for (uint c = 0; c < COLUMN_TILES; c++)
    {
        const uint at = (((k_wave - 1) * COLUMN_WAVES + column_wave) * ROW_STRIPS + s) * COLUMN_TILES + c;
        if (k_wave > 0)
            others[at * LANES + lane] = sums[s][c];
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    if (k_wave > 0)
        return;
    UNROLLED for (uint other = 0; other < K_WAVES - 1; other++) UNROLLED for (uint s = 0; s < ROW_STRIPS; s++)
        UNROLLED for (uint c = 0; c < COLUMN_TILES; c++) sums[s][c] +=
        others[(((other * COLUMN_WAVES + column_wave) * ROW_STRIPS + s) * COLUMN_TILES + c) * LANES + lane];
#endif
#if HAS_SCALES && !SCALE_K
    UNROLLED for (uint c = 0; c < COLUMN_TILES; c++) UNROLLED for (uint s = 0; s < ROW_STRIPS; s++) sums[s][c] *=
        SCALES(c, 0);
#endif
    out += out_offset + get_group_id(2) * (ulong)out_batch;
    UNROLLED for (uint s = 0; s < ROW_STRIPS; s++) UNROLLED for (uint c = 0; c < COLUMN_TILES; c++)
        UNROLLED for (uint h = 0; h < 2; h++)
    {
        const uint row = first_row + 16 * s + 8 * h + g, column = first + 8 * c + 2 * t;
        const float2 sum = h ? sums[s][c].zw : sums[s][c].xy;
        if (row < rows && column < n)
            out[row * (ulong)out_stride + column] = sum.x + (bias ? bias[column] : 0);
        if (row < rows && column + 1 < n)
            out[row * (ulong)out_stride + column + 1] = sum.y + (bias ? bias[column + 1] : 0);
    }
}
