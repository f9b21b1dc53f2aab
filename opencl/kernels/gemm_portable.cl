#include "dequantise.cl"

// gemm, tier "portable": OpenCL C 1.2 without extensions; products and sums in float32.
//
// A k_wave takes every K_WAVES-th block of 64 rows of K. For few rows (decode) there are many k_waves, so that enough
// loads are in flight. Each lane reads its own activations. gemm_portable_tiled.cl is for many rows.
//
// Build options and limits are those of wave_tiled.cl; ROWS is at most 64, so that a work-item's sums stay in registers.

// A lane's eight rows of 32, from the first of them on.
#if GROUP_16
#define LANE_ROW(t) (4 * (t))
#define LOAD_ROWS(i) (float8)(load4_input(input + input_offset, i), load4_input(input + input_offset, (i) + 16))
#else
#define LANE_ROW(t) (8 * (t))
#define LOAD_ROWS(i) load8_input(input + input_offset, i)
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
    __local float scratch[SUMS_SIZE];
    __local int in_rows[ROWS], out_rows[ROWS];

    const Place place = place_of(get_local_id(0));
    const int t = place.t, k_wave = place.k_wave, row_wave = place.row_wave;
    const uint strips = STRIPS, k_blocks = K_BLOCKS;
    const int column_tiles = COLUMN_TILES;
    const long tiles = (long)tiles_capacity * RUNS * column_tiles;

    for (long number = get_group_id(0); number < tiles; number += get_num_groups(0)) {
        const Turn turn = turn_of(number, column_tiles, RUNS, num_experts, n, k_blocks, WORK);
        if (!row_tile_exists(turn.index, WORK))
            break; // later tiles do not exist either
        const uint end_block = turn.end_block, wave_strip = turn.strip + place.column_wave * WAVE_STRIPS;
        const Lane at = lane_of(EXPERT_BASE(turn.live ? turn.tile.expert : 0), place, strips, k_blocks, groups);

        // The loads of the first weights start before the first barrier.
        uint block = turn.first_block + k_wave;
        Block next[WAVE_STRIPS];
        if (block < end_block)
            load_blocks(next, at, wave_strip, strips, block, k_blocks, groups, group_shift);

        list_rows(in_rows, out_rows, place.item, turn, WORK);
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
        ulong starts[WAVE_ROWS]; // of the input rows; padding has the start of some row, as every start is read from
#pragma unroll UNROLL_ROWS
        for (int r = 0; r < WAVE_ROWS; r++) {
            int row = in_rows[r * ROW_WAVES + row_wave];
            starts[r] = (ulong)(row >= 0 ? row : some_row) * k + LANE_ROW(t);
        }
        for (; block < end_block; block += K_WAVES) {
            Block loaded[WAVE_STRIPS];
#pragma unroll
            for (int s = 0; s < WAVE_STRIPS; s++)
                loaded[s] = next[s];
            if (block + K_WAVES < end_block)
                load_blocks(next, at, wave_strip, strips, block + K_WAVES, k_blocks, groups, group_shift);

            Terms terms[WAVE_STRIPS][PIECES];
            for (int half_block = 0; half_block < 2; half_block++) {
                const uint row_k = block * BLOCK_K + 32 * half_block;
                if (row_k >= k || wave_rows <= 0)
                    break;
                float4 w[WAVE_STRIPS][4]; // rows 0 to 3 and 4 to 7 of column g, then those of column g + 8
#pragma unroll
                for (int s = 0; s < WAVE_STRIPS; s++) {
                    if (half_block == 0 || group_shift <= 5) {
#pragma unroll
                        for (int p = 0; p < PIECES; p++) {
#if SYMMETRIC
                            const float2 zero = SYMMETRIC_ZERO;
#else
                            const uint zeros = OF_PIECE(loaded[s].zeros, half_block, p);
                            const float2 zero = (float2)(LOW_ZERO(zeros), HIGH_ZERO(zeros));
#endif
                            terms[s][p] = terms_of(FACTORS_OF(loaded[s], half_block, p), zero);
                        }
                    }
                    const HalfWords words = HALF_WORDS(loaded[s], half_block);
                    dequantise(STEP_WORDS(words, 0), terms[s][0], &w[s][0], &w[s][2]);
                    dequantise(STEP_WORDS(words, 1), terms[s][PIECES - 1], &w[s][1], &w[s][3]);
                }
#pragma unroll UNROLL_STEPS
                for (int step = 0; step < WAVE_ROWS; step += ROW_STEP)
                    if (step < wave_rows)
#pragma unroll
                        for (int r = step; r < step + ROW_STEP; r++) {
                            const float8 a = LOAD_ROWS(starts[r] + row_k);
#pragma unroll
                            for (int s = 0; s < WAVE_STRIPS; s++) {
                                sums[r][2 * s] = add_products(sums[r][2 * s], a, w[s][0], w[s][1]);
                                sums[r][2 * s + 1] = add_products(sums[r][2 * s + 1], a, w[s][2], w[s][3]);
                            }
                        }
            }
        }

        add_up_and_store(scratch, sums, in_rows, out_rows, rows, place, turn, n, weight_factor, tiny_factor, row_factor,
                         output, output_offset, output_stride, bias, partial, tiles_capacity);
    }
}
