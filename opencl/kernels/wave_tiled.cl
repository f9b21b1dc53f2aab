#include "records.cl"

// Shared by gemm_portable, gemm_portable_tiled and gemm_subgroup: the division of a tile among waves, and what becomes of
// their sums.
//
// A wave is 32 work-items, one for each lane of a packed block. Lane 4 * g + t multiplies columns g and g + 8 of its
// wave's strips by rows 8 * t to 8 * t + 7 of every 32 rows of K. Work-items of a work-group are numbered
//
//   work-item = lane + 32 * (k_wave + K_WAVES * (column_wave + COLUMN_WAVES * row_wave))
//
//   k_wave        takes a part of K
//   column_wave   takes WAVE_STRIPS strips of 16 columns
//   row_wave      takes every ROW_WAVES-th row of the tile
//
// At the end of a tile the work-group adds the sums of each output in local memory, in ascending order. So an output
// depends on K_WAVES and the number of splits, but not on other rows.
//
// Build options besides those of common.cl
//   K_WAVES, COLUMN_WAVES, ROW_WAVES   as above (8, 1, 1)
//   WAVE_STRIPS                        strips of a wave: 1, 2 or 4 (1)
//   ROW_STEP                           rows of a wave that are multiplied or skipped together (1)
//   UNROLL                             1: loops over rows are unrolled, so that sums stay in registers; 0: for CPUs,
//                                      where programs then compile in a fraction of the time (1)
//   SHUFFLE                            1: the kernel adds the sums of a column's four t before add_up_and_store (0)
//   DOT                                1: the kernel multiplies integers (0)
//
// What the host must respect
//   ROWS           a multiple of ROW_WAVES * ROW_STEP; a work-item holds ROWS / ROW_WAVES * 2 * WAVE_STRIPS sums
//   local size     32 * K_WAVES * COLUMN_WAVES * ROW_WAVES
//   tile columns   16 * WAVE_STRIPS * COLUMN_WAVES
//   local memory   16 * waves * (16 * WAVE_STRIPS * REDUCE_ROWS + 8) + 8 * ROWS bytes for the sums, a quarter of the
//                  first term with SHUFFLE; waves is K_WAVES * COLUMN_WAVES * ROW_WAVES, and REDUCE_ROWS is
//                  min(ROWS / ROW_WAVES, max(1, 32 / (waves * WAVE_STRIPS)))

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
#ifndef SHUFFLE
#define SHUFFLE 0
#endif
#ifndef DOT
#define DOT 0
#endif

#define LANES 32
#define WAVES (K_WAVES * COLUMN_WAVES * ROW_WAVES)
#define LOCAL_SIZE (LANES * WAVES)
#define WAVE_ROWS (ROWS / ROW_WAVES)
#define WAVE_COLUMNS (STRIP_N * WAVE_STRIPS)
#define TILE_COLUMNS (WAVE_COLUMNS * COLUMN_WAVES)
#define COLUMN_TILES ((n + TILE_COLUMNS - 1) / TILE_COLUMNS)
#define RUNS (SPLIT ? splits : 1) // into which K is cut
#if ROWS % (ROW_WAVES * ROW_STEP) != 0
#error "ROWS must be a multiple of ROW_WAVES * ROW_STEP"
#endif

// A kernel multiplies activations by weights times WEIGHT_UNIT.
#if DOT
#define WEIGHT_UNIT ((float)UNITS_PER_ONE)
#elif HAS_ZERO_POINTS
#define WEIGHT_UNIT 1.0f
#else
#define WEIGHT_UNIT CODE_UNIT
#endif

#if UNROLL
#define UNROLL_ROWS WAVE_ROWS
#define UNROLL_STEPS (WAVE_ROWS / ROW_STEP)
#else
#define UNROLL_ROWS 1
#define UNROLL_STEPS 1
#endif

// Rows of each wave whose sums are added over k_waves and t in one round.
#define ROW_SUMS (4 * WAVES * WAVE_COLUMNS)
#if ROW_SUMS * WAVE_ROWS <= 2048
#define REDUCE_ROWS WAVE_ROWS
#elif ROW_SUMS <= 2048
#define REDUCE_ROWS (2048 / ROW_SUMS)
#else
#define REDUCE_ROWS 1
#endif
#define SLICE (REDUCE_ROWS * WAVE_COLUMNS + 8) // 8 more, so that a column's four t use different banks
#define SLICES (SHUFFLE ? K_WAVES : 4 * K_WAVES) // terms of an output in local memory
#define SUMS_SIZE (WAVES * (SHUFFLE ? 1 : 4) * SLICE) // floats

// K is cut between chunks of 128 rows: whole groups, whatever their length.
#define CHUNK_BLOCKS 2

// The place of a work-item in its work-group.
typedef struct {
    int item, lane, g, t, k_wave, column_wave, row_wave;
} Place;

static inline Place place_of(int item)
{
    Place place;
    place.item = item;
    place.lane = item % LANES;
    place.g = place.lane / 4;
    place.t = place.lane % 4;
    place.k_wave = item / LANES % K_WAVES;
    place.column_wave = item / (LANES * K_WAVES) % COLUMN_WAVES;
    place.row_wave = item / (LANES * K_WAVES * COLUMN_WAVES);
    return place;
}

