#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define RECORD_HALVES(pair) convert_float2(as_half2(pair))
#include "wave_tiled.cl"

// gemm, tier "subgroup": needs cl_khr_fp16 and sub-groups; with DOT=1 the integer dot product, too.
//
// A k_wave takes every K_WAVES-th chunk of 128 rows of K.
//
// Work-items are numbered by sub-group. So the four t of a column are neighbours in a sub-group of any size from 4.
// With shuffles they add a column's sums without local memory; only the sums of k_waves then use local memory.
//
// The products of a group of K are added before its scale is applied, out += scale * sum(a * (q - zero)):
//
//   DOT=0   q - zero is exact in float16: a nibble in the lowest bits of the float16 1024 adds its value. Products and
//           sums are float32. A device that multiplies float16 into float32 needs no conversion.
//   DOT=1   input rows are integer planes (PREPARED_PLANES of prepare.cl). The sum is exact:
//           256 * dot(high, q) + dot(low, q) - zero * sum(a). Here q and zero are multiplicands (codes.cl).
//
// A minimum is multiplied by the sum of the group's activations.
//
// A work-item multiplies ROWS_AT_ONCE rows of K at a time: its eight of 32, or its four of 16 with groups of 16.
//
// Build options besides those of wave_tiled.cl
//   DOT       1: integer planes (0)
//   SHUFFLE   1: sub_group_shuffle_xor adds the sums of the four t; needs cl_khr_subgroup_shuffle
//
// Limits for the host, besides those of wave_tiled.cl
//   DOT=1     INPUT_TYPE is 0, though rows are bytes: input row i starts at input_offset + i * row_bytes / 4, where
//             row_bytes = 2 * k + 16 * ceil(groups / 2); input_offset is a multiple of 4
//   ROWS      each sum of a work-item takes two registers (DOT=1: three)

#ifdef cl_khr_subgroups
#pragma OPENCL EXTENSION cl_khr_subgroups : enable
#endif

#define ROWS_AT_ONCE (8 / PIECES)
#if GROUP_16
typedef StepWords Words;
#define WORDS_OF(words, piece) STEP_WORDS(words, piece)
#else
typedef HalfWords Words;
#define WORDS_OF(words, piece) (words)
#endif
#if CODE_BITS == 8
#define LOW_BYTES 0x00ff00ffu
#if GROUP_16
#define EVEN_WORDS(words) (words).x
#define ODD_WORDS(words) (words).y
#else
#define EVEN_WORDS(words) (words).even
#define ODD_WORDS(words) (words).odd
#endif
#endif

#if DOT

// Dot products of the rows with the high and the low plane.
typedef int2 Part;
#if GROUP_16
typedef uint Weights; // a column's rows, as bytes
typedef uint2 Activations;

static inline Activations load_activations(__global const INPUT *input, ulong i, int piece)
{
    return (uint2)(as_uint(input[i + piece]), as_uint(input[i + 2 + piece]));
}

static inline Part add_products(Part part, Activations a, Weights w)
{
    part.x += dot_4x8packed_us_int(w, a.x);
    part.y += dot_4x8packed_us_int(w, a.y);
    return part;
}
#else
typedef uint2 Weights;
typedef uint4 Activations;

static inline Activations load_activations(__global const INPUT *input, ulong i, int piece)
{
    return *(__global const uint4 *)(input + i);
}

static inline Part add_products(Part part, Activations a, Weights w)
{
    part.x += dot_4x8packed_us_int(w.x, a.x) + dot_4x8packed_us_int(w.y, a.y);
    part.y += dot_4x8packed_us_int(w.x, a.z) + dot_4x8packed_us_int(w.y, a.w);
    return part;
}
#endif

static inline void unpack(Words words, half2 zero, Weights *low, Weights *high)
{
#if CODE_BITS == 8 // bytes in row order 0, 2, 1, 3, as in the planes
    *low = (EVEN_WORDS(words) & LOW_BYTES) | (ODD_WORDS(words) & LOW_BYTES) << 8;
    *high = (EVEN_WORDS(words) >> 8 & LOW_BYTES) | (ODD_WORDS(words) & ~LOW_BYTES);
#elif HAS_ZERO_POINTS
    words = code_integers(words);
    *low = words & 0x0f0f0f0fu;
    *high = words >> 4 & 0x0f0f0f0fu;
#elif GROUP_16
#error "codes without zero points have no groups of 16"
#else
    code_bytes(words, low, high);
#endif
}

#else

typedef float Part;
#if GROUP_16
typedef half4 Weights; // a column's rows, minus the zero point, times WEIGHT_UNIT
typedef float4 Activations;
#define load_activations(input, i, piece) load4_input(input, (i) + 16 * (piece))
#else
typedef half8 Weights;
#if INPUT_TYPE == 1 && ALIGNED
typedef half8 Activations;
static inline Activations load_activations(__global const INPUT *input, ulong i, int piece)
{
    return *(__global const half8 *)(input + i);
}
#else
typedef float8 Activations;
#define load_activations(input, i, piece) load8_input(input, i)
#endif
#endif

