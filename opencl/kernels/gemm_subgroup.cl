// gemm, tier "subgroup": cl_khr_fp16 and sub-groups; DOT=1: the integer dot product as well.
//
// The work-group is that of gemm_portable.cl: a wave is 32 work-items, one for each lane 4 * g + t of a packed block;
//
//   work-item = lane + 32 * (k_wave + K_WAVES * (column_wave + COLUMN_WAVES * row_wave))
//
//   k_wave        takes every K_WAVES-th 128 rows of K
//   column_wave   takes WAVE_STRIPS strips of 16 columns
//   row_wave      takes every ROW_WAVES-th row of the tile
//
// Work-items are numbered by sub-group, so the four t of a column are next to each other in a sub-group of any size
// from 4: where the device has shuffles they add up a column without local memory, which the k_waves alone use then.
//
// Products of a group of K are added up before its scale is applied, out += scale * sum(a * (q - zero)):
//
//   DOT=0   q - zero is exact in float16: a nibble in the lowest bits of the float16 1024 adds its value. Products and
//           sums are float32; where a device multiplies float16 into float32 that takes no conversion.
//   DOT=1   input rows are integer planes (prepare_rows with PREPARED_TYPE=2: see there). The sum is exact:
//           256 * dot(high, q) + dot(low, q) - zero * sum(a)
//
// An output depends on K_WAVES and the number of splits only, never on the other rows.
//
// Build options besides those of common.cl
//   DOT                                1: integer planes (0)
//   SHUFFLE                            1: sums of t by sub_group_shuffle_xor (where cl_khr_subgroup_shuffle is defined)
//   K_WAVES, COLUMN_WAVES, ROW_WAVES   as above (8, 1, 1)
//   WAVE_STRIPS                        strips of a wave: 1, 2 or 4 (1)
//   ROW_STEP                           rows of a wave that are skipped together when there are fewer (1)
//   UNROLL                             1: loops over rows are unrolled, so that sums stay in registers; 0: programs
//                                      compile in a fraction of the time, for CPUs (1)
//   BIAS, SPLIT, ROW_FACTOR            1: the arguments of these names are used (0)
//
// What the host must respect
//   DOT=1          INPUT_TYPE 0, though the rows are bytes: input row i starts at input_offset + i * row_bytes / 4 with
//                  row_bytes = 2 * k + 16 * ceil(groups / 2), and input_offset is a multiple of 4
//   ROWS           a multiple of ROW_WAVES * ROW_STEP; a work-item holds ROWS / ROW_WAVES * 2 * WAVE_STRIPS sums, each
//                  two registers (DOT: three)
//   local size     32 * K_WAVES * COLUMN_WAVES * ROW_WAVES
//   tile columns   16 * WAVE_STRIPS * COLUMN_WAVES
//   local memory   16 * waves * (16 * WAVE_STRIPS * REDUCE_ROWS + 8) + 8 * ROWS bytes, a quarter of the first term with
//                  SHUFFLE; waves is K_WAVES * COLUMN_WAVES * ROW_WAVES, and REDUCE_ROWS is min(ROWS / ROW_WAVES,
//                  max(1, 32 / (waves * WAVE_STRIPS)))

#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#ifdef cl_khr_subgroups
#pragma OPENCL EXTENSION cl_khr_subgroups : enable
#endif

#ifndef DOT
#define DOT 0
#endif
#ifndef SHUFFLE
#ifdef cl_khr_subgroup_shuffle
#define SHUFFLE 1
#else
#define SHUFFLE 0
#endif
#endif
#ifndef K_WAVES
#define K_WAVES 8
#endif
#ifndef COLUMN_WAVES
#define COLUMN_WAVES 1
#endif
#ifndef ROW_WAVES
#define ROW_WAVES 1
#endif
#ifndef WAVE_STRIPS
#define WAVE_STRIPS 1
#endif
#ifndef ROW_STEP
#define ROW_STEP 1
#endif
#ifndef UNROLL
#define UNROLL 1
#endif
#ifndef BIAS
#define BIAS 0
#endif
#ifndef SPLIT
#define SPLIT 0
#endif
#ifndef ROW_FACTOR
#define ROW_FACTOR 0
#endif

