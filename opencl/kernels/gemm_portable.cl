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

// The weights of a step times WEIGHT_UNIT, four rows each of columns g (low) and g + 8 (high). With normalised float16
// scales and codes of 4 bits, weights are exact.
#if !HAS_ZERO_POINTS
typedef Factors Terms;
static inline Terms terms_of(Factors factors, float2 zero) { return factors; }

static inline void dequantise(uint word, Terms terms, float4 *low, float4 *high)
{
    const uint4 codes = code_halves(word);
    *low = (float4)(halves_to_float2(codes.x), halves_to_float2(codes.z)) * terms.x;
    *high = (float4)(halves_to_float2(codes.y), halves_to_float2(codes.w)) * terms.y;
}
#elif CODE_BITS == 4 && PLAIN_SCALES
typedef struct {
    float2 scale, offset;
} Terms;

static inline Terms terms_of(Factors factors, float2 zero)
{
    Terms terms;
    terms.scale = factors;
    terms.offset = -((float2)(2048, 128) + zero) * factors;
    return terms;
}

// q * scale + offset: a nibble at bit 12 of the float 2^11, or at bit 16 of the float 2^7, adds its value to the float.
static inline void dequantise(uint word, Terms terms, float4 *low, float4 *high)
{
    word = code_integers(word);
    uint4 at = (uint4)(word << 12, word >> 4, word << 4, word >> 12);
    *low = as_float4((at & 0xf000u) | 0x45000000u) * terms.scale.x + terms.offset.x;
    *high = as_float4((at & 0xf0000u) | 0x43000000u) * terms.scale.y + terms.offset.y;
}
#else
typedef struct {
    Factors factors;
    float2 magic; // the floats whose lowest bits are codes, plus zero points
} Terms;

#if CODE_BITS == 8
#define MAGIC (float2)(0x1p23f, 0x1p23f)
#else
#define MAGIC (float2)(2048, 128)
#endif
static inline Terms terms_of(Factors factors, float2 zero)
{
    Terms terms;
    terms.factors = factors;
    terms.magic = MAGIC + zero;
    return terms;
}

// The difference of code and zero point is exact, then comes one multiply-add.
static inline void dequantise(StepWords words, Terms terms, float4 *low, float4 *high)
{
#if CODE_BITS == 8
    const uint4 at = (uint4)(words.x, words.x >> 16, words.y, words.y >> 16);
    *low = as_float4((at & 0xffu) | 0x4b000000u) - terms.magic.x;
    *high = as_float4((at >> 8 & 0xffu) | 0x4b000000u) - terms.magic.y;
#else
    const uint word = code_integers(words);
    const uint4 at = (uint4)(word << 12, word >> 4, word << 4, word >> 12);
    *low = as_float4((at & 0xf000u) | 0x45000000u) - terms.magic.x;
    *high = as_float4((at & 0xf0000u) | 0x43000000u) - terms.magic.y;
#endif
#if MINIMA
    *low = fma(*low, (float4)(terms.factors.x), (float4)(-terms.factors.z));
    *high = fma(*high, (float4)(terms.factors.y), (float4)(-terms.factors.w));
#else
    *low *= terms.factors.x;
    *high *= terms.factors.y;
#endif
}
#endif

// A lane's eight rows of 32, from the first of them on, in global or in local memory.
#if GROUP_16
#define LANE_ROW(t) (4 * (t))
#define LOAD_ROWS(i) (float8)(load4_input(input + input_offset, i), load4_input(input + input_offset, (i) + 16))
#define STAGED_ROWS(p) (float8)(vload4(0, p), vload4(0, (p) + 16))
#else
#define LANE_ROW(t) (8 * (t))
#define LOAD_ROWS(i) load8_input(input + input_offset, i)
#define STAGED_ROWS(p) vload8(0, p)
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
            starts[r] = (ulong)(row >= 0 ? row : some_row) * k + LANE_ROW(t);
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
#if STAGED
                                __local const float *from = scratch + (r * ROW_WAVES + row_wave) * STAGE_K +
                                                            k_wave * BLOCK_K + 32 * half_block + LANE_ROW(t);
                                const float8 a = STAGED_ROWS(from);
#else
                            const float8 a = LOAD_ROWS(starts[r] + row_k);
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
