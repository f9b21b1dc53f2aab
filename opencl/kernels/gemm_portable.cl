#include "wave_tiled.cl"

// gemm, tier "portable": OpenCL C 1.2 without extensions; products and sums in float32.
//
// A k_wave takes every K_WAVES-th block of 64 rows of K. For few rows (decode) there are many k_waves, so that enough
// loads are in flight, and each lane reads its own activations. For many rows (STAGED) row_waves and column_waves share
// activations in local memory.
//
// Build options besides those of wave_tiled.cl
//   STAGED   1: activations are copied to local memory, 64 * K_WAVES rows of K at a time (0)
//
// Limits for the host, besides those of wave_tiled.cl
//   ROWS           a work-item's sums should stay in registers: at most 64
//   local memory   max(STAGED * 256 * ROWS * K_WAVES, bytes for the sums as in wave_tiled.cl) + 8 * ROWS bytes

#ifndef STAGED
#define STAGED 0
#endif
#define STAGE_K (BLOCK_K * K_WAVES)
#define STAGE_SIZE (STAGED * ROWS * STAGE_K)
#if SUMS_SIZE > STAGE_SIZE
#define SCRATCH_SIZE SUMS_SIZE
#else
#define SCRATCH_SIZE STAGE_SIZE
#endif

// The weights of a word times WEIGHT_UNIT, four rows each of columns g (low) and g + 8 (high). The results are exact,
// as scales have 11 bits.
#if !HAS_ZERO_POINTS
static inline void dequantise(uint word, float2 scale, float2 offset, float4 *low, float4 *high)
{
    const uint4 codes = code_halves(word);
    *low = (float4)(halves_to_float2(codes.x), halves_to_float2(codes.z)) * scale.x;
    *high = (float4)(halves_to_float2(codes.y), halves_to_float2(codes.w)) * scale.y;
}
#else
// q * scale + offset: a nibble at bit 12 of the float 2^11, or at bit 16 of the float 2^7, adds its value to the float.
static inline void dequantise(uint word, float2 scale, float2 offset, float4 *low, float4 *high)
{
    word = code_integers(word);
    uint4 at = (uint4)(word << 12, word >> 4, word << 4, word >> 12);
    *low = as_float4((at & 0xf000u) | 0x45000000u) * scale.x + offset.x;
    *high = as_float4((at & 0xf0000u) | 0x43000000u) * scale.y + offset.y;
}
#endif

static inline float add_products(float sum, float8 a, float4 w0, float4 w1)
{
    sum += a.s0 * w0.x;
    sum += a.s1 * w0.y;
    sum += a.s2 * w0.z;
    sum += a.s3 * w0.w;
    sum += a.s4 * w1.x;
    sum += a.s5 * w1.y;
    sum += a.s6 * w1.z;
    sum += a.s7 * w1.w;
    return sum;
}