#if CODE_BITS == 8
#if GROUP_16
#define AS_WEIGHTS as_half4
#else
#define AS_WEIGHTS as_half8
#endif
// Puts bytes in the lowest bits of the float16 1024.
static inline void unpack(Words words, half2 zero, Weights *low, Weights *high)
{
    const half2 offset = (half)1024 + zero;
    *low = AS_WEIGHTS((words & LOW_BYTES) | 0x64006400u) - offset.x;
    *high = AS_WEIGHTS((words >> 8 & LOW_BYTES) | 0x64006400u) - offset.y;
}
#elif !HAS_ZERO_POINTS
static inline void unpack(uint2 words, half2 zero, Weights *low, Weights *high)
{
    const uint4 first = code_halves(words.x), second = code_halves(words.y);
    *low = as_half8((uint4)(first.xz, second.xz));
    *high = as_half8((uint4)(first.yw, second.yw));
}
#elif GROUP_16
#error "codes of 4 bits have no groups of 16"
#else
// Puts nibbles 0, 4, 2, 6 of both words (column g) and nibbles 1, 5, 3, 7 (column g + 8) in the lowest bits of the
// float16 1024.
static inline void unpack(uint2 words, half2 zero, Weights *low, Weights *high)
{
    words = code_integers(words);
    const half2 offset = (half)1024 + zero;
    const uint4 at = (uint4)(words.x, words.x >> 8, words.y, words.y >> 8);
    *low = as_half8((at & 0x000f000fu) | 0x64006400u) - offset.x;
    *high = as_half8((at >> 4 & 0x000f000fu) | 0x64006400u) - offset.y;
}
#endif

static inline Part add_products(Part part, Activations a, Weights w)
{
    part += (float)a.s0 * (float)w.s0;
    part += (float)a.s1 * (float)w.s1;
    part += (float)a.s2 * (float)w.s2;
    part += (float)a.s3 * (float)w.s3;
#if !GROUP_16
    part += (float)a.s4 * (float)w.s4;
    part += (float)a.s5 * (float)w.s5;
    part += (float)a.s6 * (float)w.s6;
    part += (float)a.s7 * (float)w.s7;
#endif
    return part;
}

#if MINIMA
// The sum of the activations, in float32.
#if GROUP_16
static inline float sum_of(Activations a) { return (a.s0 + a.s1) + (a.s2 + a.s3); }
#else
static inline float sum_of(Activations values)
{
    const float8 a = convert_float8(values);
    return ((a.s0 + a.s1) + (a.s2 + a.s3)) + ((a.s4 + a.s5) + (a.s6 + a.s7));
}
#endif
#endif

#endif