// The work of a work-group in one turn: strips of a row tile, and blocks of K. A turn that is not live has no blocks
// and no rows, but passes the same barriers.
typedef struct {
    Tile tile;
    int index, run; // of the row tile, and of K
    uint strip, end_column, first_block, end_block;
    bool live;
} Turn;

static inline Turn turn_of(long number, int column_tiles, int runs, uint num_experts, uint n, uint k_blocks,
                           WORK_PARAMS)
{
    Turn turn;
    const int column_tile = number % column_tiles;
    turn.run = number / column_tiles % runs;
    turn.index = number / column_tiles / runs;
    turn.tile = row_tile(turn.index, num_experts, n, WORK_NAMES);
    turn.end_column = turn.tile.column + turn.tile.columns;
    turn.strip = turn.tile.column / STRIP_N + column_tile * (TILE_COLUMNS / STRIP_N);
    turn.live = (uint)turn.tile.expert < num_experts && turn.strip * STRIP_N < turn.end_column;
    const uint chunks = (k_blocks + CHUNK_BLOCKS - 1) / CHUNK_BLOCKS;
    turn.first_block = (uint)((ulong)chunks * turn.run / runs) * CHUNK_BLOCKS;
    turn.end_block = turn.live ? min((uint)((ulong)chunks * (turn.run + 1) / runs) * CHUNK_BLOCKS, k_blocks) : 0;
    return turn;
}

// A lane's part of one block of a strip; a record and a zero point for each 32 rows, or for each 16.
typedef struct {
    uint4 words[BLOCK_QUADS];
    Record records[2 * PIECES];
#if TWO_LEVELS
    BlockRecord of_rows;
#endif
#if !SYMMETRIC
    ZeroPair zeros[2 * PIECES];
#endif
} Block;

// The words, the record and the zero points of a half of a block.
#if CODE_BITS == 8
#define HALF_WORDS(block, half_block) ((half_block) ? (block).words[1] : (block).words[0])
#else
#define HALF_WORDS(block, half_block) ((half_block) ? (block).words[0].zw : (block).words[0].xy)
#endif
#define OF_PIECE(values, half_block, piece) ((half_block) ? (values)[PIECES + (piece)] : (values)[piece])
#define RECORD_OF(block, half_block, piece) OF_PIECE((block).records, half_block, piece)
#if TWO_LEVELS
#define FACTORS_OF(block, half_block, piece) factors_of(RECORD_OF(block, half_block, piece), (block).of_rows)
#else
#define FACTORS_OF(block, half_block, piece) factors_of(RECORD_OF(block, half_block, piece), 0)
#endif

// A lane's view of one expert.
typedef struct {
    __global const uint4 *words;
    __global const Record *records;
#if TWO_LEVELS
    __global const BlockRecord *of_rows;
#endif
#if !SYMMETRIC
    __global const ZeroPair *zeros;
#endif
} Lane;

// The place of the record of the group with row k, from the record of the lane's column in group 0 of strip 0.
static inline uint record_place(uint strip, uint k, uint groups, uint group_shift)
{
    return (strip * groups + min(k >> group_shift, groups - 1)) * 8;
}

static inline Block load_block(Lane at, uint strip, uint block, uint k_blocks, uint groups, uint group_shift)
{
    Block loaded;
#pragma unroll
    for (uint i = 0; i < BLOCK_QUADS; i++)
        loaded.words[i] = at.words[((strip * k_blocks + block) * BLOCK_QUADS + i) * LANES];
#pragma unroll
    for (uint i = 0; i < 2 * PIECES; i++) {
        const uint place = record_place(strip, block * BLOCK_K + i * (32 / PIECES), groups, group_shift);
        loaded.records[i] = at.records[place];
#if !SYMMETRIC
        loaded.zeros[i] = at.zeros[place];
#endif
    }
#if TWO_LEVELS
    loaded.of_rows = at.of_rows[(strip * blocks_of_rows(k_blocks) + (block * BLOCK_K >> BLOCK_SHIFT)) * 8];
#endif
    return loaded;
}

static inline Lane lane_of(__global const uint *weights, Place place, uint strips, uint k_blocks, uint groups)
{
    Lane at;
    at.words = (__global const uint4 *)weights + place.lane;
    __global const uint *records = weights + WORDS_OF_EXPERT(strips, k_blocks);
    at.records = (__global const Record *)records + place.g;
#if TWO_LEVELS
    at.of_rows = (__global const BlockRecord *)(records + UINTS_OF_RECORDS(strips, groups)) + place.g;
#endif
#if !SYMMETRIC
    at.zeros = (__global const ZeroPair *)(records + UINTS_OF_RECORDS(strips, groups)) + place.g;
#endif
    return at;
}

// Loads a block of each of the wave's strips.
static inline void load_blocks(Block loaded[WAVE_STRIPS], Lane at, uint wave_strip, uint strips, uint block,
                               uint k_blocks, uint groups, uint group_shift)
{
#pragma unroll
    for (int s = 0; s < WAVE_STRIPS; s++)
        loaded[s] = load_block(at, min(wave_strip + s, strips - 1), block, k_blocks, groups, group_shift);
}