#define LANES 32
#define WAVES (K_WAVES * COLUMN_WAVES * ROW_WAVES)
#define LOCAL_SIZE (LANES * WAVES)
#define WAVE_ROWS (ROWS / ROW_WAVES)
#define WAVE_COLUMNS (STRIP_N * WAVE_STRIPS)
#define TILE_COLUMNS (WAVE_COLUMNS * COLUMN_WAVES)
#if ROWS % (ROW_WAVES * ROW_STEP) != 0
#error "ROWS must be a multiple of ROW_WAVES * ROW_STEP"
#endif

#if UNROLL
#define UNROLL_ROWS WAVE_ROWS
#define UNROLL_STEPS (WAVE_ROWS / ROW_STEP)
#else
#define UNROLL_ROWS 1
#define UNROLL_STEPS 1
#endif

// Rows of each wave that are summed over k_waves and t in one round.
#define ROW_SUMS (4 * WAVES * WAVE_COLUMNS)
#if ROW_SUMS * WAVE_ROWS <= 2048
#define REDUCE_ROWS WAVE_ROWS
#elif ROW_SUMS <= 2048
#define REDUCE_ROWS (2048 / ROW_SUMS)
#else
#define REDUCE_ROWS 1
#endif
#define SLICE (REDUCE_ROWS * WAVE_COLUMNS + 8) // 8 more, so that the four t of a column fall into different banks
#define SLICES (SHUFFLE ? K_WAVES : 4 * K_WAVES) // terms of an output in local memory

// K is cut between chunks of 128 rows, for splits and k_waves: whole groups, whatever their length.
#define CHUNK_BLOCKS 2

// What a lane reads of one block of a strip; scales and zeros once for each 32 rows.
typedef struct {
    uint4 words;
    uint2 scales;
#if !SYMMETRIC
    ushort2 zeros;
#endif
} Block;

// A lane's view of one expert.
typedef struct {
    __global const uint4 *words;
    __global const uint *scales;
#if !SYMMETRIC
    __global const ushort *zeros;
#endif
} Lane;

static inline Block load_block(Lane at, uint strip, uint block, uint k_blocks, uint groups, uint group_shift)
{
    Block loaded;
    uint first = strip * groups, last = groups - 1;
    uint group0 = (first + min((block * BLOCK_K) >> group_shift, last)) * 8;
    uint group1 = (first + min((block * BLOCK_K + 32) >> group_shift, last)) * 8;
    loaded.words = at.words[(strip * k_blocks + block) * LANES];
    loaded.scales = (uint2)(at.scales[group0], at.scales[group1]);
#if !SYMMETRIC
    loaded.zeros = (ushort2)(at.zeros[group0], at.zeros[group1]);
#endif
    return loaded;
}

#if DOT

// Dot products of four rows with the high and the low plane.
typedef int2 Part;
typedef uint2 Weights; // a column's eight rows, as bytes
typedef uint4 Activations;

static inline Activations load_activations(__global const INPUT *input, ulong i)
{
    return *(__global const uint4 *)(input + i);
}

static inline void unpack(uint2 words, half2 zero, Weights *low, Weights *high)
{
    *low = words & 0x0f0f0f0fu;
    *high = words >> 4 & 0x0f0f0f0fu;
}

static inline Part add_products(Part part, Activations a, Weights w)
{
    part.x += dot_4x8packed_us_int(w.x, a.x) + dot_4x8packed_us_int(w.y, a.y);
    part.y += dot_4x8packed_us_int(w.x, a.z) + dot_4x8packed_us_int(w.y, a.w);
    return part;
}

#else

typedef float Part;
typedef half8 Weights; // a column's eight rows, less the zero point
#if INPUT_TYPE == 1 && ALIGNED
typedef half8 Activations;
static inline Activations load_activations(__global const INPUT *input, ulong i)
{
    return *(__global const half8 *)(input + i);
}
#else
typedef float8 Activations;
#define load_activations load8_input
#endif

