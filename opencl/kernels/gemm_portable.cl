// gemm, tier "portable": OpenCL C 1.2, no extension; products and sums in float32.
//
// A wave is 32 work-items, one for each lane of a packed block: lane 4 * g + t multiplies columns g and
// g + 8 of its wave's strips by rows 8 * t .. 8 * t + 7 of every 32 of K. A work-group has
//
//   work-item = lane + 32 * (k_wave + K_WAVES * (column_wave + COLUMN_WAVES * row_wave))
//
//   k_wave        takes every K_WAVES-th block of 64 rows of K
//   column_wave   takes WAVE_STRIPS strips of 16 columns
//   row_wave      takes every ROW_WAVES-th row of the tile
//
// and at the end of a tile adds up the 4 * K_WAVES sums of each output in local memory, in ascending order.
// An output depends on K_WAVES and the number of splits only, never on the other rows.
//
// Few rows (decode): many k_waves, so that enough loads are in flight; every lane reads its activations
// itself. Many rows (STAGED): row_waves and column_waves share activations in local memory.
//
// Build options besides those of common.cl
//   K_WAVES, COLUMN_WAVES, ROW_WAVES   as above (8, 1, 1)
//   WAVE_STRIPS                        strips of a wave: 1, 2 or 4 (1)
//   STAGED                             1: activations go through local memory, 64 * K_WAVES rows of K at a time (0)
//   ROW_STEP                           rows of a wave that are skipped together when there are fewer (1)
//   UNROLL                             1: loops over rows are unrolled, so that sums stay in registers; 0: programs
//                                      compile in a fraction of the time, for CPUs (1)
//   BIAS, SPLIT, ROW_FACTOR            1: the arguments of these names are used (0)
//
// What the host must respect
//   ROWS           a multiple of ROW_WAVES * ROW_STEP; a work-item holds ROWS / ROW_WAVES * 2 * WAVE_STRIPS sums
//                  (up to 64 stay in registers)
//   local size     32 * K_WAVES * COLUMN_WAVES * ROW_WAVES
//   tile columns   16 * WAVE_STRIPS * COLUMN_WAVES
//   local memory   max(STAGED * 256 * ROWS * K_WAVES,
//                      16 * waves * (16 * WAVE_STRIPS * REDUCE_ROWS + 8)) + 8 * ROWS bytes, where waves is
//                  K_WAVES * COLUMN_WAVES * ROW_WAVES and REDUCE_ROWS is min(ROWS / ROW_WAVES,
//                  max(1, 32 / (waves * WAVE_STRIPS)))

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
#ifndef STAGED
#define STAGED 0
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
#define STAGE_K (BLOCK_K * K_WAVES)
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

#define SUMS_SIZE (4 * WAVES * SLICE)
#define STAGE_SIZE (STAGED * ROWS * STAGE_K)
#if SUMS_SIZE > STAGE_SIZE
#define SCRATCH_SIZE SUMS_SIZE
#else
#define SCRATCH_SIZE STAGE_SIZE
#endif

// Splits cut K between chunks of 128 rows: whole groups, whatever their length.
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

// The weights of a word, scale * (q - zero), four rows each of columns g and g + 8. A nibble at bit 12 of a float
// 2^11, or bit 16 of 2^7, adds its value; the products with the scale (11 bits) and the differences are exact.
static inline void dequantise(uint word, float2 scale, float2 offset, float4 *low, float4 *high)
{
    uint4 at = (uint4)(word << 12, word >> 4, word << 4, word >> 12);
    *low = as_float4((at & 0xf000u) | 0x45000000u) * scale.x + offset.x;
    *high = as_float4((at & 0xf0000u) | 0x43000000u) * scale.y + offset.y;
}

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
    __local float scratch[SCRATCH_SIZE]; // activations, then sums
    __local int in_rows[ROWS], out_rows[ROWS];

    const int item = get_local_id(0);
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
        uint block = first_block + k_wave;
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
#pragma unroll UNROLL_ROWS
        for (int r = 0; r < WAVE_ROWS; r++)
#pragma unroll
            for (int c = 0; c < 2 * WAVE_STRIPS; c++)
                sums[r][c] = 0;
#if STAGED
        const int all_steps = ROW_WAVES * ROW_STEP, staged_rows = (rows + all_steps - 1) / all_steps * all_steps;
        for (uint stage = first_block; stage < end_block; stage += K_WAVES) {
            for (int i = item; i < staged_rows * (STAGE_K / 8); i += LOCAL_SIZE) {
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
        ulong starts[WAVE_ROWS]; // of the rows, in the input; for padding that of some row, as all must be readable
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
#pragma unroll
                for (int s = 0; s < WAVE_STRIPS; s++)
                    next[s] = load_block(at, min(wave_strip + s, strips - 1), block + K_WAVES, k_blocks, groups,
                                         group_shift);

            float2 scale[WAVE_STRIPS], offset[WAVE_STRIPS];
            for (int half_block = 0; half_block < 2; half_block++) {
                const uint row_k = block * BLOCK_K + 32 * half_block;
                if (row_k >= k || wave_rows <= 0)
                    break;
                float4 w[WAVE_STRIPS][4]; // column g: rows 0 to 3, 4 to 7; column g + 8 alike
#pragma unroll
                for (int s = 0; s < WAVE_STRIPS; s++) {
                    if (half_block == 0 || group_shift == 5) {
                        scale[s] = halves_to_float2(half_block ? loaded[s].scales.y : loaded[s].scales.x);
#if SYMMETRIC
                        const float2 zero = 8;
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

        // Add up, REDUCE_ROWS rows of each wave at a time, and store.
        for (int first = 0; first * ROW_WAVES < rows; first += REDUCE_ROWS) {
            __local float *slice = scratch + ((row_wave * COLUMN_WAVES + column_wave) * K_WAVES + k_wave) * 4 * SLICE;
#pragma unroll UNROLL_ROWS
            for (int r = 0; r < REDUCE_ROWS; r++)
#pragma unroll
                for (int c = 0; c < 2 * WAVE_STRIPS; c++)
                    slice[t * SLICE + r * WAVE_COLUMNS + 8 * c + g] = sums[r][c];
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
                                            (from_wave * COLUMN_WAVES + c / WAVE_COLUMNS) * K_WAVES * 4 * SLICE +
                                            r * WAVE_COLUMNS + c % WAVE_COLUMNS;
                float sum = 0;
                for (int i_term = 0; i_term < 4 * K_WAVES; i_term++)
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