__attribute__((reqd_work_group_size(LOCAL_SIZE, 1, 1))) __kernel void gemm(GEMM_ARGS)
{
    __local float scratch[SUMS_SIZE];
    __local int in_rows[ROWS], out_rows[ROWS];

    const Place place = place_of(get_sub_group_id() * get_max_sub_group_size() + get_sub_group_local_id());
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
        uint block = turn.first_block + k_wave * CHUNK_BLOCKS;
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
        Part parts[WAVE_ROWS][2 * WAVE_STRIPS];
#pragma unroll UNROLL_ROWS
        for (int r = 0; r < WAVE_ROWS; r++)
#pragma unroll
            for (int c = 0; c < 2 * WAVE_STRIPS; c++)
                sums[r][c] = 0, parts[r][c] = 0;
#if MINIMA && !DOT
        float row_sums[WAVE_ROWS]; // of the group's activations, of the work-item's rows of K
#pragma unroll UNROLL_ROWS
        for (int r = 0; r < WAVE_ROWS; r++)
            row_sums[r] = 0;
#endif
#if DOT
        const ulong row_length = k / 2 + (groups + 1) / 2 * 4;
        const uint meta = k / 2; // scales and sums, from the start of a row
        const int lane_k = 4 * t, half_block_k = 16; // steps in a row of planes
#else
        const ulong row_length = k;
        const int lane_k = ROWS_AT_ONCE * t, half_block_k = 32;
#endif
        ulong starts[WAVE_ROWS]; // of the input rows; padding has the start of some row, as every start is read from
#pragma unroll UNROLL_ROWS
        for (int r = 0; r < WAVE_ROWS; r++) {
            int row = in_rows[r * ROW_WAVES + row_wave];
            starts[r] = input_offset + (ulong)(row >= 0 ? row : some_row) * row_length;
        }
        while (block < end_block) {
            Block loaded[WAVE_STRIPS];
#pragma unroll
            for (int s = 0; s < WAVE_STRIPS; s++)
                loaded[s] = next[s];
            // The other block of the chunk, or the first block of the wave's next chunk.
            const uint next_block = block % CHUNK_BLOCKS == 0 ? block + 1 : block + CHUNK_BLOCKS * K_WAVES - 1;
            if (next_block < end_block)
                load_blocks(next, at, wave_strip, strips, next_block, k_blocks, groups, group_shift);

            for (int half_block = 0; half_block < 2; half_block++) {
                const uint row_k = block * BLOCK_K + 32 * half_block;
                if (row_k >= k || wave_rows <= 0)
                    break;
#if GROUP_16
#pragma unroll
                for (int piece = 0; piece < PIECES; piece++)
#else
                const int piece = 0;
#endif
                {
                    Weights w[WAVE_STRIPS][2]; // columns g and g + 8
                    int2 zero[WAVE_STRIPS];
#pragma unroll
                    for (int s = 0; s < WAVE_STRIPS; s++) {
#if SYMMETRIC
                        zero[s] = SYMMETRIC_ZERO;
#else
                        const uint zeros = OF_PIECE(loaded[s].zeros, half_block, piece);
                        zero[s] = (int2)(LOW_ZERO(zeros), HIGH_ZERO(zeros));
#endif
                        const HalfWords words = HALF_WORDS(loaded[s], half_block);
                        unpack(WORDS_OF(words, piece), convert_half2(zero[s]), &w[s][0], &w[s][1]);
                    }
#pragma unroll UNROLL_STEPS
                    for (int step = 0; step < WAVE_ROWS; step += ROW_STEP)
                        if (step < wave_rows)
#pragma unroll
                            for (int r = step; r < step + ROW_STEP; r++) {
                                const Activations a =
                                    load_activations(input, starts[r] + row_k / 32 * half_block_k + lane_k, piece);
#if MINIMA && !DOT
                                row_sums[r] += sum_of(a);
#endif
#pragma unroll
                                for (int s = 0; s < WAVE_STRIPS; s++) {
                                    parts[r][2 * s] = add_products(parts[r][2 * s], a, w[s][0]);
                                    parts[r][2 * s + 1] = add_products(parts[r][2 * s + 1], a, w[s][1]);
                                }
                            }

                    // The end of a group.
                    const uint next_k = row_k + 32;
                    if (next_k < k && (next_k & ((1u << group_shift) - 1)) != 0)
                        continue;
                    Factors factors[WAVE_STRIPS];
#pragma unroll
                    for (int s = 0; s < WAVE_STRIPS; s++)
                        factors[s] = FACTORS_OF(loaded[s], half_block, piece);
#pragma unroll UNROLL_STEPS
                    for (int step = 0; step < WAVE_ROWS; step += ROW_STEP)
                        if (step < wave_rows)
#pragma unroll
                            for (int r = step; r < step + ROW_STEP; r++) {
#if DOT
                                const uint2 of_group = *(__global const uint2 *)(input + starts[r] + meta +
                                                                                 2 * ((row_k >> group_shift) + piece));
                                const float row_scale = as_float(of_group.x);
                                const int row_sum = t == 0 ? as_int(of_group.y) : 0; // once for the four t
#endif
#pragma unroll
                                for (int s = 0; s < WAVE_STRIPS; s++) {
#if DOT
                                    const int2 low = parts[r][2 * s], high = parts[r][2 * s + 1];
                                    sums[r][2 * s] +=
                                        (float)(256 * low.x + low.y - zero[s].x * row_sum) * (row_scale * factors[s].x);
                                    sums[r][2 * s + 1] += (float)(256 * high.x + high.y - zero[s].y * row_sum) *
                                                          (row_scale * factors[s].y);
#else
                                    sums[r][2 * s] += parts[r][2 * s] * factors[s].x;
                                    sums[r][2 * s + 1] += parts[r][2 * s + 1] * factors[s].y;
#endif
#if MINIMA && DOT
                                    sums[r][2 * s] -= (float)row_sum * (row_scale * factors[s].z);
                                    sums[r][2 * s + 1] -= (float)row_sum * (row_scale * factors[s].w);
#elif MINIMA
                                    sums[r][2 * s] -= row_sums[r] * factors[s].z;
                                    sums[r][2 * s + 1] -= row_sums[r] * factors[s].w;
#endif
                                    parts[r][2 * s] = 0, parts[r][2 * s + 1] = 0;
                                }
#if MINIMA && !DOT
                                row_sums[r] = 0;
#endif
                            }
                }
            }
            block = next_block;
        }

#if SHUFFLE
#pragma unroll UNROLL_ROWS
        for (int r = 0; r < WAVE_ROWS; r++)
#pragma unroll
            for (int c = 0; c < 2 * WAVE_STRIPS; c++) {
                sums[r][c] += sub_group_shuffle_xor(sums[r][c], 1);
                sums[r][c] += sub_group_shuffle_xor(sums[r][c], 2);
            }
#endif

        add_up_and_store(scratch, sums, in_rows, out_rows, rows, place, turn, n, weight_factor, tiny_factor, row_factor,
                         output, output_offset, output_stride, bias, partial, tiles_capacity);
    }
}