// Writes the input and output rows of a turn's rows; called by all work-items.
static inline void list_rows(__local int *in_rows, __local int *out_rows, int item, Turn turn, WORK_PARAMS)
{
    for (int r = item; r < ROWS; r += LOCAL_SIZE) {
        const int2 row = turn.live ? row_of(turn.tile, r, WORK_NAMES) : (int2)(-1, -1);
        in_rows[r] = row.x;
        out_rows[r] = row.y;
    }
}

// (number of rows up to the last that is not padding, the input row of a row that is not padding).
static inline int2 rows_in_use(__local const int *in_rows)
{
    int2 used = 0;
    for (int r = 0; r < ROWS; r++)
        if (in_rows[r] >= 0)
            used = (int2)(r + 1, in_rows[r]);
    return used;
}

// Stores the sum of a row and a column of a tile, if the row is not padding and the column is one of the turn's.
static inline void store_sum(float sum, int tile_row, int tile_column, __local const int *in_rows,
                             __local const int *out_rows, Turn turn, uint n, float weight_factor, float tiny_factor,
                             __global const float *row_factor, __global OUTPUT *output, ulong output_offset,
                             uint output_stride, __global const float *bias, __global float *partial,
                             uint tiles_capacity)
{
    const uint column = turn.strip * STRIP_N + tile_column;
    const int out_row = out_rows[tile_row];
    if (out_row < 0 || column < turn.tile.column || column >= turn.end_column)
        return;
    sum *= weight_factor / WEIGHT_UNIT;
    sum *= ROW_FACTOR ? tiny_factor * row_factor[in_rows[tile_row]] : tiny_factor;
    const uint turn_column = column - turn.tile.column;
#if SPLIT
    const ulong to = ((ulong)turn.run * tiles_capacity + turn.index) * ROWS + tile_row;
    partial[to * n + turn_column] = sum;
#else
#if BIAS
    sum += BIAS_AT(turn.tile, turn.tile.out_column + turn_column);
#endif
    store_output(sum, output + output_offset, (ulong)out_row * output_stride + turn.tile.out_column + turn_column);
#endif
}

// Adds a tile's sums, REDUCE_ROWS rows of each wave at a time, and stores the outputs; called by all work-items. It is
// always inlined for PoCL: see align.cl.
__attribute__((always_inline)) static inline void add_up_and_store(
    __local float *scratch, float sums[WAVE_ROWS][2 * WAVE_STRIPS], __local const int *in_rows,
    __local const int *out_rows, int rows, Place at, Turn turn, uint n, float weight_factor, float tiny_factor,
    __global const float *row_factor, __global OUTPUT *output, ulong output_offset, uint output_stride,
    __global const float *bias, __global float *partial, uint tiles_capacity)
{
    __local float *slice =
        scratch +
        ((at.row_wave * COLUMN_WAVES + at.column_wave) * SLICES + (SHUFFLE ? at.k_wave : 4 * at.k_wave + at.t)) * SLICE;
    for (int first = 0; first * ROW_WAVES < rows; first += REDUCE_ROWS) {
#pragma unroll UNROLL_ROWS
        for (int r = 0; r < REDUCE_ROWS; r++)
#pragma unroll
            for (int c = 0; c < 2 * WAVE_STRIPS; c++)
                if (!SHUFFLE || at.t == r % 4)
                    slice[r * WAVE_COLUMNS + 8 * c + at.g] = sums[r][c];
        // The next round's sums move to the front, so that the private array is indexed by constants only.
#pragma unroll UNROLL_ROWS
        for (int r = 0; r + REDUCE_ROWS < WAVE_ROWS; r++)
#pragma unroll
            for (int c = 0; c < 2 * WAVE_STRIPS; c++)
                sums[r][c] = sums[r + REDUCE_ROWS][c];
        barrier(CLK_LOCAL_MEM_FENCE);
        for (int i = at.item; i < REDUCE_ROWS * ROW_WAVES * TILE_COLUMNS; i += LOCAL_SIZE) {
            const int c = i % TILE_COLUMNS, from_wave = i / TILE_COLUMNS % ROW_WAVES;
            const int r = i / (TILE_COLUMNS * ROW_WAVES);
            const int tile_row = (first + r) * ROW_WAVES + from_wave;
            if (tile_row >= ROWS)
                continue;
            __local const float *term = scratch + (from_wave * COLUMN_WAVES + c / WAVE_COLUMNS) * SLICES * SLICE +
                                        r * WAVE_COLUMNS + c % WAVE_COLUMNS;
            float sum = 0;
            for (int i_term = 0; i_term < SLICES; i_term++)
                sum += term[i_term * SLICE];
            store_sum(sum, tile_row, c, in_rows, out_rows, turn, n, weight_factor, tiny_factor, row_factor, output,
                      output_offset, output_stride, bias, partial, tiles_capacity);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    if (rows == 0) // the next tile overwrites in_rows and out_rows
        barrier(CLK_LOCAL_MEM_FENCE);
}
