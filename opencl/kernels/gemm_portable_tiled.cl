#include "dequantise.cl"

// gemm, tier "portable", for many rows: OpenCL C 1.2 without extensions; products and sums in float32.
//
// A work-group computes a tile of ROWS rows and TILE_COLUMNS columns, 32 rows of K (a stage) at a time:
//
//   1. Its work-items copy the tile's activations and weights of a stage to local memory, as floats. A weight is
//      dequantised once for ROWS rows.
//   2. They load the next stage into registers, so that the loads take place while they
//   3. multiply: each work-item has LANE_ROWS * LANE_COLUMNS outputs, and reads four rows of K of each of its rows and
//      columns at once. Each float of local memory is used LANE_ROWS or LANE_COLUMNS times.
//
// The design is that of CLBlast's GEMM (Nugteren, "CLBlast: A Tuned OpenCL BLAS Library", 2018), with K as the fastest
// index of both operands, as a lane dequantises consecutive rows of K.
//
// The lanes of a wave are ROW_LANES * COLUMN_LANES; a wave's tile is divided among them like this:
//
//   lane 8 * y + x   has rows y, y + 4, y + 8, .. and columns x, x + 8, x + 16, .. of its wave
//
// Build options are those of wave_tiled.cl; K_WAVES is 1.
//
// Limits for the host, besides those of wave_tiled.cl
//   ROWS           a multiple of 4 * ROW_WAVES
//   local memory   144 * (ROWS + tile columns) + 8 * ROWS bytes

#define STAGE_K 32
#define STAGE_QUADS (STAGE_K / 4)
#define STAGE_STRIDE (STAGE_QUADS + 1) // float4 of a row or column: 1 more, so that lanes use different banks
#define ROW_LANES 4
#define COLUMN_LANES 8
#define LANE_ROWS (WAVE_ROWS / ROW_LANES)
#define LANE_COLUMNS (WAVE_COLUMNS / COLUMN_LANES)
#define TILE_STRIPS (TILE_COLUMNS / STRIP_N)
#define ROW_PIECES (ROWS * STAGE_K / 8) // eight activations each
#define PIECE_TURNS ((ROW_PIECES + LOCAL_SIZE - 1) / LOCAL_SIZE)
#define STRIP_TURNS ((TILE_STRIPS + WAVES - 1) / WAVES)
#if ROWS % (ROW_LANES * ROW_WAVES) != 0 || K_WAVES != 1
#error "ROWS must be a multiple of 4 * ROW_WAVES, and K_WAVES 1"
#endif
#if UNROLL
#define UNROLL_LANE LANE_ROWS
#else
#define UNROLL_LANE 1
#endif

// A lane's part of a strip in a stage.
typedef struct {
    HalfWords words;
    Record records[PIECES];
#if TWO_LEVELS
    BlockRecord of_rows;
#endif
#if !SYMMETRIC
    ZeroPair zeros[PIECES];
#endif
} HalfBlock;

static inline HalfBlock load_half_block(Lane at, int lane, uint strip, uint stage, uint k_blocks, uint groups,
                                        uint group_shift)
{
    HalfBlock loaded;
#if CODE_BITS == 8
    loaded.words = at.words[((strip * k_blocks + stage / 2) * BLOCK_QUADS + stage % 2) * LANES];
#else
    // Both halves of a block lie in the lane's uint4.
    __global const HalfWords *words = (__global const HalfWords *)(at.words + (strip * k_blocks + stage / 2) * LANES);
    loaded.words = words[stage % 2];
#endif
#pragma unroll
    for (uint i = 0; i < PIECES; i++) {
        const uint place = record_place(strip, stage * STAGE_K + i * (STAGE_K / PIECES), groups, group_shift);
        loaded.records[i] = at.records[place];
#if !SYMMETRIC
        loaded.zeros[i] = at.zeros[place];
#endif
    }
#if TWO_LEVELS
    loaded.of_rows = at.of_rows[(strip * blocks_of_rows(k_blocks) + (stage * STAGE_K >> BLOCK_SHIFT)) * 8];
#endif
    return loaded;
}

// Loads the parts of a stage that a work-item copies.
static inline void load_stage(float8 pieces[PIECE_TURNS], HalfBlock half_blocks[STRIP_TURNS],
                              __global const INPUT *rows, const ulong starts[PIECE_TURNS], Lane at, int lane,
                              uint first_strip, uint stage, uint strips, uint k_blocks, uint groups, uint group_shift)
{
#pragma unroll
    for (int i = 0; i < PIECE_TURNS; i++)
        pieces[i] = load8_input(rows, starts[i] + stage * STAGE_K);
#pragma unroll
    for (int i = 0; i < STRIP_TURNS; i++)
        half_blocks[i] =
            load_half_block(at, lane, min(first_strip + i * WAVES, strips - 1), stage, k_blocks, groups, group_shift);
}

// Stores a lane's weights: four rows of K of a column at a time.
static inline void store_weights(__local float4 *columns, HalfBlock half_block, int g, int t)
{
    __local float4 *low = columns + g * STAGE_STRIDE, *high = low + 8 * STAGE_STRIDE;
#pragma unroll
    for (int step = 0; step < 2; step++) {
        const int p = PIECES == 1 ? 0 : step;
        const int quad = PIECES == 1 ? 2 * t + step : 4 * step + t;
#if SYMMETRIC
        const float2 zero = SYMMETRIC_ZERO;
#else
        const float2 zero = (float2)(LOW_ZERO(half_block.zeros[p]), HIGH_ZERO(half_block.zeros[p]));
#endif
#if TWO_LEVELS
        const Factors factors = factors_of(half_block.records[p], half_block.of_rows);
#else
        const Factors factors = factors_of(half_block.records[p], 0);
#endif
        float4 w[2];
        dequantise(STEP_WORDS(half_block.words, step), terms_of(factors, zero), &w[0], &w[1]);
        low[quad] = w[0];
        high[quad] = w[1];
    }
}