__attribute__((reqd_work_group_size(LOCAL_SIZE, 1, 1))) __kernel void gemm(GEMM_ARGS)
{
    __local float scratch[SCRATCH_SIZE]; // activations, then sums
    __local int in_rows[ROWS], out_rows[ROWS];

    const Place place = place_of(get_local_id(0));
    const int t = place.t, k_wave = place.k_wave, row_wave = place.row_wave;
    const uint strips = STRIPS, k_blocks = K_BLOCKS;
    const int column_tiles = (n + TILE_COLUMNS - 1) / TILE_COLUMNS;
#if SPLIT
    const int runs = splits;
#else
    const int runs = 1;
#endif
    const long tiles = (long)tiles_capacity * runs * column_tiles;

    for (long number = get_group_id(0); number < tiles; number += get_num_groups(0)) {
        const Turn turn = turn_of(number, column_tiles, runs, num_experts, n, k_blocks, WORK);
        if (!row_tile_exists(turn.index, WORK))
            break; // later tiles do not exist either
        const uint end_block = turn.end_block, wave_strip = turn.strip + place.column_wave * WAVE_STRIPS;
        const Lane at = lane_of(EXPERT_BASE(turn.live ? turn.tile.expert : 0), place, strips, k_blocks, groups);

        // The loads of the first weights start before the first barrier.
        uint block = turn.first_block + k_wave;
        Block next[WAVE_STRIPS];
        if (block < end_block)
            load_blocks(next, at, wave_strip, strips, block, k_blocks, groups, group_shift);

        for (int r = place.item; r < ROWS; r += LOCAL_SIZE) {
            const int2 row = turn.live ? row_of(turn.tile, r, WORK) : (int2)(-1, -1);
            in_rows[r] = row.x;
            out_rows[r] = row.y;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        const int2 used = rows_in_use(in_rows);
        const int rows = used.x, some_row = used.y;
        const bool wave_live = wave_strip * STRIP_N < turn.end_column;
        const int wave_rows = wave_live ? (rows - row_wave + ROW_WAVES - 1) / ROW_WAVES : 0;

        float sums[WAVE_ROWS][2 * WAVE_STRIPS];
#pragma unroll UNROLL_ROWS
        for (int r = 0; r < WAVE_ROWS; r++)
#pragma unroll
            for (int c = 0; c < 2 * WAVE_STRIPS; c++)
                sums[r][c] = 0;
#if STAGED
        const int all_steps = ROW_WAVES * ROW_STEP, staged_rows = (rows + all_steps - 1) / all_steps * all_steps;
        for (uint stage = turn.first_block; stage < end_block; stage += K_WAVES) {
            for (int i = place.item; i < staged_rows * (STAGE_K / 8); i += LOCAL_SIZE) {
                const int r = i / (STAGE_K / 8);
                const uint position = i % (STAGE_K / 8) * 8;
                const uint row_k = stage * BLOCK_K + position;
                const int row = in_rows[r];
                float8 a = 0;
                if (row >= 0 && row_k < k)
                    a = load8_input(input + input_offset, (ulong)row * k + row_k);
                vstore8(a, 0, scratch + r * STAGE_K + position);
            }
            barrier(CLK_LOCAL_MEM_FENCE);
            block = stage + k_wave;
            if (block < end_block)
#else
        ulong starts[WAVE_ROWS]; // of the input rows; padding has the start of some row, as every start is read from
#pragma unroll UNROLL_ROWS
        for (int r = 0; r < WAVE_ROWS; r++) {
            int row = in_rows[r * ROW_WAVES + row_wave];
            starts[r] = (ulong)(row >= 0 ? row : some_row) * k + 8 * t;
        }
        for (; block < end_block; block += K_WAVES)
#endif
            {
                Block loaded[WAVE_STRIPS];
#pragma unroll
                for (int s = 0; s < WAVE_STRIPS; s++)
                    loaded[s] = next[s];
                if (block + K_WAVES < end_block)
                    load_blocks(next, at, wave_strip, strips, block + K_WAVES, k_blocks, groups, group_shift);

                float2 scale[WAVE_STRIPS], offset[WAVE_STRIPS];
                for (int half_block = 0; half_block < 2; half_block++) {
                    const uint row_k = block * BLOCK_K + 32 * half_block;
                    if (row_k >= k || wave_rows <= 0)
                        break;
                    float4 w[WAVE_STRIPS][4]; // rows 0 to 3 and 4 to 7 of column g, then those of column g + 8
#pragma unroll
                    for (int s = 0; s < WAVE_STRIPS; s++) {
                        if (half_block == 0 || group_shift == 5) {
                            scale[s] = halves_to_float2(half_block ? loaded[s].scales.y : loaded[s].scales.x);
#if SYMMETRIC
                            const float2 zero = SYMMETRIC_ZERO;
#else
                        const uint zeros = half_block ? loaded[s].zeros.y : loaded[s].zeros.x;
                        const float2 zero = (float2)(zeros & 255u, zeros >> 8);
#endif
                            offset[s] = -((float2)(2048, 128) + zero) * scale[s];
                        }
                        const uint2 words = half_block ? loaded[s].words.zw : loaded[s].words.xy;
                        dequantise(words.x, scale[s], offset[s], &w[s][0], &w[s][2]);
                        dequantise(words.y, scale[s], offset[s], &w[s][1], &w[s][3]);
                    }
#pragma unroll UNROLL_STEPS
                    for (int step = 0; step < WAVE_ROWS; step += ROW_STEP)
                        if (step < wave_rows)
#pragma unroll
                            for (int r = step; r < step + ROW_STEP; r++) {
#if STAGED
                                const float8 a = vload8(0, scratch + (r * ROW_WAVES + row_wave) * STAGE_K +
                                                               k_wave * BLOCK_K + 32 * half_block + 8 * t);
#else
                            const float8 a = load8_input(input + input_offset, starts[r] + row_k);
#endif
#pragma unroll
                                for (int s = 0; s < WAVE_STRIPS; s++) {
                                    sums[r][2 * s] = add_products(sums[r][2 * s], a, w[s][0], w[s][1]);
                                    sums[r][2 * s + 1] = add_products(sums[r][2 * s + 1], a, w[s][2], w[s][3]);
                                }
                            }
                }
            }
#if STAGED
            barrier(CLK_LOCAL_MEM_FENCE);
        }
#endif

        add_up_and_store(scratch, sums, in_rows, out_rows, rows, place, turn, n, weight_factor, tiny_factor, row_factor,
                         output, output_offset, output_stride, bias, partial, tiles_capacity);
    }
}