// Nibbles 0 and 4, 2 and 6 of both words (column g), or 1 and 5, 3 and 7 (column g + 8), in the lowest bits of 1024.
static inline void unpack(uint2 words, half2 zero, Weights *low, Weights *high)
{
    const half2 offset = (half)1024 + zero;
    const uint4 at = (uint4)(words.x, words.x >> 8, words.y, words.y >> 8);
    *low = as_half8((at & 0x000f000fu) | 0x64006400u) - offset.x;
    *high = as_half8((at >> 4 & 0x000f000fu) | 0x64006400u) - offset.y;
}

static inline Part add_products(Part part, Activations a, Weights w)
{
    part += (float)a.s0 * (float)w.s0;
    part += (float)a.s1 * (float)w.s1;
    part += (float)a.s2 * (float)w.s2;
    part += (float)a.s3 * (float)w.s3;
    part += (float)a.s4 * (float)w.s4;
    part += (float)a.s5 * (float)w.s5;
    part += (float)a.s6 * (float)w.s6;
    part += (float)a.s7 * (float)w.s7;
    return part;
}

#endif

__attribute__((reqd_work_group_size(LOCAL_SIZE, 1, 1)))
__kernel void gemm(
    WEIGHT_ARGS,
    __global const INPUT *restrict input, const ulong input_offset,
    __global const float *restrict row_factor,
    __global OUTPUT *restrict output, const ulong output_offset, const uint output_stride,
    __global const float *restrict bias,
    __global float *restrict partial, const uint tiles_capacity, const int splits,
    WORK_ARGS)
{
    __local float scratch[WAVES * (SHUFFLE ? 1 : 4) * SLICE];
    __local int in_rows[ROWS], out_rows[ROWS];

    const int item = get_sub_group_id() * get_max_sub_group_size() + get_sub_group_local_id();
    const int lane = item % LANES, g = lane / 4, t = lane % 4;
    const int k_wave = item / LANES % K_WAVES;
    const int column_wave = item / (LANES * K_WAVES) % COLUMN_WAVES;
    const int row_wave = item / (LANES * K_WAVES * COLUMN_WAVES);

    const uint strips = STRIPS, k_blocks = K_BLOCKS;
    const int column_tiles = (n + TILE_COLUMNS - 1) / TILE_COLUMNS;
#if SPLIT
    const int runs = splits;
#else
    const int runs = 1;
#endif
    const long tiles = (long)max_row_tiles(WORK) * runs * column_tiles;

    for (long turn = get_group_id(0); turn < tiles; turn += get_num_groups(0)) {
        const int column_tile = turn % column_tiles;
        const int run = turn / column_tiles % runs;
        const int tile_index = turn / column_tiles / runs;
        const Tile tile = row_tile(tile_index, num_experts, n, WORK);
        if (!row_tile_exists(tile_index, WORK))
            break; // nor do those that follow

        // Strips of the tile, and blocks of K. Nothing to do: no blocks and no rows, but the same barriers.
        const uint end_column = tile.column + tile.columns;
        const uint tile_strip = tile.column / STRIP_N + column_tile * (TILE_COLUMNS / STRIP_N);
        const bool live = (uint)tile.expert < num_experts && tile_strip * STRIP_N < end_column;
        const uint chunks = (k_blocks + CHUNK_BLOCKS - 1) / CHUNK_BLOCKS;
        const uint first_block = (uint)((ulong)chunks * run / runs) * CHUNK_BLOCKS;
        const uint end_block = live ? min((uint)((ulong)chunks * (run + 1) / runs) * CHUNK_BLOCKS, k_blocks) : 0;
        const uint wave_strip = tile_strip + column_wave * WAVE_STRIPS;
        const bool wave_live = wave_strip * STRIP_N < end_column;

        __global const uint *weights = EXPERT_BASE(live ? tile.expert : 0);
        Lane at;
        at.words = (__global const uint4 *)weights + lane;
        at.scales = weights + (ulong)strips * k_blocks * BLOCK_WORDS + g;
#if !SYMMETRIC
        at.zeros = (__global const ushort *)(at.scales - g + strips * groups * 8) + g;
#endif

        // The first weights are on their way before anything waits for the rows.
        uint block = first_block + k_wave * CHUNK_BLOCKS;
        Block next[WAVE_STRIPS];
        if (block < end_block)
#pragma unroll
            for (int s = 0; s < WAVE_STRIPS; s++)
                next[s] = load_block(at, min(wave_strip + s, strips - 1), block, k_blocks, groups, group_shift);

        for (int r = item; r < ROWS; r += LOCAL_SIZE) {
            int2 row = live ? row_of(tile, r, WORK) : (int2)(-1, -1);
            in_rows[r] = row.x;
            out_rows[r] = row.y;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        int rows = 0, some_row = 0; // up to the last that is not padding, and one that is not
        for (int r = 0; r < ROWS; r++)
            if (in_rows[r] >= 0) {
                rows = r + 1;
                some_row = in_rows[r];
            }
        const int wave_rows = wave_live ? (rows - row_wave + ROW_WAVES - 1) / ROW_WAVES : 0;

        float sums[WAVE_ROWS][2 * WAVE_STRIPS];
        Part parts[WAVE_ROWS][2 * WAVE_STRIPS];
#pragma unroll UNROLL_ROWS
        for (int r = 0; r < WAVE_ROWS; r++)
#pragma unroll
            for (int c = 0; c < 2 * WAVE_STRIPS; c++)
                sums[r][c] = 0, parts[r][c] = 0;
#if DOT
        const ulong row_length = k / 2 + (groups + 1) / 2 * 4;
        const uint meta = k / 2; // scales and sums, from the start of a row
        const int lane_k = 4 * t, half_block_k = 16; // steps in a row of planes
#else
        const ulong row_length = k;
        const int lane_k = 8 * t, half_block_k = 32;
#endif
        ulong starts[WAVE_ROWS]; // of the rows, in the input; for padding that of some row, as all must be readable
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
            // The other block of the chunk, or the wave's next chunk.
            const uint next_block = block % CHUNK_BLOCKS == 0 ? block + 1 : block + CHUNK_BLOCKS * K_WAVES - 1;
            if (next_block < end_block)
#pragma unroll
                for (int s = 0; s < WAVE_STRIPS; s++)
                    next[s] = load_block(at, min(wave_strip + s, strips - 1), next_block, k_blocks, groups,
                                         group_shift);

            for (int half_block = 0; half_block < 2; half_block++) {
                const uint row_k = block * BLOCK_K + 32 * half_block;
                if (row_k >= k || wave_rows <= 0)
                    break;
                Weights w[WAVE_STRIPS][2]; // columns g and g + 8
                int2 zero[WAVE_STRIPS];
#pragma unroll
                for (int s = 0; s < WAVE_STRIPS; s++) {
#if SYMMETRIC
                    zero[s] = 8;
#else
                    const uint zeros = half_block ? loaded[s].zeros.y : loaded[s].zeros.x;
                    zero[s] = (int2)(zeros & 255u, zeros >> 8);
#endif
                    unpack(half_block ? loaded[s].words.zw : loaded[s].words.xy, convert_half2(zero[s]), &w[s][0],
                           &w[s][1]);
                }
#pragma unroll UNROLL_STEPS
                for (int step = 0; step < WAVE_ROWS; step += ROW_STEP)
                    if (step < wave_rows)
#pragma unroll
                        for (int r = step; r < step + ROW_STEP; r++) {
                            const Activations a =
                                load_activations(input, starts[r] + row_k / 32 * half_block_k + lane_k);
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
                float2 scale[WAVE_STRIPS];
#pragma unroll
                for (int s = 0; s < WAVE_STRIPS; s++)
                    scale[s] = convert_float2(as_half2(half_block ? loaded[s].scales.y : loaded[s].scales.x));
#pragma unroll UNROLL_STEPS
                for (int step = 0; step < WAVE_ROWS; step += ROW_STEP)
                    if (step < wave_rows)
#pragma unroll
                        for (int r = step; r < step + ROW_STEP; r++) {
#if DOT
                            const uint2 of_group =
                                *(__global const uint2 *)(input + starts[r] + meta + 2 * (row_k >> group_shift));
                            const float row_scale = as_float(of_group.x);
                            const int row_sum = t == 0 ? as_int(of_group.y) : 0; // once for the four t
#endif
#pragma unroll
                            for (int s = 0; s < WAVE_STRIPS; s++) {
#if DOT
                                const int2 low = parts[r][2 * s], high = parts[r][2 * s + 1];
                                sums[r][2 * s] += (float)(256 * low.x + low.y - zero[s].x * row_sum) *
                                                  (row_scale * scale[s].x);
                                sums[r][2 * s + 1] += (float)(256 * high.x + high.y - zero[s].y * row_sum) *
                                                      (row_scale * scale[s].y);
#else
                                sums[r][2 * s] += parts[r][2 * s] * scale[s].x;
                                sums[r][2 * s + 1] += parts[r][2 * s + 1] * scale[s].y;
#endif
                                parts[r][2 * s] = 0, parts[r][2 * s + 1] = 0;
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

        // Add up, REDUCE_ROWS rows of each wave at a time, and store.
        for (int first = 0; first * ROW_WAVES < rows; first += REDUCE_ROWS) {
            __local float *slice = scratch + ((row_wave * COLUMN_WAVES + column_wave) * SLICES +
                                              (SHUFFLE ? k_wave : 4 * k_wave + t)) * SLICE;
#pragma unroll UNROLL_ROWS
            for (int r = 0; r < REDUCE_ROWS; r++)
#pragma unroll
                for (int c = 0; c < 2 * WAVE_STRIPS; c++)
                    if (!SHUFFLE || t == r % 4)
                        slice[r * WAVE_COLUMNS + 8 * c + g] = sums[r][c];
            // The next round's sums move to the front: private arrays are indexed by constants only.
#pragma unroll UNROLL_ROWS
            for (int r = 0; r + REDUCE_ROWS < WAVE_ROWS; r++)
#pragma unroll
                for (int c = 0; c < 2 * WAVE_STRIPS; c++)
                    sums[r][c] = sums[r + REDUCE_ROWS][c];
            barrier(CLK_LOCAL_MEM_FENCE);
            for (int i = item; i < REDUCE_ROWS * ROW_WAVES * TILE_COLUMNS; i += LOCAL_SIZE) {
                const int c = i % TILE_COLUMNS, from_wave = i / TILE_COLUMNS % ROW_WAVES;
                const int r = i / (TILE_COLUMNS * ROW_WAVES);
                const int tile_row = (first + r) * ROW_WAVES + from_wave;
                const uint column = tile_strip * STRIP_N + c;
                const int out_row = tile_row < ROWS ? out_rows[tile_row] : -1;
                if (out_row < 0 || column < tile.column || column >= end_column)
                    continue;
                __local const float *term = scratch +
                                            (from_wave * COLUMN_WAVES + c / WAVE_COLUMNS) * SLICES * SLICE +
                                            r * WAVE_COLUMNS + c % WAVE_COLUMNS;
                float sum = 0;
                for (int i_term = 0; i_term < SLICES; i_term++)
                    sum += term[i_term * SLICE];
                sum *= weight_factor;
#if ROW_FACTOR
                sum *= row_factor[in_rows[tile_row]];
#endif
                const uint tile_column = column - tile.column;
#if SPLIT
                const ulong to = ((ulong)run * tiles_capacity + tile_index) * ROWS + tile_row;
                partial[to * n + tile_column] = sum;
#else
#if BIAS
                sum += bias[tile.out_column + tile_column];
#endif
                store_output(sum, output + output_offset,
                             (ulong)out_row * output_stride + tile.out_column + tile_column);
#endif
            }
            barrier(CLK_LOCAL_MEM_FENCE);
        }
        if (rows == 0) // the rows of the next tile overwrite these
            barrier(CLK_LOCAL_MEM_FENCE);
    }
}