__attribute__((reqd_work_group_size(LOCAL_SIZE, 1, 1))) __kernel void gemm(GEMM_ARGS)
{
    __local float4 staged_rows[ROWS * STAGE_STRIDE], staged_columns[TILE_COLUMNS * STAGE_STRIDE];
    __local int in_rows[ROWS], out_rows[ROWS];

    const Place place = place_of(get_local_id(0));
    const int wave = place.item / LANES, y = place.lane / COLUMN_LANES, x = place.lane % COLUMN_LANES;
    const int first_row = place.row_wave * WAVE_ROWS + y, first_column = place.column_wave * WAVE_COLUMNS + x;
    const uint strips = STRIPS, k_blocks = K_BLOCKS;
    const int column_tiles = COLUMN_TILES;
    const long tiles = (long)tiles_capacity * RUNS * column_tiles;

    for (long number = get_group_id(0); number < tiles; number += get_num_groups(0)) {
        const Turn turn = turn_of(number, column_tiles, RUNS, num_experts, n, k_blocks, WORK);
        if (!row_tile_exists(turn.index, WORK))
            break; // later tiles do not exist either
        list_rows(in_rows, out_rows, place.item, turn, WORK);
        barrier(CLK_LOCAL_MEM_FENCE);
        const int2 used = rows_in_use(in_rows);
        const int rows = used.x, some_row = used.y;
        const uint end_stage = rows > 0 ? min(2 * turn.end_block, k / STAGE_K) : 0;
        const bool wave_live = place.row_wave * WAVE_ROWS < rows &&
                               turn.strip * STRIP_N + place.column_wave * WAVE_COLUMNS < turn.end_column;
        const Lane at = lane_of(EXPERT_BASE(turn.live ? turn.tile.expert : 0), place, strips, k_blocks, groups);

        ulong starts[PIECE_TURNS]; // of the pieces in the input; padding has those of some row
        float8 pieces[PIECE_TURNS];
        HalfBlock half_blocks[STRIP_TURNS];
        uint stage = 2 * turn.first_block;
#pragma unroll
        for (int i = 0; i < PIECE_TURNS; i++) {
            const int piece = place.item + i * LOCAL_SIZE;
            const int row = piece < ROW_PIECES ? in_rows[piece / 4] : -1;
            starts[i] = (ulong)(row >= 0 ? row : some_row) * k + 8 * (piece % 4);
        }
        if (stage < end_stage)
            load_stage(pieces, half_blocks, input + input_offset, starts, at, place.lane, turn.strip + wave, stage,
                       strips, k_blocks, groups, group_shift);

        float sums[LANE_ROWS][LANE_COLUMNS];
#pragma unroll UNROLL_LANE
        for (int r = 0; r < LANE_ROWS; r++)
#pragma unroll
            for (int c = 0; c < LANE_COLUMNS; c++)
                sums[r][c] = 0;

        while (stage < end_stage) {
#pragma unroll
            for (int i = 0; i < PIECE_TURNS; i++) {
                const int piece = place.item + i * LOCAL_SIZE;
                if (ROW_PIECES % LOCAL_SIZE == 0 || piece < ROW_PIECES) {
                    __local float4 *to = staged_rows + piece / 4 * STAGE_STRIDE + piece % 4 * 2;
                    to[0] = pieces[i].lo;
                    to[1] = pieces[i].hi;
                }
            }
#pragma unroll
            for (int i = 0; i < STRIP_TURNS; i++)
                if (TILE_STRIPS % WAVES == 0 || wave + i * WAVES < TILE_STRIPS)
                    store_weights(staged_columns + (wave + i * WAVES) * STRIP_N * STAGE_STRIDE, half_blocks[i], place.g,
                                  place.t);
            barrier(CLK_LOCAL_MEM_FENCE);
            if (++stage < end_stage)
                load_stage(pieces, half_blocks, input + input_offset, starts, at, place.lane, turn.strip + wave, stage,
                           strips, k_blocks, groups, group_shift);
            if (wave_live)
#pragma unroll 1
                for (int quad = 0; quad < STAGE_QUADS; quad++) {
                    float4 a[LANE_ROWS];
#pragma unroll UNROLL_LANE
                    for (int r = 0; r < LANE_ROWS; r++)
                        a[r] = staged_rows[(first_row + r * ROW_LANES) * STAGE_STRIDE + quad];
#pragma unroll
                    for (int c = 0; c < LANE_COLUMNS; c++) {
                        const float4 w = staged_columns[(first_column + c * COLUMN_LANES) * STAGE_STRIDE + quad];
#pragma unroll UNROLL_LANE
                        for (int r = 0; r < LANE_ROWS; r++) {
                            sums[r][c] += a[r].x * w.x;
                            sums[r][c] += a[r].y * w.y;
                            sums[r][c] += a[r].z * w.z;
                            sums[r][c] += a[r].w * w.w;
                        }
                    }
                }
            barrier(CLK_LOCAL_MEM_FENCE); // the next stage overwrites this one
        }

#pragma unroll UNROLL_LANE
        for (int r = 0; r < LANE_ROWS; r++)
#pragma unroll
            for (int c = 0; c < LANE_COLUMNS; c++)
                store_sum(sums[r][c], first_row + r * ROW_LANES, first_column + c * COLUMN_LANES, in_rows, out_rows,
                          turn, n, weight_factor, tiny_factor, row_factor, output, output_offset, output_stride, bias,
                          partial, tiles_capacity);
        barrier(CLK_LOCAL_MEM_FENCE); // the next tile overwrites in_rows and out_rows
    }
}
